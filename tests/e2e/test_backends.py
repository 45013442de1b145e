"""Which backend gets a session, what happens when it can't be reached, and names."""

import signal
import socket

import pytest

from harness import IP_HASH, PATIENCE, eventually
from more import NameServer
from peers import Place, ask, connect, open_tunnel, play, switching, upgrade, ws


def ask_only(p, source=None):
    """A client that has sent its upgrade."""
    client = connect(p, source=source)
    client.send(upgrade())
    return client


async def opened_and_closed(p, source=None):
    async with ws(p, source=source):
        pass


def chosen(p, sessions, source=lambda n: None):
    """The backends of so many sessions, one after the other, by the log."""
    seen = len(p.log.all("open"))

    async def run():
        for n in range(sessions):
            await opened_and_closed(p, source(n))
    play(run())
    p.log.wait("open", nth=seen + sessions)
    return [line["backend"] for line in p.log.all("open")[seen:]]


# ---- round robin ----

def test_round_robin_goes_round(proxy, python_server):
    a, b, c = python_server(), python_server(), python_server()
    p = proxy(a, b, c)
    assert chosen(p, 7) == [x.name for x in (a, b, c, a, b, c, a)]


def test_round_robin_is_smooth_with_weights(proxy, python_server):
    """nginx's sequence for weights 5, 1, 1."""
    a, b, c = python_server(), python_server(), python_server()
    p = proxy(a.entry(weight=5), b.entry(weight=1), c.entry(weight=1))
    assert chosen(p, 7) == [x.name for x in (a, a, b, a, c, a, a)]


# ---- ip hash ----

def test_ip_hash_keeps_each_client_where_it_was(proxy, python_server):
    servers = [python_server() for _ in range(3)]
    p = proxy(*servers, balance=IP_HASH)
    places = [chosen(p, 3, lambda _: f"127.0.0.{2 + n}") for n in range(40)]
    assert all(len(set(one)) == 1 for one in places)
    assert len({one[0] for one in places}) == 3


def test_ip_hash_is_the_same_after_a_restart(proxy, python_server):
    servers = [python_server() for _ in range(3)]

    def places():
        p = proxy(*servers, balance=IP_HASH)
        return chosen(p, 12, lambda n: f"127.0.0.{2 + n}")
    assert places() == places()


def test_ip_hash_moves_only_the_clients_of_a_lost_backend(proxy, python_server):
    servers = [python_server() for _ in range(3)]
    p = proxy(*servers, balance=IP_HASH, fail_ms=60000)
    before = chosen(p, 12, lambda n: f"127.0.0.{2 + n}")
    servers[0].close()
    after = chosen(p, 12, lambda n: f"127.0.0.{2 + n}")
    for was, now in zip(before, after):
        assert now != servers[0].name
        assert was in (now, servers[0].name)


def test_ip_hash_looks_at_hash_bits_only(proxy, python_server):
    servers = [python_server() for _ in range(3)]
    p = proxy(*servers, balance=IP_HASH, hash_bits4=24)
    assert len(set(chosen(p, 12, lambda n: f"127.0.0.{2 + n}"))) == 1
    assert len(set(chosen(p, 12, lambda n: f"127.0.{n}.1"))) > 1


# ---- failing over ----

def test_refused_connection_goes_to_the_next_at_once(proxy, place, python_server):
    dead, alive = place(), python_server()
    p = proxy(dead, alive)
    assert chosen(p, 3) == [alive.name] * 3
    assert p.log.wait("backend", name=dead.name, why="refused")["down"]


def test_backend_that_failed_is_left_alone_for_fail_ms(proxy, place, python_server, scripted):
    here = place()
    alive = python_server()
    p = proxy(here, alive, fail_ms=600000)
    chosen(p, 1)
    p.log.wait("backend", name=here.name, down=True)
    backend = scripted(here)
    assert chosen(p, 4) == [alive.name] * 4
    assert backend.untouched()


def test_backend_comes_back_after_fail_ms(proxy, place, python_server):
    here = place()
    alive = python_server()
    p = proxy(here, alive, fail_ms=300)
    chosen(p, 1)
    p.log.wait("backend", name=here.name, down=True)
    python_server(here)
    for _ in range(1000):
        if here.name in chosen(p, 1):
            break
    p.log.wait("backend", name=here.name, up=True)


def test_backend_is_put_aside_after_max_fails(proxy, place, python_server):
    """Not after the first failure; and each of the sessions is served all the same."""
    dead, alive = place(), python_server()
    p = proxy(dead, alive, max_fails=3, fail_ms=600000)
    assert chosen(p, 1) == [alive.name]
    assert not p.log.all("backend", down=True)
    assert chosen(p, 8) == [alive.name] * 8
    p.log.wait("backend", name=dead.name, down=True)


def silence(server, client):
    assert client.read_head().status == 504


def its_end(server, client):
    server.close()
    assert client.read_head().status == 502


def its_reset(server, client):
    server.reset()
    assert client.read_head().status == 502


@pytest.mark.parametrize("ending", [silence, its_end, its_reset])
def test_request_without_an_answer_takes_its_backend_from_nobody(proxy, scripted, ending):
    """It may be the request's own fault. It is not sent to another either."""
    backend, backup = scripted(), scripted()
    p = proxy(backend, backup.entry(backup=1), response_ms=300, fail_ms=600000)
    for _ in range(3):
        client = ask_only(p)
        server = backend.accept()
        server.read_head()
        ending(server, client)
    open_tunnel(p, backend)
    assert backup.untouched()
    assert not p.log.all("backend")


def test_backend_that_breaks_off_an_answer_is_not_put_aside(proxy, scripted):
    backend = scripted()
    p = proxy(backend, fail_ms=600000)
    client = ask_only(p)
    server = backend.accept()
    server.read_head()
    server.send(b"HTTP/1.1 ")
    server.close()
    assert client.read_head().status == 502
    open_tunnel(p, backend)
    assert not p.log.all("backend", down=True)


def test_all_backends_down_gets_502(proxy, place):
    p = proxy(place(), place())
    assert ask(p, upgrade())[0].status == 502
    p.log.wait_ending("no-backend", status="502")


def test_backends_put_aside_are_tried_when_there_is_no_other(proxy, place, python_server):
    one, two = place(), place()
    p = proxy(one, two, fail_ms=600000)
    assert ask(p, upgrade())[0].status == 502
    p.log.wait("backend", name=two.name, down=True)
    python_server(two)
    assert chosen(p, 1) == [two.name]


def test_connect_that_hangs_goes_to_the_next_after_connect_ms(proxy, place, scripted, keeper):
    """A full accept queue drops what comes: the connection is neither made nor refused."""
    full, alive = scripted(backlog=0), scripted()
    fill(full, keeper)
    p = proxy(full, alive, connect_ms=300)
    client = ask_only(p)
    alive.accept().send(switching())
    assert client.read_head().status == 101
    p.log.wait("backend", name=full.name, down=True, why="timeout")


def fill(backend, keeper):
    """Its backlog, which is to be 0."""
    filler = keeper(socket.socket())
    filler.connect((backend.place.host, int(backend.place.port)))
    while hangs(backend, keeper) is False:
        pass


def hangs(backend, keeper):
    one = keeper(socket.socket())
    one.settimeout(0.3)
    try:
        one.connect((backend.place.host, int(backend.place.port)))
        return False
    except TimeoutError:
        return True


def test_backend_that_fails_after_the_request_is_not_tried_elsewhere(proxy, scripted):
    """It may have acted on the request already."""
    first, second = scripted(), scripted()
    p = proxy(first, second)
    client = ask_only(p)
    server = first.accept()
    server.read_head()
    server.close()
    assert client.read_head().status == 502
    assert second.untouched()


def test_max_conns(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(max_conns=2))
    client, server = open_tunnel(p, backend)
    open_tunnel(p, backend)
    assert ask(p, upgrade())[0].status == 503
    p.log.wait_ending("full", status="503")
    server.close()
    client.close()
    p.log.wait("close", why="eof")
    open_tunnel(p, backend)


def test_max_conns_sends_the_rest_elsewhere(proxy, scripted):
    small, big = scripted(), scripted()
    p = proxy(small.entry(max_conns=1), big)
    open_tunnel(p, small)
    for _ in range(4):
        open_tunnel(p, big)


# ---- addresses and names ----

def test_backend_on_ipv6(proxy, place, scripted):
    backend = scripted(place(v6=True))
    p = proxy(backend)
    open_tunnel(p, backend)
    assert p.log.wait("open")["backend"] == backend.name


def test_backend_by_name(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(host="localhost"))
    open_tunnel(p, backend)
    assert p.log.wait("open")["backend"] == f"localhost:{backend.place.port}"


def test_unknown_name_does_not_keep_it_from_starting(proxy, python_server, no_names):
    alive = python_server()
    p = proxy({"host": "nowhere.invalid", "port": "80"}, alive, popen=no_names)
    assert chosen(p, 2) == [alive.name] * 2


def test_only_backend_is_an_unknown_name(proxy, no_names):
    p = proxy({"host": "nowhere.invalid", "port": "80"}, popen=no_names)
    assert ask(p, upgrade())[0].status == 502
    p.log.wait("backend", name="nowhere.invalid:80", down=True)


@pytest.fixture
def names(keeper):
    return keeper(NameServer())


@pytest.fixture
def own_resolver(names, live_files):
    """Options of a proxy that asks `names`, and does so for that long."""
    return lambda patience: {"wrapper": names.etc(live_files, patience).wrapper()}


def test_silent_resolver_stops_nobody(proxy, python_server, names, own_resolver):
    alive = python_server()
    p = proxy({"host": "backend.test", "port": alive.place.port}, alive, resolve_ms=500,
              popen=own_resolver("timeout:1 attempts:1"))
    assert names.asked.wait(PATIENCE)
    assert chosen(p, 10) == [alive.name] * 10


def test_name_that_resolves_later_comes_up(proxy, python_server, names, own_resolver):
    server = python_server()
    p = proxy({"host": "backend.test", "port": server.place.port}, resolve_ms=300, fail_ms=300,
              popen=own_resolver("timeout:1 attempts:1"))
    assert names.asked.wait(PATIENCE)
    assert ask(p, upgrade())[0].status == 502
    names.answer = "127.0.0.1"
    p.log.wait("backend", up=True)
    assert chosen(p, 1) == [f"backend.test:{server.place.port}"]


def test_sighup_resolves_names_again(proxy, scripted, names, own_resolver):
    """The backend has moved to another address, with the same port."""
    names.answer = "127.0.0.1"
    here = scripted()
    there = scripted(Place("127.0.0.2", here.place.port))
    p = proxy(here.entry(host="backend.test"), popen=own_resolver("timeout:5 attempts:5"))
    open_tunnel(p, here)
    names.answer = "127.0.0.2"
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    eventually(lambda: "127.0.0.2" in names.given)
    here.close()
    client = ask_only(p)
    server = there.accept()
    server.send(switching())
    assert client.read_head().status == 101
