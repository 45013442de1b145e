"""What the log says of sessions and backends, so that who reads it need not guess."""

import re
from datetime import datetime, timezone

import pytest

from harness import ALL, FORWARD, NONE, REDIRECT, TUNNELS, WS, WSS
from more import answer, pem, request, showing
from peers import ask, asking, connect, head, open_tunnel, switching, upgrade

CLEAR = {"listeners": [("127.0.0.1", "0", WS)]}
WHERE = {"host": "example.test", "path": "/chat", "backend": "-"}


@pytest.mark.parametrize("asked, fields", [
    (upgrade("/chat?q", Sec_WebSocket_Key="short"), {"status": "400", "why": "bad-key"}),
    (upgrade("/chat?q", Sec_WebSocket_Version="8"), {"status": "426", "why": "ws-version"}),
    (upgrade("http://example.test/chat?q", Host="other", Upgrade="other"),
     {"status": "426", "why": "not-websocket"}),
    (upgrade("/chat?q", Upgrade="h2c"), {"status": "426", "why": "not-websocket"}),
    (upgrade("/chat?q", Origin="https://evil.test"),
     {"status": "403", "why": "origin", "origin": "https://evil.test"}),
    (upgrade("/chat?q", Origin='a b="c"'),
     {"status": "403", "why": "origin", "origin": r"a\x20b\x3d\x22c\x22"}),
    (upgrade("/chat?q"), {"status": "403", "why": "origin", "origin": "-"}),
    (upgrade("/chat?q", Host="a=b"),
     {"status": "403", "why": "origin", "host": r"a\x3db", "origin": "-"}),
    # of a head that is no good, what was read before that
    (upgrade("/chat?q", Host="a b"), {"status": "400", "why": "host", "host": r"a\x20b"}),
    (upgrade("/chat?q", Host=None), {"status": "400", "why": "host", "host": "-"}),
    (upgrade("/chat?q", extra=["No colon"]), {"status": "400", "why": "field", "host": "-"}),
    (upgrade("/a\x1bb", Host="evil"), {"status": "400", "why": "target", "path": r"/a\x1bb",
                                       "host": "-"}),
    (head("CONNECT example.test:443 HTTP/1.1", {"Host": "example.test:443"}),
     {"status": "405", "why": "method", "path": "/", "host": "example.test:443"}),
    (upgrade("http://user:secret@example.test/chat"), {"status": "400", "why": "target", "path": "/"}),
])
def test_reject_says_what_was_asked_for(proxy, scripted, asked, fields):
    backend = scripted()
    p = proxy(backend, origins=["https://good.test"], **CLEAR)
    assert str(ask(p, asked)[0].status) == fields["status"]
    line = p.log.wait("reject", id="1", **{**WHERE, **fields})
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line["client"])
    assert "q" not in line["path"] and "secret" not in line.text
    assert ("origin" in line.fields) == (fields["why"] == "origin")
    assert backend.untouched()


def test_reject_without_a_request_line_says_nothing_of_one(proxy, place):
    p = proxy(place(), **CLEAR)
    assert ask(p, b"nonsense\r\n\r\n")[0].status == 400
    assert not {"host", "path", "backend"} & p.log.wait("reject", why="request-line").fields.keys()


def test_redirect_says_what_was_asked_for(proxy, place):
    p = proxy(place(), listeners=[("127.0.0.1", "0", REDIRECT)])
    assert ask(p, head("GET /page HTTP/1.1", {"Host": "a.test"}))[0].status == 308
    p.log.wait("reject", why="redirect", host="a.test", path="/page", backend="-")


def test_reject_says_which_backend_failed(proxy, scripted):
    backend = scripted()
    p = proxy(backend, **CLEAR)
    client, server = asking(p, backend, upgrade("/chat"))
    server.send(b"nonsense\r\n\r\n")
    assert client.read_head().status == 502
    p.log.wait("reject", **{**WHERE, "why": "bad-response", "backend": backend.name})


def test_reject_counts_on_where_open_does(proxy, scripted):
    """Each connection has its number, and one of an address that has too many, too."""
    backend = scripted()
    p = proxy(backend, max_per_ip=1, **CLEAR)
    client, server = open_tunnel(p, backend)
    assert connect(p).receive() == b""
    p.log.wait("reject", id="2", status="-", why="per-ip")
    client.close()
    server.close()
    p.log.wait("close", id="1")
    open_tunnel(p, backend)
    p.log.wait("open", id="3")


def test_path_that_no_backend_covers_is_404(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(path="/chat"), http=FORWARD, **CLEAR)
    answered, body = ask(p, request("/other?q"))
    assert answered.status == 404 and b"no-path" in body
    p.log.wait("reject", status="404", why="no-path", host="example.test", path="/other", backend="-")
    assert ask(p, upgrade("/chatty"))[0].status == 404
    p.log.wait("reject", why="no-path", path="/chatty")
    assert backend.untouched()
    open_tunnel(p, backend, request=upgrade("/chat/x"))


# ---- client certificates ----

def test_open_says_whose_certificate_it_was(proxy, scripted):
    backend = scripted()
    p = proxy(backend, client_ca=pem("client-ca"),
              listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)])
    open_tunnel(p, backend, context=showing("client-ec"))
    assert p.log.wait("open", tls="1.2")["cn"] == r"gateway\x207"
    open_tunnel(p, backend, WS)
    assert p.log.wait("open", tls="-")["cn"] == "-"


def test_open_says_that_no_certificate_was_asked_for(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    open_tunnel(p, backend)
    assert p.log.wait("open", tls="1.2")["cn"] == "-"


# ---- backends that stay down ----

def test_backend_that_is_up_again_says_what_it_cost(proxy, place, python_server):
    dead = place()
    p = proxy(dead, **CLEAR)
    for _ in range(4):
        assert ask(p, upgrade())[0].status == 502
    line = p.log.wait("backend", name=dead.name, down=True, why="refused")
    assert (line["s"], line["requests"]) == ("0", "0")      # it is not answered yet
    python_server(dead)
    client = connect(p)
    client.send(upgrade())
    assert client.read_head().status == 101
    line = p.log.wait("backend", name=dead.name, up=True)
    assert line["requests"] == "4" and line["s"].isdigit()
    assert len(p.log.all("backend")) == 2                   # not for each of them


def test_backend_that_others_stand_in_for_costs_nothing(proxy, place, python_server):
    dead, alive = place(), python_server()
    p = proxy(dead, alive, fail_ms=600000, **CLEAR)
    for _ in range(4):
        with connect(p) as client:
            client.send(upgrade())
            assert client.read_head().status == 101
    python_server(dead)
    alive.close()
    with connect(p) as client:
        client.send(upgrade())
        assert client.read_head().status == 101
    assert p.log.wait("backend", name=dead.name, up=True)["requests"] == "0"


# ---- which lines there are, and their time ----

def session_of_each_kind(p, backend):
    """A tunnel, an upgrade that the backend refuses, and a page; nothing is left of them."""
    for asked, answered in ((upgrade("/tunnel"), switching()),
                            (upgrade("/refused"), answer(status="401 No", body=b"")),
                            (request("/page"), answer(body=b"page"))):
        client, server = asking(p, backend, asked)
        server.send(answered)
        client.read_head()
        server.close()
        client.read_to_end()
        client.close()
    assert ask(p, upgrade("/reject", Sec_WebSocket_Key="short"))[0].status == 400
    p.log.wait("reject", path="/reject")
    p.stop()


@pytest.mark.parametrize("log_sessions, logged", [
    (NONE, []), (TUNNELS, ["/tunnel", "/refused"]), (ALL, ["/tunnel", "/refused", "/page"])])
def test_log_sessions(proxy, scripted, log_sessions, logged):
    backend = scripted()
    p = proxy(backend, http=FORWARD, log_sessions=log_sessions, **CLEAR)
    session_of_each_kind(p, backend)
    opened, closed = p.log.all("open"), p.log.all("close")
    assert [line["path"] for line in opened] == logged
    assert sorted(line["id"] for line in closed) == [line["id"] for line in opened]
    assert len(p.log.all("reject")) == 1


def test_lines_begin_with_the_time(proxy, place):
    before = datetime.now(timezone.utc)
    p = proxy(place(), log_time=1, ready=False)
    p.log.wait_text("listen address=")
    p.stop()
    after = datetime.now(timezone.utc)
    times = [re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z [a-z]", line.text)
             for line in p.log.lines]
    assert times and all(times)
    said = [datetime.fromisoformat(time[1] + "+00:00") for time in times]
    assert said == sorted(said)
    assert before.replace(microsecond=before.microsecond // 1000 * 1000) <= said[0] <= said[-1] <= after
