"""What backends answer to an upgrade: only a right 101 makes a tunnel."""

import pytest

from harness import FORWARD, WS, WSS
from more import asks_before
from peers import accept_of, asking, head, pattern, switching, upgrade


@pytest.fixture(params=[1, 2], ids=["first", "second"])
def asked(proxy, scripted, request):
    """A client that has asked, once or twice, and the backend that has the request."""
    def start(sent=None, **config):
        backend = scripted()
        p = proxy(backend, http=FORWARD, **config)
        p.before = request.param == 2 and asks_before(backend)
        client, server = asking(p, backend, sent or upgrade())
        return p, client, server
    return start


def ok(fields=None, status="200 OK", body=b"", version="HTTP/1.1"):
    return head(f"{version} {status}", fields or {"Content-Length": len(body)}) + body


# ---- other answers than 101 are relayed ----

@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized", "403 Forbidden",
                                    "404 Not Found", "500 Oops", "503 Busy"])
def test_plain_answer_is_relayed_whole_and_both_sides_close(asked, status):
    p, client, server = asked()
    server.send(ok(status=status, body=b"the reason"))
    answer = client.read_head()
    assert answer.first == f"HTTP/1.1 {status}"
    assert answer.get("Connection").lower() == "close"
    assert client.read_to_end() == b"the reason"
    assert client.saw_close_notify
    assert server.read_to_end() == b""
    client.close()
    p.log.wait_ending("done")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect"])
def test_redirect_of_a_backend_is_relayed(asked, status):
    _, client, server = asked()
    server.send(ok({"Location": "https://other.test/?a=b", "Content-Length": "0"}, status))
    answer = client.read_head()
    assert answer.first == f"HTTP/1.1 {status}"
    assert answer.get("Location") == "https://other.test/?a=b"
    assert client.read_to_end() == b""


def test_fields_of_a_401_pass(asked):
    _, client, server = asked()
    fields = {"WWW-Authenticate": 'Basic realm="x"', "X-Odd": "\x80;\t\xff",
              "Content-Length": "0"}
    server.send(ok(fields, "401 Unauthorized"))
    answer = client.read_head()
    assert {name: answer.get(name) for name in fields} == fields


def test_large_answer_is_relayed_whole(asked):
    _, client, server = asked()
    body = pattern(1 << 20)
    server.send(ok(status="403 Forbidden", body=body))
    assert client.read_head().status == 403
    assert client.read_to_end() == body


def test_answer_without_a_length_ends_with_the_connection(asked):
    p, client, server = asked()
    server.send(ok({"Content-Type": "text/plain"}) + b"to the end")
    server.close()
    assert client.read_head().status == 200
    assert client.read_to_end() == b"to the end"
    assert client.saw_close_notify
    client.close()
    p.log.wait_ending("done")


def test_chunked_answer_is_relayed_whole(asked):
    p, client, server = asked()
    chunks = b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"
    server.send(ok({"Transfer-Encoding": "chunked"}) + chunks)
    answer = client.read_head()
    assert answer.get("Transfer-Encoding") == "chunked"
    assert client.read_to_end() == chunks
    client.close()
    p.log.wait_ending("done")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answer_without_a_body_ends_at_once(asked, status):
    """Though the backend keeps its connection open."""
    p, client, server = asked()
    server.send(head(f"HTTP/1.1 {status}", {"X-Any": "1"}))
    assert client.read_head().first == f"HTTP/1.1 {status}"
    assert client.read_to_end() == b""
    client.close()
    p.log.wait_ending("done")


def test_bytes_beyond_the_answer_are_not_passed(asked):
    _, client, server = asked()
    server.send(ok(body=b"body") + ok(body=b"second answer"))
    client.read_head()
    assert client.read_to_end() == b"body"


def test_refused_upgrade_never_becomes_a_tunnel(asked):
    _, client, server = asked()
    server.send(ok({"Content-Length": "100"}, "403 Forbidden"))
    assert client.read_head().status == 403
    client.send(b"GET /admin HTTP/1.1\r\n\r\n")
    server.send(bytes(100))
    assert client.read_to_end() == bytes(100)
    assert server.read_to_end() == b""


def test_short_answer(asked):
    p, client, server = asked()
    server.send(ok({"Content-Length": "100"}) + b"only this")
    server.close()
    client.read_head()
    assert client.read_to_end() == b"only this"
    client.close()
    p.log.wait_ending("short")


def test_short_chunked_answer(asked):
    p, client, server = asked()
    server.send(ok({"Transfer-Encoding": "chunked"}) + b"64\r\nonly this")
    server.close()
    client.read_head()
    client.read_to_end()
    client.close()
    p.log.wait_ending("short")


# ---- 1xx ----

@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_answer_passes(asked, interim):
    _, client, server = asked()
    server.send(head(f"HTTP/1.1 {interim}", {"X-Hint": "1"}) + switching() + b"tunnel")
    first = client.read_head()
    assert first.first == f"HTTP/1.1 {interim}"
    assert first.get("X-Hint") == "1"
    assert client.read_head().status == 101
    assert client.read(6) == b"tunnel"


def test_interim_answers_have_an_end(asked):
    p, client, server = asked()
    with pytest.raises(OSError):
        for _ in range(100000):
            server.send(head("HTTP/1.1 100 Continue"))
    while True:
        answer = client.read_head()
        if answer.status != 100:
            break
    assert answer.status == 502
    p.log.wait_ending("bad-response", status="502")


def test_slow_interim_answers_do_not_extend_response_ms(asked):
    p, client, server = asked(response_ms=600)
    server.sock.settimeout(0.1)
    with pytest.raises(OSError):
        while True:
            server.send(head("HTTP/1.1 100 Continue"))
            try:
                if not server.sock.recv(1):
                    raise ConnectionError
            except TimeoutError:
                pass
    p.log.wait_ending("response-timeout", status="504")


# ---- 101s that are none ----

@pytest.mark.parametrize("answer", [
    switching(Sec_WebSocket_Accept="AAAAAAAAAAAAAAAAAAAAAAAAAAA="),
    switching(Sec_WebSocket_Accept=None),
    switching(Sec_WebSocket_Accept=accept_of("dGhlIHNhbXBsZSBub25jZA==")),
    switching(extra=[f"Sec-WebSocket-Accept: {accept_of('x')}"]),
    switching(Upgrade=None),
    switching(Upgrade="h2c"),
    switching(Connection=None),
    switching(Connection="close"),
], ids=["wrong-accept", "no-accept", "accept-of-another-key", "two-accepts", "no-upgrade",
        "other-upgrade", "no-connection", "connection-close"])
def test_wrong_101_is_no_tunnel(asked, answer):
    p, client, server = asked()
    server.send(answer + b"secret")
    got = client.read_head()
    assert got.status == 502
    assert b"secret" not in client.read_to_end()
    client.close()
    p.log.wait_ending("bad-accept", status="502")


def test_wrong_accept_passes_where_it_is_not_checked(asked):
    _, client, server = asked(check_accept=0)
    server.send(switching(Sec_WebSocket_Accept="wrong") + b"tunnel")
    assert client.read_head().status == 101
    assert client.read(6) == b"tunnel"


def test_missing_upgrade_does_not_pass_even_where_accept_is_not_checked(asked):
    p, client, server = asked(check_accept=0)
    server.send(switching(Upgrade=None))
    assert client.read_head().status == 502
    client.close()
    p.log.wait_ending("bad-accept", status="502")


# ---- no answer ----

@pytest.mark.parametrize("garbage", [
    b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    b"HTTP/1.1 abc Hello\r\n\r\n",
    b"HTTP/1.1 99 Low\r\n\r\n",
    b"HTTP/1.1 600 High\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/2.0 200 OK\r\n\r\n",
    head("HTTP/1.1 200 OK", {"Na me": "x"}),
    head("HTTP/1.1 200 OK", {"Name": "a\0b"}),
    head("HTTP/1.1 200 OK", {"Name": "a"}, ["  folded"]),
    head("HTTP/1.1 200 OK", {"Content-Length": "1"}, ["Content-Length: 2"]),
    head("HTTP/1.1 200 OK", {"Content-Length": "x"}),
    head("HTTP/1.1 200 OK", {"Content-Length": "3", "Transfer-Encoding": "gzip"}),
    bytes(range(256)) + b"\r\n\r\n",
], ids=["ssh", "no-number", "99", "600", "two-spaces", "http-2", "field-name", "nul", "folded",
        "two-lengths", "length-no-number", "length-and-coding", "noise"])
def test_malformed_answer_gets_502(asked, garbage):
    p, client, server = asked()
    server.send(garbage)
    assert client.read_head().status == 502
    client.close()
    p.log.wait_ending("bad-response", status="502")


def test_answer_with_a_head_too_large_gets_502(asked):
    p, client, server = asked(head_max=2000)
    server.send(head("HTTP/1.1 200 OK", {"Set-Cookie": "a" * 3000}))
    assert client.read_head().status == 502
    client.close()
    p.log.wait_ending("large-response", status="502")


def test_answer_with_too_many_lines_gets_502(asked):
    p, client, server = asked()
    server.send(head("HTTP/1.1 200 OK", extra=[f"X-{n}: a" for n in range(101)]))
    assert client.read_head().status == 502
    p.log.wait_ending("large-response", status="502")


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 101 Swi", switching()[:-2]],
                         ids=["nothing", "half-a-line", "half-a-head"])
def test_backend_that_closes_inside_its_head_gets_502(asked, beginning):
    p, client, server = asked()
    server.send(beginning)
    server.close()
    assert client.read_head().status == 502
    client.close()
    p.log.wait_ending("bad-response", status="502")


def test_backend_that_resets_inside_its_head_gets_502(asked):
    p, client, server = asked()
    server.send(b"HTTP/1.1 101 Swi")
    server.reset()
    assert client.read_head().status == 502


@pytest.mark.parametrize("kind", [WSS, WS])
def test_silent_backend_gets_504(asked, kind):
    p, client, server = asked(listeners=[("127.0.0.1", "0", kind)], response_ms=300)
    assert client.read_head().status == 504
    assert server.read_to_end() == b""
    p.log.wait_ending("response-timeout", status="504")


def test_client_that_leaves_while_the_backend_thinks(asked):
    p, client, server = asked()
    client.close_notify()
    client.close()
    assert server.read_to_end() == b""
    p.log.wait_ending("eof")


def test_client_that_resets_while_the_backend_thinks(asked):
    p, client, server = asked()
    client.reset()
    p.log.wait_ending("reset")
    with pytest.raises(ConnectionError):
        server.read_to_end()
        server.send(b"x")
        server.send(b"x")
