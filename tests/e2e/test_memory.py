"""What is left behind, and what rests: descriptors after many sessions, memory of idle ones."""

import random
import re
import subprocess

import pytest

from conftest import whole_config
from harness import INSTRUMENTED, SANITIZE, WS, WSS, build, config_text, eventually, run_once
from peers import (accept_of, client_context, connect, head, open_tunnel, switching, tcp,
                   upgrade)

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]


# Endings: each opens a session of its own and ends it in its own way.

def closed_by_client(p, backend, kind, tls):
    client, server = open_tunnel(p, backend, kind, **tls)
    client.close()
    server.close()


def closed_by_backend(p, backend, kind, tls):
    client, server = open_tunnel(p, backend, kind, **tls)
    server.close()
    client.close()


def reset_by_client(p, backend, kind, tls):
    client, server = open_tunnel(p, backend, kind, **tls)
    client.reset()
    server.close()


def reset_by_backend(p, backend, kind, tls):
    client, server = open_tunnel(p, backend, kind, **tls)
    server.reset()
    client.close()


def refused_request(p, backend, kind, tls):
    client = connect(p, kind, **tls)
    client.send(upgrade(Host=None))
    client.read_to_end()
    client.close()


def refused_by_backend(p, backend, kind, tls):
    client = connect(p, kind, **tls)
    client.send(upgrade())
    with backend.accept() as server:
        server.read_head()
        server.send(head("HTTP/1.1 403 No", {"Content-Length": "0"}))
        client.read_to_end()
    client.close()


def wrong_accept(p, backend, kind, tls):
    client = connect(p, kind, **tls)
    client.send(upgrade())
    with backend.accept() as server:
        server.read_head()
        server.send(switching(Sec_WebSocket_Accept=accept_of("wrong")))
        client.read_to_end()
    client.close()


def left_inside_the_head(p, backend, kind, tls):
    client = connect(p, kind, **tls)
    client.send(b"GET / HT")
    client.close()


def left_while_the_backend_thinks(p, backend, kind, tls):
    client = connect(p, kind, **tls)
    client.send(upgrade())
    with backend.accept() as server:
        client.close()
        server.read_to_end()


def left_at_once(p, backend, kind, tls):
    tcp(p, kind).close()


def spoke_noise(p, backend, kind, tls):
    with tcp(p, kind) as client:
        client.send(b"\x16\x03\x01\x00\x05noise\r\n\r\n")
        client.half_close()
        try:
            client.read_to_end()
        except ConnectionResetError:
            pass


ENDINGS = [closed_by_client, closed_by_backend, reset_by_client, reset_by_backend,
           refused_request, refused_by_backend, wrong_accept, left_inside_the_head,
           left_while_the_backend_thinks, left_at_once, spoke_noise]


def endings(p):
    return len(p.log.all("close")) + len(p.log.all("reject"))


def test_1000_sessions_of_all_endings_leave_no_descriptor(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=BOTH, max_sessions=64, linger_ms=1000)
    context = client_context()
    with connect(p, context=context) as client:
        session = client.tls.session
    eventually(lambda: p.totals()["sessions"] == "0")
    before = p.descriptors()
    dice = random.Random(7)
    for n in range(1000):
        kind = WSS if n % 2 else WS
        tls = {"context": context, "session": session} if kind == WSS else {}
        dice.choice(ENDINGS)(p, backend, kind, tls)
    eventually(lambda: endings(p) >= 1001)
    eventually(lambda: p.descriptors() == before)
    totals = p.totals()
    assert [totals[pool] for pool in ("sessions", "records", "heads")] == ["0"] * 3


def test_all_sessions_of_the_table_can_be_used_again_and_again(proxy, scripted):
    """A slot that is lost would be missed at the end."""
    backend = scripted()
    p = proxy(backend, listeners=BOTH, max_sessions=8, max_busy=8, linger_ms=200)
    for ending in ENDINGS * 3:
        ending(p, backend, WS, {})
    tunnels = [open_tunnel(p, backend, WS) for _ in range(8)]
    assert len(tunnels) == 8


@pytest.mark.usefixtures("many_descriptors")
def test_memory_of_1000_idle_sessions(proxy, scripted, record_property):
    """Private memory of a session that has spoken and rests; README's number is 4.5 KB."""
    backend = scripted()
    p = proxy(backend, max_sessions=1024, max_per_ip=0, keepalive_s=0)
    context = client_context()
    start = p.memory_kb()
    first, _ = open_tunnel(p, backend, context=context)
    session = first.tls.session
    tunnels = [open_tunnel(p, backend, context=context, session=session) for _ in range(999)]
    for client, server in tunnels:
        client.send(b"x" * 100)
        assert server.read(100) == b"x" * 100
        server.send(b"y" * 100)
        assert client.read(100) == b"y" * 100
    eventually(lambda: p.totals()["records"] == p.totals()["heads"] == "0")
    each = (p.memory_kb() - start) / 1000
    record_property("measured", f"{each:.2f} KB for each of 1000 idle sessions, "
                                f"{start} KB for the idle program")
    if not SANITIZE:
        assert each < 8
    client, server = tunnels[500]
    client.send(b"awake")
    assert server.read(5) == b"awake"


def send_until_full(stream, data):
    """Sends that data again and again until all buffers up to the other end, who does not read, are full."""
    stream.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            stream.sock.sendall(data())


def memory_told(entries):
    told = run_once(entries, "-t").stdout
    return map(int, re.search(r"at most (\d+) KB .* busy of (\d+) bytes", told).groups())


@pytest.mark.skipif(SANITIZE, reason="sanitizers have memory of their own")
@pytest.mark.parametrize("tls_backends", [0, 1])
def test_ceiling_is_that_of_all_tables(place, tls_backends):
    entries = whole_config([place()], {"tls_backends": tls_backends})
    ceiling, _ = memory_told(entries)
    sizes = subprocess.run(["size", "-B", build(config_text(entries))], capture_output=True,
                           text=True, check=True).stdout
    data, bss = map(int, sizes.splitlines()[1].split()[1:3])
    assert ceiling * 1024 <= data + bss < ceiling * 1024 + 16384


@pytest.mark.skipif(INSTRUMENTED, reason="these tools have memory of their own")
@pytest.mark.parametrize("kind", [WSS, WS])
def test_every_slot_and_buffer_in_use_stays_below_the_ceiling(proxy, scripted, kind):
    """Of 8 sessions: as long a head as there can be, then both ways full. (What can't go on is not read
    once half of the buffers are in use.)"""
    backend = scripted()
    config = {"listeners": BOTH, "max_sessions": 8, "max_busy": 8, "stall_ms": 60000}
    p = proxy(backend, **config)
    ceiling, busy = memory_told(whole_config([backend], config))
    before = p.memory_kb()
    clients = [connect(p, kind) for _ in range(8)]
    long_head = upgrade(Filler="x" * 7800)
    for client in clients:
        client.send(long_head[:-1])
    eventually(lambda: p.totals()["heads"] == "8")
    servers = []
    for client in clients:
        client.send(long_head[-1:])
        servers.append(backend.accept())
        servers[-1].read_head()
        servers[-1].send(switching())
        client.read_head()
    for client, server in zip(clients, servers):
        send_until_full(server, lambda: bytes(1 << 20))
        send_until_full(client, lambda: client.records(bytes(16000)) if kind == WSS else bytes(16000))
    assert p.totals()["sessions"] == "8" and int(p.totals()["records"]) >= 4
    grown = p.memory_kb() - before
    assert 4 * busy * 0.75 / 1024 < grown < ceiling
