"""Builds wssproxy with a configuration of its own for each test, runs it and reads its log."""

import hashlib
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

E2E = Path(__file__).resolve().parent
REPO = E2E.parents[1]
BUILD = Path(os.environ.get("WSSPROXY_BUILD", E2E.parent / "build")).resolve()
if os.geteuid() == 0 and not all(p.stat().st_mode & 1 for p in E2E.parents):
    # nobody, whom some tests run it as, could not get there
    BUILD = Path("/var/cache", "wssproxy-tests" + str(REPO).replace("/", "-"))
SANITIZE = os.environ.get("SANITIZE", "") not in ("", "0")
PLAIN = os.environ.get("PLAIN", "") not in ("", "0")    # buffers for all sessions
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")

RUN = shlex.split(os.environ.get("WSSPROXY_RUN", ""))       # what runs programs of another machine
INSTRUMENTED = SANITIZE or "valgrind" in RUN[:1]            # makes system calls of its own

# Seconds after which anything that is waited for counts as hung. Nothing waits so long when all is
# well: every wait ends with its event.
PATIENCE = 60 if SANITIZE or RUN else 30

SANITIZER_REPORT = re.compile(r"Sanitizer|runtime error:")


class C(str):
    """A C expression, to stand in config.h as it is."""


WSS, WS, REDIRECT = C("WSS"), C("WS"), C("REDIRECT")
ROUND_ROBIN, IP_HASH = C("ROUND_ROBIN"), C("IP_HASH")
FORWARD, REFUSE = C("FORWARD"), C("REFUSE")
APPEND, REPLACE, OFF = C("APPEND"), C("REPLACE"), C("OFF")
STDERR, SYSLOG = C("STDERR"), C("SYSLOG")
NONE, TUNNELS, ALL = C("NONE"), C("TUNNELS"), C("ALL")


def c_text(value):
    if value is None:
        return "NULL"
    if isinstance(value, C):
        return str(value)
    if isinstance(value, (bool, int)):
        return str(int(value))
    if isinstance(value, (str, Path)):
        safe = "".join(c if c.isprintable() and c not in '"\\' else f"\\{ord(c):03o}"
                       for c in str(value))
        return f'"{safe}"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f".{k} = {c_text(v)}" for k, v in value.items()) + " }"
    return "{ " + ", ".join(c_text(v) for v in value) + " }"


def set_entry(text, name, value):
    """config.def.h with one entry replaced: an array, a scalar or a macro."""
    constant = (r"^(static const [^=\n;]*\b%s(?:\[\])? *= *)"
                r"(?:\{[^\n]*\};|\{\n.*?^\};|[^;{\n]*;)" % name)
    macro = r"^(#define +%s +)\S+" % name
    text, n = re.subn(constant, lambda m: m[1] + c_text(value) + ";", text, flags=re.M | re.S)
    if n == 0:
        text, n = re.subn(macro, lambda m: m[1] + c_text(value), text, flags=re.M)
    if n != 1:
        raise KeyError(f"config.def.h has {n} entries named {name}")
    return text


def config_text(entries):
    text = (REPO / "config.def.h").read_text()
    defaults = {"resolve_names": 1, "http": REFUSE, "log_rejects": 0, "log_probes": 1,
                "log_sessions": ALL, "seccomp": not INSTRUMENTED}
    if PLAIN:
        defaults["max_busy"] = C("max_sessions")
    for name, value in {**defaults, **entries}.items():
        text = set_entry(text, name, value)
    return text


class BuildFailed(Exception):
    pass


def build(config):
    """The path of a binary with this config.h. Kept, and looked up by all that goes into it."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # unoptimized: each test's binary costs half as much to make
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O0", "-g"] + shlex.split(os.environ.get("CFLAGS", ""))
    if SANITIZE:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    libraries = shlex.split(os.environ.get("LDFLAGS", "")) \
        + shlex.split(os.environ.get("LDLIBS", "-lbearssl"))
    files = {name: (REPO / name).read_text() for name in ("wssproxy.c", "wssproxy.h")}
    files["config.h"] = config
    inputs = [*compiler, *flags, *libraries, *files.values()]
    place = BUILD / "bin" / hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:24]
    if place.exists():
        return place / "wssproxy"
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as unfinished:
        # from copies, for somebody may be editing the files
        work = Path(unfinished)
        for name, text in files.items():
            (work / name).write_text(text)
        command = [*compiler, *flags, f'-DCONFIG="{work}/config.h"', f"{work}/wssproxy.c",
                   *libraries, "-o", f"{work}/wssproxy"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildFailed(f"{shlex.join(command)}\n{result.stderr}")
        work.chmod(0o755)
        try:
            work.rename(place)
        except OSError:     # another worker was faster
            pass
    return place / "wssproxy"


class Line:
    """One line of the log: an event, words, and key=value fields."""

    def __init__(self, text):
        self.text = text
        self.event, _, rest = text.partition(" ")
        self.fields = {}
        for word in rest.split():
            key, equals, value = word.partition("=")
            self.fields[key] = value if equals else True

    def __getitem__(self, key):
        return self.fields[key]

    def fits(self, event, fields):
        return self.event == event and all(self.fields.get(k) == v for k, v in fields.items())

    def __repr__(self):
        return self.text


def readable(stream, ms):
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return poll.poll(ms)


class Log:
    """The lines of a log as they come; a thread feeds it, tests wait for lines. What a test has seen
    the program do has been logged before, so that whoever asks what is there takes it from the pipe."""

    def __init__(self):
        self.fed = []
        self.pipes = {}         # and of each what is not a whole line yet
        self.ended = False
        self.news = threading.Condition()

    def follow(self, stream):
        self.pipes[stream] = b""
        while stream in self.pipes:
            readable(stream, None)
            with self.news:
                self.take(stream)

    def take(self, stream):
        while stream in self.pipes and readable(stream, 0):
            data = os.read(stream.fileno(), 65536)
            *whole, self.pipes[stream] = (self.pipes[stream] + data).split(b"\n")
            if not data:
                whole = filter(None, [self.pipes.pop(stream)])
            for raw in whole:
                self.feed(raw.decode("utf-8", "backslashreplace"))
            if not data:
                self.end()

    @property
    def lines(self):
        with self.news:
            for stream in list(self.pipes):
                self.take(stream)
            return self.fed.copy()

    def feed(self, text):
        with self.news:
            self.fed.append(Line(text))
            self.news.notify_all()

    def end(self):
        with self.news:
            self.ended = True
            self.news.notify_all()

    @property
    def text(self):
        return "\n".join(line.text for line in self.lines)

    def all(self, event, **fields):
        return [line for line in self.lines if line.fits(event, fields)]

    def wait(self, event, nth=1, seconds=PATIENCE, **fields):
        """The nth line of that event with those fields; waits until it is there."""
        __tracebackhide__ = True
        return self._wait(lambda line: line.fits(event, fields), nth, seconds,
                          f"{event} {fields}")

    def wait_text(self, pattern, nth=1, seconds=PATIENCE):
        return self._wait(lambda line: re.search(pattern, line.text), nth, seconds, pattern)

    def wait_ending(self, why, nth=1, **fields):
        """The line that ends a session, whether it came as far as an open line or not."""
        __tracebackhide__ = True
        fields["why"] = why
        return self._wait(lambda line: line.fits("close", fields) or line.fits("reject", fields),
                          nth, PATIENCE, f"close or reject {fields}")

    def _wait(self, wanted, nth, seconds, what):
        __tracebackhide__ = True

        def found():
            return [line for line in self.fed if wanted(line)][nth - 1:]
        with self.news:
            self.news.wait_for(lambda: found() or self.ended, seconds)
            if not found():
                raise AssertionError(f"no line {nth} with {what} in the log")
            return found()[0]


class Proxy:
    """A running wssproxy."""

    def __init__(self, entries, wrapper=(), log=None, **popen):
        self.entries = entries
        self.log = log or Log()
        command = [*wrapper, *RUN, build(config_text(entries))]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        **popen)
        self.reader = threading.Thread(target=self.log.follow, args=(self.process.stderr,),
                                       daemon=True)
        self.reader.start()
        self.ports = []
        self.before = None      # what each client asks first, see more.asks_before

    @property
    def pid(self):
        return self.process.pid

    def wait_ready(self, log=None):
        """Learns the ports that the kernel chose."""
        __tracebackhide__ = True
        log = log or self.log
        for n in range(len(self.entries["listeners"])):
            address = log.wait("listen", nth=n + 1)["address"]
            self.ports.append(int(address.rpartition(":")[2]))
        return self

    def address(self, kind=None):
        """Address and port of the first listener of that kind, or of the first of all."""
        for (host, _, k, *_), port in zip(self.entries["listeners"], self.ports):
            if kind in (None, k):
                return {"::": "::1"}.get(host, host), port
        raise KeyError(kind)

    def kind(self, kind=None):
        return kind or self.entries["listeners"][0][2]

    def signal(self, number):
        self.process.send_signal(number)

    def wait_exit(self, seconds=PATIENCE):
        code = self.process.wait(seconds)
        self.reader.join(PATIENCE)
        return code

    def totals(self):
        """The fields of a fresh line of totals."""
        seen = self.log.text.count("\nstats sessions=")
        self.signal(signal.SIGUSR1)
        return self.log.wait_text(r"^stats sessions=", nth=seen + 1).fields

    def stop(self):
        """Ends it if it still runs, and says how it ended: an exit code, or None for 'killed'."""
        if self.process.poll() is not None:
            return self.wait_exit()
        self.signal(signal.SIGTERM)
        try:
            self.log.wait("stop")       # two signals at once would be one
        except AssertionError:
            pass
        self.signal(signal.SIGTERM)
        try:
            return self.wait_exit()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait_exit()
            return None

    def faults(self):
        """What must never be seen of it, as text; empty when all is well."""
        code = self.stop()
        if SANITIZER_REPORT.search(self.log.text):
            return "the proxy printed a sanitizer's report"
        if code is None:
            return "the proxy had to be killed: it did not end after SIGTERM"
        if code < 0:
            return f"the proxy died of {signal.Signals(-code).name}"
        if code not in (0, 1, 2):
            return f"the proxy ended with {code}"
        return ""

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def files(self):
        return list(Path(f"/proc/{self.pid}/fd").iterdir())

    def descriptors(self):
        return len(self.files())

    def memory_kb(self, field="Private_Dirty"):
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)


def eventually(condition, seconds=PATIENCE):
    """Looks until it is true, for what raises no event of its own (counters of /proc)."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.01)


def run_once(entries, *args, **options):
    """The outcome of a run that ends by itself, such as -t; its output is text."""
    result = subprocess.run([*RUN, build(config_text(entries)), *args], stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, timeout=PATIENCE, **options)
    assert not SANITIZER_REPORT.search(result.stderr), result.stderr
    return result
