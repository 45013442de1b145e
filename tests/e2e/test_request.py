"""What clients ask: every answer of the proxy's own that a request can earn, and that nothing of
a refused request reaches a backend."""

import base64

import pytest

from harness import FORWARD, REDIRECT, WS, WSS
from more import asks_before
from peers import KEY, UPGRADE, ask, asking, connect, head, switching, upgrade

PLAIN = {"Host": "example.test"}


def get(*extra, target="/", version="HTTP/1.1", method="GET", **fields):
    changed = {k.replace("_", "-"): v for k, v in fields.items()}
    return head(f"{method} {target} {version}", {**PLAIN, **changed}, extra)


def key_of(n):
    return base64.b64encode(bytes(n)).decode()


def line_ends(request, end):
    return request.replace(b"\r\n", end)


REFUSED = {
    # what it is: (request, status, why)
    "two-spaces": (upgrade(method="GET "), 400, "request-line"),
    "tab-in-request-line": (upgrade().replace(b"GET /", b"GET\t/"), 400, "request-line"),
    "no-version": (upgrade().replace(b" HTTP/1.1", b""), 400, "request-line"),
    "leading-space": (b" " + upgrade(), 400, "request-line"),
    "method-no-token": (upgrade(method="G(T"), 400, "request-line"),
    "version-no-http": (upgrade(version="HTTQ/1.1"), 400, "request-line"),
    "version-odd-digits": (upgrade(version="HTTP/1.10"), 400, "request-line"),

    "target-relative": (upgrade("chat"), 400, "target"),
    "target-other-scheme": (upgrade("ftp://example.test/"), 400, "target"),
    "target-control-byte": (upgrade("/\x01"), 400, "target"),
    "target-beyond-ascii": (upgrade("/\xff"), 400, "target"),
    "target-without-authority": (upgrade("http:///chat"), 400, "target"),

    "space-before-colon": (upgrade(extra=["Name : value"]), 400, "field"),
    "folded-line": (upgrade(extra=["Name: value", " more"]), 400, "field"),
    "first-line-folded": (upgrade().replace(b"\r\nHost", b"\r\n Host", 1), 400, "field"),
    "name-no-token": (upgrade(extra=["Na(me: value"]), 400, "field"),
    "name-beyond-ascii": (upgrade(extra=["Na\xefve: value"]), 400, "field"),
    "no-colon": (upgrade(extra=["Name"]), 400, "field"),
    "no-name": (upgrade(extra=[": value"]), 400, "field"),
    "nul-in-value": (upgrade(extra=["Name: a\0b"]), 400, "field"),
    "bare-cr-in-value": (upgrade(extra=["Name: a\rb"]), 400, "field"),
    "bare-lf-in-value": (upgrade(extra=["Name: a\nX: b"]), 400, "field"),
    "escape-in-value": (upgrade(extra=["Name: \x1b[2J"]), 400, "field"),
    "delete-in-value": (upgrade(extra=["Name: \x7f"]), 400, "field"),

    "no-host": (upgrade(Host=None), 400, "host"),
    "two-hosts": (upgrade(extra=["Host: example.test"]), 400, "host"),
    "host-with-space": (upgrade(Host="a b"), 400, "host"),
    "host-with-slash": (upgrade(Host="a/b"), 400, "host"),
    "host-with-user": (upgrade(Host="user@example.test"), 400, "host"),
    "two-hosts-in-one": (upgrade(Host="a.test, b.test"), 400, "host"),

    "length-and-coding": (get(method="POST", Content_Length="3", Transfer_Encoding="chunked"),
                          400, "framing"),
    "lengths-that-differ": (get("Content-Length: 4", method="POST", Content_Length="3"),
                            400, "framing"),
    "length-list-that-differs": (get(method="POST", Content_Length="3, 4"), 400, "framing"),
    "length-no-number": (get(method="POST", Content_Length="3x"), 400, "framing"),
    "length-signed": (get(method="POST", Content_Length="+3"), 400, "framing"),
    "length-negative": (get(method="POST", Content_Length="-3"), 400, "framing"),
    "length-hex": (get(method="POST", Content_Length="0x3"), 400, "framing"),
    "length-empty": (get(method="POST", Content_Length=""), 400, "framing"),
    "length-beyond-64-bits": (get(method="POST", Content_Length="18446744073709551619"),
                              400, "framing"),

    "upgrade-with-body": (upgrade(Content_Length="5") + b"hello", 400, "upgrade-body"),
    "upgrade-with-chunks": (upgrade(Transfer_Encoding="chunked") + b"0\r\n\r\n",
                            400, "upgrade-body"),

    "33-options": (upgrade(Connection="upgrade" + ",a" * 32), 400, "connection"),
    "33-options-in-lines": (upgrade(extra=["Connection: b, c"] * 16), 400, "connection"),
    "33-options-most-empty": (upgrade(Connection="upgrade" + "," * 32), 400, "connection"),
    "no-key": (upgrade(Sec_WebSocket_Key=None), 400, "bad-key"),
    "two-keys": (upgrade(extra=[f"Sec-WebSocket-Key: {KEY}"]), 400, "bad-key"),
    "key-of-15-bytes": (upgrade(Sec_WebSocket_Key=key_of(15)), 400, "bad-key"),
    "key-of-17-bytes": (upgrade(Sec_WebSocket_Key=key_of(17)), 400, "bad-key"),
    "key-no-base64": (upgrade(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25j!!=="), 400, "bad-key"),
    "key-without-padding": (upgrade(Sec_WebSocket_Key=KEY.rstrip("=")), 400, "bad-key"),
    "key-empty": (upgrade(Sec_WebSocket_Key=""), 400, "bad-key"),

    "connect": (head("CONNECT example.test:443 HTTP/1.1", {"Host": "example.test:443"}),
                405, "method"),
    "chunked-request": (get(method="POST", Transfer_Encoding="chunked") + b"0\r\n\r\n",
                        426, "not-websocket"),
    "long-target": (upgrade("/" + "a" * 9000), 414, "long-target"),

    "plain-get": (get(), 426, "not-websocket"),
    "upgrade-to-h2c": (upgrade(Upgrade="h2c"), 426, "not-websocket"),
    "connection-without-token": (upgrade(Connection="keep-alive"), 426, "not-websocket"),
    "connection-token-in-a-word": (upgrade(Connection="no-upgrade"), 426, "not-websocket"),
    "upgrade-token-in-a-word": (upgrade(Upgrade="websocketx"), 426, "not-websocket"),
    "upgrade-by-post": (upgrade(method="POST"), 426, "not-websocket"),

    "version-8": (upgrade(Sec_WebSocket_Version="8"), 426, "ws-version"),
    "version-none": (upgrade(Sec_WebSocket_Version=None), 426, "ws-version"),
    "version-list": (upgrade(Sec_WebSocket_Version="13, 8"), 426, "ws-version"),

    "large-field": (upgrade(Cookie="a" * 9000), 431, "large-head"),
    "many-bytes-in-all": (upgrade(extra=[f"X-{n}: {'a' * 500}" for n in range(20)]),
                          431, "large-head"),
    "many-fields": (upgrade(extra=[f"X-{n}: a" for n in range(100)]), 431, "large-head"),

    "gzip-coding": (get(method="POST", Transfer_Encoding="gzip"), 501, "coding"),
    "unknown-coding": (get(method="POST", Transfer_Encoding="rot13"), 501, "coding"),

    "http-10": (upgrade(version="HTTP/1.0"), 505, "http-version"),
    "http-20": (upgrade(version="HTTP/2.0"), 505, "http-version"),
    "http2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http-version"),
}


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][2] != "not-websocket"])
def test_refused_as_a_second_request(proxy, scripted, name):
    request_, status, why = REFUSED[name]
    backend = scripted()
    p = proxy(backend, http=FORWARD)
    p.before = asks_before(backend)
    answer, body = ask(p, request_)
    assert answer.status == status and body.startswith(b"%d " % status)
    p.log.wait("reject", id="1.2", why=why, status=str(status))
    assert backend.untouched()


@pytest.mark.parametrize("request_, status, why", REFUSED.values(), ids=REFUSED.keys())
def test_refused(proxy, scripted, request_, status, why):
    backend = scripted()
    p = proxy(backend)
    answer, body = ask(p, request_)
    assert answer.status == status
    line = p.log.wait_ending(why, status=str(status))
    assert line.event == "reject" and line["client"].startswith("127.0.0.1:")
    assert backend.untouched()


@pytest.mark.parametrize("request_, status", [
    (line_ends(upgrade(), b"\n"), 400),
    (upgrade().replace(b"\r\n\r\n", b"\n\n"), 400),
    (line_ends(upgrade(), b"\r"), 408),     # a line that never ends
], ids=["lf-only", "lf-at-the-end", "cr-only"])
def test_lines_must_end_in_crlf(proxy, scripted, request_, status):
    backend = scripted()
    p = proxy(backend, **({"head_ms": 500} if status == 408 else {}))
    assert ask(p, request_)[0].status == status
    assert backend.untouched()


@pytest.mark.parametrize("kind", [WSS, WS])
def test_own_answer_is_short_text_and_the_last(proxy, place, kind):
    p = proxy(place(), listeners=[("127.0.0.1", "0", kind)])
    client = connect(p)
    client.send(get())
    answer = client.read_head()
    body = client.read_to_end()
    assert "close" in answer.get("Connection").lower().split(", ")
    assert answer.get("Content-Type").startswith("text/plain")
    assert int(answer.get("Content-Length")) == len(body)
    assert 0 < len(body) < 200
    assert kind == WS or client.saw_close_notify


def test_426_names_what_it_wants(proxy, place):
    p = proxy(place())
    answer, _ = ask(p, get())
    assert answer.get("Upgrade").lower() == "websocket"
    assert "upgrade" in answer.get("Connection").lower()


def test_426_names_the_version_it_wants(proxy, place):
    p = proxy(place())
    answer, _ = ask(p, upgrade(Sec_WebSocket_Version="8"))
    assert answer.get("Sec-WebSocket-Version") == "13"


def test_405_lists_what_is_allowed(proxy, place):
    p = proxy(place())
    answer, _ = ask(p, head("CONNECT a.test:443 HTTP/1.1", {"Host": "a.test:443"}))
    assert answer.get("Allow") is not None      # RFC 9110 15.5.6


@pytest.mark.parametrize("kind", [WSS, WS])
def test_head_that_never_ends_gets_408(proxy, scripted, kind):
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", kind)], head_ms=300)
    client = connect(p)
    client.send(b"GET / HTTP/1.1\r\nHost: example.test\r\n")
    assert client.read_head().status == 408
    client.read_to_end()
    p.log.wait_ending("head-timeout", status="408")
    assert backend.untouched()


def test_trickled_head_gets_no_more_than_head_ms(proxy, place):
    p = proxy(place(), head_ms=400)
    client = connect(p)
    client.send(b"GET /")
    while not client.has_input():
        client.send(b"a")
        client.sock.settimeout(0.02)
        try:
            client.ahead = client.receive()
        except TimeoutError:
            pass
    assert client.read_head().status == 408


def test_client_that_leaves_inside_its_head(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    client.send(upgrade()[:-2])
    client.close()
    p.log.wait_ending("eof", status="-")
    assert backend.untouched()


def test_head_one_byte_at_a_time(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    for byte in upgrade("/slow"):
        client.send(bytes([byte]))
    server = backend.accept()
    assert server.read_head().first == "GET /slow HTTP/1.1"
    server.send(switching())
    assert client.read_head().status == 101


def request_of_size(size):
    short = upgrade(Cookie="")
    return upgrade(Cookie="c" * (size - len(short)))


def test_head_of_head_max_bytes_is_forwarded(proxy, scripted):
    backend = scripted()
    p = proxy(backend, head_max=2000)
    client = connect(p)
    client.send(request_of_size(2000))
    server = backend.accept()
    assert len(server.read_head().get("Cookie")) > 1000
    server.send(switching())
    assert client.read_head().status == 101


def test_head_of_a_hundred_lines_is_forwarded(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    request = upgrade()
    more = [f"X-{n}: a" for n in range(101 - request.count(b"\r\n") + 1)]
    client.send(upgrade(extra=more))
    server = backend.accept()
    assert server.read_head().get(more[-1][:-3]) == "a"
    server.send(switching())
    assert client.read_head().status == 101


def test_head_of_one_byte_more_gets_431(proxy, place):
    p = proxy(place(), head_max=2000)
    assert ask(p, request_of_size(2001))[0].status == 431


def test_unfinished_head_beyond_head_max_gets_431_at_once(proxy, place):
    p = proxy(place(), head_max=2000)
    client = connect(p)
    client.send(request_of_size(4000)[:3000])
    assert client.read_head().status == 431


@pytest.mark.parametrize("kind", [WSS, WS])
def test_answer_reaches_a_client_that_still_sends(proxy, place, kind):
    """The answer must not be lost to a reset: the rest of the body is read and dropped."""
    p = proxy(place(), listeners=[("127.0.0.1", "0", kind)])
    client = connect(p)
    client.send(get(method="POST", Content_Length="1000000"))
    client.send(bytes(500000))
    assert client.read_head().status == 426


def test_empty_line_before_the_request_line(proxy, scripted):
    """RFC 9112 2.2: a server SHOULD ignore at least one; refusing it with 400 is allowed too."""
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    client.send(b"\r\n" + get())
    assert client.read_head().status in (400, 426)


@pytest.mark.parametrize("fields", [
    {"Connection": "keep-alive, Upgrade"},
    {"Connection": "uPGRADE", "Upgrade": "WebSocket"},
    {"Connection": ",upgrade ,"},
    {"Connection": "close, upgrade", "Upgrade": "h2c, websocket"},
    {"Content-Length": "0"},
], ids=["firefox", "any-case", "empty-elements", "lists", "length-0"])
def test_accepted(proxy, scripted, fields):
    backend = scripted()
    p = proxy(backend)
    client, server = asking(p, backend, head("GET / HTTP/1.1", {**UPGRADE, **fields}))
    server.send(switching())
    assert client.read_head().status == 101


def test_connection_and_upgrade_on_several_lines(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    client.send(upgrade(Connection="keep-alive", Upgrade="h2c",
                        extra=["Connection: Upgrade", "Upgrade: websocket"]))
    backend.accept().send(switching())
    assert client.read_head().status == 101


# ---- origins ----

ORIGINS = ["https://a.example", "https://b.example:8443"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_allowed_origin(proxy, scripted, origin):
    backend = scripted()
    p = proxy(backend, origins=ORIGINS)
    client = connect(p)
    client.send(upgrade(Origin=origin))
    server = backend.accept()
    assert server.read_head().get("Origin") == origin
    server.send(switching())
    assert client.read_head().status == 101


@pytest.mark.parametrize("origin", [
    "https://evil.example", "https://a.example.evil.example", "http://a.example",
    "https://a.example:444", "https://b.example", "null", "https://a.exampl"])
def test_other_origin_gets_403_before_a_backend_is_dialled(proxy, scripted, origin):
    backend = scripted()
    p = proxy(backend, origins=ORIGINS)
    assert ask(p, upgrade(Origin=origin))[0].status == 403
    p.log.wait_ending("origin", status="403")
    assert backend.untouched()


def test_second_origin_line_is_no_way_around(proxy, scripted):
    backend = scripted()
    p = proxy(backend, origins=ORIGINS)
    request = upgrade(Origin=ORIGINS[0], extra=["Origin: https://evil.example"])
    assert ask(p, request)[0].status in (400, 403)
    assert backend.untouched()


@pytest.mark.parametrize("origin, status", [("https://example.test", 101),
                                            ("https://other.test", 403)])
def test_same_origin(proxy, scripted, origin, status):
    backend = scripted()
    p = proxy(backend, origins=["same"])
    client = connect(p)
    client.send(upgrade(Origin=origin))
    if status == 101:
        backend.accept().send(switching())
    assert client.read_head().status == status


# ---- redirects ----

def test_redirect_listener(proxy, place):
    p = proxy(place(), listeners=[("127.0.0.1", "0", REDIRECT)])
    answer, _ = ask(p, get(target="/chat?room=1"))
    assert answer.status == 308
    assert answer.get("Location") == "https://example.test/chat?room=1"
    p.log.wait_ending("redirect", status="308")
