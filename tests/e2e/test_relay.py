"""The tunnel: bytes in, the same bytes out, with real clients and real servers."""

import asyncio
import os
import random
import signal
import socket
from http import HTTPStatus

import pytest
import websockets
from websockets.extensions import permessage_deflate

from harness import PATIENCE, WS, WSS, eventually
from peers import client_context, node_client, open_tunnel, pattern, play, switching, upgrade, ws

SIZES = [0, 1, 2, 125, 126, 127, 1000, 16383, 16384, 16385, 65535, 65536, 100001, 1 << 20]
LARGE = 16 << 20

# What must make no difference to any byte.
VARIANTS = {
    "default": {},
    "plain-listener": {"listeners": [("127.0.0.1", "0", WS)]},
    "one-buffer": {"max_busy": 1},
    "few-buffers": {"max_busy": 3},
    "small-records": {"record_max": 512},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


async def echo(client, message):
    await client.send(message)
    return await client.recv()


def message_of(size, text):
    return "ä" * (size // 2) + "a" * (size % 2) if text else os.urandom(size)


# ---- messages ----

def test_python_client_echo(proxy, server, variant):
    p = proxy(server, **variant)

    async def run():
        async with ws(p) as client:
            for size in SIZES:
                for text in (False, True):
                    message = message_of(size, text)
                    assert await echo(client, message) == message
    play(run())


def test_node_client_echo(proxy, server, variant):
    p = proxy(server, **variant)
    assert node_client(p, sizes=SIZES)["echoed"] == 2 * len(SIZES)


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_message_of_16_mib(proxy, server, text):
    p = proxy(server)

    async def run():
        async with ws(p, compression=None) as client:
            message = message_of(LARGE, text)
            assert await echo(client, message) == message
    play(run())


def test_node_client_message_of_16_mib(proxy, node_server):
    p = proxy(node_server())
    assert node_client(p, sizes=[LARGE])["echoed"] == 2


def test_fragmented_message(proxy, server):
    p = proxy(server)
    parts = [b"", b"a", b"b" * 200, b"c" * 20000, b"", b"d"]

    async def run():
        async with ws(p) as client:
            assert await echo(client, iter(parts)) == b"".join(parts)
    play(run())


def test_ping_from_the_client(proxy, server):
    p = proxy(server)

    async def run():
        async with ws(p) as client:
            await asyncio.wait_for(await client.ping(b"are you there?"), 10)
    play(run())


def test_ping_from_the_client_by_node(proxy, server):
    p = proxy(server)
    assert node_client(p, ping=True)["pong"]


def test_ping_from_the_server(proxy, server):
    p = proxy(server)

    async def run():
        async with ws(p, "/ping") as client:
            return await client.recv()
    assert play(run()) == "pong seen"


def test_permessage_deflate(proxy, server):
    p = proxy(server)

    async def run():
        async with ws(p, compression="deflate") as client:
            assert [type(e) for e in client.extensions] == [permessage_deflate.PerMessageDeflate]
            for size in SIZES:
                message = "compress me " * (size // 12)
                assert await echo(client, message) == message
    play(run())


def test_permessage_deflate_by_node(proxy, server):
    p = proxy(server)
    seen = node_client(p, deflate=True, sizes=SIZES)
    assert "permessage-deflate" in seen["extensions"]
    assert seen["echoed"] == 2 * len(SIZES)


def test_subprotocol(proxy, python_server):
    p = proxy(python_server(subprotocols=["chat", "superchat"]))

    async def run():
        async with ws(p, subprotocols=["superchat", "other"]) as client:
            return client.subprotocol
    assert play(run()) == "superchat"


def test_server_that_refuses_with_a_page(proxy, python_server):
    async def refuse(path, headers):
        return HTTPStatus.FORBIDDEN, [("X-Why", "because")], b"not you\n"
    p = proxy(python_server(process_request=refuse))

    async def run():
        async with ws(p):
            pass
    with pytest.raises(websockets.InvalidStatusCode) as refusal:
        play(run())
    assert refusal.value.status_code == 403
    assert refusal.value.headers["X-Why"] == "because"


# ---- close codes ----

@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_close_code_of_the_client(proxy, server, code):
    p = proxy(server)

    async def run():
        async with ws(p) as client:
            await client.close(code, "enough")
            return client.close_code
    assert play(run()) == code
    assert server.next_closed() == (code, "enough")


@pytest.mark.parametrize("code", [1000, 1011, 4001])
def test_close_code_of_the_server(proxy, server, code):
    p = proxy(server)

    async def run():
        async with ws(p, f"/close/{code}") as client:
            await client.wait_closed()
            return client.close_code, client.close_reason
    assert play(run()) == (code, "as you wish")


def test_close_code_of_the_server_by_node(proxy, server):
    p = proxy(server)
    seen = node_client(p, path="/close/4002")
    assert (seen["code"], seen["reason"]) == (4002, "as you wish")


def test_close_code_of_the_client_by_node(proxy, server):
    p = proxy(server)
    assert node_client(p, close=[4003, "bye"])["code"] == 4003
    assert server.next_closed() == (4003, "bye")


# ---- many ----

async def chatter(p, number, source):
    """One client: some messages of its own, echoed in order."""
    async with ws(p, source=source, compression=None) as client:
        for turn in range(5):
            message = f"{number}/{turn}:" + "x" * random.randrange(3000)
            assert await echo(client, message) == message


def many_at_once(p, n):
    async def run():
        await asyncio.gather(*(chatter(p, i, f"127.0.0.{2 + i % 4}") for i in range(n)))
    play(run())
    p.log.wait_ending("eof", nth=n)


PATIENT = {"handshake_ms": 60000, "head_ms": 60000, "stall_ms": 60000}


def test_200_clients_at_once(proxy, python_server):
    many_at_once(proxy(python_server(compression=None), **PATIENT), 200)


def test_200_clients_at_once_with_few_buffers(proxy, python_server):
    many_at_once(proxy(python_server(compression=None), max_busy=8, **PATIENT), 200)


# ---- bytes ----

async def raw_client(p):
    host, port = p.address()
    secure = p.kind() == WSS
    reader, writer = await asyncio.open_connection(
        host, port, ssl=client_context() if secure else None,
        server_hostname="localhost" if secure else None)
    writer.write(upgrade())
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def pour(writer, data, seed):
    """Writes it in pieces of all sizes."""
    sizes = random.Random(seed)
    at = 0
    while at < len(data):
        n = sizes.choice([1, 2, 100, 5000, 16384, 70000])
        writer.write(data[at:at + n])
        await writer.drain()
        at += n


def test_both_directions_at_once_byte_for_byte(proxy, place, variant):
    """3 MiB each way at the same time: nothing lost, doubled, swapped or waiting for the other."""
    up, down = pattern(3 << 20, 1), pattern(3 << 20, 2)
    here = place()

    async def run():
        got = asyncio.get_running_loop().create_future()

        async def backend(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(switching())
            data, _ = await asyncio.gather(reader.readexactly(len(up)), pour(writer, down, 3))
            got.set_result(data)
            await reader.read()
            writer.close()
        async with await asyncio.start_server(backend, sock=here.listen()):
            p = proxy(here, **variant)
            reader, writer = await raw_client(p)
            data, _ = await asyncio.gather(reader.readexactly(len(down)), pour(writer, up, 4))
            assert data == down
            assert await got == up
            writer.close()
    play(run())


def test_one_byte_at_a_time(proxy, scripted, variant):
    backend = scripted()
    p = proxy(backend, **variant)
    client, server = open_tunnel(p, backend)
    for n in range(256):
        client.send(bytes([n]))
        assert server.read(1) == bytes([n])
        server.send(bytes([n, n]))
        assert client.read(2) == bytes([n, n])


def test_record_that_comes_in_pieces(proxy, scripted):
    """Each byte of a record in a segment of its own."""
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    for byte in client.records(b"in pieces"):
        client.sock.sendall(bytes([byte]))
    assert server.read(9) == b"in pieces"


def test_many_records_in_one_segment(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    client.sock.sendall(b"".join(client.records(b"%03d" % n) for n in range(500)))
    assert server.read(1500) == b"".join(b"%03d" % n for n in range(500))


def test_half_a_record_does_not_block_the_other_direction(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    record = client.records(b"a question")
    client.sock.sendall(record[:3])
    server.send(pattern(100000))
    assert client.read(100000) == pattern(100000)
    client.sock.sendall(record[3:])
    assert server.read(10) == b"a question"


# ---- rest ----

@pytest.mark.parametrize("kind", [WSS, WS])
def test_session_at_rest_wakes_for_either_side(proxy, scripted, kind):
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", kind)])
    client, server = open_tunnel(p, backend)
    for _ in range(3):
        eventually(lambda: p.totals()["records"] == "0")
        client.send(b"from the client")
        assert server.read(15) == b"from the client"
        eventually(lambda: p.totals()["records"] == "0")
        server.send(b"from the backend")
        assert client.read(16) == b"from the backend"


def test_urgent_data_holds_nothing_back(proxy, scripted):
    """Reads stop at it though there is more behind; the byte itself is lost, as it always was."""
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", WS)])
    client, server = open_tunnel(p, backend)
    for source, sink in ((client, server), (server, client)):
        eventually(lambda: p.totals()["records"] == "0")
        p.signal(signal.SIGSTOP)
        source.send(b"one")
        source.sock.send(b"!", socket.MSG_OOB)
        source.send(b"two")
        p.signal(signal.SIGCONT)
        assert sink.read(6) == b"onetwo"


def test_session_at_rest_sees_the_end(proxy, scripted):
    backend = scripted()
    p = proxy(backend, frames=0)
    client, server = open_tunnel(p, backend)
    eventually(lambda: p.totals()["records"] == "0")
    server.close()
    assert client.read_to_end() == b""
    client.close()
    p.log.wait("close", by="backend", why="eof")


def test_session_that_is_silent_in_the_middle_of_a_record(proxy, scripted):
    """It must not be treated as at rest, or the half it has would be lost."""
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    record = client.records(b"a question")
    client.sock.sendall(record[:7])
    for _ in range(3):          # opened later, and seen by now
        open_tunnel(p, backend)
    client.sock.sendall(record[7:])
    assert server.read(10) == b"a question"


# ---- records ----

def read_records(client, size):
    """Sizes of the records' plaintext (AES-GCM adds 8 and 16 bytes) up to that many bytes in all, and the bytes."""
    wire, sizes = b"", []
    while sum(sizes) < size:
        while len(wire) < 5 or len(wire) < 5 + int.from_bytes(wire[3:5], "big"):
            wire += client.sock.recv(1 << 16)
        end = 5 + int.from_bytes(wire[3:5], "big")
        sizes.append(end - 5 - 24)
        client.incoming.write(wire[:end])
        wire = wire[end:]
    return sizes, client.read(size)


def test_bulk_is_in_full_records_behind_a_small_first_one(proxy, scripted):
    """So that a slow line need not bring 16 KB before the first byte can be verified."""
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    for _ in range(2):
        eventually(lambda: p.totals()["records"] == "0")
        sent = pattern(300_000)
        server.send(sent)
        sizes, got = read_records(client, len(sent))
        assert got == sent
        assert sizes[0] <= 1400
        assert max(sizes) == 16384


@pytest.mark.parametrize("record_max, largest, first", [
    (512, 512, 512), (1000, 512, 512), (2048, 2048, 1400), (4096, 4096, 1400), (16383, 4096, 1400)])
def test_records_are_as_small_as_wanted(proxy, scripted, record_max, largest, first):
    """For devices that have no room for others, and can't say so. The buffers go back in between."""
    backend = scripted()
    p = proxy(backend, record_max=record_max)
    client, server = open_tunnel(p, backend)
    for _ in range(2):
        eventually(lambda: p.totals()["records"] == "0")
        sent = pattern(100_000)
        server.send(sent)
        sizes, got = read_records(client, len(sent))
        assert got == sent
        assert (sizes[0], max(sizes)) == (first, largest)
        client.send(pattern(50_000))        # may be as large as they like
        assert server.read(50_000) == pattern(50_000)


# ---- one that stalls ----

def fill(stream):
    """Sends until the other end takes no more; how many bytes went."""
    data = bytes(65536)
    stream.sock.settimeout(0.5)
    sent = 0
    try:
        while True:
            sent += stream.sock.send(data)
    except TimeoutError:
        return sent
    finally:
        stream.sock.settimeout(PATIENCE)


def test_stalled_client_beside_live_ones(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    stalled, flooding = open_tunnel(p, backend)
    sent = fill(flooding)
    client, server = open_tunnel(p, backend)
    for _ in range(100):
        client.send(b"alive")
        assert server.read(5) == b"alive"
    flooding.half_close()
    assert len(stalled.read_to_end()) == sent


def test_stalled_backend_beside_live_ones(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", WS)])
    flooding, stalled = open_tunnel(p, backend)
    sent = fill(flooding)
    client, server = open_tunnel(p, backend)
    for _ in range(100):
        client.send(b"alive")
        assert server.read(5) == b"alive"
    flooding.half_close()
    assert len(stalled.read_to_end()) == sent


def test_stalled_client_still_sends(proxy, scripted):
    """Full duplex: what the client does not read must not stop what it says."""
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    fill(server)
    client.send(b"I can't read")
    assert server.read(12) == b"I can't read"
