"""Backends by name: what happens when a name does not resolve, resolves late, to several addresses,
or to none for half a minute. The proxy runs with our own /etc/hosts and resolv.conf."""

import os
import select
import signal
from pathlib import Path

import pytest

from conftest import whole_config
from harness import FORWARD, IP_HASH, PATIENCE, WS, eventually, run_once
from more import (FILES_ONLY, LOCALHOST, STICKY_COOKIE, Etc, NameServer, answer, children_of, request,
                  status_of)
from peers import Place, ask, asking, connect, open_tunnel

PLAIN = {"listeners": [("127.0.0.1", "0", WS)], "http": FORWARD, "resolve_ms": 200, "fail_ms": 300}


@pytest.fixture
def etc(live_files):
    """/etc/hosts of the proxy is written by the test; there is no DNS."""
    return Etc(live_files, hosts=LOCALHOST, nsswitch=FILES_ONLY)


@pytest.fixture
def named(proxy, etc):
    """A proxy that sees etc's files."""
    return lambda *backends, popen=None, **config: proxy(
        *backends, popen={"wrapper": etc.wrapper(), **(popen or {})}, **{**PLAIN, **config})


def hosts(**addresses):
    """Lines of /etc/hosts: name=[address, ...]."""
    return LOCALHOST + "".join(f"{address} {name}\n" for name, several in addresses.items()
                               for address in several)


def by_name(backend, name="backend", **more):
    return {"host": name, "port": backend.place.port, **more}


def page(p, backend):
    client, server = asking(p, backend, request())
    server.send(answer(body=b"page"))
    server.close()
    assert client.read_head().status == 200
    assert client.read_to_end() == b"page"
    client.close()


# ---- at start ----

def test_name_of_etc_hosts(named, scripted, etc):
    backend = scripted()
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p = named(by_name(backend))
    page(p, backend)
    p.log.wait("open", backend=f"backend:{backend.place.port}")


def test_client_that_comes_before_the_first_answer_waits_for_it(named, scripted, etc):
    """The very first request after start is served, however slow names are."""
    backend = scripted()
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    for _ in range(5):
        p = named(by_name(backend))
        page(p, backend)
        p.stop()


def test_unresolved_name_is_down_and_not_fatal(named, scripted, etc):
    """nginx would not start: host not found in upstream."""
    backend = scripted()
    p = named(by_name(backend))
    p.log.wait("backend", name=f"backend:{backend.place.port}", down=True, why="unresolved")
    assert ask(p, request())[0].status == 502
    assert backend.untouched()


def test_unresolved_name_is_said_once(named, scripted):
    backend = scripted()
    p = named(by_name(backend), scripted().entry())
    p.log.wait("backend", down=True, why="unresolved")
    asked = p.log.all("backend")
    for _ in range(3):
        p.signal(signal.SIGHUP)
    p.log.wait("reload", nth=1, ok=True)
    eventually(lambda: p.log.all("reload"))
    assert p.log.all("backend") == asked


def test_others_serve_while_a_name_is_unresolved(named, scripted):
    missing, backend = scripted(), scripted()
    p = named(by_name(missing), backend.entry())
    for _ in range(4):
        page(p, backend)
    assert missing.untouched()


@pytest.mark.parametrize("balance", [IP_HASH, STICKY_COOKIE])
def test_others_serve_while_a_name_is_unresolved_for_each_balance(named, scripted, balance):
    missing, backend = scripted(), scripted()
    p = named(by_name(missing), backend.entry(), balance=balance)
    for _ in range(3):
        page(p, backend)


def test_name_without_resolve_names_is_named(place):
    result = run_once(whole_config([{"host": "server01", "port": place().port}],
                                   {"resolve_names": 0}), "-t")
    assert result.returncode == 1
    assert "server01" in result.stderr and "resolve_names" in result.stderr


# ---- later ----

def test_name_that_resolves_later_comes_up_by_itself(named, scripted, etc):
    backend = scripted()
    p = named(by_name(backend))
    p.log.wait("backend", down=True, why="unresolved")
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p.log.wait("backend", name=f"backend:{backend.place.port}", up=True)
    page(p, backend)


def test_one_of_several_names_comes_up_later(named, scripted, etc):
    first, second = scripted(), scripted()
    etc.write("hosts", hosts(one=["127.0.0.1"]))
    p = named(by_name(first, "one"), by_name(second, "two"))
    p.log.wait("backend", name=f"two:{second.place.port}", down=True)
    page(p, first)
    etc.write("hosts", hosts(one=["127.0.0.1"], two=["127.0.0.1"]))
    p.log.wait("backend", name=f"two:{second.place.port}", up=True)
    seen = set()

    def try_both():
        client = connect(p)
        client.send(request())
        client.close()
        seen.update(b for b in (first, second) if not b.untouched())
        return len(seen) == 2
    eventually(try_both)


def test_sighup_resolves_at_once(named, scripted, etc):
    """Long before resolve_ms."""
    backend = scripted()
    p = named(by_name(backend), resolve_ms=600000)
    p.log.wait("backend", down=True, why="unresolved")
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p.signal(signal.SIGHUP)
    p.log.wait("backend", up=True)
    page(p, backend)


def test_sighup_moves_a_backend_to_its_new_address(named, scripted, etc):
    here = scripted()
    there = scripted(Place("127.0.0.2", here.place.port))
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p = named(by_name(here))
    page(p, here)
    etc.write("hosts", hosts(backend=["127.0.0.2"]))
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    eventually(lambda: goes_to(p, there, here))
    page(p, there)


def goes_to(p, wanted, other):
    """Whether a request goes to `wanted`."""
    client = connect(p)
    client.send(request())
    found = []

    def look():
        for backend in (wanted, other):
            if not backend.untouched():
                found.append(backend)
        return found
    eventually(look)
    client.close()
    return found[0] is wanted


def test_sighup_touches_no_session_of_the_old_address(named, scripted, etc):
    here = scripted()
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p = named(by_name(here))
    client, server = open_tunnel(p, here)
    etc.write("hosts", hosts(backend=["127.0.0.2"]))
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    client.send(b"still here")
    assert server.read(10) == b"still here"


def test_name_that_is_lost_keeps_its_last_address(named, scripted, etc):
    """A resolver that fails for a while takes no backend away."""
    backend = scripted()
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p = named(by_name(backend))
    page(p, backend)
    etc.write("hosts", LOCALHOST)
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    for _ in range(3):
        page(p, backend)
    assert p.log.all("backend") == []


def test_backend_that_is_refused_is_resolved_again(named, scripted, etc):
    """It has moved, and nobody sends SIGHUP."""
    here = scripted()
    there = scripted(Place("127.0.0.2", here.place.port))
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p = named(by_name(here))
    page(p, here)
    etc.write("hosts", hosts(backend=["127.0.0.2"]))
    here.close()
    eventually(lambda: ask_quietly(p, there))


def ask_quietly(p, backend):
    """A request; whether the backend got it."""
    client = connect(p)
    client.send(request())
    got = []

    def look():
        if not backend.untouched():
            got.append(True)
        return got or client.has_input()
    eventually(look)
    client.close()
    return bool(got)


# ---- several addresses ----

def test_addresses_are_tried_in_turn(named, scripted, etc):
    backend = scripted(Place("127.0.0.3", scripted().place.port))
    etc.write("hosts", hosts(backend=["127.0.0.2", "127.0.0.4", "127.0.0.3"]))
    p = named(by_name(backend))
    page(p, backend)
    assert p.log.all("backend") == []


def test_all_addresses_refused(named, place, etc):
    here = place()
    etc.write("hosts", hosts(backend=["127.0.0.2", "127.0.0.3"]))
    p = named({"host": "backend", "port": here.port})
    assert ask(p, request())[0].status == 502
    p.log.wait("backend", name=f"backend:{here.port}", down=True, why="refused")


def test_name_with_ipv6_and_ipv4(named, scripted, etc):
    """The one that listens is found, whichever comes first."""
    backend = scripted()
    etc.write("hosts", hosts(backend=["::1", "127.0.0.1"]))
    p = named(by_name(backend))
    page(p, backend)


def test_many_addresses_are_no_harm(named, scripted, etc):
    backend = scripted()
    etc.write("hosts", hosts(backend=["127.0.0.1", *(f"127.0.1.{n}" for n in range(1, 60))]))
    p = named(by_name(backend))
    page(p, backend)


def test_upgrade_goes_to_the_second_address(named, scripted, etc):
    backend = scripted(Place("127.0.0.3", scripted().place.port))
    etc.write("hosts", hosts(backend=["127.0.0.2", "127.0.0.3"]))
    p = named(by_name(backend))
    client, server = open_tunnel(p, backend)
    client.send(b"hello")
    assert server.read(5) == b"hello"


def several(scripted, count=3):
    """Backends at one port of addresses of their own."""
    first = scripted()
    return [first, *(scripted(Place(f"127.0.0.{n}", first.place.port)) for n in range(2, count + 1))]


def taken_by(p, backends, source=None, **fields):
    """Which of them a new session comes to."""
    with connect(p, source=source) as client:
        client.send(request(**fields))
        backend = reached(backends)
        backend.accept().close()
        return backend


def reached(backends):
    ready = select.select([b.listener for b in backends], [], [], PATIENCE)[0]
    return next(b for b in backends if b.listener in ready)


def test_all_addresses_serve_in_turn(named, scripted, etc):
    backends = several(scripted)
    etc.write("hosts", hosts(backend=[b.place.host for b in backends]))
    p = named(by_name(backends[0]))
    seen = [taken_by(p, backends) for _ in range(9)]
    assert set(seen[:3]) == set(backends)
    assert seen[:3] * 3 == seen


def test_next_address_has_the_sessions_of_one_that_is_gone(named, scripted, etc):
    first, second, third = backends = several(scripted)
    etc.write("hosts", hosts(backend=[b.place.host for b in backends]))
    p = named(by_name(first))
    second.close()
    assert {taken_by(p, [first, third]) for _ in range(6)} == {first, third}
    assert p.log.all("backend") == []       # which serves


@pytest.mark.parametrize("balance", [IP_HASH, STICKY_COOKIE])
def test_client_comes_to_the_same_address_again(named, scripted, etc, balance):
    """In whatever order the resolver has them."""
    backends = several(scripted)
    there = [b.place.host for b in backends]
    etc.write("hosts", hosts(backend=there))
    p = named(by_name(backends[0]), balance=balance, hash_bits4=32)
    sources = [f"127.0.0.{n}" for n in range(10, 22)]
    home = {source: taken_by(p, backends, source) for source in sources}
    assert len(set(home.values())) > 1
    etc.write("hosts", hosts(backend=reversed(there)))
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    for source in sources:
        assert taken_by(p, backends, source) is home[source]


# ---- names that change ----

def test_refresh_finds_a_new_address_and_leaves_the_old_one(named, scripted, etc):
    """Nobody sends SIGHUP, nothing fails. Tunnels of the old address live on."""
    here, there = several(scripted, 2)
    etc.write("hosts", hosts(backend=[here.place.host]))
    p = named(by_name(here), refresh_ms=50)
    client, server = open_tunnel(p, here)
    etc.write("hosts", hosts(backend=[there.place.host]))
    eventually(lambda: taken_by(p, [here, there]) is there)
    for _ in range(3):
        assert taken_by(p, [here, there]) is there
    client.send(b"still here")
    assert server.read(10) == b"still here"
    etc.write("hosts", LOCALHOST)           # a name that is lost for a while
    for _ in range(20):
        assert taken_by(p, [here, there]) is there
    etc.write("hosts", hosts(backend=[here.place.host, there.place.host]))
    eventually(lambda: taken_by(p, [here, there]) is here)
    assert p.log.all("backend") == []


def test_names_are_not_asked_again_without_refresh(named, scripted, etc):
    here, there = several(scripted, 2)
    etc.write("hosts", hosts(backend=[here.place.host]))
    p = named(by_name(here), by_name(there, "other"), resolve_ms=20)
    p.log.wait("backend", name=f"other:{there.place.port}", down=True)
    etc.write("hosts", hosts(backend=[there.place.host], other=["127.0.0.9"]))
    p.log.wait("backend", name=f"other:{there.place.port}", up=True)    # the resolver has looked
    etc.write("hosts", hosts(backend=[there.place.host]))
    assert taken_by(p, [here, there]) is here


# ---- a resolver that hangs ----

@pytest.fixture
def names(keeper):
    return keeper(NameServer())


@pytest.fixture
def hanging(proxy, names, live_files):
    """A proxy whose resolver asks `names`: 30 s and twice before it gives up."""
    etc = names.etc(live_files, "timeout:30 attempts:2")

    def start(*backends, **config):
        p = proxy(*backends, popen={"wrapper": etc.wrapper()}, **{**PLAIN, **config})
        assert names.asked.wait(PATIENCE)
        return p
    return start


def slow(backend):
    return {"host": "slow.test", "port": backend.place.port}


def test_sessions_are_served_while_the_resolver_hangs(hanging, scripted):
    backend = scripted()
    p = hanging(slow(scripted()), backend.entry())
    client, server = open_tunnel(p, backend)
    for n in range(100):
        client.send(b"%03d" % n)
        assert server.read(3) == b"%03d" % n
        server.send(b"%03d" % n)
        assert client.read(3) == b"%03d" % n
    for _ in range(5):
        page(p, backend)


def test_session_for_the_hanging_name_alone_gets_an_answer_after_connect_ms(hanging, scripted):
    p = hanging(slow(scripted()), connect_ms=500)
    assert ask(p, request())[0].status == 502


def test_client_that_waits_for_a_hanging_name_may_leave(hanging, scripted):
    p = hanging(slow(scripted()), connect_ms=600000)
    client = connect(p)
    client.send(request())
    client.close()
    p.log.wait_ending("eof")


def test_waiting_client_is_served_when_the_answer_comes(hanging, scripted, names):
    backend = scripted()
    p = hanging(slow(backend), connect_ms=600000)
    client = connect(p)
    client.send(request())
    names.answer_all("127.0.0.1")
    server = backend.accept()
    server.read_head()
    server.send(answer(body=b"page"))
    assert client.read_head().status == 200


def test_sighup_is_obeyed_while_the_resolver_hangs(hanging, scripted):
    backend = scripted()
    p = hanging(slow(scripted()), backend.entry())
    for nth in range(3):
        p.signal(signal.SIGHUP)
        p.log.wait("reload", nth=nth + 1, ok=True)
    page(p, backend)


def test_sigterm_is_obeyed_while_the_resolver_hangs(hanging, scripted):
    p = hanging(slow(scripted()))
    children = children_of(p.pid)
    assert children
    p.signal(signal.SIGTERM)
    assert p.wait_exit() == 0
    eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in children))


def test_questions_do_not_pile_up_while_the_resolver_hangs(hanging, scripted, names):
    backend = scripted()
    p = hanging(slow(scripted()), backend.entry(), resolve_ms=50)
    for _ in range(20):
        p.signal(signal.SIGHUP)
        page(p, backend)
    assert len(names.questions) <= 4        # A and AAAA, asked once or twice


# ---- the process that resolves ----

def test_resolver_dies_with_the_proxy(named, scripted, etc):
    p = named(by_name(scripted()))
    children = children_of(p.pid)
    assert len(children) == 1
    p.process.kill()
    p.process.wait()
    eventually(lambda: not Path(f"/proc/{children[0]}/exe").exists())
    p.process.returncode = 0        # it is meant to be killed


def test_resolver_that_is_killed_takes_nobody_with_it(named, scripted, etc):
    backend = scripted()
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p = named(by_name(backend))
    page(p, backend)
    os.kill(children_of(p.pid)[0], signal.SIGKILL)
    p.log.wait_text("^resolver")
    for _ in range(3):
        page(p, backend)
    eventually(lambda: children_of(p.pid) == [])        # no zombie


def test_resolver_that_is_killed_leaves_no_client_waiting(hanging, scripted):
    """For an answer that does not come any more."""
    p = hanging(slow(scripted()), connect_ms=600000)
    client = connect(p)
    client.send(request())
    os.kill(children_of(p.pid)[0], signal.SIGKILL)
    p.log.wait_text("^resolver")
    assert client.read_head().status == 502
    assert ask(p, request())[0].status == 502


def test_resolver_that_is_killed_is_not_asked_again(named, scripted):
    """What was to be asked for once more has nobody left to ask."""
    backend = scripted()
    p = named(by_name(scripted()), backend.entry(), resolve_ms=300, head_ms=1000)
    p.log.wait("backend", down=True, why="unresolved")
    os.kill(children_of(p.pid)[0], signal.SIGKILL)
    p.log.wait_text("^resolver")
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    late = connect(p)
    late.send(b"GET")
    assert late.read_head().status == 408       # by then a retry would have come
    client, server = open_tunnel(p, backend)
    client.send(b"alive")
    assert server.read(5) == b"alive"


def test_no_process_without_names(proxy, scripted):
    p = proxy(scripted(), **PLAIN)
    assert children_of(p.pid) == []


def test_resolver_holds_no_listener(named, scripted, etc):
    """Or a proxy that was killed could not be started again at once."""
    p = named(by_name(scripted()), resolve_ms=600000)
    p.log.wait("backend", down=True, why="unresolved")      # so it looks into no file now
    child = children_of(p.pid)[0]
    kinds = [os.readlink(f"/proc/{child}/fd/{n}") for n in os.listdir(f"/proc/{child}/fd")]
    assert len([kind for kind in kinds if kind.startswith("socket:")]) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_resolver_gives_up_privileges_too(named, scripted, etc):
    p = named(by_name(scripted()), user="nobody")
    child = children_of(p.pid)[0]
    eventually(lambda: status_of(child)["Uid"] == ["65534"] * 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_names_resolve_though_the_proxy_is_in_a_chroot(named, scripted, etc, live_files):
    backend = scripted()
    no_leak_check = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}   # it wants /proc
    p = named(by_name(backend), chroot_dir=live_files, user="nobody", popen={"env": no_leak_check})
    p.log.wait("backend", down=True, why="unresolved")
    etc.write("hosts", hosts(backend=["127.0.0.1"]))
    p.log.wait("backend", up=True)
    page(p, backend)
