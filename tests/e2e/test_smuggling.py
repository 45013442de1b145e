"""Requests that proxy and backend could read in two ways, and what follows a request: nothing of it
reaches a backend, as bytes or as a second request. A backend that reads all and answers all stands
behind; what it was sent is looked through for the words 'smuggled' and 'evil'."""

import socket
import threading

import pytest

from harness import FORWARD, PATIENCE, REFUSE, WS, WSS
from more import answer, request
from peers import UPGRADE, Scripted, connect, head, open_tunnel, switching, upgrade

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]
BEFORE = request("/before", Connection=None)
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: evil.test\r\n\r\n"


class Witness(Scripted):
    """Answers whatever comes, on every connection, and keeps all that it was sent."""

    def __init__(self, place, reply):
        super().__init__(place)
        self.reply = reply
        self.got = []
        self.threads = [threading.Thread(target=self._serve, daemon=True)]
        self.threads[0].start()

    def _serve(self):
        while True:
            try:
                stream = self.accept()
            except (OSError, TimeoutError):
                return
            thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _read(self, stream):
        self.got.append(b"")
        mine = len(self.got) - 1
        answered = False
        try:
            while data := stream.receive():
                self.got[mine] += data
                if b"\r\n\r\n" in self.got[mine] and not answered:
                    answered = True
                    before = self.got[mine].startswith(b"GET /before ")
                    stream.send(answer(body=b"before") if before else self.reply)
        except OSError:
            pass
        stream.close()

    def all(self):
        """Ends it; everything that it was sent."""
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)
        return b"".join(got for got in self.got if not got.startswith(b"GET /before "))


@pytest.fixture(params=[1, 2], ids=["first", "second"])
def attack(proxy, place, keeper, request):
    """Sends bytes, as the first or second request of a connection, reads all that is answered; the
    answer, and all that the backend was sent."""
    def run(data, kind=WSS, reply=answer(body=b"answered"), http=FORWARD, **config):
        witness = keeper(Witness(place(), reply))
        p = proxy(witness, http=http, listeners=BOTH, **config)
        client = connect(p, kind)
        if request.param == 2 and http is FORWARD:
            client.send(BEFORE)
            client.read_until(b"before")
        client.send(data)
        try:
            answered = client.read_to_end()
        except ConnectionResetError:
            answered = b""
        client.close()
        assert p.stop() == 0
        return answered, witness.all()
    return run


def status(answered):
    return int(answered.split()[1])


KINDS = pytest.mark.parametrize("kind", [WSS, WS])


# ---- requests of two readings ----

@KINDS
@pytest.mark.parametrize("fields, expected", [
    # CL.TE and TE.CL
    (["Content-Length: 6", "Transfer-Encoding: chunked"], 400),
    (["Transfer-Encoding: chunked", "Content-Length: 6"], 400),
    (["Content-Length: 0", "Transfer-Encoding: chunked"], 400),
    # TE.TE: one of them is meant to be overlooked
    (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], 501),
    (["Transfer-Encoding: xchunked"], 501), (["Transfer-Encoding: chunked, identity"], 501),
    (["Transfer-Encoding: identity, chunked"], 501), (["Transfer-Encoding: \"chunked\""], 501),
    (["Transfer-Encoding: chunked;q=1"], 501), (["Transfer-Encoding:"], 501),
    (["Transfer-Encoding : chunked"], 400), (["Transfer-Encoding\t: chunked"], 400),
    ([" Transfer-Encoding: chunked"], 400), (["X: y", "\tTransfer-Encoding: chunked"], 400),
    (["Transfer-Encoding: \x0bchunked"], 400), (["Transfer-Encoding: chunked\x00"], 400),
    (["X: y\nTransfer-Encoding: chunked"], 400), (["X: y\rTransfer-Encoding: chunked"], 400),
    (["Transfer\x00-Encoding: chunked"], 400), (["Transfer-Encoding\x00: chunked"], 400),
    # lengths
    (["Content-Length: 5", "Content-Length: 44"], 400), (["Content-Length: 5, 44"], 400),
    (["Content-Length: 44, 44"], 400),
    (["Content-Length: 0x2c"], 400), (["Content-Length: +44"], 400), (["Content-Length: -0"], 400),
    (["Content-Length: 4 4"], 400), (["Content-Length: 44\x00"], 400),
    (["Content-Length: 44.0"], 400), (["Content-Length: 4e1"], 400),
    (["Content-Length: 18446744073709551660"], 400), (["Content-Length : 44"], 400),
    (["Content-Length: 44\nX: y"], 400), (["Content Length: 44"], 400),
    # hosts
    (["Host: evil.test"], 400), ([" Host: evil.test"], 400),
])
def test_request_of_two_readings(attack, kind, fields, expected):
    answered, seen = attack(request("/", "POST", extra=fields) + SMUGGLED, kind)
    assert status(answered) == expected
    assert seen == b""


@KINDS
@pytest.mark.parametrize("body", [
    SMUGGLED, b"\r\n", b"0\n\n", b"0\r\n\n", b"0\n\r\n", b"0\r\r\n", b"0\r\n\rX", b" 0\r\n\r\n",
    b"-0\r\n\r\n", b"+0\r\n\r\n", b"0x0\r\n\r\n", b"0 0\r\n\r\n", b"0,0\r\n\r\n", b";0\r\n\r\n",
    b"0;\n\r\n\r\n", b"0;a\rb\r\n\r\n", b"0;a\x00\r\n\r\n", b"0;a\nX: y\r\n\r\n",
    b"0\r\n X: y\r\n\r\n", b"0\r\nX: y\n\r\n", b"0\r\nX: \x00\r\n\r\n", b"0\r\n: y\r\n\r\n",
    b"5\r\nhello0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n",
    b"5\r\nhell\r\n0\r\n\r\n", b"4\nhell\r\n0\r\n\r\n", b"g\r\n0\r\n\r\n",
    # 16 digits and more: those that wrap to 0, to 5, to what is left of a buffer
    b"0000000000000000\r\n\r\n", b"0000000000000005\r\nhello\r\n0\r\n\r\n",
    b"ffffffffffffffff\r\n", b"FFFFFFFFFFFFFFFE\r\n", b"7fffffffffffffff\r\n",
    b"10000000000000000\r\n\r\n", b"10000000000000005\r\nhello\r\n0\r\n\r\n"])
def test_chunks_of_two_readings(attack, kind, body):
    """The backend has the head by then, and of the body what is no whole chunk of anybody."""
    sent = request("/", "POST", Transfer_Encoding="chunked") + body + SMUGGLED
    answered, seen = attack(sent, kind)
    assert status(answered) == 400
    assert answered.count(b"HTTP/1.1 ") == 1
    body = seen.partition(b"\r\n\r\n")[2]
    assert not body.endswith(b"0\r\n\r\n")
    assert b"smuggled" not in seen and b"evil" not in seen


@KINDS
@pytest.mark.parametrize("start", [b"0\r\nX: ", b"0\r\n", b"1;", b"1 "])
def test_trailers_and_extensions_have_an_end(attack, kind, start):
    """No more than head_max of them in all, however many lines they make."""
    filler = b"a: 0123456789abcdef\r\n" if start.endswith(b"\n") else b" "
    sent = request("/", "POST", Transfer_Encoding="chunked") + start + filler * 9000
    answered, seen = attack(sent, kind)
    assert answered == b"" or status(answered) == 400
    assert len(seen.partition(b"\r\n\r\n")[2]) <= 3


@KINDS
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/11",
                                     "http/1.1", "HTTP/1.1 x", "HTTP/1.01", ""])
def test_other_versions(attack, kind, version):
    sent = head(f"POST / {version}", {"Host": "a.test", "Transfer-Encoding": "chunked"})
    answered, seen = attack(sent + b"0\r\n\r\n" + SMUGGLED, kind)
    assert status(answered) in (400, 505)
    assert seen == b""


def test_request_without_a_version(attack):
    answered, seen = attack(b"GET /\r\n\r\n" + SMUGGLED)
    assert status(answered) == 400
    assert seen == b""


@pytest.mark.parametrize("line", [
    "GET / HTTP/1.1 ", "GET  / HTTP/1.1", "GET\t/ HTTP/1.1", " GET / HTTP/1.1", "GET / / HTTP/1.1",
    "GET /\x00 HTTP/1.1", "GET /a\rb HTTP/1.1", "G@T / HTTP/1.1", "GET /a b HTTP/1.1",
    "GET //evil.test/\x7f HTTP/1.1", "GET evil.test HTTP/1.1", "GET gopher://evil.test/ HTTP/1.1",
    "GET https://user@evil.test/ HTTP/1.1", "GET /#evil HTTP/1.1", "GET * HTTP/1.1"])
def test_odd_request_lines(attack, line):
    sent = (line + "\r\nHost: a.test\r\n\r\n").encode("latin-1") + SMUGGLED
    answered, seen = attack(sent)
    assert status(answered) in (400, 505)
    assert seen == b""


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_odd_ends_of_a_head(attack, ending):
    answered, seen = attack(b"GET / HTTP/1.1\r\nHost: a.test" + ending + SMUGGLED)
    assert answered == b"" or status(answered) == 400
    assert b"smuggled" not in seen


# ---- what follows a request ----

@KINDS
@pytest.mark.parametrize("first", [
    request("/first"), request("/first", "HEAD"), request("/first", "POST", body=b"body"),
    request("/first", "POST", body=b""), request("/first", Connection="keep-alive, close"),
    request("/first", "OPTIONS"), request("/first", "DELETE")])
def test_pipelined_second_request_goes_nowhere(attack, kind, first):
    answered, seen = attack(first + SMUGGLED, kind)
    assert status(answered) == 200
    assert answered.count(b"HTTP/1.1 ") == 1
    assert seen.startswith(first.split(b" ")[0] + b" /first")
    assert b"smuggled" not in seen and b"evil" not in seen


@KINDS
def test_second_request_after_the_answer_goes_nowhere(proxy, place, keeper, kind):
    witness = keeper(Witness(place(), answer(body=b"answered")))
    p = proxy(witness, http=FORWARD, listeners=BOTH)
    client = connect(p, kind)
    client.send(request("/first"))
    client.read_until(b"answered")
    try:
        client.send(SMUGGLED)
        assert client.read_to_end() == b""
    except (ConnectionResetError, BrokenPipeError):
        pass
    client.close()
    assert p.stop() == 0
    assert b"smuggled" not in witness.all()


def test_body_with_a_request_in_it_is_a_body(attack):
    """Content-Length covers it: the backend is told so, and no connection is used again."""
    answered, seen = attack(request("/first", "POST", body=SMUGGLED) + SMUGGLED)
    assert status(answered) == 200
    got, _, body = seen.partition(b"\r\n\r\n")
    assert b"Connection: close" in got and b"Content-Length: %d" % len(SMUGGLED) in got
    assert SMUGGLED.startswith(body)


@pytest.mark.parametrize("sent", [request("/first"), request("/first", "POST", body=b"x")])
def test_nothing_is_forwarded_with_http_refuse(attack, sent):
    answered, seen = attack(sent + SMUGGLED, http=REFUSE)
    assert status(answered) == 426
    assert seen == b""


def test_refused_request_is_the_last_of_its_connection(attack):
    answered, seen = attack(request("/a", Host=None) + SMUGGLED + upgrade("/smuggled"))
    assert status(answered) == 400
    assert answered.count(b"HTTP/1.1 ") == 1
    assert seen == b""


# ---- upgrades ----

@KINDS
@pytest.mark.parametrize("fields", [
    ["Content-Length: 44"], ["Transfer-Encoding: chunked"], ["Transfer-Encoding: identity"],
    ["Content-Length: 0", "Transfer-Encoding: chunked"], ["Content-Length: 1", "Content-Length: 2"],
    ["Content-Length: x"]])
def test_upgrade_with_a_body(attack, kind, fields):
    answered, seen = attack(upgrade("/", extra=fields) + SMUGGLED, kind)
    assert status(answered) == 400
    assert seen == b""


@KINDS
@pytest.mark.parametrize("refusal", [
    answer("403 Forbidden", b"no"), answer("200 OK", b"no"), answer("426 Upgrade Required", b"no"),
    answer("304 Not Modified"), answer("204 No Content"),
    answer("400 Bad Request", extra=["Transfer-Encoding: chunked"]) + b"0\r\n\r\n"])
def test_refused_upgrade_followed_by_a_second_request(attack, kind, refusal):
    """The classic of WebSocket smuggling: a proxy that believes in the upgrade, though the backend
    has refused it, passes on whatever follows."""
    answered, seen = attack(upgrade("/first") + SMUGGLED, kind, reply=refusal)
    assert answered.count(b"HTTP/1.1 ") == 1
    assert status(answered) == int(refusal.split()[1])
    assert b"smuggled" not in seen


@KINDS
def test_second_request_after_the_refusal(proxy, place, keeper, kind):
    witness = keeper(Witness(place(), answer("426 Upgrade Required", b"no")))
    p = proxy(witness, http=FORWARD, listeners=BOTH)
    client = connect(p, kind)
    client.send(upgrade("/first"))
    client.read_until(b"no")
    try:
        client.send(SMUGGLED)
        assert client.read_to_end() == b""
    except (ConnectionResetError, BrokenPipeError):
        pass
    client.close()
    assert p.stop() == 0
    assert b"smuggled" not in witness.all()


@pytest.mark.parametrize("reply", [
    switching(Sec_WebSocket_Accept=None), switching(Sec_WebSocket_Accept="x" * 28),
    switching(Upgrade="h2c"), switching(Upgrade=None), switching(Connection="close"),
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.0 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"])
def test_false_101_opens_no_tunnel(attack, reply):
    answered, seen = attack(upgrade("/first") + SMUGGLED, reply=reply + b"from the backend")
    assert status(answered) == 502
    assert b"smuggled" not in seen
    assert b"from the backend" not in answered


@pytest.mark.parametrize("change", [
    {"Sec_WebSocket_Version": "12"}, {"Sec_WebSocket_Version": "777"},
    {"Sec_WebSocket_Version": None}, {"Sec_WebSocket_Key": None}, {"Sec_WebSocket_Key": "short"}])
def test_upgrade_that_the_backend_would_refuse_is_refused_here(attack, change):
    """A wrong version is how attackers have a backend refuse what a proxy takes for a tunnel."""
    answered, seen = attack(upgrade("/first", **change) + SMUGGLED)
    assert status(answered) in (400, 426)
    assert seen == b""


@pytest.mark.parametrize("fields", [
    {"Upgrade": "h2c"}, {"Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"},
    {"Upgrade": "TLS/1.2"}, {"Upgrade": "websocket2"}, {"Connection": "keep-alive"}])
def test_other_upgrades_are_plain_requests_without_upgrade(attack, fields):
    sent = head("GET /first HTTP/1.1", {**UPGRADE, **fields}, ["Connection: close"]) + SMUGGLED
    answered, seen = attack(sent)
    assert status(answered) == 200
    assert b"upgrade" not in seen.lower()
    assert b"smuggled" not in seen


def test_101_to_a_page_opens_no_tunnel(attack):
    answered, seen = attack(request("/first") + SMUGGLED, reply=switching() + b"from the backend")
    assert status(answered) == 502
    assert b"smuggled" not in seen and b"from the backend" not in answered


# ---- answers of two readings ----

@pytest.mark.parametrize("reply", [
    answer(body=b"one") + answer(body=b"two"),
    answer("204 No Content") + answer(body=b"two"),
    answer("304 Not Modified") + answer(body=b"two"),
    answer(extra=["Transfer-Encoding: chunked"]) + b"3\r\none\r\n0\r\n\r\n" + answer(body=b"two")])
def test_second_answer_goes_nowhere(attack, reply):
    answered, _ = attack(request("/first"), reply=reply)
    assert answered.count(b"HTTP/1.1 ") == 1
    assert b"two" not in answered


def test_answer_to_head_with_a_body_is_cut(attack):
    answered, _ = attack(request("/first", "HEAD"), reply=answer(body=b"body"))
    assert b"body" not in answered


@pytest.mark.parametrize("line", ["Content-Length: 4\r\nTransfer-Encoding: chunked",
                                  "Content-Length: 4\r\nContent-Length: 5", "Content-Length: 4, 4",
                                  "Content-Length : 4", " Content-Length: 4", "X: y\nSet-Cookie: a",
                                  "X: y\rSet-Cookie: a", "Transfer-Encoding: chunked\x00"])
def test_answer_of_two_readings_is_not_passed(attack, line):
    reply = f"HTTP/1.1 200 OK\r\n{line}\r\n\r\nbody".encode("latin-1")
    answered, _ = attack(request("/first"), reply=reply)
    assert status(answered) == 502
    assert b"body" not in answered


# ---- forged fields ----

@pytest.mark.parametrize("target", ["http://other.test/", "https://other.test:8443/"])
def test_host_and_target_can_not_differ(attack, target):
    """The backend sees one host: that of the target."""
    _, seen = attack(request(target, Host="evil.test"))
    assert b"evil" not in seen and b"Host: other.test" in seen


def test_tunnel_passes_what_it_is_given(proxy, scripted):
    """What looks like a request is data there, and nobody's business."""
    backend = scripted()
    p = proxy(backend, http=FORWARD, listeners=BOTH)
    client, server = open_tunnel(p, backend)
    client.send(SMUGGLED)
    assert server.read(len(SMUGGLED)) == SMUGGLED
