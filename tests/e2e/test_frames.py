"""Tunnels whose frames are counted: Closes and Pings of the proxy's own, at a frame's end or not at
all; what the log says of them; and that all else goes through as it came."""

import asyncio
import signal
import struct
import threading

import pytest
import websockets

from conftest import whole_config
from harness import FORWARD, RUN, WS, WSS, run_once
from more import TLS_NOVERIFY, ScriptedTls, request
from peers import Place, Stream, node_client, open_tunnel, pattern, play, tcp, tunnel_on, ws

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
KINDS = pytest.mark.parametrize("kind", [WSS, WS])
LEGS = pytest.mark.parametrize("kind, tls", [(WSS, 0), (WSS, 1), (WS, 0), (WS, 1)])
IDLE = {"head_ms": 500, "idle_ms": 600}
BULK = pattern(1 << 20)


def frame(payload=b"", op=BINARY, fin=1, key=None, rsv=0):
    """A frame; with a key it is a client's."""
    size = len(payload)
    first = fin << 7 | rsv << 4 | op
    mask = 0x80 if key else 0
    if size < 126:
        head = bytes([first, mask | size])
    elif size < 65536:
        head = struct.pack(">BBH", first, mask | 126, size)
    else:
        head = struct.pack(">BBQ", first, mask | 127, size)
    if key:
        head += key
        stream = key * (size // 4 + 1)
        payload = (int.from_bytes(payload, "big") ^
                   int.from_bytes(stream[:size], "big")).to_bytes(size, "big")
    return head + payload


def masked(payload=b"", op=BINARY, **more):
    return frame(payload, op, key=b"\x12\x34\x56\x78", **more)


def code(number):
    return struct.pack(">H", number)


def read_frame(stream):
    """First byte, whether it is masked, payload."""
    first, second = stream.read(2)
    size = second & 0x7f
    if size > 125:
        size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
    key = stream.read(4) if second & 0x80 else bytes(4)
    payload = stream.read(size) if size else b""
    return first, bool(second & 0x80), bytes(b ^ key[n % 4] for n, b in enumerate(payload))


def said(number):
    """The proxy's Close as a client reads it; a backend gets it masked."""
    return 0x80 | CLOSE, False, code(number)


def said_masked(number):
    return 0x80 | CLOSE, True, code(number)


@pytest.fixture
def tunnel(proxy, scripted):
    """Starts a proxy; the proxy, a client, its backend's end."""
    def start(kind=WSS, tls=0, **config):
        backend = scripted()
        end = ScriptedTls(backend) if tls else backend
        entry = backend.entry(tls=TLS_NOVERIFY) if tls else backend.entry()
        p = proxy(entry, listeners=[("127.0.0.1", "0", kind)], tls_backends=tls, **config)
        p.backend = end
        return p, *open_tunnel(p, end)
    return start


def end(stream, how):
    if how == "close_notify":
        stream.close_notify()
    getattr(stream, "reset" if how == "reset" else "half_close")()


# ---- a side that ends without a Close ----

@LEGS
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_backend_is_told_that_its_client_has_gone(tunnel, kind, tls, how):
    p, client, server = tunnel(kind, tls)
    client.send(masked(b"hello", TEXT))
    assert read_frame(server) == (0x80 | TEXT, True, b"hello")
    end(client, how)
    assert read_frame(server) == said_masked(1001)
    assert server.read_to_end() == b""
    server.close()
    line = p.log.wait("close", by="client", why="eof" if how == "fin" else "reset")
    assert line["code"] == "1001" and line["code-by"] == "proxy"
    assert line["rx-frames"] == "1" and line["tx-frames"] == "0"


@LEGS
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_client_is_told_that_its_backend_has_gone(tunnel, kind, tls, how):
    p, client, server = tunnel(kind, tls)
    server.send(frame(b"hello", TEXT))
    assert read_frame(client) == (0x80 | TEXT, False, b"hello")
    end(server, how)
    assert read_frame(client) == said(1012)
    assert client.read_to_end() == b""
    if kind == WSS:
        assert client.saw_close_notify
    client.close()
    line = p.log.wait("close", by="backend")
    assert line["code"] == "1012" and line["code-by"] == "proxy"
    assert line["rx-frames"] == "0" and line["tx-frames"] == "1"


def test_close_notify_is_an_end_too(tunnel):
    p, client, server = tunnel()
    client.close_notify()
    assert read_frame(server) == said_masked(1001)
    assert server.read_to_end() == b""
    server.close()
    assert client.read_to_end() == b""
    assert client.saw_close_notify


@KINDS
def test_all_that_a_side_has_sent_comes_before_the_close(tunnel, kind):
    p, client, server = tunnel(kind)
    sender = threading.Thread(target=lambda: (server.send(frame(BULK)), server.close()))
    sender.start()
    assert read_frame(client) == (0x80 | BINARY, False, BULK)
    assert read_frame(client) == said(1012)
    sender.join()


CUTS = [b"\x81", b"\x81\x7e\0", b"\x81\5hell", b"\x82\x7f\0\0\0\0\0\1\0\0" + bytes(65535),
        frame(b"whole") + b"\x82\5cut", frame(b"a", fin=0) + b"\0\x01"]


@KINDS
@pytest.mark.parametrize("cut", CUTS, ids=range(len(CUTS)))
def test_nothing_is_put_into_a_frame_that_was_cut_off(tunnel, kind, cut):
    p, client, server = tunnel(kind)
    server.send(cut)
    server.half_close()
    assert client.read_to_end() == cut
    client.close()
    p.log.wait("close", by="backend", why="eof", code="-")


@pytest.mark.parametrize("cut", CUTS, ids=range(len(CUTS)))
def test_nor_towards_a_backend(tunnel, cut):
    p, client, server = tunnel()
    cut = bytes([cut[0], cut[1] | 0x80]) + cut[2:] if 1 < len(cut) < 8 else cut[:1]
    client.send(cut)
    client.close_notify()
    assert server.read_to_end() == cut
    server.close()
    p.log.wait("close", by="client", why="eof")


FOREIGN = [b"last words", b"\x83\0", b"\x81\x80\0\0\0\0", b"\x88\2\3\xe8behind",
           frame(b"good") + b"\x0a\0", b"\x80\0"]


@KINDS
@pytest.mark.parametrize("words", FOREIGN, ids=range(len(FOREIGN)))
def test_a_stream_that_is_no_frames_goes_through_and_gets_none(tunnel, kind, words):
    p, client, server = tunnel(kind)
    server.send(words)
    assert client.read(len(words)) == words
    client.send(b"no frames either")
    assert server.read(16) == b"no frames either"
    server.half_close()
    assert client.read_to_end() == b""
    client.close()
    p.log.wait("close", by="backend", why="eof")


@KINDS
def test_a_close_may_stand_between_fragments(tunnel, kind):
    p, client, server = tunnel(kind)
    server.send(frame(b"one of more", TEXT, fin=0))
    server.close()
    assert read_frame(client) == (TEXT, False, b"one of more")
    assert read_frame(client) == said(1012)


def test_a_vanished_client_of_a_full_table_is_told_to_its_backend(neighbour, proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=[("10.77.0.1", "0", WS)], max_sessions=1, max_busy=1)
    server = tunnel_on(Stream(neighbour.connect(p.address())), backend)
    neighbour.run("ip link set theirs down")
    tcp(p)                                          # a newcomer, for whom there is no place
    assert read_frame(server) == said_masked(1001)
    p.log.wait("close", by="client", why="timeout", code="1001")


def test_a_vanished_client_may_have_to_wait_for_a_buffer(neighbour, proxy, scripted):
    """Meanwhile all others are served; who has it and makes no progress is ended for it."""
    backend = scripted()
    p = proxy(backend, listeners=[("10.77.0.1", "0", WS)], max_sessions=2, max_busy=1,
              http=FORWARD, stall_ms=1000, response_ms=600_000)
    server = tunnel_on(Stream(neighbour.connect(p.address())), backend)
    client = tcp(p)
    client.send(request("/first", Connection=None) + request("/second"))    # that is held
    busy = backend.accept()
    assert busy.read_head().first == "GET /first HTTP/1.1"
    neighbour.run("ip link set theirs down")
    tcp(p)                                          # a newcomer, for whom there is no place
    assert client.read_head().status == 504
    assert read_frame(server) == said_masked(1001)
    p.log.wait("close", by="client", why="timeout", code="1001")


# ---- Closes of the peers ----

def close_both(p, first, second, put, answer):
    """`first` closes with 4001, the other answers; what each has read."""
    first.send(put(code(4001) + b"enough", CLOSE))
    got = second.read(len(put(code(4001) + b"enough", CLOSE)))
    second.send(answer(code(4001), CLOSE))
    return got, first.read(len(answer(code(4001), CLOSE)))


@LEGS
@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_close_goes_through_and_nothing_is_added(tunnel, kind, tls, who):
    p, client, server = tunnel(kind, tls)
    for n in range(3):
        client.send(masked(b"up", TEXT) + masked(b"", PING))
        server.send(frame(b"down", fin=n != 0, op=TEXT if n != 1 else 0))
    client.read(18), server.read(42)
    if who == "client":
        got = close_both(p, client, server, masked, frame)
        assert got == (masked(code(4001) + b"enough", CLOSE), frame(code(4001), CLOSE))
    else:
        got = close_both(p, server, client, frame, masked)
        assert got == (frame(code(4001) + b"enough", CLOSE), masked(code(4001), CLOSE))
    server.close()
    assert client.read_to_end() == b""
    client.close()
    line = p.log.wait("close")
    assert line["code"] == "4001" and line["code-by"] == who
    assert line["rx-frames"] == "3" and line["tx-frames"] == "3"


@KINDS
def test_a_close_that_nobody_answers_is_not_answered_by_us(tunnel, kind):
    p, client, server = tunnel(kind)
    client.send(masked(code(1000), CLOSE))
    server.read(8)
    server.close()
    assert client.read_to_end() == b""
    client.close()
    p.log.wait("close", code="1000")


def test_a_close_without_a_code(tunnel):
    p, client, server = tunnel()
    server.send(frame(b"", CLOSE))
    assert client.read(2) == b"\x88\0"
    client.send(masked(b"", CLOSE))
    server.read(6)
    server.close()
    client.close()
    line = p.log.wait("close")
    assert line["code"] == "1005" and line["code-by"] == "backend"


@KINDS
@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_code_that_comes_in_two_pieces(tunnel, kind, who):
    p, client, server = tunnel(kind)
    put, source, target = (masked, client, server) if who == "client" else (frame, server, client)
    data = put(code(1000), CLOSE)
    source.send(data[:-1])
    assert target.read(len(data) - 1) == data[:-1]
    source.send(data[-1:])
    assert target.read(1) == data[-1:]
    server.close()
    client.close()
    line = p.log.wait("close")
    assert line["code"] == "1000" and line["code-by"] == who


def test_frames_0_counts_nothing(tunnel):
    p, client, server = tunnel(frames=0)
    server.send(frame(b"hello", TEXT))
    client.read(7)
    server.close()
    assert client.read_to_end() == b""
    client.close()
    line = p.log.wait("close", by="backend", why="eof")
    assert "code" not in line.fields and "tx-frames" not in line.fields


# ---- a tunnel that we end ----

@LEGS
def test_an_idle_client_is_told_and_what_it_says_still_goes_up(tunnel, kind, tls):
    p, client, server = tunnel(kind, tls, **IDLE)
    assert read_frame(client) == said(1001)
    server.send(frame(b"too late"))                 # behind the Close: nobody's
    client.send(masked(b"on its way", TEXT) + masked(code(1001), CLOSE))
    assert read_frame(server) == (0x80 | TEXT, True, b"on its way")
    assert read_frame(server) == said_masked(1001)
    server.send(frame(code(1001), CLOSE))
    server.half_close()
    assert client.read_to_end() == b""
    client.close()
    assert server.read_to_end() == b""
    line = p.log.wait("close", by="proxy", why="idle")
    assert line["code"] == "1001" and line["code-by"] == "proxy"


@LEGS
def test_a_client_that_does_not_answer_is_left_after_linger_ms(tunnel, kind, tls):
    p, client, server = tunnel(kind, tls, linger_ms=300, **IDLE)
    assert read_frame(client) == said(1001)
    assert read_frame(server) == said_masked(1001)
    assert server.read_to_end() == b""
    assert client.read_to_end() == b""
    p.log.wait("close", by="proxy", why="idle", code="1001")


@KINDS
def test_a_client_that_talks_on_is_left_too(tunnel, kind):
    p, client, server = tunnel(kind, linger_ms=300, **IDLE)
    assert read_frame(client) == said(1001)
    while True:
        client.send(masked(b"and another thing", TEXT))
        got = read_frame(server)
        if got == said_masked(1001):
            break
        assert got == (0x80 | TEXT, True, b"and another thing")
    assert server.read_to_end() == b""


def left(p):
    """Waits until a tunnel that is younger than all others was told to go."""
    client, server = open_tunnel(p, p.backend)
    assert read_frame(client) == said(1001)
    return client, server


@LEGS
@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
def test_a_frame_that_has_begun_arrives_whole(tunnel, kind, tls, piece):
    message = frame(BULK[:3000] if piece == 1 else BULK)
    p, client, server = tunnel(kind, tls, linger_ms=20000, **IDLE)
    server.send(message[:1000])
    assert client.read(1000) == message[:1000]
    left(p)

    def send():
        for at in range(1000, len(message), piece):
            server.send(message[at:at + piece])
        server.send(frame(b"the next"))             # may come, or not
    sender = threading.Thread(target=send)
    sender.start()
    assert client.read(len(message) - 1000) == message[1000:]
    last = read_frame(client)
    if last != said(1001):
        assert last == (0x80 | BINARY, False, b"the next")
        assert read_frame(client) == said(1001)
    sender.join()
    client.send(masked(code(1001), CLOSE))
    assert read_frame(server) == said_masked(1001)


@KINDS
def test_a_frame_that_is_never_finished_gets_no_close(tunnel, kind):
    p, client, server = tunnel(kind, linger_ms=300, **IDLE)
    server.send(b"\x82\x7e\1\0half")
    assert client.read_to_end() == b"\x82\x7e\1\0half"
    assert read_frame(server) == said_masked(1001)  # nothing was cut off in that direction
    assert server.read_to_end() == b""
    p.log.wait("close", by="proxy", why="idle")


@KINDS
def test_what_the_client_is_sending_arrives_whole(tunnel, kind):
    message = masked(BULK)
    p, client, server = tunnel(kind, linger_ms=20000, **IDLE)
    client.send(message[:1000])
    assert server.read(1000) == message[:1000]
    assert read_frame(client) == said(1001)
    sender = threading.Thread(target=lambda: client.send(message[1000:] + masked(code(1001), CLOSE)))
    sender.start()
    assert server.read(len(message) - 1000) == message[1000:]
    assert read_frame(server) == said_masked(1001)
    sender.join()


def test_a_tunnel_does_not_grow_old(tunnel):
    p, client, server = tunnel(max_age_ms=300)
    others = [open_tunnel(p, p.backend) for _ in range(20)]
    for mine, theirs in [(client, server), *others]:
        assert read_frame(mine) == said(1001)
        mine.send(masked(code(1001), CLOSE))
        assert read_frame(theirs) == said_masked(1001)
        theirs.close()
        assert mine.read_to_end() == b""
    p.log.wait("close", nth=21, by="proxy", why="max-age", code="1001")


def test_age_ends_a_tunnel_that_is_never_silent(tunnel):
    p, client, server = tunnel(max_age_ms=300)
    seen = 0
    while True:
        server.send(frame(b"news", TEXT))
        got = read_frame(client)
        if got == said(1001):
            break
        assert got == (0x80 | TEXT, False, b"news")
        seen += 1
    assert seen > 0


# ---- Ping ----

ROOM = 700      # ms for the answers of a test on a busy machine

@LEGS
def test_a_silent_client_is_asked_and_its_answer_goes_through(tunnel, kind, tls):
    p, client, server = tunnel(kind, tls, ping_ms=ROOM)
    for _ in range(3):
        assert read_frame(client) == (0x80 | PING, False, b"")
        client.send(masked(b"", PONG))
        assert read_frame(server) == (0x80 | PONG, True, b"")
    client.send(masked(b"still here", TEXT))
    assert read_frame(server) == (0x80 | TEXT, True, b"still here")


@LEGS
def test_a_client_that_does_not_answer_is_dead(tunnel, kind, tls):
    p, client, server = tunnel(kind, tls, ping_ms=200)
    assert read_frame(client) == (0x80 | PING, False, b"")
    assert read_frame(server) == said_masked(1001)
    assert server.read_to_end() == b""
    server.close()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    line = p.log.wait("close", by="client", why="no-pong")
    assert line["code"] == "1001" and line["code-by"] == "proxy"


def test_a_client_that_only_hears_is_asked(tunnel):
    """Bytes for it are no sign of it, if nothing of them is left to be taken."""
    p, client, server = tunnel(ping_ms=300)
    while True:
        server.send(frame(b"news", TEXT))
        got = read_frame(client)
        if got[0] == 0x80 | PING:
            break
    p.log.wait("close", by="client", why="no-pong")


def test_answers_to_our_ping_are_no_use_of_a_tunnel(tunnel):
    p, client, server = tunnel(ping_ms=ROOM, head_ms=1000, idle_ms=4 * ROOM)
    while (got := read_frame(client)) != said(1001):
        assert got == (0x80 | PING, False, b"")
        client.send(masked(b"", PONG))
    server.close()
    client.close()
    p.log.wait("close", by="proxy", why="idle")


@LEGS
def test_a_client_whose_bytes_wait_for_the_backend_is_there(tunnel, kind, tls):
    """Nor could it answer: its Pong would stand behind them."""
    p, client, server = tunnel(kind, tls, ping_ms=ROOM)
    message = masked(BULK)
    sender = threading.Thread(target=client.send, args=(message * 20,))
    sender.start()
    other = open_tunnel(p, p.backend)[0]
    for _ in range(3):                              # Pings of a younger tunnel later
        assert read_frame(other) == (0x80 | PING, False, b"")
        other.send(masked(b"", PONG))
    for _ in range(20):
        assert server.read(len(message)) == message
    sender.join()


def test_no_ping_within_a_frame(tunnel):
    p, client, server = tunnel(ping_ms=ROOM)
    server.send(b"\x82\5he")
    assert client.read(4) == b"\x82\5he"
    other = open_tunnel(p, p.backend)[0]            # two Pings of a younger tunnel later
    for _ in range(2):
        assert read_frame(other) == (0x80 | PING, False, b"")
        other.send(masked(b"", PONG))
    assert not client.has_input()
    server.send(b"llo")
    assert client.read(5) == b"llo\x89\0"


def test_ping_needs_frames():
    result = run_once(whole_config([Place("127.0.0.1", 9)], {"ping_ms": 1000, "frames": 0}), "-t")
    assert result.returncode == 1
    assert "ping_ms: set frames to 1" in result.stderr


# ---- clients and servers that others wrote ----

@pytest.mark.parametrize("deflate", ["deflate", None])
def test_libraries_see_a_clean_close_when_idle(proxy, server, deflate):
    p = proxy(server, **IDLE)

    async def wait():
        async with ws(p, compression=deflate) as client:
            await client.send("hello" * 1000)
            assert await client.recv() == "hello" * 1000
            await client.wait_closed()
            return client.close_code, client.close_reason
    assert play(wait()) == (1001, "")
    assert server.next_closed()[0] == 1001
    seen = node_client(p, sizes=[1000], deflate=bool(deflate), wait=True)
    assert seen["echoed"] == 2 and (seen["code"], seen["reason"]) == (1001, "")
    assert server.next_closed()[0] == 1001
    p.log.wait("close", nth=2, by="proxy", why="idle", code="1001")


def test_libraries_see_that_the_backend_was_killed(proxy, node_server):
    server = node_server()
    p = proxy(server)

    async def wait():
        async with ws(p) as client:
            await client.send("hello")
            await client.recv()
            server.process.send_signal(signal.SIGKILL)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await client.recv()
            return closed.value.rcvd.code
    assert play(wait()) == 1012


def test_servers_see_that_the_client_was_killed(proxy, server):
    p = proxy(server)

    async def vanish():
        client = await ws(p)
        await client.send("hello")
        await client.recv()
        client.transport.abort()
    play(vanish())
    assert server.next_closed()[0] == 1001


@pytest.mark.skipif(bool(RUN), reason="takes too long in there")
def test_messages_of_all_sizes_are_as_they_were_when_age_ends_them(proxy, server):
    """Whole or not at all: whatever is under way when its time has come."""
    p = proxy(server, max_age_ms=1000)

    async def talk(n):
        async with ws(p, compression="deflate" if n % 2 else None) as client:
            sent = got = 0
            try:
                while True:
                    message = BULK[:(n * 7919 + sent * 104729) % 300000]
                    await client.send(message)
                    sent += 1
                    assert await client.recv() == message
                    got += 1
            except websockets.ConnectionClosed as closed:
                assert closed.rcvd and closed.rcvd.code == 1001
            assert got in (sent, sent - 1) and got > 0

    async def all_talk():
        await asyncio.gather(*(talk(n) for n in range(8)))
    play(all_talk())
    p.log.wait("close", nth=8, by="proxy", why="max-age", code="1001")
