"""Connections of clients that are kept for the next request (http_idle_ms)."""

import signal
import socket
import threading

import pytest

from harness import FORWARD, PATIENCE, WS, WSS, C, eventually
from more import STICKY_COOKIE, answer, pem, request, showing
from peers import asking, connect, pattern, switching, tunnel_on, upgrade

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]
KINDS = pytest.mark.parametrize("kind", [WSS, WS])


def page(target="/", method="GET", body=None, **fields):
    """A request that leaves its connection open."""
    return request(target, method, body, **{"Connection": None, **fields})


@pytest.fixture
def backend(scripted):
    return scripted()


@pytest.fixture
def keeping(proxy, backend):
    return lambda *backends, **config: proxy(*(backends or [backend]), http=FORWARD,
                                             listeners=BOTH, **config)


def serve(backend, answered=answer(body=b"hello")):
    """One request of whoever comes next; what was asked."""
    server = backend.accept()
    got = server.read_head()
    body = server.read(int(got.get("Content-Length") or 0))
    server.send(answered)
    server.half_close()
    return got, body


def fetch(client, backend, sent, answered=answer(body=b"hello"), size=5):
    """A request, and its answer with a body of that size; what was asked, what was answered."""
    client.send(sent)
    asked = serve(backend, answered)
    head = client.read_head()
    return asked, (head, client.read(size) if size else b"")


@KINDS
def test_many_requests_of_a_connection(keeping, backend, kind):
    p = keeping()
    client = connect(p, kind)
    for n in range(20):
        (got, _), (head, body) = fetch(client, backend, page(f"/{n}"))
        assert got.first == f"GET /{n} HTTP/1.1"
        assert got.get("Connection") == "close"
        assert head.status == 200 and head.all("Connection") == [] and body == b"hello"
    assert not client.has_input()


ANSWERS = [
    (answer(body=b"hello"), 5), (answer(body=b""), 0), (answer("204 No Content"), 0),
    (answer("304 Not Modified", Content_Length="1234"), 0),
    (answer("404 Not Found", b"nowhere"), 7),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + answer(body=b"hello"), 0),
    (answer(Transfer_Encoding="chunked") + b"5\r\nhello\r\n0\r\n\r\n", 15),
    (answer(Transfer_Encoding="chunked") + b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n", 25),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", 5),
    (answer(body=bytes(300_000)), 300_000)]


@KINDS
@pytest.mark.parametrize("answered, size", ANSWERS, ids=range(len(ANSWERS)))
def test_answers_of_known_length_keep_the_connection(keeping, backend, kind, answered, size):
    p = keeping()
    client = connect(p, kind)
    for _ in range(2):
        _, (head, body) = fetch(client, backend, page(), answered, size)
        while head.status == 100:
            head = client.read_head()
            if head.status != 100:
                body = client.read(5)
        assert head.all("Connection") == []
        assert body == answered[len(answered) - len(body):]
    assert not client.has_input()


REQUESTS = [
    page("/x", "POST", b"0123456789"), page("/x", "POST", b""), page("/x", "HEAD"),
    page("/x", "OPTIONS"), page("*", "OPTIONS"), page("http://other.example/x"),
    page("/x", "POST", pattern(200_000)),
    page("/x", "DELETE", Transfer_Encoding="chunked") + b"5;a\r\nhello\r\n0\r\nA: b\r\n\r\n",
    page("/x", "POST", Transfer_Encoding="chunked") + b"0\r\n\r\n",
    page("/x", Connection="keep-alive, X-Hop", X_Hop="1")]


@KINDS
@pytest.mark.parametrize("sent", REQUESTS, ids=range(len(REQUESTS)))
@pytest.mark.parametrize("at_once", [False, True])
def test_next_request_begins_behind_the_body(keeping, backend, kind, sent, at_once):
    p = keeping()
    client = connect(p, kind)
    behind = page("/next", "POST", b"next")
    size = 0 if sent.startswith(b"HEAD") else 5
    threading.Thread(target=client.send, args=(sent + behind if at_once else sent,),
                     daemon=True).start()
    server = backend.accept()
    got = server.read_head()
    if got.get("Transfer-Encoding"):
        body = server.read_until(b"0\r\n\r\n")
        assert body in (b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n")
    else:
        body = sent.partition(b"\r\n\r\n")[2]
        assert server.read(len(body)) == body
    assert backend.untouched()
    server.send(answer(body=b"hello" if size else b""))
    assert server.read_to_end() == b""
    assert client.read_head().status == 200
    assert client.read(size) == b"hello"[:size]
    if not at_once:
        client.send(behind)
    got, body = serve(backend)
    assert got.first == "POST /next HTTP/1.1" and body == b"next"
    assert client.read_head().status == 200 and client.read(5) == b"hello"


@KINDS
@pytest.mark.parametrize("sent, answered", [
    (request(), answer(body=b"hello")),
    (page(Connection="Close"), answer(body=b"hello")),
    (page(Connection="x, close"), answer(body=b"hello")),
    (page(extra=["Connection: keep-alive", "Connection: close"]), answer(body=b"hello")),
    (page(), answer() + b"hello"), (page(), b"HTTP/1.0 200 OK\r\n\r\nhello"),
    (page(), answer(Transfer_Encoding="gzip") + b"hello"),
    (upgrade(), answer("403 Forbidden", b"hello")),
    (upgrade(), answer(Transfer_Encoding="chunked") + b"5\r\nhello\r\n0\r\n\r\n")])
def test_answers_that_end_the_connection(keeping, backend, kind, sent, answered):
    p = keeping()
    client = connect(p, kind)
    client.send(sent + page("/never"))
    serve(backend, answered)
    head = client.read_head()
    assert head.get("Connection") == "close"
    assert b"hello" in client.read_to_end()
    assert backend.untouched()


def test_http_idle_ms_0_is_one_request_a_connection(keeping, backend):
    p = keeping(http_idle_ms=0)
    client = connect(p)
    _, (head, _) = fetch(client, backend, page() + page("/never"))
    assert head.get("Connection") == "close"
    assert client.read_to_end() == b""
    assert client.saw_close_notify
    assert backend.untouched()


# ---- waiting ----

@KINDS
def test_kept_connection_ends_by_its_time(keeping, backend, kind):
    """Without an answer, which would be taken for that of the next request, nor a word in the log."""
    p = keeping(http_idle_ms=300, head_ms=30000)
    client = connect(p, kind)
    fetch(client, backend, page())
    assert client.read_to_end() == b""
    assert kind is WS or client.saw_close_notify
    eventually(lambda: p.totals()["sessions"] == "0")
    assert not p.log.all("reject") and p.totals()["probes"] == "0"


@KINDS
def test_next_head_has_its_own_time(keeping, backend, kind):
    p = keeping(http_idle_ms=200, head_ms=1500)
    client = connect(p, kind)
    fetch(client, backend, page())
    client.send(b"GET / HT")
    assert client.read_head().status == 408
    p.log.wait("reject", id="1.2", why="head-timeout")


@KINDS
@pytest.mark.parametrize("end", ["close", "reset", "half_close"])
def test_client_that_leaves_between_requests_is_no_news(keeping, backend, kind, end):
    p = keeping(http_idle_ms=60000)
    client = connect(p, kind)
    fetch(client, backend, page())
    if kind is WSS and end != "reset":
        client.close_notify()
    getattr(client, end)()
    eventually(lambda: p.totals()["sessions"] == "0")
    assert not p.log.all("reject") and p.totals()["probes"] == "0"
    assert len(p.log.all("close")) == 1


@KINDS
def test_kept_connection_holds_no_buffer(keeping, backend, kind):
    p = keeping(http_idle_ms=60000, max_busy=2)
    clients = [connect(p, kind) for _ in range(10)]
    for client in clients:
        fetch(client, backend, page(Cookie="x" * 3000))
        totals = p.totals()
        assert (totals["records"], totals["heads"]) == ("0", "0")
    for client in clients:
        fetch(client, backend, page("/again"))


@KINDS
def test_kept_connections_give_their_places_first(keeping, backend, kind):
    """The one that has waited longest, and before who is slow to ask; nobody has to wait for it."""
    p = keeping(http_idle_ms=600000, max_sessions=4, max_busy=2)
    clients = [connect(p, kind) for _ in range(3)]
    slow = connect(p, kind)
    slow.send(b"GET / HTTP/1.1\r\nHost: ")
    for client in clients:
        fetch(client, backend, page())
    fetch(clients[0], backend, page())
    newcomer = connect(p, kind)
    fetch(newcomer, backend, page("/newcomer"))
    assert clients[1].read_to_end() == b""
    fetch(clients[0], backend, page())
    fetch(clients[2], backend, page())
    fetch(slow, backend, b"example.test\r\n\r\n")
    assert not p.log.all("reject")


@KINDS
def test_sigterm_ends_what_waits_at_once(keeping, backend, kind):
    p = keeping(http_idle_ms=600000, drain_ms=60000)
    clients = [connect(p, kind) for _ in range(3)]
    for client in clients:
        fetch(client, backend, page())
    clients[0].send(page("/last"))
    server = backend.accept()
    server.read_head()
    p.signal(signal.SIGTERM)
    for client in clients[1:]:
        assert client.read_to_end() == b""
    server.send(answer(body=b"last"))
    head = clients[0].read_head()
    assert head.get("Connection") == "close"
    assert clients[0].read_to_end() == b"last"
    clients[0].close()
    assert p.wait_exit() == 0


def test_sigterm_amid_an_answer_that_did_not_say_close(keeping, backend):
    p = keeping(http_idle_ms=600000, drain_ms=60000)
    client, server = asking(p, backend, page())
    server.send(answer(Content_Length="10") + b"01234")
    client.read_head()
    p.signal(signal.SIGTERM)
    p.log.wait("stop")
    server.send(b"56789")
    assert client.read_to_end() == b"0123456789"
    client.close()
    assert p.wait_exit() == 0


# ---- each request is one of its own ----

def test_log_counts_requests(keeping, backend):
    p = keeping()
    client = connect(p)
    for n in range(3):
        fetch(client, backend, page(f"/{n}", "POST", b"x" * n))
    client.send(page("/bad", Host="a b"))
    assert client.read_head().status == 400
    for n, name in enumerate(("1", "1.2", "1.3")):
        line = p.log.wait("open", id=name)
        assert (line["path"], line["status"], line["tls"]) == (f"/{n}", "200", "1.2")
        line = p.log.wait("close", id=name)
        assert (line["why"], line["rx"], line["tx"]) == ("done", str(n), "5")
    p.log.wait("reject", id="1.4", why="host", path="/bad")
    totals = p.totals()
    assert (totals["opened"], totals["rejected"]) == ("3", "1")
    assert (totals["rx"], totals["tx"]) == ("3", "15")


def test_requests_are_balanced_one_by_one(keeping, scripted):
    backends = [scripted() for _ in range(3)]
    p = keeping(*backends)
    client = connect(p)
    for n in range(6):
        fetch(client, backends[n % 3], page(f"/{n}"))
    p.log.wait("open", id="1.6")
    assert len({line["backend"] for line in p.log.all("open")}) == 3


def test_requests_are_routed_one_by_one(keeping, scripted):
    one, two = scripted(), scripted()
    p = keeping(one.entry(path="/one"), two.entry(path="/two"))
    client = connect(p)
    for name, backend in (("/one", one), ("/two", two), ("/one/x", one)):
        (got, _), _ = fetch(client, backend, page(name, Host=f"{name[1:4]}.example"))
        assert got.get("Host") == f"{name[1:4]}.example"
    client.send(page("/three"))
    assert client.read_head().status == 404
    assert one.untouched() and two.untouched()


def test_host_may_differ_from_that_before_and_from_sni(keeping, backend):
    p = keeping()
    client = connect(p)
    for host in ("localhost", "a.example", "b.example:8443", "[::1]:443"):
        (got, _), _ = fetch(client, backend, page(Host=host))
        assert got.get("Host") == host
        p.log.wait("open", host=host.replace("=", "\\x3d"))


@pytest.mark.parametrize("name", ["client-ec", None])
def test_every_request_tells_the_clients_name(proxy, backend, name):
    """And whatever a client without a certificate says of itself, in none of them."""
    listener = ("127.0.0.1", "0", WSS, pem("client-ca"), C("VERIFY_OPTIONAL"))
    p = proxy(backend, http=FORWARD, listeners=[listener])
    client = connect(p, context=showing(name))
    for n in range(3):
        (got, _), _ = fetch(client, backend, page(X_SSL_Client_CN="root"))
        assert got.get("X-SSL-Client-CN") == (name and "gateway 7")
    assert p.log.wait("open", id="1.3", cn="gateway\\x207" if name else "-")


def test_cookie_is_judged_anew(keeping, scripted):
    backends = [scripted(), scripted()]
    p = keeping(*backends, balance=STICKY_COOKIE)
    client = connect(p)
    _, (head, _) = fetch(client, backends[0], page())
    cookie = head.get("Set-Cookie").partition(";")[0]
    for n in range(3):
        _, (head, _) = fetch(client, backends[0], page(Cookie=cookie))
        assert head.all("Set-Cookie") == []
    _, (head, _) = fetch(client, backends[1], page())
    assert head.get("Set-Cookie").partition(";")[0] != cookie


def test_max_conns_counts_requests_not_connections(keeping, backend):
    p = keeping(backend.entry(max_conns=1))
    clients = [connect(p) for _ in range(3)]
    for client in clients * 2:
        fetch(client, backend, page())
    clients[0].send(page())
    server = backend.accept()
    clients[1].send(page())
    assert clients[1].read_head().status == 503
    server.read_head()
    server.send(answer(body=b"x"))
    assert clients[0].read_head().status == 200
    fetch(clients[2], backend, page())


@KINDS
@pytest.mark.parametrize("before", [1, 3])
def test_upgrade_as_a_later_request(keeping, backend, kind, before):
    p = keeping()
    client = connect(p, kind)
    for _ in range(before):
        fetch(client, backend, page())
    server = tunnel_on(client, backend)
    client.send(b"to the backend")
    assert server.read(14) == b"to the backend"
    server.send(b"to the client")
    assert client.read(13) == b"to the client"
    p.log.wait("open", id=f"1.{before + 1}", status="101")


@KINDS
def test_upgrade_behind_a_page_at_once(keeping, backend, kind):
    p = keeping()
    client = connect(p, kind)
    client.send(page() + upgrade() + b"early")
    serve(backend)
    server = backend.accept()
    server.read_head()
    server.send(switching() + b"answer")
    assert client.read_head().status == 200 and client.read(5) == b"hello"
    assert client.read_head().status == 101 and client.read(6) == b"answer"
    assert server.read(5) == b"early"


# ---- pipelining ----

@KINDS
@pytest.mark.parametrize("record", [1, 50, 1 << 20])
def test_pipelined_requests_are_answered_in_order(keeping, backend, kind, record):
    p = keeping()
    client = connect(p, kind)
    sent = b"".join(page(f"/{n}", "POST", b"%d" % n) for n in range(30))
    for at in range(0, len(sent), record):
        client.send(sent[at:at + record])
    for n in range(30):
        server = backend.accept()
        assert server.read_head().first == f"POST /{n} HTTP/1.1"
        assert server.read(len(str(n))) == b"%d" % n
        assert backend.untouched()
        server.send(answer(body=b"%03d" % n))
        server.close()
        assert client.read_head().status == 200
        assert client.read(3) == b"%03d" % n
    assert not client.has_input() and backend.untouched()


@KINDS
def test_client_that_pipelines_and_reads_nothing(keeping, backend, kind):
    """It is held back: neither what it sends nor what it is sent piles up, and it has its time."""
    p = keeping(idle_ms=2000, head_ms=1000, max_busy=2)
    client = connect(p, kind)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    served = []

    def serve_all():
        while True:
            try:
                one = backend.accept()
                one.read_head()
                one.send(answer(body=bytes(20_000)))
                served.append(1)
                one.close()
            except OSError:
                return
    server = threading.Thread(target=serve_all, daemon=True)
    server.start()

    def send_all():
        try:
            client.send(page("/" + "x" * 700) * 10_000)
        except OSError:
            pass
    threading.Thread(target=send_all, daemon=True).start()
    p.log.wait("close", id="1.2")
    eventually(lambda: p.totals()["sessions"] == "0")
    assert p.totals()["records"] == "0"
    assert len(served) < 500
    backend.listener.shutdown(socket.SHUT_RDWR)
    server.join(PATIENCE)


@KINDS
def test_pipelined_request_behind_an_endless_answer(keeping, backend, kind):
    """It has to wait; who has gone meanwhile is gone, and the backend is told."""
    p = keeping()
    client, server = asking(p, backend, page() + page("/never"), kind)
    server.send(answer(Transfer_Encoding="chunked") + b"5\r\nhello\r\n")
    client.read_until(b"hello\r\n")
    client.close()
    assert server.read_to_end() == b""
    server.close()
    assert backend.untouched()


@KINDS
def test_endless_answer_whose_client_leaves(keeping, backend, kind):
    """The backend is told at once, though the client is not listened to during its answer."""
    p = keeping()
    client = connect(p, kind)
    for n in range(2):
        fetch(client, backend, page())
    client.send(page())
    server = backend.accept()
    server.read_head()
    server.send(answer(Transfer_Encoding="chunked") + b"5\r\nhello\r\n")
    client.read_until(b"hello\r\n")
    if kind is WSS:
        client.close_notify()
    client.half_close()
    assert server.read_to_end() == b""


# ---- bad second requests ----

SECOND = page("/smuggled", Host="evil.test")


@KINDS
@pytest.mark.parametrize("bad, status", [
    (b"\r\n", 400), (b"0\r\n\r\n", 400), (b"\x00", None), (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", 505),
    (page("/bad", Host=None), 400), (page("/bad", Transfer_Encoding="x"), 501),
    (page("/bad", Content_Length="x"), 400), (page("/bad", body=b"", Transfer_Encoding="chunked"), 400),
    (page("/bad", Cookie="x" * 20000), 431), (page("/" + "x" * 20000), 414),
    (page("/bad", "CONNECT"), 405), (upgrade(Sec_WebSocket_Key="x"), 400),
    (upgrade(Sec_WebSocket_Version="8"), 426)])
@pytest.mark.parametrize("at_once", [False, True])
def test_bad_request_ends_the_connection(keeping, backend, kind, bad, status, at_once):
    p = keeping(head_ms=2000)
    client = connect(p, kind)
    if at_once:
        client.send(page() + bad + SECOND)
        serve(backend)
        assert client.read_head().status == 200 and client.read(5) == b"hello"
    else:
        fetch(client, backend, page())
        client.send(bad + SECOND)
    head = client.read_head()
    assert head.status == (status or 400) and head.get("Connection").startswith("close")
    try:
        assert client.read_to_end().count(b"HTTP/1.1") == 0
    except ConnectionResetError:
        pass
    assert backend.untouched()


@KINDS
def test_body_longer_than_said(keeping, backend, kind):
    p = keeping()
    client = connect(p, kind)
    fetch(client, backend, page())
    client.send(page("/x", "POST", Content_Length="5") + b"hello world" + SECOND)
    (got, body) = serve(backend)
    assert body == b"hello"
    assert client.read_head().status == 200 and client.read(5) == b"hello"
    assert client.read_head().status == 400
    assert backend.untouched()


@KINDS
def test_body_shorter_than_said(keeping, backend, kind):
    """What was to be the next request is the rest of the body, and the backend is told so."""
    p = keeping(response_ms=1500)
    client = connect(p, kind)
    fetch(client, backend, page())
    client.send(page("/x", "POST", Content_Length="500") + b"hello" + SECOND)
    server = backend.accept()
    assert server.read_head().get("Content-Length") == "500"
    assert server.read(5 + len(SECOND)) == b"hello" + SECOND
    assert client.read_head().status == 504
    assert server.read_to_end() == b""
    assert backend.untouched()


@KINDS
@pytest.mark.parametrize("end", ["close", "reset", "stay"])
def test_body_that_the_backend_does_not_take(keeping, backend, kind, end):
    """Its rest is no request, whatever it looks like: the answer before it is the last."""
    p = keeping()
    client = connect(p, kind)
    fetch(client, backend, page())
    client.send(page("/x", "POST", Content_Length="3000000") + SECOND)
    server = backend.accept()
    server.read_head()
    server.send(answer("413 Payload Too Large", b"no"))
    if end != "stay":
        getattr(server, end)()
    try:
        client.send(SECOND * 20_000)
        head = client.read_head()
        assert head.status in (413, 502) and head.get("Connection") == "close"
        assert b"HTTP/1.1" not in client.read_to_end()
    except (ConnectionResetError, BrokenPipeError):
        pass
    client.close()
    assert backend.untouched()


@KINDS
def test_refused_expectation_ends_the_connection(keeping, backend, kind):
    """Whether its body comes all the same nobody knows."""
    p = keeping()
    client = connect(p, kind)
    fetch(client, backend, page())
    client.send(page("/x", "POST", Content_Length="50", Expect="100-continue"))
    server = backend.accept()
    server.read_head()
    server.send(answer("417 Expectation Failed", b"no"))
    head = client.read_head()
    assert head.status == 417 and head.get("Connection") == "close"
    assert client.read_to_end() == b"no"


@KINDS
def test_methods_are_case_sensitive(keeping, backend, kind):
    """Only HEAD has no body in its answer (RFC 9110 9.1): what another one has is not lost, for a
    client of many users would take the next answer for it."""
    p = keeping()
    client = connect(p, kind)
    for method in "head", "Head", "GET":
        (got, _), (_, body) = fetch(client, backend, page("/x", method))
        assert got.first == f"{method} /x HTTP/1.1" and body == b"hello"
