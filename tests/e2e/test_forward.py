"""http = FORWARD: requests that are no WebSocket upgrade, as the first and as the second of their
connection."""

import re
import signal
import threading
import time

import pytest

from harness import FORWARD, PATIENCE, WS, WSS, eventually
from more import answer, asks_before, curl, exchange, request
from peers import KEY, accept_of, ask, asking, connect, open_tunnel, pattern, play, upgrade, ws

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]


@pytest.fixture
def backend(scripted):
    return scripted()


@pytest.fixture(params=[1, 2], ids=["first", "second"])
def forwarding(proxy, backend, request):
    """A proxy that forwards to `backend`; all tests that need no more share one binary."""
    def start(*backends, **config):
        p = proxy(*(backends or [backend]), http=FORWARD, listeners=BOTH, **config)
        if request.param == 2 and not backends:
            p.before = asks_before(backend)
        return p
    return start


# ---- the request ----

@pytest.mark.parametrize("kind", [WSS, WS])
def test_page(forwarding, backend, kind):
    p = forwarding()
    (got, _), (head, body) = exchange(p, backend, request("/a?b=c"), answer(body=b"hello"), kind)
    assert got.first == "GET /a?b=c HTTP/1.1"
    assert head.first == "HTTP/1.1 200 OK"
    assert body == b"hello"


def test_backend_learns_what_it_does_of_an_upgrade(forwarding, backend):
    p = forwarding()
    sent = request("/", Host="shop.example:8443", Cookie="a=b; c=d", User_Agent="browser")
    (got, _), _ = exchange(p, backend, sent, answer(body=b""))
    assert [line for line in got.fields if line[0] != "X-Real-IP"] == [
        ("Host", "shop.example:8443"), ("Cookie", "a=b; c=d"), ("User-Agent", "browser"),
        ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Proto", "https"),
        ("Connection", "close")]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND",
                                    "M-SEARCH", "get"])
def test_any_method(forwarding, backend, method):
    p = forwarding()
    (got, _), (head, body) = exchange(p, backend, request("/x", method), answer(body=b"done"))
    assert got.first == f"{method} /x HTTP/1.1"
    assert (head.status, body) == (200, b"done")


def test_connect_is_no_method_for_it(forwarding, backend):
    p = forwarding()
    assert ask(p, request("example.test:443", "CONNECT"))[0].status == 405
    assert backend.untouched()


def test_options_of_the_server(forwarding, backend):
    p = forwarding()
    (got, _), _ = exchange(p, backend, request("*", "OPTIONS"), answer(body=b""))
    assert got.first == "OPTIONS * HTTP/1.1"


def test_absolute_target(forwarding, backend):
    p = forwarding()
    (got, _), _ = exchange(p, backend, request("http://real.example/p?q", Host="other.example"),
                           answer(body=b""))
    assert got.first == "GET /p?q HTTP/1.1"
    assert got.get("Host") == "real.example"


@pytest.mark.parametrize("line", [
    "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: trailers", "Upgrade: h2c",
    "Upgrade: websocket"])
def test_hop_by_hop_field_of_a_request_is_removed(forwarding, backend, line):
    p = forwarding()
    (got, _), _ = exchange(p, backend, request(extra=[line]), answer(body=b""))
    assert got.all(line.partition(":")[0]) == []


def test_upgrade_to_http2_is_not_passed_on(forwarding, backend):
    p = forwarding()
    sent = request(Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings="AAMAAABk")
    (got, _), (head, _) = exchange(p, backend, sent, answer(body=b"1.1 then"))
    assert got.all("Upgrade") == got.all("HTTP2-Settings") == []
    assert got.get("Connection") == "close"
    assert head.status == 200


def test_upgrade_by_another_method_is_a_plain_request(forwarding, backend):
    p = forwarding()
    (got, _), (head, _) = exchange(p, backend, upgrade(method="POST", Content_Length="0"),
                                   answer("400 Bad Request", b""))
    assert got.all("Upgrade") == []
    assert got.get("Connection") == "close"
    assert head.status == 400


def test_websocket_works_beside(proxy, python_server):
    p = proxy(python_server(), http=FORWARD, listeners=BOTH)

    async def echo():
        async with ws(p) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
    play(echo())


# ---- its body ----

@pytest.mark.parametrize("kind", [WSS, WS])
@pytest.mark.parametrize("size", [1, 5, 16384, 3_000_000])
def test_body_arrives_byte_for_byte(forwarding, backend, kind, size):
    p = forwarding()
    body = pattern(size)
    client = connect(p, kind)
    sender = threading.Thread(target=client.send, args=(request(method="POST", body=body),))
    sender.start()
    server = backend.accept()
    got = server.read_head()
    assert server.read(size) == body
    sender.join(PATIENCE)
    server.send(answer("201 Created", b""))
    assert client.read_head().status == 201
    assert got.get("Content-Length") == str(size)


def test_body_of_length_0(forwarding, backend):
    p = forwarding()
    (got, _), (head, _) = exchange(p, backend, request(method="POST", body=b""),
                                   answer(body=b"empty"))
    assert got.get("Content-Length") == "0"
    assert head.status == 200


def test_body_in_pieces(forwarding, backend):
    p = forwarding()
    client, server = asking(p, backend, request(method="POST", Content_Length="6"))
    for piece in (b"ab", b"cd", b"ef"):
        client.send(piece)
        assert server.read(2) == piece
    server.send(answer(body=b"all here"))
    assert client.read_head().status == 200


def test_bytes_behind_the_body_go_nowhere(forwarding, backend):
    p = forwarding()
    client, server = asking(p, backend, request(method="POST", body=b"0123456789") + request("/second"))
    assert server.read(10) == b"0123456789"
    server.send(answer(body=b"first"))
    assert client.read_head().status == 200
    assert client.read_to_end() == b"first"
    client.close()
    assert server.read_to_end() == b""
    assert backend.untouched()


@pytest.mark.parametrize("framing, status", [
    (["Transfer-Encoding: gzip"], 501),
    (["Transfer-Encoding: gzip, chunked"], 501),
    (["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
    (["Content-Length: 5", "Content-Length: 6"], 400),
    (["Content-Length: +5"], 400), (["Content-Length: 5x"], 400), (["Content-Length: -1"], 400),
    (["Content-Length: 0x5"], 400), (["Content-Length:"], 400), (["Content-Length: 5, 5"], 400),
    (["Content-Length: 99999999999999999999"], 400),
])
def test_unclear_body_is_refused(forwarding, backend, framing, status):
    p = forwarding()
    assert ask(p, request(method="POST", extra=framing))[0].status == status
    assert backend.untouched()


@pytest.mark.parametrize("kind", [WSS, WS])
@pytest.mark.parametrize("sent, passed", [
    (b"0\r\n\r\n", None), (b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", None),
    (b"0005\r\nhello\r\n00\r\n\r\n", None), (b"9\r\n0\r\n\r\n0\r\n\r\r\n0\r\n\r\n", None),
    (b"5;name=value\r\nhello\r\n0;last\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    (b"5 \r\nhello\r\n0\t;a=\"b\"\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    (b"1\r\n1\r\n0\r\nHost: evil\r\nContent-Length: 5\r\n\r\n", b"1\r\n1\r\n0\r\n\r\n")])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_chunks_are_passed_on_without_extensions_and_trailers(forwarding, backend, kind, sent,
                                                              passed, piece):
    p = forwarding()
    client = connect(p, kind)
    client.send(request(method="POST", Transfer_Encoding="Chunked"))
    server = backend.accept()
    got = server.read_head()
    assert got.get("Transfer-Encoding") == "chunked"
    assert got.all("Content-Length") == []
    for at in range(0, len(sent), piece):
        client.send(sent[at:at + piece])
    passed = passed or sent
    assert server.read(len(passed)) == passed
    server.send(answer(body=b"thanks"))
    assert client.read_head().status == 200
    assert server.read_to_end() == b""
    assert not p.log.all("reject")


@pytest.mark.parametrize("kind", [WSS, WS])
def test_large_chunked_body_arrives_byte_for_byte(forwarding, backend, kind):
    """A backend that takes nothing for a while, too: what it did not take is not judged twice."""
    p = forwarding()
    client = connect(p, kind)
    data = pattern(6_000_000)
    body = b"".join(b"%x;n=%d\r\n%b\r\n" % (len(data[at:at + 5000]), at, data[at:at + 5000])
                    for at in range(0, 1000000, 5000))
    body += b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    sender = threading.Thread(target=client.send, daemon=True, args=(
        request(method="POST", Transfer_Encoding="chunked") + body,))
    sender.start()
    server = backend.accept()
    server.read_head()
    clean = re.sub(rb";n=[0-9]+\r", b"\r", body[:1010000]) + body[1010000:]
    assert server.read(len(clean)) == clean
    sender.join(PATIENCE)
    server.send(answer(body=b"thanks"))
    assert client.read_head().status == 200


def test_client_that_leaves_in_the_middle_of_its_chunks(forwarding, backend):
    p = forwarding()
    client = connect(p)
    client.send(request(method="POST", Transfer_Encoding="chunked") + b"5\r\nhello\r\n")
    server = backend.accept()
    server.read_head()
    assert server.read(10) == b"5\r\nhello\r\n"
    client.close()
    try:
        assert server.read_to_end() == b""
    except ConnectionResetError:
        pass
    p.log.wait("reject", why="eof")


def test_chunks_that_go_bad_during_the_answer(forwarding, backend):
    """It can't be told any more, but it must not look as if all were well."""
    p = forwarding()
    client = connect(p)
    client.send(request(method="POST", Transfer_Encoding="chunked") + b"5\r\nhello\r\n")
    server = backend.accept()
    server.read_head()
    server.read(10)
    server.send(answer(Content_Length="100"))
    assert client.read_head().status == 200
    client.send(b"x\r\n")
    with pytest.raises(ConnectionResetError):
        server.read_to_end()
    p.log.wait("close", by="client", why="chunks")


def test_same_length_twice_is_said_once(forwarding, backend):
    p = forwarding()
    sent = request(method="POST", extra=["Content-Length: 3", "Content-Length: 3"]) + b"abc"
    (got, body), _ = exchange(p, backend, sent, answer(body=b""))
    assert got.get("Content-Length") == "3"
    assert body == b"abc"


def test_connection_can_not_take_the_length_away(forwarding, backend):
    p = forwarding()
    sent = request(method="POST", body=b"abc", Connection="content-length")
    (got, body), _ = exchange(p, backend, sent, answer(body=b""))
    assert got.get("Content-Length") == "3"
    assert body == b"abc"


def test_expect_100_continue(forwarding, backend):
    p = forwarding()
    client = connect(p)
    client.send(request(method="POST", Content_Length="4", Expect="100-continue"))
    server = backend.accept()
    assert server.read_head().get("Expect") == "100-continue"
    server.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert client.read_head().status == 100
    client.send(b"body")
    assert server.read(4) == b"body"
    server.send(answer(body=b"thanks"))
    assert client.read_head().status == 200


def test_refused_expectation(forwarding, backend):
    p = forwarding()
    client = connect(p)
    client.send(request(method="POST", Content_Length="4", Expect="100-continue"))
    server = backend.accept()
    server.read_head()
    server.send(answer("417 Expectation Failed", b"no"))
    assert client.read_head().status == 417
    assert client.read_to_end() == b"no"


def test_answer_that_does_not_wait_for_the_body(forwarding, backend):
    """A server may refuse an upload that it has not read; the client gets to know why, though it
    still sends."""
    p = forwarding()
    client, server = asking(p, backend, request(method="POST", Content_Length="100000000"))
    server.send(answer("413 Payload Too Large", b"too much"))
    client.send(bytes(200_000))
    assert client.read_head().status == 413
    assert client.read(8) == b"too much"


def test_answer_of_a_backend_that_closes_in_the_middle_of_the_body(forwarding, backend):
    """Its answer was on the way before the reset that the client's bytes provoke."""
    p = forwarding()
    client, server = asking(p, backend, request(method="POST", Content_Length="50000000"))
    server.send(answer("413 Payload Too Large", b"too much"))
    server.half_close()
    client.send(bytes(1_000_000))
    assert client.read_head().status == 413
    assert client.read_to_end() == b"too much"


def test_body_that_moves_outlives_response_ms(forwarding, backend):
    p = forwarding(response_ms=1000)
    client, server = asking(p, backend, request(method="POST", Content_Length="1000"))
    start, sent = time.monotonic(), 0
    while time.monotonic() < start + 2 or sent % 10:
        client.send(b"x")
        assert server.read(1) == b"x"
        sent += 1
        time.sleep(0.01)
    client.send(bytes(1000 - sent))
    assert len(server.read(1000 - sent)) == 1000 - sent
    server.send(answer(body=b"at last"))
    assert client.read_head().status == 200


def test_body_that_stops_gets_504(forwarding, backend):
    p = forwarding(response_ms=1000)
    client, server = asking(p, backend, request(method="POST", Content_Length="1000") + b"x")
    assert client.read_head().status == 504
    server.read_to_end()


@pytest.mark.parametrize("end", ["close", "reset"])
def test_client_that_leaves_in_the_middle_of_its_body(forwarding, backend, end):
    p = forwarding()
    client, server = asking(p, backend, request(method="POST", Content_Length="1000") + b"half")
    assert server.read(4) == b"half"
    getattr(client, end)()
    try:
        assert server.read_to_end() == b""
    except ConnectionResetError:
        pass
    eventually(lambda: p.log.all("reject") + p.log.all("close"))


def test_backend_that_takes_nothing_holds_the_client_back(forwarding, backend):
    p = forwarding()
    client, server = asking(p, backend, request(method="POST", Content_Length=str(1 << 30)), WS)
    client.sock.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < 1 << 30:
            sent += client.sock.send(bytes(1 << 16))
    client.sock.settimeout(PATIENCE)
    assert len(server.read(sent)) == sent


# ---- the answer ----

def test_fields_of_the_answer_pass_in_order(forwarding, backend):
    p = forwarding()
    lines = ["Set-Cookie: a=1; Path=/", "Set-Cookie: b=2", "X-Odd:  spaced  ", "ETag: \"x\"",
             "Location: /elsewhere", "WWW-Authenticate: Basic realm=x"]
    _, (head, _) = exchange(p, backend, request(), answer("302 Found", b"", lines))
    assert head.fields == [
        ("Content-Length", "0"), ("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2"),
        ("X-Odd", "spaced"), ("ETag", '"x"'), ("Location", "/elsewhere"),
        ("WWW-Authenticate", "Basic realm=x"), ("Connection", "close")]


def test_keep_alive_of_the_backend_is_not_the_clients(forwarding, backend):
    p = forwarding()
    _, (head, _) = exchange(p, backend, request(Connection="keep-alive, close"),
                            answer(body=b"x", Connection="keep-alive, X-Private",
                                   Keep_Alive="timeout=5", X_Private="1"))
    assert head.get("Connection") == "close"
    assert head.all("Keep-Alive") == head.all("X-Private") == []


@pytest.mark.parametrize("kind", [WSS, WS])
def test_answer_with_a_length_ends_though_the_backend_stays(forwarding, backend, kind):
    p = forwarding()
    client, server = asking(p, backend, request(), kind)
    server.send(answer(body=b"all there is"))
    assert client.read_head().status == 200
    assert client.read_to_end() == b"all there is"
    assert server.read_to_end() == b""


CHUNKED = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"


def test_chunked_answer_is_passed_as_it_came(forwarding, backend):
    p = forwarding()
    client, server = asking(p, backend, request())
    server.send(answer(extra=["Transfer-Encoding: chunked"]) + CHUNKED + b"rubbish")
    head = client.read_head()
    assert head.get("Transfer-Encoding") == "chunked"
    assert head.all("Content-Length") == []
    assert client.read_to_end() == CHUNKED
    server.read_to_end()


def test_answer_up_to_the_end_of_the_connection(forwarding, backend):
    p = forwarding()
    body = pattern(300_000)
    _, (head, got) = exchange(p, backend, request(), answer() + body)
    assert head.all("Content-Length") == []
    assert got == body


def test_answer_by_http10(forwarding, backend):
    p = forwarding()
    _, (head, body) = exchange(p, backend, request(), b"HTTP/1.0 200 OK\r\n\r\nold")
    assert head.first == "HTTP/1.1 200 OK"
    assert body == b"old"


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answer_without_a_body_ends_at_once(forwarding, backend, status):
    p = forwarding()
    client, server = asking(p, backend, request())
    server.send(answer(status, extra=["ETag: \"x\""]))
    assert client.read_head().first == f"HTTP/1.1 {status}"
    assert client.read_to_end() == b""


def test_304_may_say_a_length_that_is_not_sent(forwarding, backend):
    p = forwarding()
    client, server = asking(p, backend, request())
    server.send(answer("304 Not Modified", Content_Length="1234"))
    assert client.read_head().status == 304
    assert client.read_to_end() == b""


@pytest.mark.parametrize("fields", [["Content-Length: 1234"], ["Transfer-Encoding: chunked"], []])
def test_answer_to_head(forwarding, backend, fields):
    p = forwarding()
    client = connect(p)
    client.send(request(method="HEAD"))
    server = backend.accept()
    assert server.read_head().first == "HEAD / HTTP/1.1"
    server.send(answer(extra=fields))
    head = client.read_head()
    assert client.read_to_end() == b""
    for field in fields:
        name, _, value = field.partition(": ")
        assert head.get(name) == value


def test_own_answer_to_head_has_no_body(proxy, place):
    p = proxy(place(), http=FORWARD)
    head, body = ask(p, request(method="HEAD"))
    assert head.status == 502
    assert body == b""


def test_early_hints_pass(forwarding, backend):
    p = forwarding()
    client, server = asking(p, backend, request())
    server.send(answer("103 Early Hints", extra=["Link: </style.css>; rel=preload"]))
    head = client.read_head()
    assert (head.status, head.get("Link")) == (103, "</style.css>; rel=preload")
    server.send(answer(body=b"page"))
    assert client.read_head().status == 200
    assert client.read(4) == b"page"


def test_101_that_nobody_asked_for(forwarding, backend):
    p = forwarding()
    (_, _), (head, _) = exchange(p, backend, request(), answer(
        "101 Switching Protocols", Upgrade="websocket", Connection="Upgrade",
        Sec_WebSocket_Accept=accept_of(KEY)))
    assert head.status == 502


@pytest.mark.parametrize("garbage", [
    b"\r\n", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\nX: y\n\n", b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_malformed_answer_gets_502(forwarding, backend, garbage):
    p = forwarding()
    _, (head, _) = exchange(p, backend, request(), garbage)
    assert head.status == 502


@pytest.mark.parametrize("kind", [WSS, WS])
def test_answer_that_ends_early_is_not_made_to_look_whole(forwarding, backend, kind):
    """With its length said, fewer bytes and the end are what tells the client."""
    p = forwarding()
    _, (head, body) = exchange(p, backend, request(), answer(Content_Length="10") + b"12345", kind)
    assert head.get("Content-Length") == "10"
    assert body == b"12345"
    p.log.wait("close", why="short")


def test_chunked_answer_that_ends_early_is_not_made_to_look_whole(forwarding, backend):
    p = forwarding()
    _, (_, body) = exchange(p, backend, request(),
                            answer(extra=["Transfer-Encoding: chunked"]) + b"5\r\nhel")
    assert body == b"5\r\nhel"
    p.log.wait("close", why="short")


def test_silent_backend_gets_504(forwarding, backend):
    p = forwarding(response_ms=1000)
    client, server = asking(p, backend, request())
    assert client.read_head().status == 504


@pytest.mark.parametrize("kind", [WSS, WS])
def test_client_that_leaves_during_a_download(forwarding, backend, kind):
    p = forwarding()
    client, server = asking(p, backend, request(), kind)
    server.send(answer(Content_Length=str(1 << 30)) + bytes(100_000))
    client.read_head()
    client.read(100_000)
    client.close()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            server.send(bytes(1 << 20))
    p.log.wait("close", by="client")


@pytest.mark.parametrize("kind", [WSS, WS])
def test_slow_client_holds_the_backend_back_and_gets_all(forwarding, backend, kind):
    p = forwarding()
    client, server = asking(p, backend, request(), kind)
    before = p.memory_kb()
    part = pattern(1 << 20)
    server.send(answer())
    server.sock.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:             # how much the kernel takes is its own affair
            at = sent % len(part)
            sent += server.sock.send(part[at:at + (1 << 16)])
    assert p.memory_kb() - before < 512
    server.sock.settimeout(PATIENCE)
    rest = part[sent % len(part):] + part
    sender = threading.Thread(target=lambda: (server.send(rest), server.close()))
    sender.start()
    client.read_head()
    body = client.read_to_end()
    assert len(body) == sent + len(rest)
    assert body == part * (len(body) // len(part))
    sender.join(PATIENCE)


def test_log_has_the_path_and_the_status_but_no_query(forwarding, backend):
    p = forwarding()
    exchange(p, backend, request("/login?password=x"), answer("303 See Other", b""))
    line = p.log.wait("open", path="/login", status="303", host="example.test")
    assert "password" not in p.log.text
    p.log.wait("close", id=line["id"], why="done")


# ---- clients that others wrote ----

def page_server(backend, answers):
    """Plays a server that answers each connection's request with the next of those."""
    seen = []

    def serve():
        for text in answers:
            server = backend.accept()
            head = server.read_head()
            body = server.read(int(head.get("Content-Length") or 0))
            seen.append((head, body))
            server.send(text)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return seen


def test_curl_gets_two_pages_by_two_connections(forwarding, backend):
    p = forwarding()
    page_server(backend, [answer(body=b"one "), answer(body=b"two")])
    port = p.address()[1]
    result = curl(p, "/1", f"https://localhost:{port}/2")
    assert result.stdout == "two" "one " or result.stdout == "one two", result.stderr


def test_curl_that_would_like_http2_gets_http11(forwarding, backend):
    p = forwarding()
    page_server(backend, [answer(body=b"page")])
    result = curl(p, "/", "--http2", "-w", " %{http_version}")
    assert result.stdout == "page 1.1", result.stderr


def test_curl_posts_a_form_and_follows_with_its_cookie(forwarding, backend):
    p = forwarding()
    seen = page_server(backend, [
        answer("303 See Other", b"", ["Location: /home", "Set-Cookie: id=7; Secure; HttpOnly"]),
        answer(body=b"welcome")])
    result = curl(p, "/login", "-L", "-b", "", "-d", "user=a&password=b")
    assert result.stdout == "welcome", result.stderr
    assert seen[0][1] == b"user=a&password=b"
    assert seen[1][0].first == "GET /home HTTP/1.1"
    assert seen[1][0].get("Cookie") == "id=7"


def test_curl_uploads_with_expect(forwarding, backend, tmp_path):
    """curl waits for 100 before a large body, and sends it all the same when none comes."""
    p = forwarding()
    body = pattern(2_000_000)
    (tmp_path / "file").write_bytes(body)
    seen = page_server(backend, [b"HTTP/1.1 100 Continue\r\n\r\n" + answer("201 Created", b"ok")])
    result = curl(p, "/file", "-T", tmp_path / "file", "-H", "Expect: 100-continue",
                  "--expect100-timeout", "0.1")
    assert result.stdout == "ok", result.stderr
    assert seen[0][1] == body


def test_curl_decodes_a_chunked_answer(forwarding, backend):
    p = forwarding()
    page_server(backend, [answer(extra=["Transfer-Encoding: chunked"]) + CHUNKED])
    result = curl(p, "/")
    assert result.stdout == "hello world", result.stderr


def test_curl_says_that_an_answer_was_cut_off(forwarding, backend):
    p = forwarding()
    seen = []

    def serve():
        server = backend.accept()
        seen.append(server.read_head())
        server.send(answer(Content_Length="100") + b"half")
        server.close()
    thread = threading.Thread(target=serve)
    thread.start()
    result = curl(p, "/")
    thread.join(PATIENCE)
    assert result.returncode == 18, result.stderr


# ---- who waits for an answer holds nothing ----

def asked(p, backend, kind=None, **fields):
    """A client whose request is at the backend, and the backend's end."""
    client, server = asking(p, backend, request(**fields), kind)
    return client, server


def at_rest(p):
    eventually(lambda: p.totals()["records"] == p.totals()["heads"] == "0")


@pytest.mark.parametrize("kind", [WSS, WS])
def test_long_polls_hold_no_buffers(forwarding, backend, kind):
    p = forwarding(max_busy=2, stall_ms=60000)
    polls = [asked(p, backend, kind) for _ in range(20)]
    at_rest(p)
    client, server = open_tunnel(p, backend)
    client.send(b"served")
    assert server.read(6) == b"served"
    for n, (client, server) in enumerate(polls):
        server.send(answer(body=b"%d" % n))
        assert client.read_head().status == 200
        assert client.read_to_end() == b"%d" % n


def test_slow_uploads_hold_no_buffers(forwarding, backend):
    p = forwarding(max_busy=2, stall_ms=60000)
    uploads = [asked(p, backend, method="POST", Content_Length="10") for _ in range(20)]
    for byte in b"123456789":
        for client, server in uploads:
            client.send(bytes([byte]))
        for client, server in uploads:
            assert server.read(1) == bytes([byte])
    at_rest(p)
    exchange(p, backend, request("/between"), answer(body=b"x"))
    for n, (client, server) in enumerate(uploads):
        client.send(b"0")
        assert server.read(1) == b"0"
        server.send(answer(body=b"%d" % n))
        assert client.read_head().status == 200
        assert client.read_to_end() == b"%d" % n


def test_answers_in_two_halves_take_turns(forwarding, backend):
    """Ten answers of which half the head has come, two buffers: those who sit on them give way."""
    p = forwarding(max_busy=2, stall_ms=400)
    polls = [asked(p, backend) for _ in range(10)]
    for _, server in polls:
        server.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    answers = [client.read_head().status for client, _ in polls[:-2]]
    assert set(answers) == {504}


@pytest.mark.parametrize("kind", [WSS, WS])
def test_silent_backend_gets_504_though_all_buffers_are_taken(forwarding, backend, kind):
    p = forwarding(max_busy=1, stall_ms=60000, response_ms=1000, linger_ms=60000)
    client, _ = asked(p, backend, kind)
    at_rest(p)
    sitting = connect(p, kind)
    sitting.send(upgrade() + b"early")          # which stays in its buffer
    backend.accept().read_head()
    p.log.wait("reject", status="504", nth=2)
    assert client.read_head().status == sitting.read_head().status == 504


def test_answers_that_came_during_a_pause_are_no_timeouts(forwarding, backend):
    """The process was stopped, or starved: what has come goes before what is due, however much."""
    p = forwarding(max_per_ip=0, response_ms=2000)
    polls = [asked(p, backend, WS) for _ in range(100)]
    p.signal(signal.SIGSTOP)
    threading.Event().wait(2.2)         # all are due by now
    for _, server in polls:
        server.send(answer(body=b"late"))
    p.signal(signal.SIGCONT)
    assert [client.read_head().status for client, _ in polls] == [200] * len(polls)


def test_place_at_the_backend_is_free_once_its_answer_is_whole(forwarding, backend):
    """However long the client keeps its end open, or takes to read."""
    p = forwarding(backend.entry(max_conns=1), linger_ms=60000)
    clients = []
    for body in b"x", bytes(50000), b"y":
        client, server = asked(p, backend, WS)
        clients.append(client)
        server.send(answer(body=body))
        assert client.read_head().status == 200
        assert server.read_to_end() == b""
    assert clients[1].read_to_end() == bytes(50000)


def test_client_that_leaves_while_it_waits(forwarding, backend):
    p = forwarding()
    client, server = asked(p, backend)
    at_rest(p)
    client.close()
    assert server.read_to_end() == b""
    p.log.wait_ending("eof")


def test_client_that_leaves_after_bytes_that_nobody_takes(forwarding, backend):
    p = forwarding()
    client, server = asked(p, backend)
    server.send(answer(Content_Length="100"))
    client.read_head()
    client.send(request("/pipelined"))
    client.close()
    assert server.read_to_end() == b""
    server.close()
    p.log.wait("close", by="client", why="eof")


def test_backend_that_leaves_while_it_is_waited_for(forwarding, backend):
    p = forwarding()
    client, server = asked(p, backend)
    at_rest(p)
    server.reset()
    assert client.read_head().status == 502


def test_client_that_has_not_asked_yet_holds_nothing(forwarding, backend):
    p = forwarding(max_busy=1, stall_ms=60000)
    early = [connect(p) for _ in range(5)]
    at_rest(p)
    for n, client in enumerate(early):
        client.send(request(f"/{n}"))
        server = backend.accept()
        assert server.read_head().first == f"GET /{n} HTTP/1.1"
        server.send(answer(body=b"x"))
        assert client.read_head().status == 200


def test_events_one_by_one_hold_no_buffers(forwarding, backend):
    """Server-sent events: an answer that never ends, and rests between its lines."""
    p = forwarding(max_busy=2, stall_ms=60000)
    streams = [asked(p, backend) for _ in range(10)]
    for _, server in streams:
        server.send(answer(Content_Type="text/event-stream"))
    for client, _ in streams:
        client.read_head()
    for n in range(3):
        at_rest(p)
        for _, server in streams:
            server.send(b"data: %d\n\n" % n)
        for client, _ in streams:
            assert client.read(9) == b"data: %d\n\n" % n


@pytest.mark.parametrize("kind", [WSS, WS])
def test_answer_that_is_cut_off_for_silence_does_not_look_whole(forwarding, backend, kind):
    """Of an answer without a length only a reset, or the want of a close_notify, tells."""
    p = forwarding(head_ms=1000, idle_ms=1200)
    client, server = asked(p, backend, kind)
    server.send(answer() + b"half")
    client.read_head()
    assert client.read(4) == b"half"
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    p.log.wait("close", by="proxy", why="idle")


def test_answer_that_its_backend_breaks_off_never_looks_whole(forwarding, backend):
    """Not even to a client that has ended before."""
    p = forwarding()
    client, server = asked(p, backend, WS)
    server.send(answer() + b"half")
    client.read_head()
    assert client.read(4) == b"half"
    client.half_close()
    assert server.read_to_end() == b""
    server.reset()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()


# ---- many at once ----

def test_tunnels_and_pages_mixed(forwarding, backend):
    p = forwarding()
    client, server = open_tunnel(p, backend)
    for n in range(20):
        _, (head, body) = exchange(p, backend, request(f"/{n}"), answer(body=b"%d" % n),
                                   (WSS, WS)[n % 2])
        assert (head.status, body) == (200, b"%d" % n)
        client.send(b"ping")
        assert server.read(4) == b"ping"


def test_plain_requests_leave_no_descriptor(forwarding, backend):
    p = forwarding()
    exchange(p, backend, request(), answer(body=b"x"))
    eventually(lambda: p.log.all("close"))
    before = p.descriptors()
    for n in range(50):
        exchange(p, backend, request(), answer(body=b"x") if n % 2 else b"", (WSS, WS)[n % 2])
    eventually(lambda: len(p.log.all("close")) + len(p.log.all("reject")) >= 51)
    eventually(lambda: p.descriptors() <= before)
