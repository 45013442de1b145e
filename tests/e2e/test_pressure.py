"""What is scarce is not held by those who wait: many clients or backends that stop where it hurts,
all at a time, and beside them others who must not feel it. Nobody moves meanwhile, and at its end
nobody was cut off, so whoever got in did not wait for them. Times are config.def.h's own, and
nothing here is measured by the clock."""

import asyncio
import random
import signal
import ssl
import threading
import time

import pytest

from conftest import certificate
from harness import FORWARD, PATIENCE, RUN, WS, WSS, eventually
from more import TLS_NOVERIFY, ScriptedTls, answer, idle_cpu, request
from peers import (TlsStream, client_context, client_hello, connect, open_tunnel, pattern,
                   play, switching, tcp, upgrade)

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]
FEW, MANY = 4, 12       # max_busy, and those who stop: more than there are buffers
BIG = pattern(16384)    # a record of the largest size


def one(_):
    return "127.0.0.2"


def each(n):
    return f"127.0.1.{n + 1}"


@pytest.fixture
def backend(scripted):
    return scripted()


@pytest.fixture
def pressed(proxy, backend):
    """A proxy with few buffers, in front of `backend`."""
    def start(*backends, **config):
        return proxy(*(backends or [backend]), **{"http": FORWARD, "listeners": BOTH,
                                                  "max_busy": FEW, **config})
    return start


def seen(p):
    """What was sent before is in the kernel; now the proxy has had it, too, if it ever wants to."""
    for _ in range(3):
        p.totals()


def is_idle(p):
    """Nothing spins while they wait."""
    eventually(lambda: idle_cpu(p) < 0.1)


def cut_off(p):
    """Sessions that have ended. Those who only wait are among them if they were to blame."""
    return p.log.all("close") + p.log.all("reject")


def newcomers(p, backend, sources=("127.0.0.2", "127.0.9.9"), cut=0):
    """One from each address, on each listener: all get in, and their echoes; they stay."""
    pairs = [open_tunnel(p, backend, kind, source=source) for source in sources
             for kind in (WSS, WS)]
    for pair in pairs:
        chat(*pair)
    assert len(cut_off(p)) <= cut
    return pairs


def chat(client, server):
    for n in range(3):
        client.send(b"question %d" % n)
        assert server.read(10) == b"question %d" % n
        server.send(b"answer %d" % n)
        assert client.read(8) == b"answer %d" % n


# ---- records that have begun ----

# How much of a record is there.
PARTS = {"3-bytes": lambda r: 3, "its-header": lambda r: 5, "half": lambda r: len(r) // 2,
         "all-but-a-byte": lambda r: len(r) - 1}


@pytest.fixture(params=PARTS)
def part(request):
    return PARTS[request.param]


def tunnels_of(p, backend, source, parked):
    """Many, which are all parked or none of them."""
    tunnels = [open_tunnel(p, backend, source=source(n)) for n in range(MANY)]
    if parked:
        eventually(lambda: p.parked() >= 2 * MANY)
    return tunnels


PARKED = pytest.mark.parametrize("parked", [{"park_ms": 600000}, {"park_ms": 50}],
                                 ids=["awake", "parked"])


def stop_within(streams, part):
    """Each sends a part of a record; the rests."""
    rests = []
    for stream in streams:
        record = stream.records(BIG)
        assert len(record) < 17000
        stream.sock.sendall(record[:part(record)])
        rests.append(record[part(record):])
    return rests


@PARKED
@pytest.mark.parametrize("how", ["close", "reset"])
def test_ends_in_the_middle_of_a_record_are_seen(pressed, backend, how, parked):
    p = pressed(**parked)
    tunnels = tunnels_of(p, backend, each, parked["park_ms"] == 50)
    stop_within([client for client, _ in tunnels], PARTS["half"])
    seen(p)
    for client, _ in tunnels:
        getattr(client, how)()
    for _, server in tunnels:
        assert over(server)
        server.close()
    p.log.wait("close", nth=MANY)
    why = {line["why"] for line in p.log.all("close")}
    assert why == {"reset" if how == "reset" else "eof"}


def over(stream):
    """Whether it has ended, one way or the other, without a byte."""
    try:
        return stream.read_to_end() == b""
    except ConnectionResetError:
        return True


def test_backends_that_end_beside_half_records(pressed, backend):
    p = pressed()
    tunnels = [open_tunnel(p, backend, source=each(n)) for n in range(MANY)]
    stop_within([client for client, _ in tunnels], PARTS["half"])
    seen(p)
    for client, server in tunnels:
        server.send(b"the last word")
        server.close()
    for client, _ in tunnels:
        assert client.read_to_end() == b"the last word"
        assert client.saw_close_notify
    newcomers(p, backend, cut=MANY)


# ---- heads that have begun ----


@pytest.mark.parametrize("source", [one, each])
def test_400_devices_at_once(pressed, place, source):
    """They come back by one NAT, or by their own addresses; all get in, one time each."""
    here = place()

    async def backend(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(switching())
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def device(p, n):
        host, port = p.address()
        context = client_context()
        reader, writer = await asyncio.open_connection(
            host, port, ssl=context, server_hostname="localhost", ssl_handshake_timeout=PATIENCE,
            local_addr=(source(n % 250), 0))
        writer.write(upgrade())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 101 " in head
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        return writer

    async def run():
        async with await asyncio.start_server(backend, sock=here.listen()):
            p = pressed(here, max_per_ip=0, handshake_ms=60000, head_ms=60000)
            writers = await asyncio.gather(*(device(p, n) for n in range(400)))
            assert len(p.log.all("open")) == 400 and not cut_off(p)
            for writer in writers:
                writer.close()
    play(run())


# ---- everybody at once ----

DEAR = "rsa2048" if RUN else "rsa4096"      # a handshake costs much, and its second half little


def cpu_of(p):
    """Seconds, finer than those of /proc: see clock_getcpuclockid(3)."""
    return time.clock_gettime(~p.pid << 3 | 2)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("when", ["before-it-looks", "while-they-wait"])
def test_nothing_is_computed_for_who_has_gone(proxy, place, how, when):
    p = proxy(place(), certs=[certificate(DEAR)], handshake_ms=60000)
    with connect(p, context=client_context(DEAR)):
        begin = cpu_of(p)
    with connect(p, context=client_context(DEAR)):
        cost = cpu_of(p) - begin
    begin = cpu_of(p)
    if when == "before-it-looks":
        p.signal(signal.SIGSTOP)
    crowd = [tcp(p, source=each(n)) for n in range(24)]
    for client in crowd:
        client.send(client_hello())
    if when == "while-they-wait":
        eventually(lambda: int(p.totals()["sessions"]) >= 20)
    for client in crowd:
        getattr(client, how)()
    p.signal(signal.SIGCONT)
    eventually(lambda: len(p.log.all("reject")) >= len(crowd))
    assert cpu_of(p) - begin < 12 * cost


# ---- every byte, with few buffers ----

class Flow:
    """Seeded bytes from one stream to another, in records of 1 byte to 16 KB, cut into pieces."""

    def __init__(self, source, sink, seed, size):
        self.source, self.sink, self.dice = source, sink, random.Random(seed)
        self.data = pattern(size, seed)

    def send(self):
        at = 0
        while at < len(self.data):
            n = min(16384, int(2 ** self.dice.uniform(0, 14.1)))
            chunk = self.data[at:at + n]
            self.pieces(self.source.records(chunk) if isinstance(self.source, TlsStream) else chunk)
            at += n

    def pieces(self, wire):
        while wire:
            n = self.dice.choice([1, 5, 100, 3000, len(wire)])
            self.source.sock.sendall(wire[:n])
            wire = wire[n:]

    def took(self):
        return self.sink.read(len(self.data)) == self.data


class Tunnel:
    """A tunnel both ways of which are full. One side ends at once when it has got and sent all; the
    other reads up to that end."""

    def __init__(self, client, server, seed):
        dice = random.Random(seed)
        self.up = Flow(client, server, 2 * seed, dice.randrange(50_000, 200_000))
        self.down = Flow(server, client, 2 * seed + 1, dice.randrange(50_000, 200_000))
        self.client_ends = seed % 2 == 0
        self.first, self.last = (self.down, self.up) if self.client_ends else (self.up, self.down)
        self.wrong = []
        self.threads = [threading.Thread(target=self._guarded, args=(part,))
                        for part in (self.first.send, self.ender, self.other)]

    def _guarded(self, part):
        try:
            part()
        except (OSError, AssertionError, ssl.SSLError) as error:
            self.wrong.append(f"{part.__name__}: {error!r}")

    def ender(self):
        """Sends while it is sent to."""
        sender = threading.Thread(target=self._guarded, args=(self.last.send,))
        sender.start()
        whole = self.first.took()
        sender.join()
        if not whole:
            self.wrong.append("bytes for who ends")
        stream = self.last.source
        if isinstance(stream, TlsStream):
            stream.close_notify()
        stream.half_close()

    def other(self):
        if not self.last.took():
            self.wrong.append("bytes for the other")
        if self.last.sink.read_to_end() != b"":
            self.wrong.append("bytes behind the last one")
        self.last.sink.close()


@pytest.mark.parametrize("busy", [1, 2, 3, 8])
def test_every_byte_of_many_tunnels(pressed, scripted, busy):
    clear, secure = scripted(), ScriptedTls(scripted())
    p = pressed(clear.entry(path="/clear"), secure.entry(path="/tls", tls=TLS_NOVERIFY),
                tls_backends=1, max_busy=busy)
    tunnels = []
    for n in range(16):
        where, path = (secure, "/tls") if n & 4 else (clear, "/clear")
        pair = open_tunnel(p, where, WSS if n & 2 else WS, upgrade(path))
        tunnels.append(Tunnel(*pair, n))
    for tunnel in tunnels:
        for thread in tunnel.threads:
            thread.start()
    for tunnel in tunnels:
        for thread in tunnel.threads:
            thread.join(4 * PATIENCE)
    assert not [(n, t.wrong) for n, t in enumerate(tunnels) if t.wrong]
    for tunnel in tunnels:
        tunnel.last.source.close()
    p.log.wait("close", nth=16)
    assert {line["why"] for line in p.log.all("close")} == {"eof"}
    totals = p.totals()
    assert [totals[pool] for pool in ("sessions", "records", "heads")] == ["0"] * 3
    is_idle(p)
