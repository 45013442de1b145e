"""What passes the proxy in heads: fields kept, added and taken away, and what must wait."""

import json

import pytest

from harness import APPEND, FORWARD, OFF, REPLACE, WS, WSS, C
from more import Nginx, curl, pem
from peers import KEY, accept_of, asking, connect, head, node_client, play, switching, upgrade, ws


def forwarded(p, backend, request, **options):
    """The head that the backend gets for that request."""
    client = connect(p, **options)
    client.send(request)
    server = backend.accept()
    got = server.read_head()
    server.send(switching())
    assert client.read_head().status == 101
    return got


# ---- a Host of the backend's own ----

def test_backend_gets_its_own_host_and_the_one_asked_for(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(host_header="app.cloud.test:8080"))
    got = forwarded(p, backend, upgrade("/x", Host="a.test:443", X_Forwarded_Host="evil.test",
                                        extra=["x_forwarded_host: evil.test", "X-Mine: 1"]))
    assert got.fields[0] == ("Host", "app.cloud.test:8080")
    assert got.all("X-Forwarded-Host") == ["a.test:443"] and b"evil" not in got.raw
    assert got.get("X-Mine") == "1" and got.get("X-Forwarded-For") == "127.0.0.1"


def test_x_forwarded_host_of_the_client_passes_without_it(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade(Host="a.test", X_Forwarded_Host="b.test"))
    assert got.get("Host") == "a.test" and got.get("X-Forwarded-Host") == "b.test"


def test_host_asked_for_is_that_of_an_absolute_target(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(host_header="app.test"))
    got = forwarded(p, backend, upgrade("http://a.test/x", Host="b.test"))
    assert got.first == "GET /x HTTP/1.1"
    assert got.get("Host") == "app.test" and got.get("X-Forwarded-Host") == "a.test"


def test_each_backend_gets_its_own_host(proxy, scripted, place):
    """Whichever were tried before it."""
    down, one, two = place(), scripted(), scripted()
    p = proxy(down.entry(host_header="down.test"), one.entry(host_header="one.test", max_conns=1),
              two.entry())
    got = forwarded(p, one, upgrade(Host="a.test"))
    assert got.get("Host") == "one.test" and got.get("X-Forwarded-Host") == "a.test"
    got = forwarded(p, two, upgrade(Host="a.test"))
    assert got.all("Host") == ["a.test"] and got.get("X-Forwarded-Host") is None


def test_reset_before_the_request_goes_to_the_next_with_its_host(proxy, scripted):
    one, two = scripted(), scripted()
    tls = {"tls": C("TLS_NOVERIFY")}
    p = proxy(one.entry(host_header="one.test", **tls), two.entry(host_header="two.test"),
              tls_backends=1)
    client = connect(p)
    client.send(upgrade(Host="a.test"))
    one.accept().close()
    got = two.accept().read_head()
    assert got.get("Host") == "two.test" and got.get("X-Forwarded-Host") == "a.test"


@pytest.mark.parametrize("size", [900, 1000, 1050, 5000, 8100])
def test_long_head_with_another_host(proxy, scripted, size):
    """A head that fits where heads wait, and with the other Host does not."""
    backend = scripted()
    p = proxy(backend.entry(host_header="a" * 128))
    request = upgrade(Host="a.test")
    extra = f"X-Long: {'x' * (size - len(request) - len('X-Long: ') - 2)}"
    got = forwarded(p, backend, upgrade(Host="a.test", extra=[extra]))
    assert got.get("Host") == "a" * 128 and len(got.get("X-Long")) == len(extra) - 8


def test_server_with_several_names_finds_its_own(proxy, place, keeper, tmp_path):
    """nginx as a cloud has it: 404 for names that are not its own."""
    nginx = keeper(Nginx(place(), tmp_path, more="server_name app.cloud.test; if ($host != "
                         "app.cloud.test) { return 404; }"))
    at = {"tls": C("TLS_PIN"), "ca": pem("ec")}
    p = proxy(nginx.entry(host_header="app.cloud.test", **at), nginx.entry(path="/raw", **at),
              tls_backends=1, http=FORWARD)
    assert curl(p, "/").stdout == "from nginx"
    assert "404" in curl(p, "/raw").stdout
    assert nginx.requests(2)[0]["host"] == "app.cloud.test"


# ---- requests ----

def test_request_as_nginx_would_send_it(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade("/chat?room=1"))
    assert got.first == "GET /chat?room=1 HTTP/1.1"
    assert got.get("Host") == "example.test"
    assert got.get("Connection").lower() == "upgrade"
    assert got.get("Upgrade").lower() == "websocket"
    assert got.get("Sec-WebSocket-Key") == KEY
    assert got.get("Sec-WebSocket-Version") == "13"
    assert got.get("X-Forwarded-For") == "127.0.0.1"
    assert got.get("X-Forwarded-Proto") == "https"
    assert got.get("X-Real-IP") == "127.0.0.1"


def test_order_case_and_bytes_of_fields_are_kept(proxy, scripted):
    lines = ["cOOKIE: a=1;  b=\"2\"", "X-Twice: one", "Accept-Language: de, en;q=0.5",
             "X-Twice: two", "X-Bytes: \x80\xff\t.", "X-Empty: "]
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade(extra=lines))
    wanted = [tuple(line.split(": ", 1)) for line in lines]
    names = [name for name, _ in wanted]
    assert [(n, v) for n, v in got.fields if n in names] == wanted


def test_websocket_fields_are_untouched(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    fields = {"Sec-WebSocket-Protocol": "chat, superchat",
              "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits, x-odd"}
    got = forwarded(p, backend, upgrade(**fields))
    assert {name: got.get(name) for name in fields} == fields


@pytest.mark.parametrize("line", ["Keep-Alive: timeout=5", "Proxy-Connection: keep-alive",
                                  "TE: trailers"])
def test_hop_by_hop_field_is_removed(proxy, scripted, line):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade(extra=[line]))
    assert got.all(line.partition(":")[0]) == []


def test_fields_that_connection_lists_are_removed(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade(Connection="Upgrade, X-Mine",
                                        extra=["X-Mine: 1", "x-mine: 2", "X-Mine-Too: 3"]))
    assert got.all("X-Mine") == []
    assert got.all("X-Mine-Too") == ["3"]


@pytest.mark.parametrize("name", ["Host", "Sec-WebSocket-Key", "Sec-WebSocket-Version",
                                  "Sec-WebSocket-Protocol", "X-Forwarded-For",
                                  "X-Forwarded-Proto", "X-Forwarded-Host"])
def test_connection_can_not_take_away(proxy, scripted, name):
    backend = scripted()
    p = proxy(backend)
    request = upgrade(Connection=f"Upgrade, {name.lower()}", Sec_WebSocket_Protocol="chat",
                      X_Forwarded_For="203.0.113.9", X_Forwarded_Host="h.test")
    assert forwarded(p, backend, request).get(name)


def test_only_websocket_is_passed_on_of_several_upgrades(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    request = upgrade(Upgrade="h2c, websocket", Connection="Upgrade, HTTP2-Settings",
                      extra=["HTTP2-Settings: AAMAAABkAAQAAP__"])
    got = forwarded(p, backend, request)
    assert got.get("Upgrade").lower() == "websocket"
    assert got.get("HTTP2-Settings") is None


def test_absolute_target_gives_origin_form_and_host(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade("http://other.test:8080/chat?x=1"))
    assert got.first == "GET /chat?x=1 HTTP/1.1"
    assert got.get("Host") == "other.test:8080"


def test_absolute_target_without_path(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade("https://other.test?x=1"))
    assert got.first == "GET /?x=1 HTTP/1.1"
    assert got.get("Host") == "other.test"


@pytest.mark.parametrize("mode, came, passed", [
    (APPEND, None, "127.0.0.1"),
    (APPEND, "203.0.113.9", "203.0.113.9, 127.0.0.1"),
    (APPEND, "203.0.113.9, 198.51.100.7", "203.0.113.9, 198.51.100.7, 127.0.0.1"),
    (REPLACE, "203.0.113.9", "127.0.0.1"),
    (OFF, "203.0.113.9", "203.0.113.9"),
    (OFF, None, None),
])
def test_x_forwarded_for(proxy, scripted, mode, came, passed):
    backend = scripted()
    p = proxy(backend, x_forwarded_for=mode)
    got = forwarded(p, backend, upgrade(X_Forwarded_For=came))
    assert got.get("X-Forwarded-For") == passed


def test_several_x_forwarded_for_lines_keep_their_order(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade(extra=["X-Forwarded-For: 203.0.113.9",
                                               "x-forwarded-for: 198.51.100.7"]))
    whole = ", ".join(got.all("X-Forwarded-For"))
    assert whole == "203.0.113.9, 198.51.100.7, 127.0.0.1"


def test_forged_x_real_ip_and_proto_are_replaced(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    got = forwarded(p, backend, upgrade(X_Real_IP="203.0.113.9", X_Forwarded_Proto="gopher"))
    assert got.get("X-Real-IP") == "127.0.0.1"
    assert got.get("X-Forwarded-Proto") == "https"


def test_off_adds_nothing_about_the_client(proxy, scripted):
    backend = scripted()
    p = proxy(backend, x_forwarded_for=OFF)
    got = forwarded(p, backend, upgrade())
    assert got.get("X-Real-IP") is None
    assert got.get("X-Forwarded-Proto") is None


def test_proto_of_a_plain_listener(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", WS)])
    assert forwarded(p, backend, upgrade()).get("X-Forwarded-Proto") == "http"


def test_address_of_an_ipv6_client(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=[("::1", "0", WSS)])
    got = forwarded(p, backend, upgrade())
    assert got.get("X-Forwarded-For") == got.get("X-Real-IP") == "::1"


def test_servers_see_the_forwarded_fields(proxy, server):
    p = proxy(server)

    async def fields():
        async with ws(p, "/headers", extra_headers={"X-Forwarded-For": "203.0.113.9"}) as client:
            return {n.lower(): v for n, v in json.loads(await client.recv())}
    seen = play(fields())
    assert seen["x-forwarded-for"] == "203.0.113.9, 127.0.0.1"
    assert seen["x-forwarded-proto"] == "https"
    assert seen["host"].startswith("example.test:")


# ---- what must wait for the 101 ----

def test_bytes_behind_the_head_wait_for_the_101(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = asking(p, backend, upgrade() + b"early")
    server.send(head("HTTP/1.1 103 Early Hints"))
    assert client.read_head().status == 103     # the proxy has had its turns
    client.send(b" and late")
    assert not server.has_input()
    server.send(switching())
    assert server.read(14) == b"early and late"


def test_many_bytes_behind_the_head_wait_and_arrive_whole(proxy, scripted):
    """More than any buffer of the proxy: the client is held, not cut off."""
    backend = scripted()
    p = proxy(backend)
    client = connect(p, kind=WSS)
    early = b"e" * 50000
    client.send(upgrade() + early)
    server = backend.accept()
    server.read_head()
    server.send(switching())
    assert server.read(len(early)) == early


def test_bytes_behind_the_head_of_a_refused_upgrade_never_arrive(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = asking(p, backend, upgrade() + upgrade("/admin") + b"\x81\x85mask.....")
    server.send(head("HTTP/1.1 403 Forbidden", {"Content-Length": "2"}) + b"no")
    assert client.read_head().status == 403
    assert client.read_to_end() == b"no"
    assert server.read_to_end() == b""
    assert backend.untouched()


# ---- responses ----

def test_fields_of_the_101_pass(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = asking(p, backend, upgrade(Sec_WebSocket_Protocol="chat"))
    lines = ["Sec-WebSocket-Protocol: chat", "Set-Cookie: a=1", "Set-Cookie: b=2",
             "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover"]
    server.send(switching(extra=lines))
    got = client.read_head()
    assert got.first == "HTTP/1.1 101 Switching Protocols"
    assert got.get("Connection").lower() == "upgrade"
    assert got.get("Upgrade").lower() == "websocket"
    assert got.get("Sec-WebSocket-Accept") == accept_of(KEY)
    assert got.get("Sec-WebSocket-Protocol") == "chat"
    assert got.all("Set-Cookie") == ["a=1", "b=2"]
    assert got.get("Sec-WebSocket-Extensions") == \
        "permessage-deflate; server_no_context_takeover"


def test_hop_by_hop_fields_of_the_101_are_removed(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    client.send(upgrade())
    backend.accept().send(switching(Connection="Upgrade, X-Hop", Keep_Alive="timeout=5",
                                    X_Hop="1"))
    got = client.read_head()
    assert got.get("Keep-Alive") is None
    assert got.get("X-Hop") is None


def test_bytes_behind_the_101_reach_the_client(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    client.send(upgrade())
    backend.accept().send(switching() + b"first words")
    assert client.read_head().status == 101
    assert client.read(11) == b"first words"


def test_node_and_python_agree_on_a_subprotocol(proxy, node_server):
    p = proxy(node_server())
    assert node_client(p, path="/sub", protocols=["other", "chat"])["protocol"] == "chat"
