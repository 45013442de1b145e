"""bench.py - what wssproxy costs beside its peers. Started by tests/bench/run; see LICENSE for copyright.

Each proxy is one process with one worker and one thread (stunnel: its thread for each session), on a
CPU of its own where there are two; with the same certificate (EC P-256), the same TLS 1.2 suite, key
exchange by X25519, room for MAX_SESSIONS, and the same backend in the clear. hitch and stunnel know no
HTTP and pass the WebSocket bytes as they are; the others check and rewrite the upgrade.

A round makes each measure with each peer in turn, each time with a process started for it, so that what
disturbs the machine hits all alike. The tables show medians over the rounds. CPU is the kernel's account
of the proxy's processes (user and system, see load.c), memory their private dirty pages (smaps_rollup):
anonymous ones, the kernel's buffers not counted.

Environment:
    QUICK=1         one short round with few sessions, to see that all works: its numbers say little
    ROUNDS, SECONDS rounds, and seconds for each measure
    PEERS           of: %(peers)s
    MEASURES        of: %(measures)s
    CLIENTS         that talk at a time in the echo measures, SESSIONS in the memory measure,
    RESTING         beside talking ones
    SUITE           AES128-GCM or CHACHA20
    BEARSSL         a source tree of BearSSL, for the peer wssproxy-bearssl
    CC, CFLAGS      as for make

Results, in tests/build/bench: table.txt, table.csv (medians), runs.csv (all), plot.svg."""

import csv
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import resource

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
OUT = TOP / "tests" / "build" / "bench"
MAX_SESSIONS = 5000
FILES = 16384           # descriptors for each process
SUITES = {
    "AES128-GCM": ("ECDHE-ECDSA-AES128-GCM-SHA256", "BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
    "CHACHA20": ("ECDHE-ECDSA-CHACHA20-POLY1305", "BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
}
O2 = "-O2 -fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2"


def option(name, default, quick=None):
    """A setting from the environment, of the type of its default."""
    if QUICK and quick is not None:
        default = quick
    text = os.environ.get(name, "")
    if not text:
        return default
    if isinstance(default, list):
        return [type(default[0])(word) for word in text.split()]
    return type(default)(text)


QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = option("ROUNDS", 3, 1)
SECONDS = option("SECONDS", 1.5, 0.2)
CLIENTS = option("CLIENTS", 32)
SESSIONS = option("SESSIONS", [500, 1000, 2000], [100, 200])
RESTING = option("RESTING", [1000, 4000], [300])
SUITE = option("SUITE", "AES128-GCM")
BEARSSL = option("BEARSSL", "")
CC = option("CC", "cc")


# ---- the peers: what to run, and the files it wants in its directory ----

def nginx(d, port, backend):
    return ["nginx", "-e", "stderr", "-c", f"{d}/nginx.conf"], {"nginx.conf": f"""
        daemon off;
        master_process off;
        pid {d}/nginx.pid;
        error_log stderr error;
        worker_rlimit_nofile {FILES};
        events {{ worker_connections {2 * MAX_SESSIONS + 100}; }}
        http {{
            access_log off;
            client_body_temp_path {d}/body;
            proxy_temp_path {d}/proxy;
            fastcgi_temp_path {d}/fastcgi;
            uwsgi_temp_path {d}/uwsgi;
            scgi_temp_path {d}/scgi;
            server {{
                listen 127.0.0.1:{port} ssl backlog=1024;
                ssl_certificate {OUT}/cert.pem;
                ssl_certificate_key {OUT}/key.pem;
                ssl_protocols TLSv1.2;
                ssl_ciphers {SUITES[SUITE][0]};
                ssl_session_cache shared:bench:1m;
                location / {{
                    proxy_pass http://127.0.0.1:{backend};
                    proxy_http_version 1.1;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection "upgrade";
                    proxy_set_header Host $host;
                    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                    proxy_read_timeout 1h;
                    proxy_send_timeout 1h;
                }}
            }}
        }}"""}


def haproxy(d, port, backend):
    return ["haproxy", "-db", "-q", "-f", f"{d}/haproxy.cfg"], {"haproxy.cfg": f"""
        global
            nbthread 1
            maxconn {MAX_SESSIONS}
            ssl-default-bind-options ssl-min-ver TLSv1.2 ssl-max-ver TLSv1.2
            ssl-default-bind-ciphers {SUITES[SUITE][0]}
        defaults
            mode http
            option forwardfor
            timeout connect 5s
            timeout client 1h
            timeout server 1h
            timeout tunnel 1h
        frontend bench
            bind 127.0.0.1:{port} ssl crt {OUT}/both.pem curves X25519:P-256
            default_backend bench
        backend bench
            server bench 127.0.0.1:{backend}
        """}


def hitch(d, port, backend):
    return ["hitch", "--config", f"{d}/hitch.conf"], {"hitch.conf": f"""
        frontend = {{ host = "127.0.0.1" port = "{port}" }}
        backend = "[127.0.0.1]:{backend}"
        pem-file = "{OUT}/both.pem"
        workers = 1
        backlog = 1024
        tls-protos = TLSv1.2
        ciphers = "{SUITES[SUITE][0]}"
        ecdh-curve = "X25519:P-256"
        ocsp-dir = ""
        daemon = off
        user = "{"nobody" if os.getuid() == 0 else ""}"
        """}


def stunnel(d, port, backend):
    return ["stunnel4", f"{d}/stunnel.conf"], {"stunnel.conf": f"""
        foreground = yes
        pid =
        debug = err
        socket = l:TCP_NODELAY=1
        socket = r:TCP_NODELAY=1
        [bench]
        accept = 127.0.0.1:{port}
        connect = 127.0.0.1:{backend}
        cert = {OUT}/cert.pem
        key = {OUT}/key.pem
        sslVersionMin = TLSv1.2
        sslVersionMax = TLSv1.2
        ciphers = {SUITES[SUITE][0]}
        curves = X25519:P-256
        """}


def lighttpd(d, port, backend):
    return ["lighttpd", "-D", "-f", f"{d}/lighttpd.conf"], {"lighttpd.conf": f"""
        server.modules = ("mod_openssl", "mod_proxy")
        server.document-root = "{d}"
        server.bind = "127.0.0.1"
        server.port = {port}
        server.max-connections = {MAX_SESSIONS}
        server.max-fds = {FILES}
        server.max-read-idle = 3600
        server.max-write-idle = 3600
        ssl.engine = "enable"
        ssl.pemfile = "{OUT}/cert.pem"
        ssl.privkey = "{OUT}/key.pem"
        ssl.openssl.ssl-conf-cmd = ("MinProtocol" => "TLSv1.2", "MaxProtocol" => "TLSv1.2",
            "CipherString" => "{SUITES[SUITE][0]}", "Curves" => "X25519:P-256")
        proxy.server = ("" => (("host" => "127.0.0.1", "port" => {backend})))
        proxy.header = ("upgrade" => "enable")
        """}


# wssproxy as it comes, and in other builds: what make is told, and changes to its config.h.
BUILDS = {
    "wssproxy": ({}, {}),
    "wssproxy-static": ({"LDFLAGS": "-static"}, {}),
    "wssproxy-O2": ({"CFLAGS": O2}, {}),
    "wssproxy-O2-static": ({"CFLAGS": O2, "LDFLAGS": "-static"}, {}),
    "wssproxy-bearssl": ({"CFLAGS": O2.replace("2", "3", 1), "BEARSSL": BEARSSL}, {}),
    "wssproxy-plain": ({}, {"park": 0, "max_busy": MAX_SESSIONS}),
}
ONLY = {"wssproxy-static": ["idle"]}    # by default it is there for this
OTHERS = {"nginx": nginx, "haproxy": haproxy, "hitch": hitch, "stunnel": stunnel, "lighttpd": lighttpd}
PROGRAMS = {"stunnel": "stunnel4"}
PACKAGES = {"nginx": "nginx-light", "stunnel": "stunnel4"}
DEFAULT_PEERS = ["wssproxy", "wssproxy-static", *(["wssproxy-bearssl"] if BEARSSL else []), *OTHERS]
PEERS = option("PEERS", DEFAULT_PEERS)


def config_write(path, port, backend, changes):
    """config.h for the bench: config.def.h with other values, each of which must be found there."""
    text = (TOP / "config.def.h").read_text()

    def change(pattern, value):
        nonlocal text
        text, n = re.subn(pattern, lambda m: m[1] + value + m[2], text, flags=re.S | re.M)
        if n != 1:
            sys.exit(f"bench: config.def.h is not what this script expects: {pattern}")

    def table(kind, name, value):
        change(rf"^(static const {kind} {name}\[\] = \{{).*?(^\}};)", f"\n\t{value},\n")

    table("struct listener", "listeners", f'{{ "127.0.0.1", "{port}", WSS }}')
    table("struct cert", "certs", f'{{ NULL, "{OUT}/cert.pem", "{OUT}/key.pem" }}')
    table("struct backend", "backends", f'{{ .host = "127.0.0.1", .port = "{backend}" }}')
    table("uint16_t", "ciphers", SUITES[SUITE][1])
    values = {"max_sessions": MAX_SESSIONS, "max_busy": 64, "max_per_ip": 0, "log_sessions": 0, **changes}
    for name, value in values.items():
        change(rf"^(#define {name}\s+|static const \w+ {name}\s+= )\w+(.*?$)", str(value))
    path.write_text(text)


# ---- processes ----

def cpus():
    """CPUs for the proxy, the load and the backend: the proxy's is its own if possible."""
    own = sorted(os.sched_getaffinity(0))
    return own[0], own[-1 if len(own) < 3 else 1], own[-1]


def start(cpu, argv, **kw):
    """Starts a process on a CPU, as leader of a group, to be killed with us."""
    return subprocess.Popen(["taskset", "-c", str(cpu), "setpriv", "--pdeathsig", "KILL", *argv],
                            start_new_session=True, **kw)


def kill(process):
    """Ends a process that we started, and those that it did."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def free_port():
    """One below those that the kernel gives to outgoing connections."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    first = 10000 + os.getpid() * 7 % 10000
    for port in [*range(first, low), *range(1024, first)]:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass
    raise Failure("no port is free")


class Failure(Exception):
    """A measure could not be made."""


class Proxy:
    """A running peer."""

    def __init__(self, name):
        self.name = name
        self.dir = OUT / name
        self.port = ports[name]
        self.log = self.dir / "log"
        argv, files = ([str(self.dir / "wssproxy")], {}) if name in BUILDS else \
            OTHERS[name](self.dir, self.port, backend_port)
        self.dir.mkdir(exist_ok=True)
        for file, text in files.items():
            (self.dir / file).write_text(re.sub(r"^ {8}", "", text, flags=re.M).lstrip())
        with open(self.log, "wb") as log:
            self.process = start(cpus()[0], argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                time.sleep(0.1)
                return self
            except OSError:
                time.sleep(0.02)
        self.__exit__()
        raise Failure("it did not start: " + self.last_words())

    def __exit__(self, *_):
        kill(self.process)

    def last_words(self):
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])

    def pids(self):
        """All processes of its group."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.process.pid:
                    found.append(stat.parent.name)
            except OSError:
                pass
        return found

    def memory(self):
        """Dirty KB of its processes; what they share of it counts once (before Linux 6.0: not at all)."""
        kb = 0
        for pid in self.pids():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kb += int(re.search(r"^(?:Pss_Dirty|Private_Dirty): *(\d+) kB", rollup, re.M)[1])
        return kb

    def load_argv(self, *args):
        return [str(OUT / "load"), "-p", str(self.port), "-P", ",".join(self.pids()), "-C", SUITES[SUITE][0],
                *map(str, args)]

    def load(self, *args):
        """Runs the load and returns what it counted."""
        process = start(cpus()[1], self.load_argv("-t", SECONDS, *args), stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True)
        try:
            out, error = process.communicate(timeout=SECONDS + 200)
        except subprocess.TimeoutExpired:
            raise Failure("the load did not end in time") from None
        finally:
            kill(process)
        if process.returncode:
            raise Failure(f"{error.strip()}; its log: {self.last_words()}")
        result = {key: float(value) for key, value in (word.split("=") for word in out.split())}
        if not result["count"] + result["bytes"]:
            raise Failure("nothing came through")
        result["busy"] = result["cpu"] / result["seconds"]
        return result


# ---- measures: each gives the values of one or more rows of the table ----

def idle(proxy):
    time.sleep(0.3)
    return {"idle": proxy.memory()}


def memory(proxy):
    """Sessions that rest, more and more of them, none of them resumed."""
    time.sleep(0.3)
    kb = {0: proxy.memory()}
    process = start(cpus()[1], proxy.load_argv("-c", 8, "-w", 0.5, "hold", *SESSIONS), stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for n in SESSIONS:
            if not process.stdout.readline():
                raise Failure(f"{process.stderr.read().strip()}; its log: {proxy.last_words()}")
            kb[n] = proxy.memory()
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        kill(process)
    last = SESSIONS[-1]
    return {"memory": (kb[last] - kb[0]) / last, **{f"memory-{n}": kb[n] / 1024 for n in kb}}


def echo(size, resting=0):
    def measure(proxy):
        beside = ["-R", "-r", resting, "-w", 1.5] if resting else []
        r = proxy.load("-c", CLIENTS, "-s", size, *beside, "echo")
        name = f"rest-{resting}" if resting else f"echo-{size}"
        return {f"{name}-cpu": r["cpu"] / r["count"] * 1e6, f"{name}-rate": r["count"] / r["seconds"],
                f"{name}-p99": r["p99"], "busy": r["busy"]}
    return measure


def bulk(way):
    def measure(proxy):
        r = proxy.load("-c", 4, way)
        return {f"{way}-cpu": r["cpu"] / r["bytes"] * 1e9, f"{way}-rate": r["bytes"] / r["seconds"] / 1e6,
                "busy": r["busy"]}
    return measure


def connect(resumed):
    def measure(proxy):
        name = "resumed" if resumed else "full"
        r = proxy.load("-c", 8, *(["-R"] if resumed else []), "connect")
        if r["full"] > r["count"] / 100:
            raise Failure("it resumes no sessions")
        return {f"{name}-cpu": r["cpu"] / r["count"] * 1e6, f"{name}-rate": r["count"] / r["seconds"],
                "busy": r["busy"]}
    return measure


ALL_MEASURES = {
    "idle": idle,
    "memory": memory,
    "echo": echo(64),
    **{f"rest-{n}": echo(64, n) for n in RESTING},
    "echo-1024": echo(1024),
    "echo-16384": echo(16384),
    "up": bulk("up"),
    "down": bulk("down"),
    "full": connect(False),
    "resumed": connect(True),
}
ONCE = ["idle", "memory"]       # does not vary
MEASURES = option("MEASURES", list(ALL_MEASURES))

# Rows of the table: key, label, decimals, whether less is better, and the goal: an absolute one, or a
# factor to the best peer's or to our own without sessions at rest.
ROWS = [
    ("idle", "idle program, KB", 0, True, None),
    ("idle-static", "the same, static, KB", 0, True, ("max", 400)),
    ("memory", "session at rest, KB", 1, True, ("max", 4.5)),
    ("echo-64-cpu", "echo of 64 B, CPU us", 2, True, ("best", 0.8)),
    *[(f"rest-{n}-cpu", f"the same beside {n} at rest", 2, True, ("own", 1.1)) for n in RESTING],
    ("echo-1024-cpu", "echo of 1 KB, CPU us", 2, True, None),
    ("echo-16384-cpu", "echo of 16 KB, CPU us", 1, True, None),
    ("up-cpu", "upload, CPU us for 1 KB", 3, True, None),
    ("down-cpu", "download, CPU us for 1 KB", 3, True, None),
    ("full-cpu", "full handshake, CPU us", 0, True, None),
    ("resumed-cpu", "resumed handshake, CPU us", 0, True, ("best", 0.8)),
    ("echo-64-rate", "echoes of 64 B a second", 0, False, None),
    ("echo-1024-rate", "echoes of 1 KB a second", 0, False, None),
    ("echo-16384-rate", "echoes of 16 KB a second", 0, False, ("best", 1.3)),
    ("up-rate", "upload, MB a second", 0, False, ("best", 1.1)),
    ("down-rate", "download, MB a second", 0, False, ("best", 1.1)),
    ("full-rate", "full handshakes a second", 0, False, None),
    ("resumed-rate", "resumed handshakes a second", 0, False, None),
    ("echo-64-p99", "echo of 64 B, us at 99 %", 0, True, None),
]
REACHED_IS_LESS = {key: less for key, _, _, less, _ in ROWS}


# ---- results ----

samples = {}            # (peer, key): values, one a round
failures = []


def value(peer, key):
    """The median over the rounds, or None."""
    if key == "idle-static":
        peer, key = f"{peer}-static", "idle"
    values = samples.get((peer, key))
    return statistics.median(values) if values else None


def busy(peer, key):
    """How busy the proxy's CPU was when a rate was measured."""
    return value(peer, key.replace("-rate", "-busy"))


def columns():
    return [p for p in PEERS if p not in ONLY or "PEERS" in os.environ]


def others(key):
    return {p: v for p in PEERS if p in OTHERS and (v := value(p, key)) is not None}


def best(key, less):
    """The best of the peers, and its value."""
    return (min if less else max)(others(key).items(), key=lambda item: item[1], default=(None, None))


def judge(key, less, goal):
    """The goal as text, and whether it is reached."""
    own = value("wssproxy", key)
    kind, factor = goal
    base = {"max": 1, "own": value("wssproxy", "echo-64-cpu"), "best": best(key, less)[1]}[kind]
    if own is None or base is None:
        return "", ""
    text = f"{factor:g}" if kind == "max" else f"{factor:g} of {'its own' if kind == 'own' else 'the best'}"
    reached = own <= factor * base if less else own >= factor * base
    return text, "yes" if reached else f"no: {own / base:.2f}" if kind != "max" else "no"


def table():
    """Rows of text: a label, a value for each peer, the best one, the ratio to it, goal, whether reached."""
    rows = [["", *columns(), "best peer", "wssproxy / best", "goal", "reached"]]
    for key, label, decimals, less, goal in ROWS:
        values = [value(p, key) for p in columns()]
        if all(v is None for v in values):
            continue
        cells = ["-" if v is None else f"{v:.{decimals}f}" for v in values]
        if key.endswith("-rate"):
            cells = [c + ("*" if c != "-" and busy(p, key) < 0.9 else "") for c, p in zip(cells, columns())]
        name, least = best(key, less)
        own = value("wssproxy", key)
        ratio = f"{own / least:.2f}" if own is not None and least else ""
        rows.append([label, *cells, name or "", ratio, *(judge(key, less, goal) if goal else ("", ""))])
    return rows


def table_text(rows):
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join("  ".join([row[0].ljust(width[0])] + [c.rjust(w) for c, w in zip(row[1:], width[1:])]).rstrip() + "\n"
                   for row in rows)


def output(*argv):
    """What a command prints, or nothing."""
    try:
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def preface():
    """What was measured where."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    versions = []
    for package in [PACKAGES.get(p, p) for p in PEERS if p in OTHERS] + ["libbearssl0", "libssl3"]:
        version = output("dpkg-query", "-W", "-f", "${Version}", package)
        versions.append(f"{package} {version or '(version unknown)'}")
    return (f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x {model[1] if model else os.uname().machine}, "
            f"Linux {os.uname().release.split('-')[0]}\n"
            f"{', '.join(versions)}\n"
            f"{SUITES[SUITE][0]}, EC P-256, X25519; {CLIENTS} clients for echoes, 4 for bulk, 8 for handshakes; "
            f"medians of {ROUNDS} x {SECONDS:g} s\n")


def save():
    rows = table()
    text = preface() + "\n" + table_text(rows)
    if any(c.endswith("*") for row in rows for c in row):
        text += "* its CPU was less than 90 % busy: the load was the limit\n"
    text += "".join(f"failed: {f}\n" for f in failures)
    (OUT / "table.txt").write_text(text)
    with open(OUT / "table.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        keys = list(dict.fromkeys(key for _, key in samples))
        out.writerow(["measure", *PEERS])
        for key in keys:
            out.writerow([key, *("" if (v := value(p, key)) is None else f"{v:.6g}" for p in PEERS)])
    return text


# ---- the plot ----

def plot():
    """Five pictures, by gnuplot: what the table says, and the lines that it has only the ends of."""
    peers = [p for p in columns() if any(peer == p for peer, _ in samples)]
    out = [f'set terminal svg size 1100,1250 font "sans,13" background "white"\nset output "{OUT}/plot.svg"\n'
           'set multiplot layout 3,2\nset key left top reverse Left\nset style data histogram\n'
           'set style histogram clustered gap 1\nset style fill solid 0.8 noborder\nset boxwidth 0.9 relative\n'
           'set yrange [0:*]\nset grid ytics\nset tics nomirror\n']

    def lines(title, x, y, points):
        """points: (x, key of its value)"""
        out.append(f'set title "{title}"\nset xlabel "{x}"\nset ylabel "{y}"\nset xtics auto\nset xrange [0:*]\n')
        curves = []
        for i, p in enumerate(peers):
            data = "".join(f"{at} {v:.6g}\n" for at, key in points if (v := value(p, key)) is not None)
            if data:
                out.append(f"$c{i} << EOD\n{data}EOD\n")
                curves.append(f'$c{i} with linespoints lc {i + 1} pt 7 ps 0.6 lw 2 title "{p}"')
        if curves:
            out.append(f"plot {', '.join(curves)}\n")

    def bars(title, y, groups):
        """groups: (label, key)"""
        out.append(f'set title "{title}"\nset xlabel ""\nset ylabel "{y}"\nset xrange [*:*]\n')
        groups = [g for g in groups if any(value(p, g[1]) is not None for p in peers)]
        if groups:
            data = "".join(" ".join([f'"{label}"', *(f"{value(p, key) or 0:.6g}" for p in peers)]) + "\n"
                           for label, key in groups)
            out.append(f"$bars << EOD\n{data}EOD\nplot " + ", ".join(
                f'$bars using {i + 2}{":xtic(1)" if i == 0 else ""} lc {i + 1} title "{p}"'
                for i, p in enumerate(peers)) + "\n")

    lines("Memory of the program", "sessions at rest", "private dirty, MB",
          [(n, f"memory-{n}") for n in [0, *SESSIONS]])
    lines("An echo of 64 bytes", "sessions at rest beside it", "CPU, us",
          [(0, "echo-64-cpu"), *((n, f"rest-{n}-cpu") for n in RESTING)])
    bars("Echoes", "a second", [("64 B", "echo-64-rate"), ("1 KB", "echo-1024-rate"), ("16 KB", "echo-16384-rate")])
    bars("Bulk", "MB a second", [("upload", "up-rate"), ("download", "down-rate")])
    bars("CPU of bulk", "us for 1 KB", [("upload", "up-cpu"), ("download", "down-cpu")])
    bars("Handshake and upgrade", "CPU, us", [("full", "full-cpu"), ("resumed", "resumed-cpu")])
    (OUT / "plot.gp").write_text("".join(out))
    if shutil.which("gnuplot"):
        result = subprocess.run(["gnuplot", OUT / "plot.gp"], stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            failures.append(f"plot: {result.stderr.strip()}")
    else:
        failures.append("plot: gnuplot is not there")


# ---- what is done ----

ports = {}
backend_port = 0


def compile_all(backend):
    """The load, and each build of wssproxy; a failure of one of ours is the end."""
    def run(*argv):
        result = subprocess.run(argv, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode:
            sys.exit(f"bench: this failed: {' '.join(map(str, argv))}\n{result.stdout}")

    run(CC, "-std=c11", "-D_GNU_SOURCE", "-O2", "-o", OUT / "load", HERE / "load.c", "-lssl", "-lcrypto")
    for name in [p for p in PEERS if p in BUILDS]:
        variables, changes = BUILDS[name]
        (OUT / name).mkdir(exist_ok=True)
        config_write(OUT / name / "config.h", ports[name], backend, changes)
        run(os.environ.get("MAKE", "make"), f"CONFIG={OUT / name}/config.h", f"OUT={OUT / name}/wssproxy", f"CC={CC}",
            *(f"{k}={v}" for k, v in variables.items()))
        with open(OUT / name / "wssproxy", "rb+") as f:
            os.fsync(f)         # or its text counts as dirty


def certificate():
    """A self-signed EC certificate for all."""
    if not shutil.which("openssl"):
        sys.exit("bench: openssl is needed")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
                    "30", "-subj", "/CN=localhost", "-keyout", OUT / "key.pem", "-out", OUT / "cert.pem"],
                   stderr=subprocess.DEVNULL, check=True)
    (OUT / "both.pem").write_text((OUT / "cert.pem").read_text() + (OUT / "key.pem").read_text())


def files_raise():
    """Descriptors enough for all sessions, in all processes that we start."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        print(f"bench: no more than {hard} descriptors: measures with many sessions may fail", file=sys.stderr)


def measure_all(rows):
    """All rounds. `rows` is the CSV of single values."""
    for turn in range(ROUNDS):
        for name in MEASURES:
            if turn and name in ONCE:
                continue
            print(f"round {turn + 1} of {ROUNDS}, {name}", end="", file=sys.stderr, flush=True)
            shift = turn % len(PEERS)
            for peer in PEERS[shift:] + PEERS[:shift]:
                if name not in ONLY.get(peer, MEASURES) and "PEERS" not in os.environ:
                    continue
                try:
                    with Proxy(peer) as proxy:
                        result = ALL_MEASURES[name](proxy)
                except (Failure, OSError) as e:
                    failures.append(f"{name}, {peer}: {e}")
                    print(f"; {peer} failed: {e}", end="", file=sys.stderr, flush=True)
                    continue
                first = next(iter(result))
                print(f"; {peer} {result[first]:.4g}", end="", file=sys.stderr, flush=True)
                for key, x in result.items():
                    if key == "busy":
                        key = first.rpartition("-")[0] + "-busy"
                    samples.setdefault((peer, key), []).append(x)
                    rows.writerow([turn + 1, peer, key, f"{x:.6g}"])
            print(file=sys.stderr)


def peers_check():
    unknown = [p for p in PEERS if p not in BUILDS and p not in OTHERS] + [m for m in MEASURES if m not in ALL_MEASURES]
    if unknown or SUITE not in SUITES:
        sys.exit(f"bench: unknown: {' '.join(unknown) or SUITE}\n\n{__doc__}")
    for p in [p for p in PEERS if p in OTHERS and not shutil.which(PROGRAMS.get(p, p))]:
        failures.append(f"{p}: not installed")
        PEERS.remove(p)


def main():
    global backend_port

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["PATH"] += ":/usr/sbin:/usr/local/sbin"
    began = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    peers_check()
    files_raise()
    certificate()
    subprocess.run([CC, "-std=c11", "-D_GNU_SOURCE", "-O2", "-o", OUT / "backend", HERE / "backend.c", "-lcrypto"], check=True)
    backend = start(cpus()[2], [OUT / "backend"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        backend_port = int(backend.stdout.readline())
        for p in PEERS:
            ports[p] = free_port()
            while list(ports.values()).count(ports[p]) > 1:
                ports[p] = free_port() + len(ports)
        compile_all(backend_port)
        with open(OUT / "runs.csv", "w", newline="") as f:
            rows = csv.writer(f, lineterminator="\n")
            rows.writerow(["round", "peer", "measure", "value"])
            measure_all(rows)
    finally:
        kill(backend)
    plot()
    print(f"\n{save()}\n{time.monotonic() - began:.0f} s; in {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}: "
          "table.txt, table.csv, runs.csv, plot.svg")
    return 1 if any("wssproxy" in f for f in failures) else 0


if __name__ == "__main__":
    __doc__ = __doc__ % {"peers": " ".join([*BUILDS, *OTHERS]), "measures": " ".join(ALL_MEASURES)}
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
