"""bench.py - what wssproxy costs beside its peers. Started by tests/bench/run; see LICENSE.

Each proxy is one process with one worker and one thread (stunnel: with its thread for each
session), on a CPU of its own where there are two; with the same certificate (EC P-256), the same
TLS 1.2 suite, key exchange by X25519, room for MAX_SESSIONS, and the same backend in the clear.
hitch and stunnel know no HTTP and pass the WebSocket's bytes as they are; the others check and
rewrite the upgrade.

A round makes each measure with each peer in turn, every time with a process started for it, so that
what disturbs the machine hits all alike; what counts is the median over the rounds. CPU is the
kernel's account of the proxy's processes (user and system, see load.c); memory is their private
dirty pages (smaps_rollup), without the kernel's socket buffers.

Environment:
    QUICK=1         one short round with few sessions, to see that all works; says little
    ROUNDS, SECONDS rounds, and seconds for each measure
    PEERS           of: %(peers)s
    MEASURES        of: %(measures)s
    CLIENTS         how many talk at a time in the echo measures
    RESTING         how many sessions rest beside them, and
    SESSIONS        in the memory measure
    SUITE           AES128-GCM or CHACHA20
    STORM           how many clients come at once in the storm measures, and
    PATIENCE        how many seconds each of them waits before it gives up and comes again; 0: a
                    sixth of what all their handshakes take one after the other, but at least 2
    TUNNELS         how many are open at a restart, and
    DRAIN           seconds that their proxy has to end them
    PRESSURE        how many clients stop in the middle of things in the pressure measures
    QUOTA           per cent of a CPU that the proxy has in storms and beside bulk, by a cgroup
    BEARSSL         source trees of BearSSL, each for a peer of its own, built at -O3:
                    wssproxy- and the tree's name
    CC, MAKE        what compiles
    EMULATE         of: %(machines)s

Goodput of a storm is what those who got in cost when eight at a time come to the same slow CPU and
wait, of the CPU that it took; it ends when all are in, or after four times that. To take and drop
one who gave up costs any server 50 us (accept, epoll_ctl, close), a sixth of a resumed handshake:
2000 who wait for 2 s and come again do so too often for the goal. Newcomers of the pressure
measures come one after the other from an address of their own, the others from one address; who has
not got in at the end counts with its time so far.

A restart is what each does for a new configuration: wssproxy gets SIGUSR2 and is started again when
it has ended, nginx and haproxy are told to reload, with DRAIN as what their old process has
(worker_shutdown_timeout, hard-stop-after; without these it has for ever). Tunnels talk five times a
second and come again at once, newcomers come every 10 ms: see restart.py.

With EMULATE the proxies are programs of that machine under qemu-user, and only they: wssproxy as
README builds it with musl, static, beside Debian's haproxy and nginx with their libraries. Kernel,
load and backend are the host's, and qemu's time for an instruction is not a device's: the ratios
say something, the figures little. Other defaults: longer measures, those that mean something there,
and CHACHA20, since such a CPU has no instructions for AES, nor has the emulated one.

Results, in tests/build/bench (bench-mipsel, bench-armhf): table.txt, table.csv (medians), runs.csv
(all values), plot.svg."""

import contextlib
import csv
import gzip
import http.client
import itertools
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import restart

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
EMULATE = os.environ.get("EMULATE", "")
OUT = TOP / "tests" / "build" / f"bench{EMULATE and '-'}{EMULATE}"
CROSS = TOP / "tests" / "build" / "cross"
ROOT = CROSS / "packages" / EMULATE     # of the emulated peers
MAX_SESSIONS = 5000
PARTS = 40              # of a page, see backend.c
FILES = 16384           # descriptors for each process
SUITES = {
    "AES128-GCM": ("ECDHE-ECDSA-AES128-GCM-SHA256",
                   "BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
    "CHACHA20": ("ECDHE-ECDSA-CHACHA20-POLY1305",
                 "BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
}
# What to emulate: the compiler of README's line for it, and what runs its programs.
MACHINES = {
    "mipsel": ("mipsel-linux-musl-gcc", ["qemu-mipsel-static", "-cpu", "24Kf"]),
    "armhf": ("arm-linux-musleabihf-gcc", ["qemu-arm-static", "-cpu", "cortex-a7"]),
}
QUICK = os.environ.get("QUICK", "") not in ("", "0")


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


ROUNDS = option("ROUNDS", 3, 1)
SECONDS = option("SECONDS", 4.0 if EMULATE else 1.2, 0.2)
CLIENTS = option("CLIENTS", 32)
RESTING = option("RESTING", [1000, 4000], [300])
SESSIONS = option("SESSIONS", [500, 1000, 2000], [100, 200])
SUITE = option("SUITE", "CHACHA20" if EMULATE else "AES128-GCM")
STORM = option("STORM", [300], [100])
PATIENCE = option("PATIENCE", [0.0])
TUNNELS = option("TUNNELS", 200, 50)
DRAIN = option("DRAIN", 10, 3)
PRESSURE = option("PRESSURE", 100)
QUOTA = option("QUOTA", 5.0)
BEARSSL = {f"wssproxy-{Path(tree).name}": tree for tree in option("BEARSSL", "").split()}
CC = option("CC", "cc")
MAKE = option("MAKE", "make")


# ---- the peers: what to run, and the files that it wants in its directory ----

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


OTHERS = {"nginx": nginx, "haproxy": haproxy, "hitch": hitch, "stunnel": stunnel,
          "lighttpd": lighttpd}
PROGRAMS = {"stunnel": "stunnel4"}
PACKAGES = {} if EMULATE else {"nginx": "nginx-light", "stunnel": "stunnel4"}

# wssproxy as it comes, and in other builds: what make is told, and changes to its config.h.
FAST = "-fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2"
BUILDS = {
    "wssproxy": ({}, {}),
    "wssproxy-static": ({"LDFLAGS": "-static"}, {}),
    "wssproxy-O2": ({"CFLAGS": f"-O2 {FAST}"}, {}),
    **{peer: ({"CFLAGS": f"-O3 {FAST}", "BEARSSL": tree}, {}) for peer, tree in BEARSSL.items()},
}
PEERS = option("PEERS", ["wssproxy", "haproxy", "nginx"] if EMULATE else
               ["wssproxy", "wssproxy-static", *BEARSSL, *OTHERS])
# By default the static build is there for one row of the table and has no column.
ONLY = {} if "PEERS" in os.environ else {"wssproxy-static": ["idle"]}


def config_write(path, port, backend, changes):
    """config.h for the bench: config.def.h with other values, each of which must be there."""
    text = (TOP / "config.def.h").read_text()

    def change(pattern, value):
        nonlocal text
        text, n = re.subn(pattern, lambda m: m[1] + value + m[2], text, flags=re.S | re.M)
        if n != 1:
            sys.exit(f"bench: config.def.h is not what this script expects: {pattern}")

    def table(name, value):
        change(rf"^(static const [\w ]+ {name}\[\] = \{{).*?(^\}};)", f"\n\t{value},\n")

    table("listeners", f'{{ "127.0.0.1", "{port}", WSS }}')
    table("certs", f'{{ NULL, "{OUT}/cert.pem", "{OUT}/key.pem" }}')
    table("backends", f'{{ .host = "127.0.0.1", .port = "{backend}" }}')
    table("ciphers", SUITES[SUITE][1])
    values = {"max_sessions": MAX_SESSIONS, "max_per_ip": 0, "log_sessions": "NONE", "make_way": 1,
              "drain_ms": DRAIN * 1000}
    for name, value in {**values, **changes}.items():
        change(rf"^(#define {name}\s+|static const [\w ]+ {name}\s+= )\w+(.*?$)", str(value))
    path.write_text(text)


# ---- processes ----

class Failure(Exception):
    """A measure could not be made."""


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
            except OSError:
                continue
            if port not in ports.values():
                return port
    sys.exit("bench: no port is free")


class Proxy:
    """A running peer."""

    def __init__(self, name, change=lambda argv, files: (argv, files)):
        self.port = ports[name]
        self.group = None       # the cgroup of slow()
        self.dir = OUT / name
        self.dir.mkdir(exist_ok=True)
        argv, files = ([self.dir / "wssproxy"], {}) if name in BUILDS else \
            change(*OTHERS[name](self.dir, self.port, backend_port))
        for file, text in files.items():
            (self.dir / file).write_text(re.sub(r"^ {8}", "", text, flags=re.M).lstrip())
        if EMULATE:     # of wssproxy the path stays, for it is absolute
            argv = [*MACHINES[EMULATE][1], "-L", ROOT, ROOT / "usr/sbin" / argv[0], *argv[1:]]
        self.argv, self.ended = argv, []
        self.start()

    def start(self):
        with open(self.dir / "log", "wb") as log:
            self.process = start(cpus()[0], self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def way(self):
        """Makes way, as a supervisor sees it."""
        self.process.send_signal(signal.SIGUSR2)
        self.process.wait()
        self.ended.append(self.process)         # its group has the copy
        self.start()

    def __enter__(self):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                time.sleep(0.1)
                return self
            except OSError:
                time.sleep(0.02)
        kill(self.process)
        raise Failure(f"it did not start; {self.last_words()}")

    def __exit__(self, *_):
        for process in [self.process, *self.ended]:
            kill(process)
        if self.group:
            self.group.rmdir()

    def slow(self):
        """Gives it QUOTA per cent of a CPU from now on. An emulated one is slow enough."""
        root = Path("/sys/fs/cgroup")
        v1 = root / "cpu" / "cpu.cfs_quota_us"
        group = (v1.parent if v1.exists() else root) / f"wssproxy-bench-{os.getpid()}"
        if EMULATE:
            return 1.0
        try:
            if not v1.exists():
                (root / "cgroup.subtree_control").write_text("+cpu")
            group.mkdir()
            self.group = group
            quota, period = int(QUOTA * 200), 20000
            if v1.exists():
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (group / "cpu.max").write_text(f"{quota} {period}")
            for pid in self.pids():
                (group / "cgroup.procs").write_text(pid)
        except OSError as e:
            raise Failure(f"a slow CPU needs root and a cgroup for it: {e}") from None
        return QUOTA / 100

    def last_words(self):
        lines = (self.dir / "log").read_text(errors="replace").splitlines()
        return "its log: " + " | ".join(lines[-3:])

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
        """Dirty KB; what its processes share of it counts once (before Linux 6.0: not at all)."""
        kb = 0
        for pid in self.pids():
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except PermissionError:
                raise Failure("it lets only root look at its memory") from None
            kb += int(re.search(r"^(?:Pss_Dirty|Private_Dirty): *(\d+) kB", rollup, re.M)[1])
        return kb

    def cpu(self):
        """Seconds of CPU so far, of its first threads."""
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
                   for pid in self.pids()) / 1e9

    def descriptors(self):
        """How many all its processes have."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids())

    def load_start(self, *args):
        return start(cpus()[1], [OUT / "load", "-p", str(self.port), "-P", ",".join(self.pids()),
                                 "-C", SUITES[SUITE][0], *map(str, args)],
                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                     text=True)

    def clients(self, address):
        """How many connections from there it has not closed: who reads nothing sees no end."""
        here, there = (f"{int.from_bytes(socket.inet_aton(a), sys.byteorder):08X}:"
                       for a in ("127.0.0.1", address))
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return sum(line[1] == f"{here}{self.port:04X}" and line[2].startswith(there)
                   and line[3] == "01" for line in lines)

    def load_end(self, process):
        """Awaits its end and returns what it counted."""
        try:
            out, error = process.communicate(timeout=SECONDS + 200)
        except subprocess.TimeoutExpired:
            raise Failure("the load did not end in time") from None
        finally:
            kill(process)
        if process.returncode:
            raise Failure(f"{error.strip()}; {self.last_words()}")
        return {key: float(value) for key, value in
                (word.split("=") for word in out.splitlines()[-1].split())}

    def load(self, *args):
        """Runs the load and returns what it counted."""
        r = self.load_end(self.load_start("-t", SECONDS, *args))
        if not r["count"] + r["bytes"]:
            raise Failure("nothing came through")
        return r


# ---- measures: each gives values by key, see ROWS ----

def idle(proxy):
    time.sleep(0.3)
    return {"idle": proxy.memory()}


def memory(proxy):
    """More and more sessions that rest, none of them resumed; and what one more of them takes."""
    time.sleep(0.3)
    kb = {0: proxy.memory()}
    process = proxy.load_start("-w", 0.5, "hold", *SESSIONS)
    try:
        for n in SESSIONS:
            if not process.stdout.readline():
                raise Failure(f"{process.stderr.read().strip()}; {proxy.last_words()}")
            kb[n] = proxy.memory()
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        kill(process)
    first, last = SESSIONS[0] if len(SESSIONS) > 1 else 0, SESSIONS[-1]
    return {"memory": (kb[last] - kb[first]) / (last - first),
            **{f"memory-{n}": kb[n] / 1024 for n in kb}}


def rates(name, r, unit):
    """CPU in us for each of `unit` things, how many a second, and how busy its CPU was then."""
    return {f"{name}-cpu": r["cpu"] / unit * 1e6, f"{name}-rate": unit / r["seconds"],
            f"{name}-busy": r["cpu"] / r["seconds"]}


def echo(name, size, resting=0):
    def measure(proxy):
        beside = ["-R", "-r", resting, "-w", 1.5] if resting else []
        r = proxy.load("-c", CLIENTS, "-s", size, *beside, "echo")
        return {**rates(name, r, r["count"]), f"{name}-p99": r["p99"]}
    return measure


def beside_full(proxy):
    """How long an echo takes while others make one full handshake after the other."""
    others = proxy.load_start("-t", SECONDS + 2, "-c", 4, "connect")
    try:
        return {"beside-full-p99": proxy.load("-c", 4, "echo")["p99"]}
    finally:
        kill(others)


def storm(name, n, patience, *args):
    """All come at once, to a slow CPU, with less patience than all their handshakes take."""
    def measure(proxy):
        share = proxy.slow()
        # before and after, when all have left, for the machine may be another one meanwhile
        idle = proxy.descriptors()
        before = proxy.load("-t", max(3, SECONDS), *args, "-c", 8, "connect")
        cost = n * before["cpu"] / before["count"]
        limit = 4 * cost / share
        # nobody has less than two seconds; and a CPU of 5 % has a turn of 1 ms every 20 ms
        patient = patience or max(2, cost / share / 6)
        r = proxy.load_end(proxy.load_start(*args, "-t", limit, "-c", n, "-T", patient, "storm"))
        if r["full"] > n / 100:
            raise Failure("it resumes no sessions")
        while proxy.descriptors() > idle:
            time.sleep(0.1)
        after = proxy.load("-t", max(3, SECONDS), *args, "-c", 8, "connect")
        cost = n * (before["cpu"] + after["cpu"]) / (before["count"] + after["count"])
        return {f"{name}-goodput": r["count"] / n * cost / r["cpu"], f"{name}-up": r["count"],
                f"{name}-attempts": r["cut"] + r["count"],
                f"{name}-time": r["seconds"] * share / cost}
    return measure


STORMS = {f"storm-{n}{f'-{patience:.3g}' if patience else ''}{kind}":
          (f"{n}{f', patience {patience:.3g} s' if patience else ''}{text}",
           (n, patience, *args))
          for n in STORM for patience in PATIENCE for kind, text, args in [
              ("", "", ["-m", "-a", "127.1.0.1"]), ("-one", ", of one address", []),
              ("-resumed", ", resumed", ["-R", "-m", "-a", "127.1.0.1"])]}


def pressure(name, slow, *args):
    """How long newcomers take to get in beside others, and how many of these are cut off."""
    def measure(proxy):
        if slow:
            proxy.slow()
        others = proxy.load_start("-t", 1000, "-k", "-a", "127.0.0.2", *args)
        try:
            if others.stdout.readline() != "open\n":
                raise Failure(others.stderr.read().strip())
            r = proxy.load_end(proxy.load_start("-t", 5 * SECONDS, "-k", "connect"))
            return {f"{name}-p50": r["p50"] / 1000, f"{name}-worst": r["worst"] / 1000,
                    f"{name}-cut": max(0, int(args[1]) - proxy.clients("127.0.0.2"))}
        finally:
            kill(others)
    return measure


PRESSURES = {
    "pieces": (f"{PRESSURE} uploads in pieces", False, "-c", PRESSURE, "pieces"),
    "stuck": (f"{PRESSURE} who read nothing", False, "-c", PRESSURE, "stuck"),
    "slow-down": ("30 downloads, slow CPU", True, "-c", 30, "down"),
}


def bulk(name):
    def measure(proxy):
        r = proxy.load("-c", 4, name)
        return rates(name, r, r["bytes"] / 1e6)
    return measure


def connect(name, *args):
    def measure(proxy):
        r = proxy.load("-c", 8, *args, "connect")
        if r["full"] > r["count"] / 100:
            raise Failure("it resumes no sessions")
        return rates(name, r, r["count"])
    return measure


def nginx_of_two(argv, files):
    """With a master process, which reloads, and an end of the old worker."""
    text = files["nginx.conf"].replace("master_process off;", f"worker_shutdown_timeout {DRAIN}s;")
    return argv, {"nginx.conf": text}


def haproxy_of_two(argv, files):
    text = files["haproxy.cfg"].replace("global", f"global\n            hard-stop-after {DRAIN}s", 1)
    return [argv[0], "-W", *argv[1:]], {"haproxy.cfg": text}


RESTARTED = {"nginx": nginx_of_two, "haproxy": haproxy_of_two}
RELOAD = {"nginx": signal.SIGHUP, "haproxy": signal.SIGUSR2}


def restarted(proxy):
    peer = proxy.dir.name
    reload = (lambda: proxy.process.send_signal(RELOAD[peer])) if peer in RELOAD else proxy.way
    found = restart.measure(proxy.port, TUNNELS, reload, DRAIN + 4)
    if found["again"] < TUNNELS:
        failures.append(f"restart of {peer}: only {found['again']} tunnels of {TUNNELS} ended")
    return {f"restart-{key}": x for key, x in found.items()}


class Browser:
    """A page and its parts, as a browser without a past loads them: six connections at most, each
    for one request at a time, and again while the server keeps it."""

    def __init__(self, port):
        self.port, self.parts, self.connections = port, itertools.count(), 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        self.context.maximum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_ciphers(SUITES[SUITE][0])

    def fetch(self, client, path):
        self.connections += client.sock is None
        client.request("GET", path)
        if len(client.getresponse().read()) < 1000:
            raise Failure(f"{path} is too short")

    def client(self):
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=self.context)

    def fetch_parts(self, client):
        while (n := next(self.parts)) < PARTS:
            self.fetch(client, f"/part/{n}")
        client.close()

    def load(self):
        first = self.client()
        self.fetch(first, "/page")
        clients = [first, *(self.client() for _ in range(5))]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(self.fetch_parts, clients))


def page(proxy):
    """Browsers that load a page, one after the other."""
    loads, connections, began, cpu = 0, 0, time.monotonic(), proxy.cpu()
    while loads < 3 or time.monotonic() - began < SECONDS:
        browser = Browser(proxy.port)
        browser.load()
        loads += 1
        connections += browser.connections
    return {"page-cpu": (proxy.cpu() - cpu) / loads * 1e3, "page-connections": connections / loads,
            "page-time": (time.monotonic() - began) / loads * 1e3}


def chromium(profile, url):
    return ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--disable-background-networking", "--ignore-certificate-errors",
            f"--user-data-dir={profile}", "--dump-dom", url]


def firefox(profile, url):
    """It has no flag that lets a certificate pass, but a file of those that were let."""
    shown = subprocess.run(["openssl", "x509", "-in", OUT / "cert.pem", "-noout", "-fingerprint",
                            "-sha256"], capture_output=True, text=True, check=True).stdout
    digest = shown.strip().partition("=")[2]
    (Path(profile) / "cert_override.txt").write_text(
        f"{url.split('/')[2]}:\tOID.2.16.840.1.101.3.4.2.1\t{digest}\t\n")
    return ["firefox-esr", "--headless", "--no-remote", "--profile", profile,
            "--screenshot", f"{profile}/page.png", url]


def page_by(browser):
    """A browser without a past loads it, once; a relay counts its connections."""
    def measure(proxy):
        name, seen, got = browser.__name__, [], []

        def pump(one, other, count):
            with contextlib.suppress(OSError):
                while data := one.recv(65536):
                    other.sendall(data)
                    count.append(len(data))
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_WR)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client = relay.accept()[0]
                    server = socket.create_connection(("127.0.0.1", proxy.port))
                    seen.append(client)
                    for way in ((client, server, []), (server, client, got)):
                        threading.Thread(target=pump, args=way, daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as relay, \
                tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            threading.Thread(target=serve, daemon=True).start()
            argv = browser(profile, f"https://127.0.0.1:{relay.getsockname()[1]}/page")
            if not shutil.which(argv[0]):
                raise Failure(f"{argv[0]} is not installed")
            cpu = proxy.cpu()
            result = subprocess.run(["taskset", "-c", str(cpus()[1]), *argv], capture_output=True,
                                    text=True, timeout=100, check=False)
            if result.returncode or sum(got) < PARTS * 1000:
                raise Failure(f"{name} got {sum(got)} bytes: {result.stderr[-200:]}")
            return {f"{name}-connections": len(seen), f"{name}-cpu": (proxy.cpu() - cpu) * 1e3}
    return measure


ALL_MEASURES = {
    "idle": idle,
    "memory": memory,
    "echo-64": echo("echo-64", 64),
    **{f"rest-{n}": echo(f"rest-{n}", 64, n) for n in RESTING},
    "echo-1024": echo("echo-1024", 1024),
    "echo-16384": echo("echo-16384", 16384),
    "up": bulk("up"),
    "down": bulk("down"),
    "full": connect("full"),
    "resumed": connect("resumed", "-R"),
    "beside-full": beside_full,
    "page": page,
    "page-chromium": page_by(chromium),
    "page-firefox": page_by(firefox),
    **{name: storm(name, *args) for name, (_, args) in STORMS.items()},
    **{name: pressure(name, *args) for name, (_, *args) in PRESSURES.items()},
    "restart": restarted,
}
ONCE = ["idle", "memory", "restart", "page-chromium", "page-firefox"]   # they do not vary
NO_PAGES = ["hitch", "stunnel"]         # their backend would have to close its connections
MEASURES = option("MEASURES", ["echo-64", "echo-16384", "full", "resumed", *STORMS, *PRESSURES]
                  if EMULATE else list(ALL_MEASURES))

# Rows of the table: key, label, decimals, whether less is better, and the goal: an absolute one
# (MAX), a factor to the best of the others (BEST), or to our own echo without any at rest (OWN).
MAX, BEST, OWN = "", "best", "own"
ROWS = [
    ("idle", "idle program, KB", 0, True, None),
    ("idle-static", "the same, static, KB", 0, True, (400, MAX)),
    ("memory", "session at rest, KB", 1, True, (4.5, MAX)),
    ("echo-64-cpu", "echo of 64 B, CPU us", 2, True, (0.8, BEST)),
    *[(f"rest-{n}-cpu", f"  beside {n} at rest", 2, True, (1.1, OWN)) for n in RESTING],
    ("echo-1024-cpu", "echo of 1 KB, CPU us", 2, True, None),
    ("echo-16384-cpu", "echo of 16 KB, CPU us", 1, True, None),
    ("up-cpu", "upload of 1 MB, CPU us", 0, True, None),
    ("down-cpu", "download of 1 MB, CPU us", 0, True, None),
    ("full-cpu", "full handshake, CPU us", 0, True, None),
    ("page-cpu", "page of 40 parts, new browser, CPU ms", 1, True, (1, BEST)),
    ("page-connections", "  its connections", 0, True, (1, BEST)),
    ("page-time", "  its time, ms", 0, True, None),
    ("chromium-cpu", "  by Chromium, CPU ms", 1, True, None),
    ("chromium-connections", "  its connections", 0, True, (1, BEST)),
    ("firefox-cpu", "  by Firefox, CPU ms", 1, True, None),
    ("firefox-connections", "  its connections", 0, True, (1, BEST)),
    ("resumed-cpu", "resumed handshake, CPU us", 0, True, (0.8, BEST)),
    ("echo-64-rate", "echoes of 64 B / s", 0, False, None),
    ("echo-1024-rate", "echoes of 1 KB / s", 0, False, None),
    ("echo-16384-rate", "echoes of 16 KB / s", 0, False, (1.3, BEST)),
    ("up-rate", "upload, MB / s", 0, False, (1.1, BEST)),
    ("down-rate", "download, MB / s", 0, False, (1.1, BEST)),
    ("full-rate", "full handshakes / s", 0, False, None),
    ("resumed-rate", "resumed handshakes / s", 0, False, None),
    ("echo-64-p99", "echo of 64 B, us at 99 %", 0, True, None),
    ("beside-full-p99", "  beside full handshakes", 0, True, None),
    *[row for key, (text, _) in STORMS.items() for row in [
        (f"{key}-goodput", f"storm of {text}, goodput", 2, False, (0.9, MAX)),
        (f"{key}-up", "  who got in", 0, False, None),
        (f"{key}-time", "  time that it took, of all their handshakes'", 2, True, None)]],
    *[row for key, (text, *_) in PRESSURES.items() for row in [
        (f"{key}-p50", f"newcomer, ms: {text}", 1, True, None),
        (f"{key}-worst", "  the worst", 0, True, None),
        (f"{key}-cut", "  of the others, cut off", 0, True, None)]],
    ("restart-refused", "restart: newcomers refused", 0, True, (0, MAX)),
    ("restart-cut", f"  of {TUNNELS} tunnels, cut without a Close", 0, True, (0, MAX)),
    ("restart-lost", "  messages lost", 0, True, None),
    ("restart-herd", "  who came again in the worst 100 ms", 0, True, None),
]


# ---- the table ----

samples = {}            # (peer, key): values, one a round
failures = []


def value(peer, key):
    """The median over the rounds, or None."""
    if key == "idle-static":
        peer, key = f"{peer}-static", "idle"
    values = samples.get((peer, key))
    return statistics.median(values) if values else None


def columns():
    return [p for p in PEERS if p not in ONLY]


def limited(peer, key):
    """Whether a rate was limited by the load, not by the proxy."""
    return key.endswith("-rate") and value(peer, key.replace("-rate", "-busy")) < 0.9


def worth(peer, key):
    """What to compare: of a rate, that for a whole second of the proxy's CPU."""
    x = value(peer, key)
    if x is not None and key.endswith("-rate"):
        x /= value(peer, key.replace("-rate", "-busy"))
    return x


def compare(key, less):
    """The best of the others, and our ratio to it."""
    them = {p: x for p in PEERS if p in OTHERS and (x := worth(p, key))}
    us = worth("wssproxy", key)
    if not them:
        return "", None
    best = (min if less else max)(them, key=them.get)
    return best, us / them[best] if us is not None and them[best] else None


def judge(key, less, ratio, goal):
    """The goal, and whether it is reached."""
    limit, kind = goal
    x = ratio
    if kind != BEST:
        x = value("wssproxy", key)
    if kind == OWN and x is not None:
        own = value("wssproxy", "echo-64-cpu")
        x = x / own if own else None
    if x is None:
        return ""
    found = f"{x:.2f} " if kind == OWN else ""
    return f"{limit:g} {kind}: {found}".replace(" :", ":") + \
        ("yes" if (x <= limit if less else x >= limit) else "no")


def table():
    """The cells: a label, a value for each peer, the best of them, our ratio to it, the goal."""
    rows = [["", *columns(), "best", "ratio", "goal"]]
    for key, label, decimals, less, goal in ROWS:
        cells = []
        for p in columns():
            x = value(p, key)
            cells.append("-" if x is None else f"{x:.{decimals}f}{'*' if limited(p, key) else ''}")
        if any(c != "-" for c in cells):
            best, ratio = compare(key, less)
            rows.append([label, *cells, best, "" if ratio is None else f"{ratio:.2f}",
                         judge(key, less, ratio, goal) if goal and not EMULATE else ""])
    return rows


def output(*argv):
    """What a command prints, or nothing."""
    try:
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              check=False).stdout.strip()
    except OSError:
        return ""


def version(package):
    """Of a package: of one that is unpacked, its changelog begins with it."""
    changelog = ROOT / "usr/share/doc" / package / "changelog.Debian.gz"
    if EMULATE and changelog.exists():
        with gzip.open(changelog, "rt") as f:
            return re.search(r"\((.*?)\)", f.readline())[1]
    return output("dpkg-query", "-W", "-f", "${Version}", package) or "of unknown version"


def preface():
    """What was measured where."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    packages = [PACKAGES.get(p, p) for p in PEERS if p in OTHERS]
    packages += ["libssl3"] if EMULATE else ["libbearssl0", "libssl3"]
    versions = [f"{p} {version(p)}" for p in packages]
    if EMULATE:
        versions = [f"{' '.join(MACHINES[EMULATE][1])}: {version('qemu-user-static')}", *versions]
    return (f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x "
            f"{model[1] if model else os.uname().machine}, "
            f"Linux {os.uname().release.split('-')[0]}\n"
            f"{', '.join(versions)}\n{SUITES[SUITE][0]}, EC P-256, X25519; {CLIENTS} clients for "
            f"echoes, 4 for bulk, 8 for handshakes; medians of {ROUNDS} x {SECONDS:g} s\n\n")


def save():
    """Writes table.txt and table.csv, and returns the former."""
    rows = table()
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = preface()
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row, width)]
        text += "  ".join([row[0].ljust(width[0]), *cells[1:-1], row[-1]]).rstrip() + "\n"
    text += "best, ratio: of the others, and wssproxy's to it; of rates: for a second of CPU\n"
    if any(c.endswith("*") for row in rows for c in row):
        text += "*: its CPU was less than 90 % busy, so that the load was the limit\n"
    text += "".join(f"failed: {f}\n" for f in failures)
    (OUT / "table.txt").write_text(text)
    with open(OUT / "table.csv", "w", newline="") as f:
        lines = csv.writer(f, lineterminator="\n")
        lines.writerow(["measure", *PEERS])
        for key in dict.fromkeys(key for _, key in samples):
            lines.writerow([key, *("" if (x := value(p, key)) is None else f"{x:.6g}"
                                   for p in PEERS)])
    return text


# ---- the plot ----

PLOT = """set terminal svg size 1100,1250 font "sans,13" background "white"
set output "{output}"
set multiplot layout 3,2 margins 0.08,0.98,0.05,0.97 spacing 0.09,0.08
set linetype 1 lc rgb "#c02020"
set linetype 2 lc rgb "#306090"
set linetype 3 lc rgb "#60a0d0"
set linetype 4 lc rgb "#e0a030"
set linetype 5 lc rgb "#909090"
set linetype 6 lc rgb "#50a050"
set style data histogram
set style histogram clustered gap 1
set style fill solid 0.9 noborder
set boxwidth 0.9 relative
set grid ytics
set tics nomirror
set key left top reverse Left
"""


def plot_lines(peers, title, x, y, points, top="*"):
    """points: (x, key of its value)"""
    out = f'set title "{title}"\nset xlabel "{x}"\nset ylabel "{y}"\nset xtics auto\n' \
        f'set xrange [0:*]\nset yrange [0:{top}]\n'
    curves = []
    for i, p in enumerate(peers):
        data = [f"{at} {v:.6g}\n" for at, key in points if (v := value(p, key)) is not None]
        if data:
            out += f"$c{i} << EOD\n{''.join(data)}EOD\n"
            curves.append(f'$c{i} with linespoints lt {i + 1} pt 7 ps 0.6 lw 2 title "{p}"')
    return f"{out}plot {', '.join(curves)}\n" if curves else ""


def plot_bars(peers, title, y, groups):
    """groups: (label, key). The colours are those of the lines, whose key will do."""
    groups = [g for g in groups if any(value(p, g[1]) is not None for p in peers)]
    if not groups:
        return ""
    out = f'set title "{title}"\nset xlabel ""\nset ylabel "{y}"\nset xrange [*:*]\n' \
        'set yrange [0:*]\n$bars << EOD\n'
    for label, key in groups:
        out += f'"{label}" {" ".join(f"{value(p, key) or 0:.6g}" for p in peers)}\n'
    bars = [f'$bars using {i + 2}:xtic(1) lt {i + 1} title "{p}"' for i, p in enumerate(peers)]
    return f"{out}EOD\nplot {', '.join(bars)}\nunset key\n"


def plot():
    """Six pictures by gnuplot: the lines that the table has only the ends of, and bars."""
    peers = [p for p in columns() if any(peer == p for peer, _ in samples)]
    talk = max((value(p, "echo-64-cpu") or 0 for p in peers), default=0)
    text = PLOT.format(output=OUT / "plot.svg")
    text += plot_lines(peers, "Memory of the program", "sessions at rest", "private dirty, MB",
                       [(n, f"memory-{n}") for n in [0, *SESSIONS]])
    text += plot_lines(peers, "An echo of 64 bytes, 32 clients", "sessions at rest beside them",
                       "CPU, us", [(0, "echo-64-cpu"), *((n, f"rest-{n}-cpu") for n in RESTING)],
                       f"{2 * talk:.3g}" if talk else "*")
    text += plot_bars(peers, "Echoes", "CPU, us", [("64 B", "echo-64-cpu"),
                      ("1 KB", "echo-1024-cpu"), ("16 KB", "echo-16384-cpu")])
    text += plot_bars(peers, "Echoes", "a second", [("64 B", "echo-64-rate"),
                      ("1 KB", "echo-1024-rate"), ("16 KB", "echo-16384-rate")])
    text += plot_bars(peers, "Bulk", "CPU of 1 MB, us", [("upload", "up-cpu"),
                      ("download", "down-cpu")])
    text += plot_bars(peers, "Handshake and upgrade", "CPU, us", [("full", "full-cpu"),
                      ("resumed", "resumed-cpu")])
    (OUT / "plot.gp").write_text(text)
    if not shutil.which("gnuplot"):
        failures.append("plot: gnuplot is not installed")
        return
    result = subprocess.run(["gnuplot", OUT / "plot.gp"], stderr=subprocess.PIPE, text=True,
                            check=False)
    if result.returncode:
        failures.append(f"plot: {result.stderr.strip()}")


# ---- what is done ----

ports = {}
backend_port = 0


def run(*argv):
    """A command that has to succeed."""
    result = subprocess.run(argv, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, check=False)
    if result.returncode:
        sys.exit(f"bench: this failed: {' '.join(map(str, argv))}\n{result.stdout}")


def prepare():
    """Descriptors enough for all sessions in all that we start; the certificate; our programs."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        print(f"bench: {hard} descriptors: too many sessions will fail", file=sys.stderr)
    OUT.mkdir(parents=True, exist_ok=True)
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-days", "30", "-subj", "/CN=localhost", "-keyout", OUT / "key.pem",
        "-out", OUT / "cert.pem")
    (OUT / "both.pem").write_text((OUT / "cert.pem").read_text() + (OUT / "key.pem").read_text())
    for program in ["load", "backend"]:
        run(CC, "-std=c11", "-D_GNU_SOURCE", "-O2", "-o", OUT / program, HERE / f"{program}.c",
            "-lssl", "-lcrypto")


def cross():
    """What README's line tells make, with the tree of BearSSL that the cross tests have built."""
    cc = MACHINES[EMULATE][0]
    line = re.search(rf"^ +make (CC={cc} .*)$", (TOP / "README").read_text(), re.M)[1]
    return {**dict(word.split("=", 1) for word in shlex.split(line)),
            "BEARSSL": CROSS / cc / "bearssl-0.6+dfsg.1"}


def build(name):
    """One build of wssproxy."""
    variables, changes = BUILDS[name]
    variables = {"CC": CC, "BEARSSL": "", **variables, **(cross() if EMULATE else {})}
    d = OUT / name
    d.mkdir(exist_ok=True)
    config_write(d / "config.h", ports[name], backend_port, changes)
    run(MAKE, f"CONFIG={d}/config.h", f"OUT={d}/wssproxy",
        *(f"{k}={v}" for k, v in variables.items()))
    with open(d / "wssproxy", "rb+") as f:
        os.fsync(f)     # as long as it is not on disk, its text counts as dirty


def measure(name, peer):
    """Makes one measure. Returns the values, or None."""
    try:
        change = [RESTARTED[peer]] if name == "restart" and peer in RESTARTED else []
        with Proxy(peer, *change) as proxy:
            if EMULATE:     # its start is over once this came through, and its code translated
                proxy.load("-t", 1, "-c", 8, "echo")
            return ALL_MEASURES[name](proxy)
    except (Failure, OSError) as e:
        failures.append(f"{name} of {peer}: {e}")
        return None


def measure_all(lines, backend):
    """All rounds; `lines` is the CSV of the single values."""
    for turn in range(ROUNDS):
        for name in [m for m in MEASURES if turn == 0 or m not in ONCE]:
            print(f"round {turn + 1} of {ROUNDS}, {name}:", end="", file=sys.stderr, flush=True)
            shift = turn % len(PEERS)
            for peer in PEERS[shift:] + PEERS[:shift]:
                if name not in ONLY.get(peer, MEASURES) or \
                        (name == "restart" and peer not in BUILDS and peer not in RELOAD) or \
                        (name.startswith("page") and peer in NO_PAGES):
                    continue
                found = measure(name, peer)
                if backend.poll() is not None:
                    sys.exit("\nbench: the backend has ended")
                first = f"{next(iter(found.values())):.4g}" if found else "failed"
                print(f" {peer} {first}", end="", file=sys.stderr, flush=True)
                for key, x in (found or {}).items():
                    samples.setdefault((peer, key), []).append(x)
                    lines.writerow([turn + 1, peer, key, f"{x:.6g}"])
            print(file=sys.stderr)


def peers_check():
    unknown = [p for p in PEERS if p not in BUILDS and p not in OTHERS]
    unknown += [m for m in MEASURES if m not in ALL_MEASURES]
    unknown += [SUITE] if SUITE not in SUITES else []
    unknown += [EMULATE] if EMULATE and EMULATE not in MACHINES else []
    if unknown:
        sys.exit(f"bench: unknown: {' '.join(unknown)}\n\n" + __doc__ % {
            "peers": " ".join([*BUILDS, *OTHERS]), "measures": " ".join(ALL_MEASURES),
            "machines": " ".join(MACHINES)})
    path = ROOT / "usr/sbin" if EMULATE else None
    for p in [p for p in PEERS if p in OTHERS and not shutil.which(PROGRAMS.get(p, p), path=path)]:
        failures.append(f"{p}: not installed")
        PEERS.remove(p)


def main():
    global backend_port

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(f"\nbench: ended by signal {n}"))
    os.environ["PATH"] += f":/usr/sbin:/usr/local/sbin:{CROSS / 'bin'}"
    began = time.monotonic()
    peers_check()
    prepare()
    backend = start(cpus()[2], [OUT / "backend"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        backend_port = int(backend.stdout.readline())
        for p in PEERS:
            ports[p] = free_port()
        for p in [p for p in PEERS if p in BUILDS]:
            build(p)
        with open(OUT / "runs.csv", "w", newline="") as f:
            lines = csv.writer(f, lineterminator="\n")
            lines.writerow(["round", "peer", "measure", "value"])
            measure_all(lines, backend)
    finally:
        kill(backend)
    plot()
    print(f"\n{save()}\n{time.monotonic() - began:.0f} s; "
          f"table.txt, table.csv, runs.csv and plot.svg are in {os.path.relpath(OUT, TOP)}")
    return 1 if any("wssproxy" in f for f in failures) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
