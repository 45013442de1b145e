"""What is scarce is not held by those who wait: many clients or backends that stop where it hurts,
all at a time, and beside them others who must not feel it. Nobody moves meanwhile, and at its end
nobody was cut off, so whoever got in did not wait for them. Times are config.def.h's own, and
nothing here is measured by the clock."""

import asyncio
import contextlib
import random
import re
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from conftest import certificate
from harness import FORWARD, PATIENCE, REPO, RUN, WS, WSS, eventually
from more import TLS_NOVERIFY, ScriptedTls, answer, idle_cpu, identity, pem, request
from peers import (TlsStream, client_context, client_hello, connect, open_tunnel, pattern,
                   play, switching, tcp, upgrade)
from test_limits import hung_connect, hung_tls

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]
FEW, MANY = 4, 12       # max_busy, and those who stop: more than there are buffers
DEFAULT_BUSY = int(re.search(r"^#define max_busy +(\d+)", (REPO / "config.def.h").read_text(),
                             re.M)[1])
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


def asked(p, backend, source, kind=None, **fields):
    """A client whose request is at the backend, but for its body, and the backend's end."""
    client = connect(p, kind, source=source)
    client.send(request(**fields))
    server = backend.accept()
    server.read_head()
    return client, server


# ---- records that have begun ----

# How much of a record is there.
PARTS = {"3-bytes": lambda r: 3, "its-header": lambda r: 5, "half": lambda r: len(r) // 2,
         "all-but-a-byte": lambda r: len(r) - 1}


@pytest.fixture(params=PARTS)
def part(request):
    return PARTS[request.param]


@pytest.mark.parametrize("source", [one, each])
def test_uploads_in_the_middle_of_a_record(pressed, backend, source):
    """Slow ones in pieces and honest ones alike: newcomers must not wait for their end."""
    p = pressed()
    old = open_tunnel(p, backend, source="127.0.9.9")
    uploads = [asked(p, backend, source(n), method="POST", Content_Length=str(2 * len(BIG)))
               for n in range(MANY)]
    rests = []
    for client, _ in uploads:
        wire = client.records(BIG) + client.records(BIG)
        client.sock.sendall(wire[:len(wire) // 4])
        rests.append(wire[len(wire) // 4:])
    seen(p)
    chat(*old)
    newcomers(p, backend)
    is_idle(p)
    for (client, server), rest in zip(uploads, rests):
        client.sock.sendall(rest)
        assert server.read(2 * len(BIG)) == BIG + BIG
        server.send(answer(body=b"thanks"))
        assert client.read_head().status == 200
        assert client.read_to_end() == b"thanks"


def tunnels_of(p, backend, source):
    return [open_tunnel(p, backend, source=source(n)) for n in range(MANY)]


@pytest.mark.parametrize("source", [one, each])
def test_tunnels_in_the_middle_of_a_record(pressed, backend, part, source):
    p = pressed()
    old = open_tunnel(p, backend, source="127.0.9.9")
    tunnels = tunnels_of(p, backend, source)
    rests = stop_within([client for client, _ in tunnels], part)
    seen(p)
    chat(*old)
    newcomers(p, backend)
    is_idle(p)
    for (client, server), rest in zip(tunnels, rests):
        server.send(b"meanwhile")       # the other way is open
        assert client.read(9) == b"meanwhile"
        client.sock.sendall(rest)
        assert server.read(len(BIG)) == BIG
        chat(client, server)
    assert not cut_off(p)


def stop_within(streams, part):
    """Each sends a part of a record; the rests."""
    rests = []
    for stream in streams:
        record = stream.records(BIG)
        assert len(record) < 17000
        stream.sock.sendall(record[:part(record)])
        rests.append(record[part(record):])
    return rests


def test_backends_in_the_middle_of_a_record(pressed, backend, part):
    backend = ScriptedTls(backend)
    p = pressed(backend.entry(tls=TLS_NOVERIFY), tls_backends=1)
    old = open_tunnel(p, backend, source="127.0.9.9")
    tunnels = [open_tunnel(p, backend, source=each(n)) for n in range(MANY)]
    rests = stop_within([server for _, server in tunnels], part)
    seen(p)
    chat(*old)
    for source in ("127.0.0.2", "127.0.9.9"):
        chat(*open_tunnel(p, backend, source=source))
    for (client, server), rest in zip(tunnels, rests):
        client.send(b"meanwhile")
        assert server.read(9) == b"meanwhile"
        server.sock.sendall(rest)
        assert client.read(len(BIG)) == BIG
        chat(client, server)
    assert not cut_off(p)


def test_more_tunnels_in_the_middle_of_a_record_than_the_default_has_buffers(pressed, backend):
    p = pressed(max_busy=DEFAULT_BUSY)
    tunnels = [open_tunnel(p, backend, source=one(n)) for n in range(DEFAULT_BUSY + 2)]
    rests = stop_within([client for client, _ in tunnels], PARTS["half"])
    seen(p)
    newcomers(p, backend)
    for (client, server), rest in zip(tunnels, rests):
        client.sock.sendall(rest)
        assert server.read(len(BIG)) == BIG


def test_record_byte_by_byte_beside_half_records(pressed, backend):
    """Small segments fill a receive buffer long before their bytes do: what waits for a whole
    record must not wait for more than can come."""
    p = pressed()
    tunnels = [open_tunnel(p, backend, source=each(n)) for n in range(MANY)]
    rests = stop_within([client for client, _ in tunnels], PARTS["half"])
    seen(p)
    for (client, server), rest in zip(tunnels, rests):
        for n in range(len(rest) - 1 if client is tunnels[-1][0] else 0):
            client.sock.sendall(rest[n:n + 1])
    client, server = tunnels[-1]
    client.sock.sendall(rests[-1][-1:])
    assert server.read(len(BIG)) == BIG
    newcomers(p, backend)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_ends_in_the_middle_of_a_record_are_seen(pressed, backend, how):
    p = pressed()
    tunnels = tunnels_of(p, backend, each)
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
    """Whether it has ended, one way or the other, with a Close of the proxy's at most."""
    try:
        said = stream.read_to_end()
        return not said or (len(said) == 8 and said.startswith(b"\x88\x82"))
    except ConnectionResetError:
        return True


def test_header_that_no_record_can_have_is_not_waited_for(pressed, backend):
    """It says more than 16 KB, beside others whose records have begun."""
    p = pressed()
    tunnels = [open_tunnel(p, backend, source=each(n)) for n in range(MANY)]
    stop_within([client for client, _ in tunnels], PARTS["half"])
    forger, server = open_tunnel(p, backend, source="127.0.9.9")
    seen(p)
    forger.sock.sendall(b"\x17\x03\x03\x60\x00")
    assert over(server)
    assert p.log.wait("close")["id"] == p.log.all("open")[-1]["id"]


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


# ---- handshakes that have begun ----

class Halfway:
    """A client that goes on with its handshake only as far as it is told."""

    def __init__(self, p, source, context=None):
        self.stream = tcp(p, WSS, source=source)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.context = context or client_context()
        self.tls = self.context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.wire = b""

    def flight(self):
        """Adds its next flight to what is to be sent. Whether it is done."""
        try:
            self.tls.do_handshake()
            return True
        except ssl.SSLWantReadError:
            return False
        finally:
            self.wire += self.outgoing.read()

    def send(self, n=None):
        n = len(self.wire) if n is None else n
        self.stream.sock.sendall(self.wire[:n])
        self.wire = self.wire[n:]

    def hear(self):
        """The proxy's flight, whole when the next one can be made of it."""
        while not self.wire:
            data = self.stream.sock.recv(65536)
            assert data
            self.incoming.write(data)
            self.flight()

    def finish(self):
        self.send()
        while not self.flight():
            self.send()
            data = self.stream.sock.recv(65536)
            assert data
            self.incoming.write(data)
        self.send()


def nothing(client):
    pass


def a_byte(client):
    client.flight()
    client.send(1)


def half_a_hello(client):
    client.flight()
    client.send(len(client.wire) // 2)


def a_hello(client):
    client.flight()
    client.send()


def half_a_second_flight(client):
    a_hello(client)
    client.hear()
    client.send(len(client.wire) // 2)


def second_flight_but_a_byte(client):
    a_hello(client)
    client.hear()
    client.send(len(client.wire) - 1)


SAID = [nothing, a_byte, half_a_hello, a_hello, half_a_second_flight, second_flight_but_a_byte]


@pytest.mark.parametrize("ca", [False, True], ids=["", "client-ca"])
@pytest.mark.parametrize("said", SAID)
def test_clients_that_stop_in_their_handshake(pressed, backend, said, ca):
    context = client_context()
    if ca:
        context.load_cert_chain(*identity("client-ec").values())
    p = pressed(client_ca=pem("client-ca") if ca else None)
    halfway = [Halfway(p, each(n), context) for n in range(MANY)]
    for client in halfway:
        said(client)
    eventually(lambda: p.totals()["sessions"] == str(MANY))
    seen(p)
    for source in ("127.0.1.1", "127.0.9.9"):
        chat(*open_tunnel(p, backend, WSS, source=source, context=context))
    chat(*open_tunnel(p, backend, WS, source="127.0.9.9"))
    assert not cut_off(p)
    for client in halfway:
        client.finish()


def test_handshake_byte_by_byte_beside_others(pressed, backend):
    p = pressed()
    halfway = [Halfway(p, each(n)) for n in range(MANY)]
    for client in halfway:
        half_a_hello(client)
    slow = Halfway(p, "127.0.9.9")
    slow.flight()
    byte_by_byte(slow)
    slow.hear()
    byte_by_byte(slow)
    slow.finish()
    assert not cut_off(p)


def byte_by_byte(client):
    while client.wire:
        client.send(1)


# ---- heads that have begun ----

LONG_HEAD = upgrade(Filler="x" * 6000)


def as_many_as_wait(head):
    """Of clients with such a head: a long one takes a place of twice max_busy."""
    return range(2 * FEW if head == LONG_HEAD else MANY)


@pytest.mark.parametrize("kind", [WSS, WS])
@pytest.mark.parametrize("head", [upgrade(), LONG_HEAD], ids=["short", "long"])
@pytest.mark.parametrize("source", [one, each])
def test_half_heads(pressed, backend, kind, head, source):
    """In TLS: half of a head's record."""
    p = pressed()
    clients = [connect(p, kind, source=source(n)) for n in as_many_as_wait(head)]
    wires = [client.records(head) if kind == WSS else head for client in clients]
    for client, wire in zip(clients, wires):
        client.sock.sendall(wire[:len(wire) // 2])
    seen(p)
    newcomers(p, backend)
    is_idle(p)
    finish_heads(backend, clients, [wire[len(wire) // 2:] for wire in wires])
    assert not cut_off(p)


@pytest.mark.parametrize("head", [upgrade(), LONG_HEAD], ids=["short", "long"])
@pytest.mark.parametrize("source", [one, each])
def test_half_heads_in_whole_records(pressed, backend, head, source):
    p = pressed()
    clients = [connect(p, source=source(n)) for n in as_many_as_wait(head)]
    for client in clients:
        client.send(head[:len(head) // 2])
    seen(p)
    newcomers(p, backend)
    is_idle(p)
    finish_heads(backend, clients, [client.records(head[len(head) // 2:]) for client in clients])
    assert not cut_off(p)


def finish_heads(backend, clients, rests):
    for client, rest in zip(clients, rests):
        client.sock.sendall(rest)
        server = backend.accept()
        server.read_head()
        server.send(switching())
        assert client.read_head().status == 101
        chat(client, server)


@pytest.mark.parametrize("source", [one, each])
def test_half_answers(pressed, backend, source):
    """Half of the head, that is; whoever waits for the rest must not keep others from asking."""
    p = pressed()
    pairs = [asked(p, backend, source(n)) for n in range(MANY)]
    head = answer(body=b"a page")
    for _, server in pairs:
        server.send(head[:20])
    seen(p)
    newcomers(p, backend)
    for client, server in pairs:
        server.send(head[20:])
        assert client.read_head().status == 200
        assert client.read_to_end() == b"a page"


def test_address_may_have_what_nobody_else_wants(pressed, backend):
    """Devices behind one NAT: more of them are in their heads than half of the buffers are for."""
    p = pressed(max_busy=8)         # 6 for heads
    clients = [connect(p, source="127.0.0.2") for _ in range(4)]
    for client in clients:
        client.send(LONG_HEAD[:-4])
    seen(p)
    newcomers(p, backend, ["127.0.0.2"])
    finish_heads(backend, clients, [client.records(LONG_HEAD[-4:]) for client in clients])


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


# ---- clients that take nothing, or little ----

STREAM = pattern(1 << 20)


class Flood:
    """A stream of which its reader takes nothing yet; a thread writes, without end or so much."""

    def __init__(self, source, sink, size=None):
        self.source, self.sink, self.size = source, sink, size
        self.got = 0
        source.sock.settimeout(None)
        self.thread = threading.Thread(target=self._pour, daemon=True)
        self.thread.start()

    def _pour(self):
        with contextlib.suppress(OSError):
            left = self.size
            while left is None or left > 0:
                self.source.send(STREAM[:left])
                left = left and left - len(STREAM[:left])
            self.source.close()

    def take(self, n):
        """Reads so much, and compares it."""
        at = self.got % len(STREAM)
        assert self.sink.read(n) == (STREAM[at:] + STREAM * (n // len(STREAM) + 1))[:n]
        self.got += n

    def end(self):
        for stream in (self.source, self.sink):
            with contextlib.suppress(OSError):
                stream.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE)


@pytest.fixture
def flood():
    """Starts one; ends all of them."""
    floods = []

    def start(*args, **options):
        floods.append(Flood(*args, **options))
        return floods[-1]
    yield start
    for running in floods:
        running.end()


@pytest.fixture
def downloads(backend, flood):
    def start(p, kind, n, source=each, size=None):
        running = []
        for i in range(n):
            client, server = asked(p, backend, source(i), kind)
            server.send(answer())
            assert client.read_head().status == 200
            running.append(flood(server, client, size=size))
        return running
    return start


def stuck(p):
    """Waits until nothing moves any more."""
    def still():
        before = p.totals()
        threading.Event().wait(0.1)
        return [before[way] for way in ("rx", "tx")] == [p.totals()[way] for way in ("rx", "tx")]
    eventually(still)


def queued(p):
    """Bytes of the proxy's that the kernel has, not sent or not acknowledged, for each client."""
    ports = {b":%04X" % port for port in p.ports}
    found = []
    for line in Path("/proc/net/tcp").read_bytes().splitlines()[1:]:
        _, local, _, state, queues = line.split()[:5]
        if local[-5:] in ports and state == b"01":
            found.append(int(queues.partition(b":")[0], 16))
    return found


@pytest.mark.parametrize("kind", [WSS, WS])
@pytest.mark.parametrize("source", [one, each])
def test_downloads_that_nobody_reads(pressed, backend, downloads, kind, source):
    p = pressed()
    old = open_tunnel(p, backend, source="127.0.9.9")
    running = downloads(p, kind, MANY, source)
    stuck(p)
    chat(*old)
    newcomers(p, backend)
    is_idle(p)
    for download in running:
        download.take(1 << 20)
    newcomers(p, backend)


@pytest.mark.parametrize("kind", [WSS, WS])
def test_downloads_that_nobody_reads_though_they_are_whole(pressed, backend, downloads, kind):
    p = pressed()
    size = 6_000_000
    running = downloads(p, kind, MANY, size=size)
    stuck(p)
    newcomers(p, backend)
    for download in running:
        download.take(size)
        assert download.sink.read_to_end() == b""
        assert kind == WS or download.sink.saw_close_notify


@pytest.mark.parametrize("tls", [0, 1], ids=["clear", "tls"])
def test_uploads_that_no_backend_reads(pressed, backend, flood, tls):
    far = ScriptedTls(backend) if tls else backend
    p = pressed(far.entry(tls=TLS_NOVERIFY) if tls else far, tls_backends=tls)
    floods = [flood(*open_tunnel(p, far, source=each(n))) for n in range(MANY)]
    stuck(p)
    for source in ("127.0.0.2", "127.0.9.9"):
        chat(*open_tunnel(p, far, source=source))
    is_idle(p)
    assert not cut_off(p)
    for running in floods:
        running.take(1 << 20)


@pytest.mark.parametrize("kind", [WSS, WS])
def test_kernel_holds_little_for_clients_that_read_nothing(pressed, downloads, kind):
    p = pressed()
    downloads(p, kind, MANY)
    stuck(p)
    sizes = queued(p)
    assert len(sizes) == MANY
    assert sum(sizes) < MANY * 256 * 1024, sizes


def test_slow_readers_are_not_cut_off(pressed, backend, downloads):
    """More of them than there are buffers, for longer than stall_ms, beside as many that read
    nothing."""
    p = pressed()
    downloads(p, WSS, MANY, one)
    readers = downloads(p, WSS, MANY)
    for _ in range(24):
        for reader in readers:
            reader.take(20000)
        threading.Event().wait(0.25)
    newcomers(p, backend)


# ---- backends that do nothing ----

@pytest.mark.parametrize("hung", [hung_tls, hung_connect])
@pytest.mark.parametrize("source", [one, each])
def test_requests_to_a_backend_that_hangs(pressed, backend, scripted, keeper, hung, source):
    _, entry, _ = hung(scripted, keeper)
    p = pressed({**entry, "path": "/hung"}, backend, tls_backends=1)
    old = open_tunnel(p, backend, source="127.0.9.9")
    clients = []
    for n in range(MANY):
        client = tcp(p, WS, source=source(n))
        client.send(upgrade("/hung"))
        clients.append(client)
    seen(p)
    chat(*old)
    for address in ("127.0.0.2", "127.0.9.9"):
        chat(*open_tunnel(p, backend, source=address))
    assert not p.log.all("backend") and not cut_off(p)


# ---- everybody at once ----

DEAR = "rsa2048" if RUN else "rsa4096"      # a handshake costs much, and its second half little


def cpu_of(p):
    """Seconds, finer than those of /proc: see clock_getcpuclockid(3)."""
    return time.clock_gettime(~p.pid << 3 | 2)


class Storm:
    """Clients that come at once, each of which gives up when the proxy has computed for so long
    since, and comes again. Patience is the proxy's CPU time: whatever else the machine does, it
    does not count."""

    def __init__(self, p):
        self.p, self.context = p, client_context(DEAR)
        self.up, self.attempts = 0, 0

    def cpu(self):
        return cpu_of(self.p)

    async def connect(self):
        host, port = self.p.address()
        reader, writer = await asyncio.open_connection(
            host, port, ssl=self.context, server_hostname="localhost",
            ssl_handshake_timeout=4 * PATIENCE)
        try:
            writer.write(upgrade())
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            return writer
        except asyncio.CancelledError:
            writer.transport.abort()
            raise

    async def attempt(self):
        """Whether it got in before its patience was over."""
        self.attempts += 1
        task, until = asyncio.create_task(self.connect()), self.cpu() + self.patience
        while not task.done() and self.cpu() < until:
            await asyncio.wait([task], timeout=0.01)
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled() or task.exception():
            return False
        self.up += 1
        self.kept.append(task.result())
        return True

    async def client(self, pause):
        while self.cpu() < self.end and not await self.attempt():
            await asyncio.sleep(pause)

    async def run(self, n):
        """Goodput: what the handshakes of all cost one after the other, of the CPU that it took."""
        self.kept, begin = [], self.cpu()
        for _ in range(3):
            (await self.connect()).close()
        each = (self.cpu() - begin) / 3
        self.patience, begin = n * each / 6, self.cpu()
        self.end = begin + 4 * n * each
        dice = random.Random(n)
        await asyncio.gather(*(self.client(self.patience * dice.random()) for _ in range(n)))
        return n * each / (self.cpu() - begin)


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


def test_storm(proxy, place):
    here = place()

    async def backend(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(switching())
        await reader.read()
        writer.close()

    async def run():
        async with await asyncio.start_server(backend, sock=here.listen()):
            p = proxy(here, certs=[certificate(DEAR)])
            storm = Storm(p)
            goodput = await storm.run(60)
            assert storm.up == 60, f"{storm.up} in {storm.attempts} attempts"
            assert goodput > 0.7, f"{storm.attempts} attempts"
    play(run())


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
