"""A hostile world: attackers on either side, and beside them a canary whose echoes must all come,
in order. Afterwards everything has been given back and newcomers are served. What the canary and
the proxy went through becomes a table (siege.TABLE), which is printed at the end."""

import random
import select
import socket
import struct
import subprocess
import threading

import pytest

from harness import FORWARD, PATIENCE, WS, WSS
from peers import Stream, client_hello, head, pattern, switching, upgrade
from siege import ALERT, CHANGE_CIPHER, DATA, HANDSHAKE, Canary, Forger, Siege, is_over

HASTE = {"max_sessions": 64, "max_busy": 16, "max_per_ip": 0, "handshake_ms": 1500,
         "head_ms": 1500, "connect_ms": 1500, "response_ms": 1500, "stall_ms": 500,
         "linger_ms": 500}


@pytest.fixture
def besiege(proxy, scripted, place, keeper, record_property, request):
    def start(attack, *more, **config):
        backend, newcomers, nest = scripted(), scripted(), place()
        p = proxy(backend, nest.entry(path="/canary"), newcomers.entry(path="/newcomer"), *more,
                  **{**HASTE, **config})
        siege = Siege(p, backend, keeper(Canary(p, nest)), newcomers)
        row = siege.endure(attack)
        name = request.node.name.removeprefix("test_").replace("_", " ")
        record_property("abuse", {"name": name, **row})
        return p
    return start


# ---- clients that do nothing, or little ----

HELLO = client_hello()


@pytest.mark.parametrize("said", [b"", HELLO[:1], HELLO[:len(HELLO) // 2], HELLO,
                                  HELLO + b"\x16\x03\x03\x00\x46\x10\x00"],
                         ids=["nothing", "a-byte", "half-a-hello", "a-hello", "half-a-key"])
def test_clients_that_say(besiege, said):
    """More of them than there are places."""
    def attack(s):
        crowd = [s.tcp(source="127.0.0.2") for _ in range(150)]
        for client in crowd:
            try:
                client.send(said)
            except OSError:
                pass        # displaced already
        s.ended(crowd)
    besiege(attack)


def test_strangers_leave_buffers_to_tunnels(besiege):
    """Nothing that a client does before it has asked makes a tunnel wait, though it may take its
    time."""
    def attack(s):
        crowd = [s.tcp() for _ in range(40)]
        for client in crowd:
            client.send(HELLO[:-1])
        s.note()
        s.canary.beats()
    besiege(attack, handshake_ms=1000000, stall_ms=1000000)


def test_half_a_record_in_tunnels(besiege):
    """More than there are buffers: they wait where they are, and nobody has to be cut off."""
    def attack(s):
        tunnels = [s.tunnel() for _ in range(40)]
        for client, _ in tunnels:
            client.sock.sendall(client.records(b"never finished")[:-3])
        s.note()
        s.canary.beats()
    p = besiege(attack, stall_ms=1)
    assert not p.log.all("close", why="stall")


def test_records_that_always_end_with_half_of_the_next(besiege):
    """The same, for as long as it takes."""
    def attack(s):
        crowd = [s.tunnel()[0] for _ in range(40)]
        rest, calm = {client: b"" for client in crowd}, len(s.canary.log.all("beats"))
        s.note()
        while crowd and len(s.canary.log.all("beats")) < calm + 6:
            for client in list(crowd):
                record = client.records(b"drip")
                try:
                    client.sock.sendall(rest[client] + record[:10])
                    rest[client] = record[10:]
                except OSError:
                    crowd.remove(client)
            threading.Event().wait(0.1)
    p = besiege(attack, stall_ms=60000)
    assert not p.log.all("close", why="stall")


def test_heads_byte_by_byte(besiege):
    def attack(s):
        crowd = [s.connect() for _ in range(12)]
        request = iter(upgrade() * 1000)
        s.note()
        while crowd:
            byte = bytes([next(request)])
            for client in crowd:
                try:
                    client.send(byte)
                except OSError:
                    pass
            threading.Event().wait(0.1)
            crowd = [client for client in crowd if not is_over(client)]
    p = besiege(attack, head_ms=700, stall_ms=60000)
    assert len(p.log.all("reject", status="408")) == 24


# ---- floods ----

def flood(stream, data, times):
    """Sends until the other side ends it; how often that went well."""
    for n in range(times):
        try:
            stream.sock.sendall(data)
        except OSError:
            return n
    return times


def all_at_once(jobs):
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("record", [
    struct.pack("!BBBH", HANDSHAKE, 3, 3, 0), struct.pack("!BBBH", DATA, 3, 3, 0),
    struct.pack("!BBBH", ALERT, 3, 3, 2) + b"\x01\x5a",
    struct.pack("!BBBH", CHANGE_CIPHER, 3, 3, 1) + b"\x01"],
    ids=["empty-handshakes", "empty-data", "warnings", "changes-of-cipher"])
def test_flood_before_the_handshake_of(besiege, record):
    def attack(s):
        crowd = [s.tcp() for _ in range(4)]
        all_at_once(lambda client=client: flood(client, record * 1000, 100) for client in crowd)
        s.ended(crowd)
    besiege(attack)


def forgers_tunnel(s, folder):
    client = Forger(s.p, folder)
    s.attackers += 1
    client.send(upgrade())
    server = s.backend.accept()
    server.read_head()
    server.send(switching())
    assert client.read_head().status == 101
    client.send(b"before it")
    assert server.read(9) == b"before it"
    return client, server


@pytest.mark.parametrize("kind, payload", [
    (DATA, b""), (ALERT, b"\x01\x5a"), (HANDSHAKE, HELLO[5:]), (HANDSHAKE, b"\0\0\0\0")],
    ids=["empty-data", "warnings", "renegotiations", "empty-handshakes"])
def test_flood_in_a_tunnel_of(besiege, tmp_path, kind, payload):
    """Each of 100,000 records for which nothing is to be done but to check it."""
    def attack(s):
        crowd = [forgers_tunnel(s, tmp_path)[0] for _ in range(4)]
        s.note()

        def storm(client):
            for _ in range(100):
                records = b"".join(client.record(kind, payload) for _ in range(1000))
                if flood(client, records, 1) == 0:
                    return
        all_at_once(lambda client=client: storm(client) for client in crowd)
        s.ended(crowd)
    besiege(attack)


def test_empty_records_between_data(besiege, tmp_path):
    """Fewer in a row than are too many: nothing is lost of what is between them."""
    def attack(s):
        client, server = forgers_tunnel(s, tmp_path)
        s.note()
        for n in range(0, 100000, 500):
            client.sock.sendall(b"".join(client.record(DATA) for _ in range(500)))
            client.send(b"%6d" % n)
            assert server.read(6) == b"%6d" % n
    besiege(attack)


def test_renegotiations_at_once(proxy, scripted, tmp_path):
    """The next before the refusal of the last has left."""
    backend = scripted()
    p = proxy(backend)
    client = Forger(p, tmp_path)
    client.send(upgrade())
    server = backend.accept()
    server.send(switching())
    assert client.read_head().status == 101
    client.sock.sendall(b"".join(client.record(HANDSHAKE, HELLO[5:]) for _ in range(5)))
    p.log.wait("close", by="client", why="tls-error")


def test_openssl_asks_for_renegotiation_again_and_again(besiege):
    """It ends at the first refusal; so it comes again."""
    def attack(s):
        host, port = s.p.address()

        def client():
            seen = subprocess.run(
                ["openssl", "s_client", "-connect", f"{host}:{port}", "-tls1_2",
                 "-legacy_renegotiation"], input=b"R\n", capture_output=True, timeout=PATIENCE)
            assert b"RENEGOTIATING" in seen.stdout + seen.stderr
            s.attackers += 1
        all_at_once([client] * 6)
    besiege(attack)


# ---- clients that take nothing, or little ----

def pour(stream):
    """Sends until the other side takes no more for now."""
    stream.sock.setblocking(False)
    try:
        while True:
            stream.sock.send(bytes(100000))
    except BlockingIOError:
        pass
    finally:
        stream.sock.settimeout(PATIENCE)


@pytest.mark.parametrize("deaf", ["client", "backend", "both"])
def test_never_reading(besiege, deaf):
    def attack(s):
        for _ in range(24):
            try:
                client, server = s.tunnel()
                if deaf in ("client", "both"):
                    pour(server)
                if deaf in ("backend", "both"):
                    client.sock.settimeout(0.2)
                    while True:
                        client.send(bytes(100000))
            except TimeoutError:
                pass
        s.note()
        s.canary.beats()
    besiege(attack)


def narrow(sock):
    """A window as small as the kernel lets it be."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 1)
    return sock


def test_window_of_a_byte(besiege):
    """Clients that read a byte at a time through the smallest window, while there is much for
    them; and what they get is what was sent."""
    sent = pattern(1 << 20)

    def attack(s):
        crowd = []
        for _ in range(10):
            sock = narrow(socket.socket())
            sock.settimeout(PATIENCE)
            sock.connect(s.p.address(WS))
            client = Stream(sock)
            s.attackers += 1
            client.send(upgrade())
            server = s.backend.accept()
            narrow(server.sock)
            server.read_head()
            server.send(switching())
            assert client.read_head().status == 101
            crowd.append((client, server))
        heard = [client.ahead for client, _ in crowd]
        for client, server in crowd:
            client.ahead = b""
            threading.Thread(target=flood, args=(server, sent, 1), daemon=True).start()
        s.note()
        for _ in range(300):
            for n, (client, _) in enumerate(crowd):
                heard[n] += client.sock.recv(1)
        s.canary.beats()
        assert all(sent.startswith(h) and len(h) >= 300 for h in heard)
    besiege(attack, listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)])


# ---- more connections than there are places ----

def socket_from(source, address):
    sock = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
    sock.setblocking(False)
    sock.bind((source, 0))
    sock.connect_ex(address)
    return sock


CROWD = 1500


def crowd_attack(source, newcomers):
    def attack(s):
        host, port = s.p.address()
        address = ("2001:db8::1" if ":" in source(0) else "127.0.0.1", port)
        sockets = [socket_from(source(n), address) for n in range(CROWD)]
        s.attackers += CROWD
        s.note()
        s.canary.beats()
        for _ in range(newcomers):
            s.newcomer()
        s.note()
        for n, sock in enumerate(sockets):
            if n % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    return attack


LARGE = {"max_sessions": 256, "max_busy": 32, "listeners": [("::", "0", WSS)], "log_rejects": 20}


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("limit, source", [
    (0, lambda n: "127.0.0.2"), (32, lambda n: "127.0.0.2"),
    (0, lambda n: f"127.0.1.{n % 50 + 1}"), (0, lambda n: f"127.{1 + n // 250}.0.{n % 250 + 1}")],
    ids=["one-address", "one-address-of-which-32", "50-addresses", "1500-addresses"])
def test_1500_connections_from(besiege, source, limit):
    """Newcomers from elsewhere get in, behind those that came before them."""
    p = besiege(crowd_attack(source, 3), **LARGE, max_per_ip=limit)
    assert bool(p.log.all("reject", why="per-ip")) == (limit > 0)


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("source, limited", [(lambda n: f"2001:db8::{n + 2:x}", True),
                                             (lambda n: f"2001:db8:0:{n + 2:x}::1", False)],
                         ids=["one-network", "1500-networks"])
def test_1500_connections_by_ipv6_from(network, besiege, source, limited):
    """All addresses of a /64 are one client."""
    p = besiege(crowd_attack(source, 3), **LARGE, max_per_ip=32)
    assert bool(p.log.all("reject", why="per-ip")) == limited


# ---- resets ----

# Each brings a client into that state: its stream, and its backend's if there is one.

def silent(s):
    return [s.tcp()]


def in_hello(s):
    client = s.tcp()
    client.send(HELLO[:50])
    return [client]


def in_handshake(s):
    client = s.tcp()
    client.send(HELLO)
    client.sock.recv(1)
    return [client]


def before_its_head(s):
    return [s.connect()]


def in_its_head(s):
    client = s.connect()
    client.send(upgrade()[:40])
    return [client]


def dialling(s):
    client = s.connect()
    client.send(upgrade("/full"))
    return [client]


def asking(s):
    client = s.connect()
    client.send(upgrade())
    server = s.backend.accept()
    server.read_head()
    return [client, server]


def uploading(s):
    client = s.connect()
    client.send(head("POST / HTTP/1.1", {"Host": "a", "Content-Length": 100000}) + bytes(500))
    server = s.backend.accept()
    server.read_head()
    return [client, server]


def downloading(s):
    client = s.connect()
    client.send(head("GET / HTTP/1.1", {"Host": "a"}))
    server = s.backend.accept()
    server.read_head()
    server.send(head("HTTP/1.1 200 OK", {"Content-Length": 10000000}) + bytes(500000))
    return [client, server]


def at_rest(s):
    return list(s.tunnel())


def full(s):
    client, server = s.tunnel()
    pour(server)
    client.sock.sendall(client.records(bytes(10000))[:-1])
    return [client, server]


def refused(s):
    client = s.connect()
    client.send(b"what?\r\n\r\n")
    return [client]


def ending(s):
    client, server = s.tunnel()
    client.close_notify()
    server.read_to_end()
    return [client, server]


def ended(s):
    client, server = s.tunnel()
    server.close()
    client.read_to_end()
    return [client]


STATES = [silent, in_hello, in_handshake, before_its_head, in_its_head, dialling, asking, uploading,
          downloading, at_rest, full, refused, ending, ended]


@pytest.fixture
def full_backend(place, keeper):
    """One whose backlog is full, so that it answers no SYN."""
    here = place()
    keeper(here.listen(0))
    sockets = []
    for _ in range(4):
        sock = keeper(socket.socket())
        sock.setblocking(False)
        sock.connect_ex((here.host, int(here.port)))
        sockets.append(sock)
    return here.entry(path="/full")


@pytest.mark.parametrize("who", ["client", "backend"])
def test_resets_at_every_state_by_the(besiege, full_backend, who):
    """Each state by itself, and then many at once."""
    def attack(s):
        for state in STATES:
            streams = state(s)
            if who == "client":
                streams[0].reset()
            elif len(streams) > 1:
                streams[1].reset()
                s.ended(streams[:1])
        crowd = [state(s) for state in STATES * 3 if state is not dialling]
        s.note()
        for streams in crowd:
            streams[0 if who == "client" else -1].reset()
    besiege(attack, full_backend, http=FORWARD)


# ---- backends ----

class Playing:
    """Has each connection to the backend played by a function of its own thread."""

    def __init__(self, backend, play):
        self.backend, self.play, self.threads, self.over = backend, play, [], threading.Event()

    def _one(self, server):
        try:
            server.read_head()
            self.play(server, self.over)
            self.over.wait(4 * PATIENCE)
        except (OSError, AssertionError):
            pass

    def take(self, n):
        for _ in range(n):
            thread = threading.Thread(target=self._one, args=(self.backend.accept(),), daemon=True)
            thread.start()
            self.threads.append(thread)

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(PATIENCE)


def hangs(server, over):
    pass


def drips(server, over):
    for byte in switching() * 1000:
        server.send(bytes([byte]))
        if over.wait(0.1):
            return


def again_and_again(text, first=b"", last=b""):
    def play(server, over):
        server.send(first)
        while not over.is_set():
            server.send(text * 50)
    return play


def final_status(client):
    statuses = iter(lambda: client.read_head().status, None)
    return next(status for status in statuses if status != 100)


@pytest.mark.parametrize("play, status", [
    (hangs, 504), (drips, 504), (again_and_again(b"HTTP/1.1 100 Continue\r\n\r\n"), 502),
    (again_and_again(b"X-More: of it\r\n", b"HTTP/1.1 101 Switching Protocols\r\n"), 502),
    (again_and_again(b"HTTP/1.1 101 "), 502),
    (again_and_again(random.Random(1).randbytes(1000)), 502)],
    ids=["hangs", "drips", "endless-1xx", "endless-headers", "endless-status-line", "noise"])
def test_backend_that(besiege, play, status):
    """As many at a time as there are buffers but for some."""
    def attack(s):
        playing = Playing(s.backend, play)
        crowd = [s.connect() for _ in range(10)]
        for client in crowd:
            client.send(upgrade())
        playing.take(len(crowd))
        s.note()
        s.newcomer()
        assert [final_status(client) for client in crowd] == [status] * len(crowd)
        playing.end()
        s.ended(crowd)
    besiege(attack, head_ms=10000)


NOISE = random.Random(2).randbytes(300000)


@pytest.mark.parametrize("ending", ["end", "reset"])
def test_garbage_behind_101(besiege, ending):
    """It is relayed as it is, for messages are not looked into; then the backend ends or dies."""
    def attack(s):
        tunnels = [s.tunnel() for _ in range(10)]

        def one(client, server):
            sender = threading.Thread(target=flood, args=(server, NOISE, 1))
            sender.start()
            assert client.read(len(NOISE)) == NOISE
            sender.join()
            server.close() if ending == "end" else server.reset()
        s.note()
        for tunnel in tunnels:
            one(*tunnel)
        s.ended([client for client, _ in tunnels])
    besiege(attack)


MUCH = memoryview(random.Random(3).randbytes(16 << 20))


def fill_up(stream):
    """Sends as much as goes in while nobody reads at the other end, of what there is: how much that is
    the kernel decides, by tcp_rmem and by how it found the proxy to read."""
    sent = 0
    stream.sock.setblocking(False)
    while sent < len(MUCH) and select.select([], [stream.sock], [], 0.2)[1]:
        sent += stream.sock.send(MUCH[sent:sent + 100000])
    stream.sock.settimeout(PATIENCE)
    return sent


@pytest.mark.parametrize("by", ["client", "backend"])
def test_close_while_data_is_queued(besiege, by):
    """All that was sent arrives, though the sender has gone before anything was read, however long
    ago; and more of them do so than there are buffers."""
    def attack(s):
        tunnels = [s.tunnel(kind=WS if by == "client" else WSS) for _ in range(20)]
        sent = []
        for client, server in tunnels:
            sender = client if by == "client" else server
            sent.append(fill_up(sender))
            sender.half_close() if by == "client" else sender.close()
        s.note()
        for (client, server), size in zip(tunnels, sent):
            got = (server if by == "client" else client).read_to_end()
            assert len(got) == size and got == MUCH[:size]
    besiege(attack, stall_ms=600000, user_timeout_ms=0,
            listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)])
