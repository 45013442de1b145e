"""The configuration of every tutorial, line by line (the nginx words are in the comments), and what
goes wrong with it there: names that do not resolve at boot, a backend that is down, idle cuts."""

import json

import pytest

from harness import APPEND, FORWARD, IP_HASH, WSS, C
from more import FILES_ONLY, TLS_VERIFY, Etc, Nginx, NodeHttps, curl, identity, key_of, pem, request
from peers import Place, client_context, connect, play, ws

NAMES = ("server01", "server02", "server03")


@pytest.fixture
def etc(live_files):
    return Etc(live_files, nsswitch=FILES_ONLY,
               hosts="127.0.0.1 localhost\n127.0.1.1 server01\n127.0.1.2 server02\n"
                     "127.0.1.3 server03\n")


@pytest.fixture
def servers(place, keeper):
    """Three real servers with TLS on one port of three addresses, as three machines have it; they
    require client certificates."""
    port = place().port
    return [keeper(NodeHttps(Place(f"127.0.1.{n}", port), client_ca="client-ca"))
            for n in (1, 2, 3)]


@pytest.fixture
def tutorial(proxy, etc):
    """The configuration, for servers on that port."""
    def start(port, **more):
        backends = [{
            "host": name, "port": port,             # server server01:3000;
            "tls": TLS_VERIFY, "ca": pem("ca"),     # proxy_pass https://...; (and verified)
            **identity("client-ec"),                # proxy_ssl_certificate(_key)
        } for name in NAMES]
        config = {
            "listeners": [("127.0.0.1", "0", WSS)],             # listen 443 ssl;
            "certs": [(None, pem("ec"), key_of("ec"))],         # ssl_certificate(_key)
            "tls_min": C("BR_TLS12"), "tls_max": C("BR_TLS12"),  # ssl_protocols TLSv1.2;
            "ciphers": [C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),    # ssl_ciphers
                        C("BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256")],
            "balance": IP_HASH,                                 # ip_hash;
            "x_forwarded_for": APPEND,      # proxy_set_header X-Forwarded-For $proxy_add_...;
            "http": FORWARD,                # location / { proxy_pass }
            # proxy_http_version 1.1, proxy_set_header Upgrade, Connection and Host: always
            "tls_backends": 1, **more}
        return proxy(*backends, popen={"wrapper": etc.wrapper()}, **config)
    return start


@pytest.fixture
def site(tutorial, servers):
    return tutorial(servers[0].place.port)


def context():
    """Clients verify the proxy."""
    c = client_context(None)
    c.load_verify_locations(pem("ca"))
    c.check_hostname = True
    return c


async def facts(p, source=None, headers=None):
    """What a server says of a WebSocket that it was asked for."""
    async with ws(p, "/facts", source=source, ssl=context(), extra_headers=headers) as client:
        seen = json.loads(await client.recv())
        await client.send("hello")
        assert await client.recv() == "hello"
        return seen


def test_tutorial_websocket(site):
    """All the lines at once, as the server sees them."""
    seen = play(facts(site, headers={"X-Forwarded-For": "192.0.2.1"}))
    headers = seen["headers"]
    assert headers["upgrade"] == "websocket"
    assert headers["connection"].lower() == "upgrade"
    assert headers["host"] == f"example.test:{site.address()[1]}"
    assert headers["x-forwarded-for"] == "192.0.2.1, 127.0.0.1"
    assert seen["authorized"] is True and seen["subject"] == "gateway 7"
    assert seen["sni"] in NAMES
    assert seen["tls"] == "TLSv1.2"


def test_tutorial_page(site):
    port = site.address()[1]
    result = curl(site, "/page?x=y", "-H", "X-Forwarded-For: 192.0.2.1", ca=pem("ca"))
    seen = json.loads(result.stdout)
    assert seen["url"] == "/page?x=y"
    assert seen["headers"]["host"] == f"localhost:{port}"
    assert seen["headers"]["x-forwarded-for"] == "192.0.2.1, 127.0.0.1"
    assert seen["authorized"] is True


def test_tutorial_names_are_in_the_log(site):
    play(facts(site))
    line = site.log.wait("open")
    assert line["backend"].partition(":")[0] in NAMES
    assert line["tls"] == "1.2" and line["suite"].startswith("ECDHE_ECDSA_")


def test_tutorial_keeps_each_client_on_one_server(site):
    for n in range(2, 8):
        source = f"127.0.0.{n}"
        assert len({play(facts(site, source))["sni"] for _ in range(3)}) == 1


def test_tutorial_uses_all_three_servers(site):
    assert {play(facts(site, f"127.0.0.{n}"))["sni"] for n in range(2, 40)} == set(NAMES)


def test_tutorial_moves_only_the_clients_of_a_lost_server(site, servers):
    sources = [f"127.0.0.{n}" for n in range(2, 14)]
    before = {source: play(facts(site, source))["sni"] for source in sources}
    lost = before[sources[0]]
    servers[NAMES.index(lost)].close()
    after = {source: play(facts(site, source))["sni"] for source in sources}
    site.log.wait("backend", down=True, why="refused")
    assert lost not in after.values()
    assert all(after[s] == before[s] for s in sources if before[s] != lost)


def test_tutorial_backends_are_verified(tutorial, place, keeper):
    """nginx verifies no proxied server unless told to: here, one that shows another's certificate
    gets no request."""
    port = place().port
    good = [keeper(NodeHttps(Place(f"127.0.1.{n}", port), client_ca="client-ca")) for n in (1, 2)]
    bad = keeper(NodeHttps(Place("127.0.1.3", port), certificate="unknown-ca",
                           client_ca="client-ca"))
    p = tutorial(port)
    seen = {play(facts(p, f"127.0.0.{n}"))["sni"] for n in range(2, 20)}
    assert seen == {"server01", "server02"}
    p.log.wait("backend", name=f"server03:{port}", down=True, why="unknown-ca")
    assert good and bad


def test_tutorial_at_boot_without_names(tutorial, etc, servers):
    """'host not found in upstream' ends nginx; here the backends come up when their names do."""
    later = (etc.folder / "etc-hosts").read_text()
    etc.write("hosts", "127.0.0.1 localhost\n")
    p = tutorial(servers[0].place.port, resolve_ms=300)
    for name in NAMES:
        p.log.wait("backend", name=f"{name}:{servers[0].place.port}", down=True, why="unresolved")
    assert ask_with(p).status == 502
    etc.write("hosts", later)
    for name in NAMES:
        p.log.wait("backend", name=f"{name}:{servers[0].place.port}", up=True)
    assert play(facts(p))["sni"] in NAMES


def ask_with(p):
    with connect(p, context=context()) as client:
        client.send(request())
        return client.read_head()


def test_tutorial_with_nginx_as_the_servers(tutorial, place, keeper, tmp_path, python_server):
    """nginx behind instead of before: WebSockets by way of its own proxying."""
    behind, port = python_server(), place().port
    fronts = [keeper(Nginx(Place(f"127.0.1.{n}", port), tmp_path / f"n{n}", client_ca="client-ca",
                           upstream=behind.place)) for n in (1, 2, 3)]
    p = tutorial(port)

    async def echo():
        async with ws(p, ssl=context()) as client:
            await client.send("through both")
            assert await client.recv() == "through both"
    play(echo())
    name = p.log.wait("open")["backend"].partition(":")[0]
    line = fronts[NAMES.index(name)].log.wait("request", status="101")
    assert line["verify"] == "SUCCESS" and line["sni"] == name
    assert line["host"].startswith("example.test:")
