import contextlib
import ctypes
import fcntl
import functools
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

import pki
import siege
from harness import BUILD, PATIENCE, WSS, Proxy
from more import FILES_ONLY, Etc
from peers import NodeServer, Place, Places, PythonServer, Scripted, Stream


DESCRIPTORS = 6000      # the most that a test needs


def enough_descriptors():
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft == resource.RLIM_INFINITY or soft >= DESCRIPTORS


def pytest_configure():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(ValueError):       # root may have more
        if not enough_descriptors():
            resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    pki.make_all()


@pytest.fixture
def many_descriptors():
    if not enough_descriptors():
        pytest.skip(f"needs {DESCRIPTORS} descriptors: ulimit -n")


@functools.cache
def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


def need_ipv6():
    if not has_ipv6():
        pytest.skip("needs IPv6: ::1")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed:
        for n, proxy in enumerate(getattr(item, "proxies", [])):
            report.sections.append((f"log of proxy {n}", proxy.log.text))


def pytest_terminal_summary(terminalreporter):
    rows = []
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(f"{report.nodeid}: {value}")
            elif name == "abuse":
                rows.append(value)
    if rows:
        table = siege.table(rows)
        siege.TABLE.write_text(table)
        terminalreporter.write_line(f"\n{table}written to {siege.TABLE}")


@pytest.fixture(autouse=True)
def deadline():
    """No test hangs, whatever its waits forgot."""
    def too_long(*_):
        raise TimeoutError("the test took too long")
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(8 * PATIENCE)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def streams():
    yield
    for stream in Stream.kept:
        stream.close()
    Stream.kept.clear()


@pytest.fixture(scope="session")
def places():
    return Places(socket.AF_INET, "127.0.0.1"), Places(socket.AF_INET6, "::1")


@pytest.fixture
def place(places):
    """Gives an address that refuses connections until a backend listens there."""
    used = [0, 0]

    def give(v6=False):
        if v6:
            need_ipv6()
        index = used[v6]
        used[v6] += 1
        return Place(places[v6].address, places[v6].get(index))
    return give


@pytest.fixture
def keeper():
    """Closes at the end what a test opened."""
    kept = []

    def keep(thing):
        kept.append(thing)
        return thing
    yield keep
    for thing in reversed(kept):
        thing.close()


@pytest.fixture
def scripted(place, keeper):
    return lambda at=None, **options: keeper(Scripted(at or place(), **options))


@pytest.fixture
def python_server(place, keeper):
    return lambda at=None, **options: keeper(PythonServer(at or place(), **options))


@pytest.fixture
def node_server(place, keeper):
    return lambda at=None: keeper(NodeServer(at or place()))


@pytest.fixture(params=["python", "node"])
def server(request):
    """A WebSocket backend of each library."""
    return request.getfixturevalue(f"{request.param}_server")()


def certificate(name, key=None, server_name=None):
    """An entry of certs[]."""
    return (server_name, pki.DIR / f"{name}.pem", pki.DIR / f"{key or name + '.key'}")


def whole_config(backends, config):
    entries = {"listeners": [("127.0.0.1", "0", WSS)], "certs": [certificate("ec256")],
               "backends": [b if isinstance(b, dict) else b.entry() for b in backends]}
    return {**entries, **config}


@pytest.fixture
def proxy(request):
    """Starts a wssproxy in front of those backends; at the end it must be alive and well, or have
    ended as a program should."""
    request.node.proxies = started = []

    def start(*backends, popen=None, ready=True, **config):
        if any(":" in listener[0] for listener in config.get("listeners", [])):
            need_ipv6()
        p = Proxy(whole_config(backends, config), **(popen or {}))
        started.append(p)
        return p.wait_ready() if ready else p
    yield start
    faults = [p.faults() for p in started]
    assert not any(faults), faults


CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def network():
    """A network of its own in which all addresses of 2001:db8::/32 are this machine's."""
    need_ipv6()
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET) != 0:
        os.close(own)
        pytest.skip("needs a network namespace: root")
    try:
        for command in ("ip link set lo up", "ip -6 route add local 2001:db8::/32 dev lo"):
            subprocess.run(command.split(), check=True)
        Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")
        yield
    finally:
        libc.setns(own, 0)
        os.close(own)


class Neighbour:
    """Another network, on a cable to this one: it is 10.77.0.2, we are 10.77.0.1."""

    def __init__(self):
        self.holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo ready; exec cat"],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.holder.stdout.readline() == b"ready\n"
        self.run("ip link add ours type veth peer name theirs netns {}", where=())
        for who, where in ((1, ()), (2, self.inside())):
            name = ("ours", "theirs")[who - 1]
            self.run(f"ip addr add 10.77.0.{who}/24 dev {name}", where=where)
            self.run(f"ip link set {name} up", where=where)

    def inside(self):
        return "nsenter", "-t", str(self.holder.pid), "-n"

    def run(self, command, where=None):
        where = self.inside() if where is None else where
        subprocess.run([*where, *command.format(self.holder.pid).split()], check=True)

    def connect(self, address):
        """A socket in there, connected to an address here. (Who enters is a thread of its own.)"""
        made = []

        def enter():
            there = os.open(f"/proc/{self.holder.pid}/ns/net", os.O_RDONLY)
            if libc.setns(there, CLONE_NEWNET) == 0:
                made.append(socket.create_connection(address, PATIENCE))
            os.close(there)
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return made[0]

    def segments(self):
        """Segments of TCP that came in."""
        names, values = [line.split() for line in open(f"/proc/{self.holder.pid}/net/snmp")
                         if line.startswith("Tcp:")]
        return int(values[names.index("InSegs")])

    def close(self):
        self.holder.stdin.close()
        self.holder.stdout.close()
        self.holder.wait()


@pytest.fixture
def neighbour(network, keeper):
    return keeper(Neighbour())


@pytest.fixture
def live_files():
    """A directory for files that change while a proxy runs. Its name is the same in each run, as it
    is part of the configuration, unless another run uses it at this moment."""
    for n in itertools.count():
        lock = open(BUILD / f"live-{n}.lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.close()
    path = BUILD / f"live-{n}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    yield path
    lock.close()


@pytest.fixture
def no_names(live_files):
    """Options of a proxy for which no name resolves, whatever network there is, and that at once."""
    return {"wrapper": Etc(live_files, nsswitch=FILES_ONLY).wrapper()}
