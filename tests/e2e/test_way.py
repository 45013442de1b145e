"""SIGUSR2, make way: the program that is started next takes over, and nobody who comes notices. And
the pace at which tunnels leave, then and on SIGTERM."""

import asyncio
import contextlib
import datetime
import fcntl
import os
import re
import resource
import selectors
import shlex
import signal
import socket
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import websockets

from conftest import whole_config
from harness import (INSTRUMENTED, PATIENCE, RUN, SANITIZE, WS, C, build, config_text, eventually,
                     run_once)
from more import LOCALHOST, Etc, children_of
from peers import ask, asking, head, open_tunnel, tcp, upgrade
from test_operation import NO_LEAK_CHECK
from test_privileges import (as_root, filtered, foreign_calls, handshake, intruded, library,  # noqa: F401
                             low_port, own_files, status_of)

GET = head("GET / HTTP/1.1", {"Host": "example.test"})
REDIRECT = C("REDIRECT")
WAY_S = 5
CLOSE = b"\x88\x02\x03\xe9"      # 1001

needs_clone = pytest.mark.skipif(bool(RUN), reason="needs a process that forks by itself")
pytestmark = needs_clone


def status(p, kind=None):
    return ask(p, GET, kind)[0].status


def copy_of(p):
    """The copy, once it is there: its pid."""
    return int(p.log.wait_text(r"^\[\d+\] way pid=")["pid"])


def make_way(p):
    """Has it make way; it has ended when this returns, with 0. The pid of its copy."""
    p.signal(signal.SIGUSR2)
    assert p.process.wait(PATIENCE) == 0
    return copy_of(p)


def has_ended(pid):
    return not Path(f"/proc/{pid}").exists() or status_of(pid)["State"][0] == "Z"


def copy_says(p, text, **options):
    return p.log.wait_text(rf"^\[\d+\] {text}", **options)


@pytest.fixture
def here(place):
    return place()


@pytest.fixture
def ways(proxy, here):
    """Starts programs on one port, one after the other. later() has one made: who makes way waits a
    few seconds for it, and a compiler may take longer."""
    started = []

    def later(*backends, kind=WS, popen=None, ready=True, **config):
        config = {"make_way": 1, "listeners": [(here.host, here.port, kind)], **config}
        build(config_text(whole_config(backends, config)))

        def start():
            started.append(proxy(*backends, popen=popen, ready=ready, **config))
            return started[-1]
        return start

    def start(*args, **options):
        return later(*args, **options)()
    start.later = later
    yield start
    for p in started:
        for pid in re.findall(r"^(?:\S+Z )?\[(\d+)\] way ", p.log.text, re.M):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)
            eventually(lambda: has_ended(int(pid)))


# ---- make way ----

def test_next_one_takes_over_while_the_copy_drains(ways, scripted):
    backend = scripted()
    p, following = ways(backend, drain_ms=600000), ways.later(backend, kind=REDIRECT)
    tunnels = [open_tunnel(p, backend) for _ in range(2)]
    tunnels[1][0].send(b"last to speak")
    assert tunnels[1][1].read(13) == b"last to speak"
    copy = make_way(p)
    assert status(following()) == 308
    copy_says(p, "stop signal=SIGUSR2 sessions=2")
    assert tunnels[0][0].receive() in (CLOSE, b"")      # the one that rested, at once
    for end in tunnels[0]:
        end.close()
    copy_says(p, "close .*why=drain")
    client, server = tunnels[1]
    client.send(b"still here")
    assert server.read(10) == b"still here"
    server.send(b"and served")
    assert client.read(10) == b"and served"
    client.close()
    assert server.read_to_end() == b""
    server.close()
    eventually(lambda: has_ended(copy))
    copy_says(p, "stop sessions=0")


def test_idle_copy_ends_when_the_next_one_has_the_listeners(ways, scripted):
    p, following = ways(scripted()), ways.later(scripted(), kind=REDIRECT)
    copy = make_way(p)
    assert status(p) == 426             # meanwhile it serves
    assert not has_ended(copy)
    following()
    eventually(lambda: has_ended(copy))
    assert status(p) == 308


def test_again_and_again(ways, scripted):
    """Copies drain beside each other."""
    backend = scripted()
    copies, streams = [], []
    for start in [ways.later(backend, drain_ms=600000 + n) for n in range(4)]:
        p = start()
        streams += [open_tunnel(p, backend) for _ in range(2)]
        copies.append(make_way(p))
    p = start()
    assert status(p) == 426
    assert not any(has_ended(copy) for copy in copies)


def test_without_a_next_one_the_copy_ends_as_well(ways, scripted):
    backend = scripted()
    p = ways(backend, drain_ms=600000)
    streams = [open_tunnel(p, backend) for _ in range(2)]
    begin = time.monotonic()
    copy = make_way(p)
    while time.monotonic() < begin + WAY_S - 1:
        assert status(p) == 426
    copy_says(p, "stop signal=SIGUSR2 sessions=2")
    assert time.monotonic() > begin + WAY_S - 0.1
    with pytest.raises(ConnectionRefusedError):
        tcp(p)
    assert not has_ended(copy)
    streams[0][0].close()
    assert status(ways(backend, kind=REDIRECT)) == 308


def test_some_listeners_only(ways, here, place, scripted):
    """What the next one does not want ends after a while; the drain begins then."""
    other = place()
    following = ways.later(scripted(), kind=REDIRECT)
    p = ways(scripted(), listeners=[(here.host, here.port, WS), (other.host, other.port, WS)])
    copy = make_way(p)
    assert status(following()) == 308
    assert not has_ended(copy)
    eventually(lambda: has_ended(copy))


@pytest.mark.parametrize("address", ["::", "::1"])
def test_listener_of_ipv6(ways, place, scripted, address):
    port = place(v6=True).port
    following = ways.later(scripted(), listeners=[(address, port, REDIRECT)])
    p = ways(scripted(), listeners=[(address, port, WS)])
    copy = make_way(p)
    new = following()
    eventually(lambda: has_ended(copy))
    assert status(new) == 308


def refused_as_in_use(here, entries, **popen):
    result = run_once(entries, **popen)
    assert result.returncode == 1
    assert all(part in result.stderr for part in (here.host, here.port, "in use"))


def test_two_by_mistake_stay_impossible(ways, here, scripted):
    """Before a restart, and behind it."""
    p, following = ways(scripted()), ways.later(scripted(), kind=REDIRECT)
    refused_as_in_use(here, p.entries)
    copy = make_way(p)
    new = following()
    refused_as_in_use(here, p.entries)
    eventually(lambda: has_ended(copy))
    refused_as_in_use(here, p.entries)
    refused_as_in_use(here, new.entries)
    assert status(new) == 308


@as_root
def test_another_user_gets_no_listener(ways, here, scripted, own_files):  # noqa: F811
    p = ways(scripted(), certs=own_files)
    copy = make_way(p)
    refused_as_in_use(here, p.entries, user=65534, group=65534, extra_groups=[])
    assert not has_ended(copy)
    assert status(p) == 426


@as_root
def test_under_chroot_as_another_user_on_a_low_port(ways, place, tmp_path, scripted):
    tmp_path.chmod(0o755)
    listeners = [("127.0.0.1", low_port(), WS)]
    config = {"user": "nobody", "chroot_dir": "/var/empty" if Path("/var/empty").is_dir() else "/proc",
              "seccomp": not INSTRUMENTED}
    following = ways.later(scripted(), listeners=[(*listeners[0][:2], REDIRECT)], popen=NO_LEAK_CHECK,
                           **config)
    p = ways(scripted(), listeners=listeners, popen=NO_LEAK_CHECK, **config)
    assert status(p) == 426
    copy = make_way(p)
    assert status_of(copy)["Uid"][0] == "65534"
    new = following()
    assert status(new) == 308
    eventually(lambda: has_ended(copy))
    assert status(new) == 308


def test_with_a_resolver(ways, live_files, scripted, place):
    """Its process ends with the old one; what it found is used on."""
    backend = scripted()
    wrapper = Etc(live_files, hosts=LOCALHOST + f"{backend.place.host} name.test\n", nsswitch="hosts: files\n").wrapper()
    name = {"host": "name.test", "port": backend.place.port}
    following = ways.later(name, popen={"wrapper": wrapper})
    p = ways(name, popen={"wrapper": wrapper}, drain_ms=600000)
    eventually(lambda: status_of(p.pid)["Name"] == ["wssproxy"])
    resolver, = children_of(p.pid)
    streams = [open_tunnel(p, backend)]
    copy = make_way(p)
    eventually(lambda: has_ended(resolver))
    streams.append(open_tunnel(p, backend))
    os.kill(copy, signal.SIGHUP)
    copy_says(p, "reload ok")
    assert "resolver died" not in p.log.text and not children_of(copy)
    streams.append(open_tunnel(following(), backend))


def test_signals_of_the_copy(ways, scripted):
    backend = scripted()
    p, following = ways(backend, drain_ms=600000), ways.later(backend)
    streams = [open_tunnel(p, backend) for _ in range(3)]
    copy = make_way(p)
    os.kill(copy, signal.SIGUSR2)
    os.kill(copy, signal.SIGUSR1)
    copy_says(p, "stats sessions=3 ")
    following()
    copy_says(p, "stop signal=SIGUSR2")
    os.kill(copy, signal.SIGUSR2)
    os.kill(copy, signal.SIGHUP)
    copy_says(p, "reload ok")
    os.kill(copy, signal.SIGTERM)       # the second to end it
    eventually(lambda: has_ended(copy))
    copy_says(p, "stop sessions=0")
    assert len(re.findall(r"\] close .*why=drain", p.log.text)) == 3
    assert len(re.findall(r" way pid=", p.log.text)) == 1
    for client, _ in streams:
        assert client.read_to_end() in (CLOSE, b"")


def test_copy_has_what_it_needs_and_no_more(ways, scripted):
    backend = scripted()
    p = ways(backend)
    stream = open_tunnel(p, backend)
    before, status_before = p.descriptors(), status_of(p.pid)
    copy = make_way(p)
    same = ["Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn"]
    assert {key: status_of(copy)[key] for key in same} == {key: status_before[key] for key in same}
    assert len(list(Path(f"/proc/{copy}/fd").iterdir())) == before
    limits = Path(f"/proc/{copy}/limits").read_text()
    assert re.search(r"Max core file size +0 +0", limits)
    stream[0].close()


def test_sigusr2_while_it_ends_is_no_matter(ways, scripted):
    backend = scripted()
    p = ways(backend, drain_ms=600000)
    streams = [open_tunnel(p, backend) for _ in range(2)]
    p.signal(signal.SIGTERM)
    p.log.wait("stop")
    p.signal(signal.SIGUSR2)
    client, server = streams[1]
    client.send(b"still here")
    assert server.read(10) == b"still here"
    assert p.process.poll() is None


NO_VISITOR = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Who comes to a unix: socket has gone again. */
int accept4(int fd, struct sockaddr *peer, socklen_t *len, int flags)
{
	struct sockaddr_storage own;
	socklen_t own_len = sizeof own;
	int taken = (int)syscall(SYS_accept4, fd, peer, len, flags);

	if (getsockname(fd, (struct sockaddr *)&own, &own_len) < 0 || own.ss_family != AF_UNIX)
		return taken;
	close(taken);
	errno = EAGAIN;
	return -1;
}
"""


def test_who_only_knocks_delays_nobody(ways, here, scripted, tmp_path):
    """A door's visitor that has gone again is no lack of something of ours."""
    library = tmp_path / "no_visitor.so"
    library.with_suffix(".c").write_text(NO_VISITOR)
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-o", library,
                    library.with_suffix(".c")], check=True)
    p = ways(scripted(), popen={"env": {**os.environ, "LD_PRELOAD": str(library),
                                        "ASAN_OPTIONS": "verify_asan_link_order=0"}})

    def delay():
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.connect(f"\0wssproxy {here.host}:{here.port}")
            assert visitor.recv(1) == b""
        begin = time.monotonic()
        assert status(p) == 426
        return time.monotonic() - begin
    assert min(delay() for _ in range(5)) < 0.25


# ---- what can't be done ----

def goes_on_after_failing(p, backend, why):
    p.signal(signal.SIGUSR2)
    assert why in p.log.wait("way", failed=True).text
    open_tunnel(p, backend)
    assert status(p) == 426


@as_root
def test_fork_that_fails_is_said(ways, scripted):
    backend = scripted()
    p = ways(backend, user="nobody", popen={**NO_LEAK_CHECK, "preexec_fn": lambda: resource.setrlimit(
        resource.RLIMIT_NPROC, (0, 0))})
    goes_on_after_failing(p, backend, "Resource temporarily unavailable")


@as_root
@pytest.mark.skipif(INSTRUMENTED, reason="needs no /proc itself")
def test_first_process_of_all_does_not_fork(ways, scripted, keeper):
    backend = scripted()
    p = ways(backend, popen={"wrapper": ["unshare", "--pid", "--fork", "--kill-child"]})
    first, = children_of(p.pid)
    p.signal = lambda number: os.kill(first, number)
    goes_on_after_failing(p, backend, "process 1")


def test_sigusr2_without_make_way_ends_it(proxy, place):
    p = proxy(place(), make_way=0)
    p.signal(signal.SIGUSR2)
    assert p.wait_exit() == -signal.SIGUSR2
    p.process.returncode = 0            # it is meant to be killed


@filtered
@pytest.mark.parametrize("name", ["fork-of-threads", "fork-and-share", "fork-into-user", "fork-into-pids",
                                  "vfork", "clone3", "execve", "bind", "listen", "unix"])
def test_forbidden_call_ends_the_program_all_the_same(intruded, here, name):
    """What else could make a process, or listen."""
    p, call = intruded(here, make_way=1)
    call(name)
    handshake(p)
    assert p.wait_exit() == -signal.SIGSYS
    assert "intruder" not in p.log.text
    p.process.returncode = 0


# ---- half-open connections ----

class Tun:
    """A network device whose other end is this test: 10.78.0.2 is a host that answers when it likes."""

    def __init__(self):
        self.file = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(self.file, 0x400454ca, struct.pack("16sH22x", b"tun0", 0x1001))
        for command in ("ip addr add 10.78.0.1/24 dev tun0", "ip link set tun0 up"):
            subprocess.run(command.split(), check=True)

    @staticmethod
    def sum(data):
        total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
        while total >> 16:
            total = (total & 0xffff) + (total >> 16)
        return ~total & 0xffff

    def send(self, ports, seq, ack, flags, data=b""):
        ends = socket.inet_aton("10.78.0.2") + socket.inet_aton("10.78.0.1")
        tcp_head = bytearray(struct.pack(">HHIIBBHHH", *ports, seq, ack, 0x50, flags, 65535, 0, 0))
        segment = bytes(tcp_head) + data
        tcp_head[16:18] = struct.pack(">H", self.sum(ends + struct.pack(">HH", 6, len(segment)) + segment))
        ip = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + ends)
        ip[10:12] = struct.pack(">H", self.sum(bytes(ip)))
        os.write(self.file, bytes(ip) + bytes(tcp_head) + data)

    def receive(self):
        """Sequence number, flags and data of the next segment that comes."""
        while True:
            packet = os.read(self.file, 4096)
            if packet[0] >> 4 == 4 and packet[9] == 6:
                break
        tcp_at = (packet[0] & 15) * 4
        data_at = tcp_at + (packet[tcp_at + 12] >> 4) * 4
        return struct.unpack(">I", packet[tcp_at + 4:tcp_at + 8])[0], packet[tcp_at + 13], packet[data_at:]

    def close(self):
        os.close(self.file)


SYN, ACK, PSH, RST = 2, 16, 8, 4


@as_root
def test_half_open_connection_is_the_next_ones(ways, network, keeper, scripted):
    """Its client has sent a SYN to the one, and its ACK finds the other."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    tun = keeper(Tun())
    listeners = [("0.0.0.0", "8443", WS)]
    p, following = ways(scripted(), listeners=listeners), ways.later(
        scripted(), listeners=[(*listeners[0][:2], REDIRECT)])
    tun.send((4000, 8443), 1000, 0, SYN)
    seq, flags, _ = tun.receive()
    assert flags == SYN | ACK
    copy = make_way(p)
    following()
    eventually(lambda: has_ended(copy))
    tun.send((4000, 8443), 1001, seq + 1, ACK)
    tun.send((4000, 8443), 1001, seq + 1, ACK | PSH, GET)
    data = b""
    while b"\r\n" not in data:
        _, flags, more = tun.receive()
        assert not flags & RST
        data += more
    assert data.startswith(b"HTTP/1.1 308 ")


# ---- the pace ----

def as_they_leave(clients):
    """Who is told to go, or cut, and when; they go at once."""
    left = []
    with selectors.DefaultSelector() as here:
        for n, client in enumerate(clients):
            here.register(client.sock, selectors.EVENT_READ, n)
        while here.get_map():
            for key, _ in here.select(PATIENCE):
                left.append((key.data, time.monotonic()))
                here.unregister(key.fileobj)
                key.fileobj.close()
            assert not left or left[-1][1] > time.monotonic() - PATIENCE
    return left


def test_silent_longest_leave_first_on_sigterm(proxy, scripted):
    backend = scripted()
    p = proxy(backend, drain_ms=2000, idle_ms=0)
    tunnels = [open_tunnel(p, backend) for _ in range(5)]
    order = [3, 0, 4, 2, 1]
    for n in order:
        tunnels[n][0].send(b"\x81\x81" + bytes(4) + b"x")
        assert tunnels[n][1].read(7)[6:] == b"x"
    p.signal(signal.SIGTERM)
    assert [n for n, _ in as_they_leave([client for client, _ in tunnels])] == order
    for _, server in tunnels:
        server.close()
    assert p.wait_exit() == 0


def test_tunnels_leave_evenly_on_sigterm(proxy, scripted):
    """None before its time, and all before drain_ms are over."""
    backend = scripted()
    p = proxy(backend, drain_ms=4000)
    tunnels = [open_tunnel(p, backend) for _ in range(40)]
    begin = time.monotonic()
    p.signal(signal.SIGTERM)
    for k, (_, when) in enumerate(as_they_leave([client for client, _ in tunnels])):
        assert when >= begin + 3.6 * k / len(tunnels) - 0.002
    for _, server in tunnels:
        server.close()
    assert p.wait_exit() == 0
    assert len(p.log.all("close", why="drain")) == len(tunnels)


def seconds(line):
    return datetime.datetime.fromisoformat(re.match(r"\S+Z ", line.text)[0].strip(" Z")).timestamp()


def spread_of(lines):
    """The most of these lines that are within 100 ms of each other."""
    times = sorted(map(seconds, lines))
    return max(sum(1 for t in times if at <= t < at + 0.1) for at in times)


def test_what_is_no_tunnel_has_all_of_drain_ms(proxy, scripted):
    backend = scripted()
    p = proxy(backend, drain_ms=1000)
    waiting, server = asking(p, backend, upgrade())
    tunnel = open_tunnel(p, backend)
    p.signal(signal.SIGTERM)
    assert tunnel[0].receive() in (CLOSE, b"")  # at once
    for end in tunnel:
        end.close()
    assert p.wait_exit() == 0
    assert [line.event for line in p.log.lines if "why=drain" in line.text] == ["close", "reject"]


# ---- under load ----

class Load:
    """Tunnels that talk, by the websockets library at both ends, and newcomers one after the other.
    A message says whose and which it is."""

    def __init__(self, here, pages, backend_place):
        self.here, self.pages, self.place = here, pages, backend_place
        self.heard = {}                 # by the backend, of each tunnel
        self.newcomers, self.codes = Counter(), Counter()
        self.opened = 0
        self.late = 0                   # seconds that this process was not given when it wanted them

    async def backend(self, ws):
        heard = self.heard.setdefault(ws.path, [])
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                heard.append(message)
                await ws.send(message)

    async def tunnel(self, name):
        """Talks until it is ended: what was sent, and what came back."""
        sent, back = [], []
        async with websockets.connect(f"ws://{self.here.host}:{self.here.port}/{name}", ping_interval=None,
                                      open_timeout=PATIENCE, close_timeout=PATIENCE) as ws:
            self.opened += 1
            try:
                while not self.stopping.is_set():
                    message = f"{name}:{len(sent)}" + "." * (len(sent) * 97 % 3000)
                    sent.append(message)
                    await ws.send(message)
                    back.append(await ws.recv())
                    await asyncio.sleep(0.2)
            except websockets.ConnectionClosed:
                pass
        self.codes[ws.close_code] += not self.stopping.is_set()
        heard = self.heard[f"/{name}"]
        assert self.stopping.is_set() or ws.close_code == 1001
        assert heard == sent[:len(heard)] and back == heard[:len(back)]
        assert len(sent) - len(back) <= 1       # the one under way, of which it is told
        return not self.stopping.is_set()

    async def client(self, n):
        again = 0
        while await self.tunnel(f"{n}.{again}"):
            again += 1

    async def newcomer(self):
        try:
            reader, writer = await asyncio.open_connection(self.pages.host, int(self.pages.port))
            writer.write(GET)
            answer = await asyncio.wait_for(reader.read(), PATIENCE)
            self.newcomers[answer[9:12].decode()] += 1
            writer.close()
        except OSError as error:
            self.newcomers[type(error).__name__] += 1

    async def newcome(self):
        tasks = []
        while not self.stopping.is_set():
            tasks.append(asyncio.create_task(self.newcomer()))
            at = time.monotonic()
            await asyncio.sleep(0.01)
            self.late = max(self.late, time.monotonic() - at - 0.01)
        await asyncio.gather(*tasks)

    async def run(self, tunnels, restart):
        self.stopping = asyncio.Event()
        async with websockets.serve(self.backend, sock=self.place.listen(), ping_interval=None):
            clients = [asyncio.create_task(self.client(n)) for n in range(tunnels)]
            while self.opened < tunnels:
                assert not any(c.done() for c in clients), clients
                await asyncio.sleep(0.01)
            comers = asyncio.create_task(self.newcome())
            await asyncio.get_running_loop().run_in_executor(None, restart)
            self.stopping.set()
            await asyncio.gather(comers, *clients)


@pytest.mark.skipif(SANITIZE, reason="needs the speed")
def test_restart_under_load_that_nobody_notices(ways, here, place):
    pages, backend = place(), place()
    both = [(here.host, here.port, WS), (pages.host, pages.port, WS)]
    config = {"drain_ms": 6000, "log_time": 1, "max_per_ip": 0, "ready": False}
    old = ways(backend, listeners=both, **config)
    following = ways.later(backend, listeners=[both[0], (*both[1][:2], REDIRECT)], **config)
    old.log.wait_text(" listen ", nth=2)
    load = Load(here, pages, backend)

    def restart():
        time.sleep(0.5)
        old.signal(signal.SIGUSR2)
        assert old.process.wait(PATIENCE) == 0
        following().log.wait_text(" listen ", nth=2)
        old.log.wait_text(r"\[\d+\] stop sessions=0")
        eventually(lambda: load.opened == 400)  # each came again, once
    asyncio.run(load.run(200, restart))
    assert set(load.newcomers) == {"426", "308"}, load.newcomers
    begin = seconds(old.log.wait_text(r"\] stop signal=SIGUSR2 sessions=2\d\d"))
    told = [line for line in old.log.lines if re.search(r"\] close .* by=proxy why=drain ", line.text)]
    assert len(told) == 200
    assert max(map(seconds, told)) <= begin + 6 + max(0.1, load.late)
    assert spread_of(told) <= 3 * 200 / 54 * (1 + load.late / 0.1)
