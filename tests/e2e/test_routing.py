"""Which backend a request goes to: by the Host that it asks for, then by its path."""

import selectors

import pytest

from harness import FORWARD, PATIENCE, REDIRECT, WS, WSS
from more import STICKY_COOKIE, answer, request
from peers import ask, client_context, connect, node_client, open_tunnel, play, upgrade, ws

PLAIN = {"listeners": [("127.0.0.1", "0", WS)], "http": FORWARD}


def selected(backends):
    """The name of one that a connection waits at."""
    with selectors.DefaultSelector() as events:
        for name, backend in backends.items():
            events.register(backend.listener, selectors.EVENT_READ, name)
        return events.select(PATIENCE)[0][0].data


def goes_to(p, backends, sent=None, **fields):
    """The name of the backend, of a dict, that gets a request with those fields."""
    with connect(p) as client:
        client.send(sent or request(**fields))
        name = selected(backends)
        backends[name].accept().close()
        return name


@pytest.fixture
def two(proxy, scripted):
    """A proxy, and its backends: of a name, of a wildcard, of no name."""
    def start(**config):
        backends = {"a": scripted(), "star": scripted(), "b": scripted(), "any": scripted()}
        names = {"a": "a.test", "star": "*.test", "b": "*.b.test"}
        return proxy(*(b.entry(**({"name": names[n]} if n in names else {}))
                       for n, b in backends.items()), **{**PLAIN, **config}), backends
    return start


@pytest.mark.parametrize("host, wanted", [
    ("a.test", "a"), ("A.Test", "a"), ("a.test.", "a"), ("a.test:8443", "a"), ("a.test.:443", "a"),
    ("a.test:", "a"), ("x.a.test", "star"), ("x.test", "star"), ("x.b.test", "b"), ("b.test", "star"),
    ("x.y.b.test:1", "b"), ("test", "any"), ("a.tes", "any"), ("xa.test.b", "any"), ("[::1]", "any")])
def test_the_name_that_fits_best_has_the_request(two, host, wanted):
    p, backends = two()
    assert goes_to(p, backends, Host=host) == wanted
    assert goes_to(p, backends, upgrade(Host=host)) == wanted


def test_target_with_an_authority_is_routed_by_that(two):
    p, backends = two()
    assert goes_to(p, backends, request("http://a.test:81/x", Host="x.b.test")) == "a"


def test_address_is_a_name_too(proxy, scripted):
    backends = {"six": scripted(), "four": scripted()}
    p = proxy(backends["six"].entry(name="[2001:db8::A]"),
              backends["four"].entry(name="192.0.2.1"), **PLAIN)
    assert goes_to(p, backends, Host="[2001:DB8::a]:443") == "six"
    assert goes_to(p, backends, Host="192.0.2.1:80") == "four"
    assert ask(p, request(Host="[2001:db8::b]"))[0].status == 421


def test_paths_are_those_of_the_name(proxy, scripted):
    """A name is not left for a longer path under another, or under none."""
    backends = {"chat": scripted(), "deep": scripted(), "any": scripted()}
    p = proxy(backends["chat"].entry(name="a.test", path="/chat"),
              backends["deep"].entry(name="a.test", path="/chat/deep"),
              backends["any"].entry(path="/chat/deep/x"), **PLAIN)
    assert goes_to(p, backends, request("/chat", Host="a.test")) == "chat"
    assert goes_to(p, backends, request("/chat/deep/x", Host="a.test")) == "deep"
    assert goes_to(p, backends, request("/chat/deep/x", Host="b.test")) == "any"
    assert ask(p, request("/other", Host="a.test"))[0].status == 404
    p.log.wait("reject", status="404", why="no-path", host="a.test", path="/other")


def test_host_that_nobody_serves_is_421(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(name="a.test"), **PLAIN)
    for n, host in enumerate(["b.test", "x.a.test", "a.test.x", "127.0.0.1", "a.test.."]):
        answered, body = ask(p, upgrade(Host=host))
        assert answered.first == "HTTP/1.1 421 Misdirected Request"
        assert body == b"421 Misdirected Request: no-name\n"
        p.log.wait("reject", nth=n + 1, status="421", why="no-name", backend="-")
    p.log.wait("reject", host="b.test")
    assert backend.untouched()
    open_tunnel(p, backend, request=upgrade(Host="a.test"))


def test_malformed_host_is_400_and_not_routed(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(name="a.test"), **PLAIN)
    for host in ["a.test:x", "a.test/", "a.test:1:2", "[::1", None]:
        assert ask(p, request(Host=host))[0].status == 400
    assert ask(p, request(Host="a.test", extra=["Host: b.test"]))[0].status == 400
    assert backend.untouched()


def test_others_of_the_name_serve_while_one_is_down(proxy, scripted, place):
    """And nobody of another name."""
    backends = {"a": scripted(), "b": scripted()}
    down = place()
    p = proxy(down.entry(name="a.test"), backends["a"].entry(name="a.test"),
              backends["b"].entry(name="b.test"), **PLAIN)
    for _ in range(3):
        assert goes_to(p, backends, Host="a.test") == "a"
    backends["a"].close()
    assert ask(p, request(Host="a.test"))[0].status == 502
    assert goes_to(p, {"b": backends["b"]}, Host="b.test") == "b"


def test_full_name_takes_no_place_of_another(proxy, scripted):
    a, b = scripted(), scripted()
    p = proxy(a.entry(name="a.test", max_conns=1), b.entry(name="b.test"), **PLAIN)
    open_tunnel(p, a, request=upgrade(Host="a.test"))
    assert ask(p, request(Host="a.test"))[0].status == 503
    open_tunnel(p, b, request=upgrade(Host="b.test"))


def test_cookie_sticks_within_each_name(proxy, scripted):
    """The same two servers under two names."""
    one, two = scripted(), scripted()
    p = proxy(*(b.entry(name=name) for name in ("a.test", "b.test") for b in (one, two)),
              balance=STICKY_COOKIE, cookie_secret="x", **PLAIN)
    backends = {"one": one, "two": two}
    for host in ("a.test", "b.test"):
        client = connect(p)
        client.send(request(Host=host))
        chosen = selected(backends)
        backends[chosen].accept().send(answer(body=b"x"))
        cookie = client.read_head().get("Set-Cookie").split(";")[0]
        for _ in range(3):
            assert goes_to(p, backends, Host=host, Cookie=cookie) == chosen


# ---- by clients that others wrote ----

def test_websocket_clients(proxy, python_server, node_server):
    """Two applications on one port, each under its name."""
    python, node = python_server(), node_server()
    p = proxy(python.entry(name="localhost"), node.entry(name="example.test"))
    assert node_client(p, sizes=[10])["echoed"] == 2
    p.log.wait("open", host=f"localhost:{p.ports[0]}", backend=python.name)

    async def other():
        async with ws(p) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
    play(other())
    p.log.wait("open", host=f"example.test:{p.ports[0]}", backend=node.name)


def test_resumed_session_is_routed_by_its_own_host(proxy, scripted):
    """Not by the name that its TLS began with."""
    backends = {"a": scripted(), "b": scripted()}
    p = proxy(backends["a"].entry(name="localhost"), backends["b"].entry(name="b.test"),
              http=FORWARD)
    context = client_context()
    first = connect(p, context=context)
    first.send(request(Host="localhost"))
    backends["a"].accept().send(answer(body=b"a"))
    assert first.read_head().status == 200
    again = connect(p, context=context, session=first.tls.session)
    assert again.tls.session_reused
    again.send(request(Host="b.test"))
    backends["b"].accept().send(answer(body=b"b"))
    assert again.read_head().status == 200 and again.read_to_end() == b"b"


def test_each_request_of_a_connection_is_routed_by_its_own_host(two):
    p, backends = two(http_idle_ms=60000)
    client = connect(p)
    for host, wanted in [("a.test", "a"), ("x.test", "star"), ("nowhere", "any"), ("a.test", "a")]:
        client.send(request(Host=host, Connection=None))
        assert selected(backends) == wanted
        server = backends[wanted].accept()
        assert server.read_head().get("Host") == host
        server.send(answer(body=b"page"))
        assert client.read_head().status == 200 and client.read(4) == b"page"
        server.close()


def test_pipelined_requests_are_routed_one_by_one(proxy, scripted):
    a, b = scripted(), scripted()
    p = proxy(a.entry(name="a.test"), b.entry(name="b.test"), **PLAIN, http_idle_ms=60000)
    client = connect(p)
    client.send(b"".join(request(Host=f"{n}.test", Connection=None) for n in "abc"))
    for backend in (a, b):
        server = backend.accept()
        server.read_head()
        server.send(answer(body=b"page"))
        assert client.read_head().status == 200 and client.read(4) == b"page"
    assert client.read_head().status == 421


def test_redirect_listener_has_no_names(proxy, scripted):
    p = proxy(scripted().entry(name="a.test"),
              listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", REDIRECT)])
    assert ask(p, request(Host="b.test:8080"), REDIRECT)[0].get("Location").startswith("https://b.test:")
