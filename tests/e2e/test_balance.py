"""LEAST_CONN, STICKY_COOKIE, weights, backups, max_conns, paths, unix: backends, active checks."""

import contextlib
import re
import selectors
import signal
import socket
import ssl
import threading

import pytest

from conftest import whole_config
from harness import FORWARD, IP_HASH, PATIENCE, ROUND_ROBIN, WS, WSS, eventually, run_once
from more import (FILES_ONLY, LEAST_CONN, STICKY_COOKIE, TLS_VERIFY, Etc, ScriptedTls, answer,
                  exchange, pem, request, server_context)
from peers import Place, Scripted, Stream, ask, connect, open_tunnel, switching, upgrade
from test_backends import fill

PLAIN = {"listeners": [("127.0.0.1", "0", WS)], "http": FORWARD}
SOON = {"fail_ms": 300}


@pytest.fixture
def backends(scripted):
    return lambda n: [scripted() for _ in range(n)]


def begin(p, target="/", source=None, **fields):
    """A client that has sent its upgrade."""
    client = connect(p, source=source)
    client.send(upgrade(target, **fields))
    return client


def server_of(p, nth):
    """The backend of the nth session by the log."""
    return p.log.wait("open", nth=nth)["backend"]


def tunnels(p, among, n, target="/", source=None):
    """Opens so many; their backends, and the ends."""
    ends, chosen = [], []
    for _ in range(n):
        client = begin(p, target, source)
        backend, server = accept_any(among)
        server.read_head()
        server.send(switching())
        assert client.read_head().status == 101
        ends.append((client, server))
        chosen.append(among.index(backend))
    return chosen, ends


def accept_any(among):
    """Which of these backends is connected to first, and the connection."""
    with selectors.DefaultSelector() as selector:
        for backend in among:
            selector.register(backend.listener, selectors.EVENT_READ, backend)
        ready = selector.select(PATIENCE)
        assert ready, "no backend was connected to"
        backend = ready[0][0].data
        return backend, backend.accept()


def page(p, among, target="/", **fields):
    """A plain request; which backend had it, what it got, the client's answer."""
    client = connect(p)
    client.send(request(target, **fields))
    backend, server = accept_any(among)
    got = server.read_head()
    server.send(answer(body=b"page"))
    server.close()
    head = client.read_head()
    assert client.read_to_end() == b"page"
    client.close()
    return among.index(backend), got, head


def end(pair):
    for stream in pair:
        stream.close()


# ---- least connections ----

def test_least_conn_fills_evenly(proxy, backends):
    among = backends(3)
    p = proxy(*among, balance=LEAST_CONN, **PLAIN)
    chosen, _ = tunnels(p, among, 9)
    assert [chosen.count(n) for n in range(3)] == [3, 3, 3]


def test_least_conn_goes_where_sessions_have_ended(proxy, backends):
    among = backends(3)
    p = proxy(*among, balance=LEAST_CONN, **PLAIN)
    chosen, ends = tunnels(p, among, 6)
    for which, pair in zip(chosen, ends):
        if which == 1:
            end(pair)
    p.log.wait("close", nth=2)
    assert tunnels(p, among, 2)[0] == [1, 1]


def test_least_conn_counts_by_weight(proxy, backends):
    among = backends(2)
    p = proxy(among[0].entry(weight=3), among[1].entry(weight=1), balance=LEAST_CONN, **PLAIN)
    chosen, _ = tunnels(p, among, 8)
    assert [chosen.count(n) for n in range(2)] == [6, 2]


def test_least_conn_goes_round_among_equals(proxy, backends):
    """Short sessions, of which there is never more than one, must not all go to the first."""
    among = backends(3)
    p = proxy(*among, balance=LEAST_CONN, **PLAIN)
    chosen = []
    for n in range(6):
        chosen.append(page(p, among)[0])
        p.log.wait("close", nth=n + 1)
    assert [chosen.count(n) for n in range(3)] == [2, 2, 2]


# ---- sticky cookies ----

STICKY = {"balance": STICKY_COOKIE, "cookie_secret": "of the tests", **PLAIN}


def cookie_of(head):
    """Its name=value."""
    lines = [v for v in head.all("Set-Cookie") if v.startswith("wssproxy=")]
    assert len(lines) == 1, head.raw
    return lines[0].partition(";")[0]


def test_cookie_leads_back(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    first, _, head = page(p, among)
    cookie = cookie_of(head)
    assert [page(p, among, Cookie=cookie)[0] for _ in range(4)] == [first] * 4


def test_cookie_of_a_page_leads_the_websocket_to_the_same_backend(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    for _ in range(3):
        which, _, head = page(p, among)
        client = begin(p, Cookie=cookie_of(head))
        server = among[which].accept()
        server.read_head()
        server.send(switching())
        assert client.read_head().status == 101


def test_cookie_is_set_by_an_upgrade_too(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    client = begin(p)
    backend, server = accept_any(among)
    server.read_head()
    server.send(switching())
    cookie = cookie_of(client.read_head())
    assert among[page(p, among, Cookie=cookie)[0]] is backend


def test_each_backend_has_a_cookie_of_its_own_without_its_address(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    cookies = {cookie_of(page(p, among)[2]) for _ in range(6)}
    assert len(cookies) == 3
    for cookie in cookies:
        for backend in among:
            assert backend.place.port not in cookie
        assert re.fullmatch(r"wssproxy=[0-9a-f]{16}", cookie)


def test_cookie_is_for_browsers_only_and_for_tls_only(proxy, backends):
    among = backends(1)
    p = proxy(*among, **{**STICKY, "listeners": [("127.0.0.1", "0", WSS)]})
    line = page(p, among)[2].get("Set-Cookie")
    attributes = {part.strip().lower() for part in line.split(";")[1:]}
    assert attributes == {"path=/", "httponly", "secure", "samesite=lax"}


def test_cookie_of_a_listener_in_the_clear_is_not_secure_or_it_would_be_lost(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    assert "secure" not in page(p, among)[2].get("Set-Cookie").lower()


def test_client_that_shows_its_cookie_is_not_given_it_again(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    cookie = cookie_of(page(p, among)[2])
    assert page(p, among, Cookie=cookie)[2].all("Set-Cookie") == []


def test_cookies_of_the_backend_stay(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    client = connect(p)
    client.send(request())
    _, server = accept_any(among)
    server.send(answer(body=b"", extra=["Set-Cookie: a=b", "Set-Cookie: c=d"]))
    head = client.read_head()
    assert len(head.all("Set-Cookie")) == 3
    assert head.all("Set-Cookie")[:2] == ["a=b", "c=d"]


def test_cookies_of_the_client_pass(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    _, got, _ = page(p, among, Cookie="id=7; theme=dark")
    assert got.get("Cookie") == "id=7; theme=dark"


@pytest.mark.parametrize("form", ["a=b; {}", "{}; a=b", "a=b; {}; c=d", "a=b;{};c=d"])
def test_cookie_among_others(proxy, backends, form):
    among = backends(3)
    p = proxy(*among, **STICKY)
    which, _, head = page(p, among)
    cookie = form.format(cookie_of(head))
    assert [page(p, among, Cookie=cookie)[0] for _ in range(3)] == [which] * 3


def test_cookie_on_a_line_of_its_own(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    which, _, head = page(p, among)
    lines = ["Cookie: a=b", f"Cookie: {cookie_of(head)}"]
    assert [page(p, among, extra=lines)[0] for _ in range(3)] == [which] * 3


@pytest.mark.parametrize("forge", [
    lambda c: "wssproxy=0123456789abcdef", lambda c: "wssproxy=", lambda c: "wssproxy",
    lambda c: c[:-1], lambda c: c + "0", lambda c: "x" + c, lambda c: c.upper(),
    lambda c: c.replace("=", "==")])
def test_forged_cookie_falls_back(proxy, backends, forge):
    """To ROUND_ROBIN, and a good one is given."""
    among = backends(3)
    p = proxy(*among, **STICKY)
    cookie = cookie_of(page(p, among)[2])
    answers = [page(p, among, Cookie=forge(cookie)) for _ in range(3)]
    assert {which for which, _, _ in answers} == {0, 1, 2}
    for _, _, head in answers:
        cookie_of(head)


def test_cookie_survives_a_restart_and_another_order(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    cookies = {}
    for _ in range(3):
        which, _, head = page(p, among)
        cookies[which] = cookie_of(head)
    p.stop()
    p = proxy(among[2], among[0], **STICKY)
    for which in (2, 0):
        assert [page(p, among, Cookie=cookies[which])[0] for _ in range(2)] == [which] * 2


def test_cookie_of_another_secret_falls_back(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    cookie = cookie_of(page(p, among)[2])
    p.stop()
    p = proxy(*among, **{**STICKY, "cookie_secret": "another"})
    assert {page(p, among, Cookie=cookie)[0] for _ in range(3)} == {0, 1, 2}


def test_cookie_of_a_lost_backend_leads_elsewhere_and_is_replaced(proxy, backends):
    among = backends(3)
    p = proxy(*among, **STICKY)
    lost, _, head = page(p, among)
    cookie = cookie_of(head)
    among[lost].close()
    left = [b for b in among if b is not among[lost]]
    _, _, head = page(p, left, Cookie=cookie)
    assert cookie_of(head) != cookie


def test_client_comes_back_to_a_backend_that_was_aside(proxy, backends, scripted):
    among = backends(2)
    p = proxy(*among, **STICKY, **SOON)
    which, _, head = page(p, among)
    cookie = cookie_of(head)
    among[which].close()
    page(p, among[1 - which:2 - which], Cookie=cookie)
    among[which] = scripted(among[which].place)
    eventually(lambda: page(p, among, Cookie=cookie)[0] == which)


def test_cookie_of_a_backend_outside_of_the_path_is_no_way_in(proxy, backends):
    """A client of / must not get to the backend of /admin by its cookie."""
    among = backends(2)
    p = proxy(among[0].entry(), among[1].entry(path="/admin"), **STICKY)
    cookie = cookie_of(page(p, among, "/admin")[2])
    assert [page(p, among, "/", Cookie=cookie)[0] for _ in range(2)] == [0, 0]


def test_sticky_backend_that_is_full(proxy, backends):
    among = backends(2)
    p = proxy(*[b.entry(max_conns=1) for b in among], **STICKY)
    client = begin(p)
    backend, server = accept_any(among)
    server.read_head()
    server.send(switching())
    cookie = cookie_of(client.read_head())
    other = [b for b in among if b is not backend]
    page(p, other, Cookie=cookie)


def test_own_name_of_the_cookie(proxy, backends):
    among = backends(2)
    p = proxy(*among, **STICKY, cookie_name="route")
    which, _, head = page(p, among)
    cookie = head.get("Set-Cookie").partition(";")[0]
    assert cookie.startswith("route=")
    assert [page(p, among, Cookie=cookie)[0] for _ in range(3)] == [which] * 3


@pytest.mark.parametrize("balance", [ROUND_ROBIN, LEAST_CONN])
def test_no_cookie_without_sticky_cookie(proxy, backends, balance):
    among = backends(3)
    p = proxy(*among, balance=balance, **PLAIN)
    assert page(p, among)[2].all("Set-Cookie") == []


# ---- weights ----

def test_ip_hash_follows_the_weights(proxy, backends):
    among = backends(2)
    p = proxy(among[0].entry(weight=9), among[1].entry(), balance=IP_HASH, **PLAIN)
    chosen = []
    for n in range(60):
        client = connect(p, source=f"127.0.{n % 6}.{n + 2}")
        client.send(request())
        backend, server = accept_any(among)
        chosen.append(among.index(backend))
        end((client, server))
    assert chosen.count(0) > chosen.count(1) > 0


def test_weight_beyond_its_bound_is_named(place):
    result = run_once(whole_config([place().entry(weight=257)], {}), "-t")
    assert result.returncode == 1
    assert "weight" in result.stderr


# ---- backups ----

@pytest.mark.parametrize("balance", [ROUND_ROBIN, IP_HASH, LEAST_CONN, STICKY_COOKIE])
def test_backup_serves_only_when_no_other_can(proxy, backends, balance):
    among = backends(2)
    p = proxy(among[0].entry(backup=1), among[1].entry(), balance=balance, **PLAIN)
    assert [page(p, among)[0] for _ in range(4)] == [1] * 4
    among[1].close()
    assert [page(p, among[:1])[0] for _ in range(3)] == [0] * 3
    p.log.wait("backend", name=among[1].name, down=True, why="refused")


def test_first_choice_serves_again_when_it_is_back(proxy, backends, scripted):
    among = backends(2)
    p = proxy(among[0].entry(backup=1), among[1].entry(), **PLAIN, **SOON)
    among[1].close()
    assert page(p, among[:1])[0] == 0
    among[1] = scripted(among[1].place)
    eventually(lambda: page(p, among)[0] == 1)


def test_backup_serves_when_the_others_are_full(proxy, backends):
    among = backends(2)
    p = proxy(among[0].entry(max_conns=1), among[1].entry(backup=1), **PLAIN)
    chosen, _ = tunnels(p, among, 3)
    assert chosen == [0, 1, 1]


# ---- max_conns ----

def test_place_of_max_conns_is_given_back(proxy, backends):
    among = backends(1)
    p = proxy(among[0].entry(max_conns=2), **PLAIN)
    _, ends = tunnels(p, among, 2)
    assert ask(p, upgrade())[0].status == 503
    end(ends[0])
    p.log.wait("close")
    tunnels(p, among, 1)


@pytest.mark.parametrize("balance", [IP_HASH, LEAST_CONN])
def test_max_conns_sends_the_rest_elsewhere(proxy, backends, balance):
    among = backends(2)
    p = proxy(*[b.entry(max_conns=2) for b in among], balance=balance, **PLAIN)
    chosen, _ = tunnels(p, among, 4)
    assert sorted(chosen) == [0, 0, 1, 1]
    assert ask(p, upgrade())[0].status == 503


def test_plain_requests_count_for_max_conns(proxy, backends):
    among = backends(1)
    p = proxy(among[0].entry(max_conns=1), **PLAIN)
    client = connect(p)
    client.send(request())
    server = among[0].accept()
    assert ask(p, request())[0].status == 503
    server.read_head()
    server.send(answer(body=b"x"))
    assert client.read_head().status == 200
    assert client.read_to_end() == b"x"
    client.close()
    p.log.wait("close")
    page(p, among)


# ---- paths ----

@pytest.fixture
def paths(proxy, backends):
    """Backends of /, /chat, /chat/room and /files/, and which of them a target leads to."""
    among = backends(4)
    p = proxy(among[0].entry(), among[1].entry(path="/chat"), among[2].entry(path="/chat/room"),
              among[3].entry(path="/files/"), **PLAIN)
    return lambda target: page(p, among, target)[0]


@pytest.mark.parametrize("target, which", [
    ("/", 0), ("/other", 0), ("/chatty", 0), ("/Chat", 0), ("/cha", 0), ("/?x=/chat", 0),
    ("/chat", 1), ("/chat/", 1), ("/chat?room=1", 1), ("/chat/roomy", 1), ("/chat/x/room", 1),
    ("/chat/room", 2), ("/chat/room/7", 2), ("/chat/room?x", 2),
    ("/files", 0), ("/files/", 3), ("/files/a", 3),
    ("http://example.test/chat/x", 1), ("http://example.test", 0)])
def test_path_leads_to_its_group(paths, target, which):
    assert paths(target) == which


def test_path_is_not_stripped(proxy, backends):
    among = backends(1)
    p = proxy(among[0].entry(path="/chat"), **PLAIN)
    assert page(p, among, "/chat/x?y")[1].first == "GET /chat/x?y HTTP/1.1"


def test_group_shares_its_path(proxy, backends):
    among = backends(4)
    p = proxy(among[0].entry(path="/chat"), among[1].entry(), among[2].entry(path="/chat"),
              among[3].entry(), **PLAIN)
    assert sorted(page(p, among, "/chat/x")[0] for _ in range(4)) == [0, 0, 2, 2]
    assert sorted(page(p, among, "/x")[0] for _ in range(4)) == [1, 1, 3, 3]


def test_group_that_is_down_is_not_replaced_by_another(proxy, backends):
    """Who serves / knows nothing of /chat."""
    among = backends(2)
    p = proxy(among[0].entry(), among[1].entry(path="/chat"), **PLAIN)
    among[1].close()
    assert ask(p, request("/chat"))[0].status == 502
    assert among[0].untouched()
    assert page(p, among[:1])[0] == 0


# ---- unix: ----

class UnixStream(Stream):
    def __init__(self, sock):
        self.kept.append(self)
        self.sock, self.ahead = sock, b""
        self.sock.settimeout(PATIENCE)


class Unix(Scripted):
    def __init__(self, path):
        self.path, self.name = path, f"unix:{path}"
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(PATIENCE)

    def accept(self):
        return UnixStream(self.listener.accept()[0])

    def entry(self, **more):
        return {"host": self.name, **more}


@pytest.fixture
def unix(live_files, keeper):
    return keeper(Unix(live_files / "socket"))


def test_unix_backend(proxy, unix):
    p = proxy(unix.entry(), **PLAIN)
    client, server = open_tunnel(p, unix)
    client.send(b"over")
    assert server.read(4) == b"over"
    server.send(b"back")
    assert client.read(4) == b"back"
    p.log.wait("open", backend=unix.name)


def test_unix_backend_serves_pages(proxy, unix):
    p = proxy(unix.entry(), **PLAIN)
    (got, _), (head, body) = exchange(p, unix, request("/x"), answer(body=b"page"))
    assert got.get("X-Forwarded-For") == "127.0.0.1"
    assert (head.status, body) == (200, b"page")


def test_end_and_reset_of_a_unix_backend(proxy, unix):
    p = proxy(unix.entry(), **PLAIN)
    client, server = open_tunnel(p, unix)
    server.send(b"last words")
    server.close()
    assert client.read_to_end() == b"last words"
    client.close()
    p.log.wait("close", by="backend")


def test_missing_unix_socket_is_said_so(proxy, live_files):
    p = proxy({"host": f"unix:{live_files}/nobody"}, **PLAIN)
    assert ask(p, request())[0].status == 502
    p.log.wait("backend", name=f"unix:{live_files}/nobody", down=True, why="no-socket")


def test_dead_unix_socket_is_said_so(proxy, unix):
    p = proxy(unix.entry(), **PLAIN)
    unix.close()
    assert ask(p, request())[0].status == 502
    p.log.wait("backend", name=unix.name, down=True, why="refused")


def test_failover_from_a_unix_backend_that_accepts_no_more(proxy, unix, backends, keeper):
    among = backends(1)
    unix.listener.listen(0)
    with pytest.raises(BlockingIOError):
        while True:
            filler = keeper(socket.socket(socket.AF_UNIX))
            filler.setblocking(False)
            filler.connect(str(unix.path))
    p = proxy(unix.entry(), *among, connect_ms=300, **PLAIN)
    for _ in range(3):
        open_tunnel(p, among[0])
    p.log.wait("backend", name=unix.name, down=True, why="full")


@pytest.mark.parametrize("backlog", [0, 1])
def test_unix_backend_that_is_slow_to_accept(proxy, unix, backlog):
    """Forty at once find its backlog full."""
    unix.listener.listen(backlog)
    p = proxy(unix.entry(), connect_ms=60000, **PLAIN)
    clients = [begin(p) for _ in range(40)]
    for _ in clients:
        threading.Event().wait(0.01)
        server = unix.accept()
        server.read_head()
        server.send(switching())
    assert [client.read_head().status for client in clients] == [101] * 40
    assert not p.log.all("backend")


def test_failover_from_a_unix_backend(proxy, unix, backends):
    among = backends(1)
    p = proxy(unix.entry(), *among, **PLAIN)
    unix.close()
    assert page(p, among)[0] == 0


def test_unix_path_too_long_is_named(place):
    result = run_once(whole_config([{"host": "unix:/" + "x" * 200}], {}), "-t")
    assert result.returncode == 1
    assert "too long" in result.stderr


# ---- active checks ----

CHECKS = {"check_ms": 200, "fail_ms": 60000, **PLAIN}


def test_check_finds_a_backend_down_before_any_client_does(proxy, backends):
    among = backends(2)
    p = proxy(*among, **CHECKS)
    among[0].close()
    p.log.wait("backend", name=among[0].name, down=True, why="refused")
    assert p.log.all("open") == p.log.all("reject") == []


def test_check_finds_a_backend_up_again_before_any_client_does(proxy, place, scripted):
    """Long before fail_ms."""
    here = place()
    p = proxy(here, **CHECKS)
    p.log.wait("backend", name=here.name, down=True)
    backend = scripted(here)
    p.log.wait("backend", name=here.name, up=True)
    backend.accept().close()


def test_backend_that_is_down_by_a_check_is_not_dialled_for_clients(proxy, place, scripted):
    here, other = place(), scripted()
    p = proxy(here, other, **CHECKS)
    p.log.wait("backend", name=here.name, down=True)
    for nth in range(3):
        client = begin(p)
        server = accept_session(other)
        server.send(switching())
        assert client.read_head().status == 101
    p.signal(signal.SIGUSR1)
    line = p.log.wait("stats", backend=here.name)
    assert line["sessions"] == "0" and line["state"] == "aside"


def accept_session(backend):
    """The next connection that is no check: those end without a byte."""
    while True:
        server = backend.accept()
        first = server.receive()
        if first:
            server.ahead = first
            server.read_head()
            return server


def test_checks_send_nothing_and_end_in_order(proxy, scripted):
    backend = scripted()
    proxy(backend, **CHECKS)
    for _ in range(3):
        assert backend.accept().read_to_end() == b""


def test_checks_that_time_out(proxy, place, keeper):
    """A listener whose backlog is full answers no SYN."""
    here = place()
    full = Scripted(here, backlog=0)
    keeper(full)
    fillers = []
    for _ in range(4):
        s = keeper(socket.socket())
        s.setblocking(False)
        s.connect_ex((here.host, int(here.port)))
        fillers.append(s)
    p = proxy(here, **CHECKS)
    p.log.wait("backend", name=here.name, down=True, why="timeout")


def refusing(at, keeper):
    """Nobody is there."""


def silent(at, keeper):
    fill(keeper(Scripted(at, backlog=0)), keeper)


@pytest.mark.parametrize("alive, other", [("127.0.0.2", "127.0.0.3"), ("127.0.0.3", "127.0.0.2")])
@pytest.mark.parametrize("dead", [refusing, silent])
def test_check_looks_at_all_addresses_of_a_name(proxy, place, live_files, keeper, alive, other, dead):
    port = place().port
    dead(Place(other, port), keeper)
    backend = keeper(Scripted(Place(alive, port)))
    etc = Etc(live_files, nsswitch=FILES_ONLY,
              hosts="127.0.0.2 backend.test\n127.0.0.3 backend.test\n")
    p = proxy({"host": "backend.test", "port": port}, popen={"wrapper": etc.wrapper()}, **CHECKS)
    for _ in range(5):
        backend.accept().close()
    assert not p.log.all("backend")
    backend.close()
    p.log.wait("backend", name=f"backend.test:{port}", down=True)
    keeper(Scripted(Place(alive, port)))
    p.log.wait("backend", name=f"backend.test:{port}", up=True)


def test_check_lifts_nothing_of_tls(proxy, scripted):
    """Though it connects each time."""
    distrusted, backup = ScriptedTls(scripted(), server_context("expired")), scripted()
    entry = distrusted.entry(tls=TLS_VERIFY, sni="backend.test", ca=pem("ca"))
    p = proxy(entry, backup.entry(backup=1), tls_backends=1, **CHECKS)

    def handshake():
        with contextlib.suppress(AssertionError, OSError):
            while True:                 # the first ones are checks
                with contextlib.suppress(ssl.SSLError):
                    distrusted.accept()
    thread = threading.Thread(target=handshake)
    thread.start()
    for _ in range(10):
        client = begin(p)
        server = accept_session(backup)
        server.send(switching())
        assert client.read_head().status == 101
        for _ in range(2):
            while backup.accept().receive():        # so there was a check of each
                pass
    p.log.wait("backend", name=distrusted.name, down=True, why="expired")
    assert len(p.log.all("backend")) == 1
    p.signal(signal.SIGUSR1)
    assert p.log.wait("stats", backend=distrusted.name)["failures"] == "1"
    distrusted.scripted.listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_check_of_a_unix_backend(proxy, unix):
    p = proxy(unix.entry(), **CHECKS)
    unix.accept()
    unix.close()
    p.log.wait("backend", name=unix.name, down=True)


def test_backend_that_stays_up_is_not_spoken_of(proxy, scripted):
    backend = scripted()
    p = proxy(backend, **CHECKS)
    for _ in range(5):
        backend.accept().close()
    assert p.log.all("backend") == []


def test_checks_do_not_touch_sessions(proxy, scripted):
    backend = scripted()
    p = proxy(backend, **CHECKS)
    client = begin(p)
    server = accept_session(backend)
    server.send(switching())
    assert client.read_head().status == 101
    backend.close()
    p.log.wait("backend", name=backend.name, down=True)
    client.send(b"still here")
    assert server.read(10) == b"still here"
