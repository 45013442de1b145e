"""What happens at each limit: sessions, addresses, buffers, descriptors, time."""

import contextlib
import ctypes
import os
import resource
import selectors
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

import pki
from conftest import whole_config
from harness import PATIENCE, RUN, SANITIZE, WS, WSS, build, config_text, eventually
from more import TLS_NOVERIFY, ScriptedTls, answer, idle_cpu, request
from peers import (Stream, ask, asking, client_hello, connect, open_tunnel, pattern, switching,
                   tcp, tunnel_on, upgrade)
from test_backends import fill


def sit(p, backend):
    """A client that says more than its request, with a backend that says nothing: bytes that nobody
    takes, of a record that is not at its end."""
    client, server = asking(p, backend, upgrade() + b"early")
    return client, server


def records_are(p, count):
    eventually(lambda: p.totals()["records"] == str(count))


def heads_are(p, count):
    eventually(lambda: p.totals()["heads"] == str(count))


# ---- max_per_ip ----

def test_max_per_ip(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_per_ip=2)
    first, _ = open_tunnel(p, backend, source="127.0.0.2")
    open_tunnel(p, backend, source="127.0.0.2")
    third = tcp(p, source="127.0.0.2")
    with pytest.raises((ConnectionResetError, AssertionError)):
        third.read(1)
    line = p.log.wait_ending("per-ip", status="-")
    assert line["client"].startswith("127.0.0.2:")
    open_tunnel(p, backend, source="127.0.0.3")


def test_place_within_max_per_ip_is_given_back(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_per_ip=1, linger_ms=100)
    for n in range(5):
        client, server = open_tunnel(p, backend)
        client.close()
        server.close()
        p.log.wait("close", nth=n + 1)


def test_no_limit_per_ip(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_per_ip=0)
    for _ in range(140):        # more than the default of 128
        open_tunnel(p, backend)


@pytest.mark.parametrize("bits, third", [(48, "per-ip"), (64, None)])
def test_source_bits6(proxy, scripted, network, bits, third):
    """Three networks of one site, two sessions at most, and then somebody else."""
    backend = scripted()
    p = proxy(backend, listeners=[("::", "0", WS)], max_per_ip=2, source_bits6=bits)
    for n in (1, 2):
        open_tunnel(p, backend, source=f"2001:db8:0:{n}::1")
    if third:
        assert tcp(p, source="2001:db8:0:3::1").read_to_end() == b""
        p.log.wait_ending(third, status="-")
    else:
        open_tunnel(p, backend, source="2001:db8:0:3::1")
    open_tunnel(p, backend, source="2001:db8:1:1::1")


# ---- max_sessions ----

PLAIN = [("127.0.0.1", "0", WS)]


def test_full_table_makes_clients_wait_for_a_place(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=PLAIN, max_sessions=2, max_busy=2)
    tunnels = [open_tunnel(p, backend) for _ in range(2)]
    waiting = connect(p)
    waiting.send(upgrade())
    assert idle_cpu(p) < 0.1
    assert not waiting.has_input() and backend.untouched()
    for end in tunnels[0]:
        end.close()
    server = backend.accept()
    server.read_head()
    server.send(switching())
    assert waiting.read_head().status == 101


def test_full_table_is_told(proxy, scripted):
    """Once when it begins and once when it ends, however often places change hands meanwhile."""
    backend = scripted()
    p = proxy(backend, listeners=PLAIN, max_sessions=4, max_busy=4)
    tunnels = [open_tunnel(p, backend) for _ in range(4)]
    p.log.wait("full", sessions="4")
    assert not p.log.all("room")
    for n in range(3):
        for end in tunnels.pop():
            end.close()
        p.log.wait("close", nth=n + 1)
        tunnels.append(open_tunnel(p, backend))
    assert p.totals()["full"] == "1"
    assert len(p.log.all("full")) == 1 and len(p.log.all("room")) <= 1
    for end in tunnels.pop():
        end.close()
    p.log.wait("room")


def test_waiting_client_that_leaves_is_not_waited_for(proxy, scripted):
    """Its end is seen while others have the buffers that it needs."""
    backend = scripted()
    p = proxy(backend, listeners=PLAIN, max_busy=1, stall_ms=60000)
    sit(p, backend)
    records_are(p, 1)
    waiting = [connect(p) for _ in range(6)]
    for client in waiting:
        client.send(upgrade())
    eventually(lambda: p.totals()["sessions"] == "7")
    waiting[0].close()
    waiting[1].reset()
    waiting[2].half_close()
    p.log.wait_ending("eof", nth=2)
    p.log.wait_ending("reset")
    assert p.totals()["sessions"] == "4" and backend.untouched()


def test_full_table_does_not_touch_tunnels(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=PLAIN, max_sessions=2, max_busy=2)
    tunnels = [open_tunnel(p, backend) for _ in range(2)]
    waiting = [connect(p) for _ in range(5)]
    for client, server in tunnels * 3:
        client.send(b"still mine")
        assert server.read(10) == b"still mine"
    assert len(waiting) == 5 and not p.log.all("close")


@pytest.mark.parametrize("said", [b"", client_hello()[:-1]], ids=["nothing", "half-a-hello"])
@pytest.mark.parametrize("source", [lambda n: "127.0.0.2", lambda n: f"127.0.0.{n + 2}"],
                         ids=["one-address", "many-addresses"])
def test_oldest_unfinished_one_gives_way_to_newcomers(proxy, scripted, source, said):
    """Whatever its address."""
    backend = scripted()
    p = proxy(backend, max_sessions=4, max_busy=4, handshake_ms=600000, stall_ms=600000)
    client, server = open_tunnel(p, backend)
    lurkers = []
    for n in range(3):
        lurkers.append(tcp(p, source=source(n)))
        lurkers[n].send(said)
        eventually(lambda: p.totals()["sessions"] == str(n + 2))
    tunnels = [open_tunnel(p, backend) for _ in range(2)]
    lines = [p.log.wait_ending("displaced", nth=n, status="-") for n in (1, 2)]
    ports = [str(lurker.sock.getsockname()[1]) for lurker in lurkers]
    assert [line["client"].rpartition(":")[2] for line in lines] == ports[:2]
    assert not lurkers[2].has_input()
    for client, server in [(client, server), *tunnels]:
        client.send(b"untouched")
        assert server.read(9) == b"untouched"


def test_flood_of_silent_connections_keeps_nobody_out(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_sessions=8, max_busy=8, handshake_ms=600000)
    lurkers = [tcp(p, source=f"127.0.0.{n % 3 + 2}") for n in range(20)]
    for _ in range(3):
        open_tunnel(p, backend, source="127.0.0.2")
    assert len(lurkers) == 20


def test_last_place_is_the_first_newcomers(proxy, scripted):
    """Many wait for it; they do not displace each other before one can ask."""
    backend = scripted()
    p = proxy(backend, listeners=PLAIN, max_sessions=4, max_busy=4)
    tunnels = [open_tunnel(p, backend) for _ in range(4)]
    newcomers = [connect(p) for _ in range(50)]
    for client in newcomers:
        client.send(upgrade())
    for end in tunnels.pop():
        end.close()
    server = backend.accept()
    server.read_head()
    server.send(switching())
    assert newcomers[0].read_head().status == 101
    assert not p.log.all("reject")


# ---- the dead make room ----

def neighbours_tunnel(p, neighbour, backend):
    client = Stream(neighbour.connect(p.address()))
    return client, tunnel_on(client, backend)


UPLINK = [("10.77.0.1", "0", WS)]


@pytest.mark.parametrize("spoken", [0, 6], ids=["silent", "spoken-to"])
def test_dead_make_room(proxy, scripted, neighbour, spoken):
    """By default. Those that their backend has spoken to meanwhile can't be probed: what it said is
    sent again and again."""
    backend = scripted()
    p = proxy(backend, listeners=UPLINK, max_sessions=6, max_busy=2)
    tunnels = [neighbours_tunnel(p, neighbour, backend) for _ in range(6)]
    neighbour.run("ip route add blackhole 10.77.0.1/32")
    for _, server in tunnels[:spoken]:
        server.send(b"are you there?")
    open_tunnel(p, backend)
    p.log.wait("close", by="client", why="timeout")


def test_dead_are_found_among_the_living(proxy, scripted, neighbour):
    backend = scripted()
    p = proxy(backend, listeners=UPLINK, max_sessions=40, max_busy=2)
    alive = [open_tunnel(p, backend) for _ in range(20)]
    dead, _ = neighbours_tunnel(p, neighbour, backend)
    alive += [open_tunnel(p, backend) for _ in range(19)]
    neighbour.run("ip route add blackhole 10.77.0.1/32")
    alive.append(open_tunnel(p, backend))
    p.log.wait("close")
    [line] = p.log.all("close")
    assert line["id"] == "21" and line["why"] == "timeout"
    for client, server in alive:
        client.send(b"untouched")
        assert server.read(9) == b"untouched"


def client_options(p, client):
    """How the proxy's kernel finds out whether that client is there."""
    pidfd, libc = os.pidfd_open(p.pid), ctypes.CDLL(None, use_errno=True)
    try:
        for link in p.files():
            if not os.readlink(link).startswith("socket:"):
                continue
            fd = libc.syscall(438, pidfd, int(link.name), 0)    # pidfd_getfd
            if fd < 0:
                pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
            with socket.socket(fileno=fd) as sock:
                try:
                    if sock.getpeername() != client.sock.getsockname():
                        continue
                except OSError:
                    continue
                tcp_options = [sock.getsockopt(socket.IPPROTO_TCP, name) for name in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
                return (sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and tcp_options)
    finally:
        os.close(pidfd)
    raise KeyError("no such client")


@pytest.mark.skipif(bool(RUN), reason="descriptors of another process")
@pytest.mark.parametrize("config, options", [
    ({}, (120000, [60, 15, 4])), ({"keepalive_s": 0, "user_timeout_ms": 0}, (0, 0))],
    ids=["default", "off"])
def test_living_keep_their_place_however_long_one_knocks(proxy, scripted, config, options):
    """They are asked, answer, and are left alone as before."""
    backend = scripted()
    p = proxy(backend, max_sessions=3, max_busy=3, **config)
    tunnels = [open_tunnel(p, backend) for _ in range(3)]
    client, server = tunnels[0]
    waiting = tcp(p)
    for _ in range(2):
        eventually(lambda: client_options(p, client) == (0, [2, 1, 127]))
        assert idle_cpu(p) < 0.1
        eventually(lambda: client_options(p, client) == options)
    waiting.close()
    eventually(lambda: all(client_options(p, client) == options for client, _ in tunnels))
    for client, server in tunnels:
        client.send(b"still mine")
        assert server.read(10) == b"still mine"
    assert not p.log.all("close")


@pytest.mark.skipif(bool(RUN), reason="descriptors of another process")
def test_late_answer_is_one(proxy, scripted, neighbour):
    """The first probes are lost, or their answers."""
    backend = scripted()
    p = proxy(backend, listeners=UPLINK, max_sessions=1, max_busy=1)
    client, server = neighbours_tunnel(p, neighbour, backend)
    neighbour.run("ip route add blackhole 10.77.0.1/32")
    before = neighbour.segments()
    waiting = tcp(p)
    eventually(lambda: neighbour.segments() > before + 1)
    neighbour.run("ip route del blackhole 10.77.0.1/32")
    eventually(lambda: client_options(p, client) == (120000, [60, 15, 4]))
    client.send(b"still mine")
    assert server.read(10) == b"still mine"
    assert not waiting.has_input()


# ---- max_busy and stall_ms ----

def test_session_that_sits_on_the_last_buffer_is_ended_when_others_wait(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_busy=1, stall_ms=400)
    sitting, _ = sit(p, backend)
    records_are(p, 1)
    open_tunnel(p, backend)     # needs that buffer
    assert sitting.read_head().status == 504


def test_session_that_sits_on_a_buffer_may_stay_while_none_waits(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_busy=2, stall_ms=200)
    sitting, server = sit(p, backend)
    records_are(p, 1)
    threading.Event().wait(0.6)         # there is nothing to see, for as long as it takes
    open_tunnel(p, backend)
    server.send(switching())
    assert server.read(5) == b"early"
    assert sitting.read_head().status == 101


@pytest.mark.parametrize("max_busy", [1, 4])
def test_clients_that_read_nothing_are_not_felt(proxy, scripted, max_busy):
    """More of them than buffers: what can't go on stays where it is."""
    backend = scripted()
    p = proxy(backend, max_busy=max_busy, stall_ms=60000)
    stuck = []
    for _ in range(3 * max_busy):
        client, server = open_tunnel(p, backend)
        server.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                server.sock.send(bytes(100000))
        stuck.append(client)
    client, server = open_tunnel(p, backend)
    client.send(b"a question")
    assert server.read(10) == b"a question"
    assert int(p.totals()["records"]) <= max_busy // 2
    for client in stuck:
        assert client.read(1 << 20) == bytes(1 << 20)


def half_a_record(client):
    client.sock.sendall(client.records(bytes(16000))[:8000])


@pytest.mark.parametrize("max_busy", [1, 4])
def test_records_in_pieces_are_not_felt(proxy, scripted, max_busy):
    """More tunnels than buffers, each amid a record, and ends that come there."""
    backend = scripted()
    p = proxy(backend, max_busy=max_busy, stall_ms=60000, frames=0)
    tunnels = [open_tunnel(p, backend) for _ in range(3 * max_busy + 1)]
    records = [client.records(pattern(16000, n)) for n, (client, _) in enumerate(tunnels)]
    for cut in 3, 5, 8000:
        for (client, _), record in zip(tunnels, records):
            client.sock.sendall(record[:cut])
        records = [record[cut:] for record in records]
        other, server = open_tunnel(p, backend)
        other.send(b"a question")
        assert server.read(10) == b"a question"
        eventually(lambda: int(p.totals()["records"]) <= max_busy // 2)
    gone = tunnels.pop()
    gone[0].sock.shutdown(socket.SHUT_WR)
    assert gone[1].read_to_end() == b""
    for n, ((client, server), record) in enumerate(zip(tunnels, records)):
        client.sock.sendall(record)
        assert server.read(16000) == pattern(16000, n)
    eventually(lambda: p.totals()["records"] == "0")


@pytest.mark.parametrize("sent", [1, 4, 5, 20, -1])
def test_half_hellos_are_not_felt(proxy, scripted, sent):
    backend = scripted()
    p = proxy(backend, max_busy=2)
    sitting = [tcp(p) for _ in range(10)]
    for client in sitting:
        client.send(client_hello()[:sent])
    eventually(lambda: p.totals()["sessions"] == "10")
    assert p.totals()["records"] == p.totals()["heads"] == "0"
    open_tunnel(p, backend)
    for client in sitting:
        client.send(client_hello()[sent:])
        assert client.read(1) == b"\x16"
    assert p.totals()["records"] == p.totals()["heads"] == "0"     # nor for their second flights
    open_tunnel(p, backend)
    for client in sitting:
        client.close()


def hung_tls(scripted, keeper):
    backend = scripted()
    return backend, backend.entry(tls=TLS_NOVERIFY), "tls-timeout"


def hung_connect(scripted, keeper):
    backend = scripted(backlog=0)
    fill(backend, keeper)
    return backend, backend.entry(), "timeout"


LONG = {"X_Long": "x" * 2000}       # for it to wait without a place of its own


@pytest.mark.parametrize("hung", [hung_tls, hung_connect])
def test_requests_behind_a_hung_backend_are_not_felt(proxy, scripted, keeper, hung):
    backend, entry, _ = hung(scripted, keeper)
    alive = scripted()
    p = proxy({**entry, "path": "/hung"}, alive, tls_backends=1, max_busy=1)
    clients = [connect(p) for _ in range(5)]
    for client in clients:
        client.send(upgrade(target="/hung"))
    if hung is hung_tls:
        for _ in clients:
            backend.accept()
    assert p.totals()["heads"] == "0"
    open_tunnel(p, alive)
    assert not p.log.all("reject")


@pytest.mark.parametrize("hung", [hung_tls, hung_connect])
def test_stall_is_the_backends_when_it_is_silent(proxy, scripted, keeper, hung):
    """Who waits for one that hangs, with a long head, goes to the next when others want its place, and
    the backend is put aside as after its own time."""
    backend, entry, why = hung(scripted, keeper)
    alive = scripted()
    p = proxy(entry, alive.entry(backup=1), tls_backends=1, max_busy=1, stall_ms=400,
              connect_ms=60000, handshake_ms=60000, fail_ms=600000)
    clients = [connect(p) for _ in range(3)]
    for client in clients:              # two have places, and one waits
        client.send(upgrade(**LONG))
    heads_are(p, 2)
    for _ in range(2):                  # who gave its place up, and who got it
        server = alive.accept()
        server.read_head()
        server.send(switching())
    p.log.wait("open", nth=2)
    p.log.wait("backend", name=backend.name, down=True, why=why)
    assert not p.log.all("reject")


@pytest.mark.parametrize("hung", [hung_tls, hung_connect])
def test_stall_behind_the_last_backend_is_answered(proxy, scripted, keeper, hung):
    backend, entry, why = hung(scripted, keeper)
    p = proxy(entry, tls_backends=1, max_busy=1, stall_ms=400, connect_ms=60000,
              handshake_ms=60000)
    clients = [connect(p) for _ in range(3)]
    for client in clients:
        client.send(upgrade(**LONG))
    p.log.wait("reject", status="502")
    p.log.wait("backend", name=backend.name, down=True, why=why)


def lurk(p, address, count):
    """Clients amid a long head."""
    lurkers = [connect(p, source=address) for _ in range(count)]
    for lurker in lurkers:
        lurker.send(upgrade(**LONG)[:-2])
    return lurkers


def test_short_heads_in_pieces_are_not_felt(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_busy=1)
    clients = [connect(p) for _ in range(10)]
    for client in clients:
        client.send(upgrade()[:-2])
    p.log.wait("listen")
    open_tunnel(p, backend)
    assert p.totals()["heads"] == "0"
    for client in clients:
        client.send(upgrade()[-2:])
        server = backend.accept()
        server.read_head()
        server.send(switching())
        assert client.read_head().status == 101


def test_long_heads_of_one_address_do_not_keep_others_out(proxy, scripted):
    """They take places from themselves, and give them up to others."""
    backend = scripted()
    p = proxy(backend, max_busy=4)
    [honest] = lurk(p, "127.0.0.3", 1)
    lurkers = lurk(p, "127.0.0.2", 20)
    heads_are(p, 8)
    for n in range(2):
        client = lurk(p, "127.0.0.4", 1)[0]
        client.send(b"\r\n")
        backend.accept()
        p.log.wait("reject", nth=n + 1, status="408")
    honest.send(b"\r\n")
    backend.accept()
    assert {line["client"].rpartition(":")[0] for line in p.log.all("reject")} == {"127.0.0.2"}
    assert len(lurkers) == 20


def test_crowd_with_long_heads_waits_and_is_served(proxy, scripted):
    backend = scripted()
    p = proxy(backend, max_busy=2)
    clients = lurk(p, "127.0.0.2", 10)
    heads_are(p, 4)
    for client in clients:
        client.send(b"\r\n")
    for client in clients:
        server = backend.accept()
        server.read_head()
        server.send(switching())
    for client in clients:
        assert client.read_head().status == 101
    assert not p.log.all("reject")


def test_sessions_wait_for_a_buffer_and_get_it(proxy, scripted):
    """Ten clients in the middle of a request, two buffers."""
    backend = scripted()
    p = proxy(backend, max_busy=2, stall_ms=60000)
    clients = [threading.Thread(target=lambda: connect(p).send(upgrade())) for _ in range(10)]
    for client in clients:
        client.start()
    for _ in clients:
        server = backend.accept()
        server.read_head()
        server.send(switching())
    for client in clients:
        client.join()
    p.log.wait("open", nth=10)


class Flow:
    """Bytes without end from one side of a tunnel to the other, which is slow once it drinks at all."""

    def __init__(self, source, sink):
        self.poured = self.drunk = 0
        self.thirst = threading.Event()
        self.threads = [threading.Thread(target=self._pour, args=(source,)),
                        threading.Thread(target=self._drink, args=(sink,))]
        for thread in self.threads:
            thread.start()

    def _pour(self, source):
        with contextlib.suppress(OSError):
            while True:
                source.send(bytes(50000))
                self.poured += 1

    def _drink(self, sink):
        self.thirst.wait()
        with contextlib.suppress(OSError, AssertionError):
            while True:
                sink.read(8000)
                self.drunk += 1
                threading.Event().wait(0.005)


@pytest.mark.parametrize("kind, ways", [(WSS, ["up"]), (WSS, ["down"]), (WS, ["up"]), (WS, ["down"]),
                                        (WS, ["up", "down"])])
def test_bulk_takes_turns(proxy, scripted, kind, ways):
    """Four tunnels that always have something on its way, two buffers: none of them is left out, nor
    is a newcomer."""
    backend = scripted()
    p = proxy(backend, max_busy=2, stall_ms=60000, listeners=[("127.0.0.1", "0", kind)])
    tunnels = [open_tunnel(p, backend) for _ in range(4)]
    flows = [Flow(*(pair if way == "up" else pair[::-1])) for pair in tunnels for way in ways]

    def all_is_full():
        before = [flow.poured for flow in flows]
        threading.Event().wait(0.2)
        return before == [flow.poured for flow in flows]

    try:
        eventually(all_is_full)
        for flow in flows:
            flow.thirst.set()
        eventually(lambda: all(flow.drunk > 20 for flow in flows))
        client, server = open_tunnel(p, backend)
        for _ in range(5):
            client.send(b"a question")
            assert server.read(10) == b"a question"
            server.send(b"an answer")
            assert client.read(9) == b"an answer"
        before = [flow.drunk for flow in flows]
        eventually(lambda: all(flow.drunk > n + 20 for flow, n in zip(flows, before)))
        assert not p.log.all("close")
    finally:
        for stream in [stream for pair in tunnels for stream in pair]:
            with contextlib.suppress(OSError):          # the other end's may have ended it
                stream.sock.shutdown(socket.SHUT_RDWR)
        for flow in flows:
            flow.thirst.set()
            for thread in flow.threads:
                thread.join()


# ---- descriptors ----

@contextlib.contextmanager
def descriptors_left(p, n):
    """While this lasts, it gets n more descriptors and then EMFILE."""
    used = {int(fd.name) for fd in p.files()}
    free = [fd for fd in range(len(used) + n + 1) if fd not in used]
    limit = resource.prlimit(p.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(p.pid, resource.RLIMIT_NOFILE, (free[n], limit[1]))
    yield
    resource.prlimit(p.pid, resource.RLIMIT_NOFILE, limit)


def test_exhausted_descriptors_stop_the_listener_not_the_sessions(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=PLAIN)
    client, server = open_tunnel(p, backend)
    with descriptors_left(p, 0):
        waiting = connect(p)
        waiting.send(upgrade())
        assert idle_cpu(p) < 0.1
        client.send(b"alive")
        assert server.read(5) == b"alive"
        assert backend.untouched()
    backend.accept().send(switching())
    assert waiting.read_head().status == 101


def test_limit_below_what_it_has_is_survived(proxy, scripted):
    """poll() fails then; signals are heard, and all goes on when the limit is lifted."""
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    limit = resource.prlimit(p.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(p.pid, resource.RLIMIT_NOFILE, (1, limit[1]))
    p.totals()
    assert idle_cpu(p) < 0.1
    resource.prlimit(p.pid, resource.RLIMIT_NOFILE, limit)
    client.send(b"alive")
    assert server.read(5) == b"alive"


def test_no_descriptor_for_the_backend(proxy, scripted):
    """Only the client's fits: it gets an answer, and the next client is served."""
    backend = scripted()
    p = proxy(backend, listeners=PLAIN)
    open_tunnel(p, backend)
    with descriptors_left(p, 1):
        assert ask(p, upgrade())[0].status == 503
    p.log.wait_ending("no-resources", status="503")
    open_tunnel(p, backend)
    assert not p.log.all("backend")


# ---- local ports ----

LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.fixture
def ports_left(network):
    """Leaves so many local ports, an even number, in a network of its own, in which clients bring their own."""
    own = iter(range(20000, 30000))

    def leave(n):
        LOCAL_PORTS.write_text(f"61000 {61000 + n - 1}")
    leave.client = lambda p: Stream(socket.create_connection(p.address(), PATIENCE,
                                                             ("127.0.0.1", next(own))))
    return leave


def outcome(client, backend):
    """The status of an answer; 101: by this backend."""
    client.send(upgrade())
    with selectors.DefaultSelector() as selector:
        selector.register(backend.listener, selectors.EVENT_READ, backend)
        selector.register(client.sock, selectors.EVENT_READ)
        for key, _ in selector.select(PATIENCE):
            if key.data:
                server = backend.accept()
                server.read_head()
                server.send(switching())
    return client.read_head().status


def test_no_local_port_is_not_the_backends_fault(proxy, scripted, ports_left):
    backend = scripted()
    p = proxy(backend, listeners=PLAIN, fail_ms=600000)
    ports_left(2)
    assert [outcome(ports_left.client(p), backend) for _ in range(4)] == [101, 101, 503, 503]
    p.log.wait_ending("no-resources", status="503")
    ports_left(4)
    assert outcome(ports_left.client(p), backend) == 101
    assert not p.log.all("backend")


def test_no_local_port_for_one_backend_leaves_the_next(proxy, scripted, ports_left):
    """Ports count for each destination."""
    one, two = scripted(), scripted()
    p = proxy(one, two.entry(backup=1), listeners=PLAIN)
    ports_left(2)
    assert [outcome(ports_left.client(p), b) for b in (one, one, two, two)] == [101] * 4
    assert outcome(ports_left.client(p), two) == 503
    assert not p.log.all("backend")


def test_address_of_a_family_that_is_not_here(proxy, scripted, place, network):
    """EADDRNOTAVAIL as well: nobody's fault, the next one serves."""
    subprocess.run(["ip", "addr", "del", "::1/128", "dev", "lo"], check=True)
    backend = scripted()
    p = proxy({"host": "::1", "port": place().port}, backend, listeners=PLAIN)
    for _ in range(3):
        open_tunnel(p, backend)
    assert not p.log.all("backend")
    backend.close()
    assert ask(p, upgrade())[0].status == 503
    p.log.wait("backend", name=backend.name, down=True, why="refused")
    assert len(p.log.all("backend")) == 1


def as_nobody():
    """Options of a process that can't raise its limits, if we are one that could."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


@pytest.fixture
def anyones(place):
    """A configuration, and its binary, in a directory that anyone may read."""
    path = Path(tempfile.mkdtemp(prefix="wssproxy-"))
    path.chmod(0o755)
    for name in ("ec256.pem", "ec256.key"):
        shutil.copy(pki.DIR / name, path)
        if os.geteuid() == 0:
            os.chown(path / name, 65534, 65534)
    entries = whole_config([place()], {"certs": [(None, path / "ec256.pem", path / "ec256.key")]})
    yield path, entries
    shutil.rmtree(path)


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.skipif(bool(RUN), reason="valgrind has limits of its own")
def test_soft_limit_of_descriptors_is_raised(proxy, place):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    low = ["sh", "-c", 'ulimit -S -n 64 && exec "$0" "$@"']
    p = proxy(place(), popen={"wrapper": low})
    assert 1024 < resource.prlimit(p.pid, resource.RLIMIT_NOFILE)[0] <= hard


def test_hard_limit_too_low_for_the_table_is_said_at_start(anyones):
    path, entries = anyones
    binary = shutil.copy(build(config_text(entries)), path)
    result = subprocess.run(["sh", "-c", 'ulimit -n 64 && exec "$0"', binary], text=True,
                            capture_output=True, timeout=PATIENCE, **as_nobody())
    assert result.returncode == 1
    assert "max_sessions" in result.stderr


# ---- the ceiling ----

def test_memory_does_not_grow_with_a_stalled_client(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    stalled, flooding = open_tunnel(p, backend)
    before = p.memory_kb("Rss")
    flooding.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            flooding.sock.sendall(bytes(1 << 20))
    assert p.memory_kb("Rss") - before < (4000 if SANITIZE else 200)
