"""Applications that others wrote, whole: pages, assets, a login, streams, polling and WebSockets
through one port."""

import http.client
import json
import os
import socket
import subprocess
import threading
from http import HTTPStatus

import pytest
import websockets

import pki
from harness import FORWARD, IP_HASH, PATIENCE, ROUND_ROBIN, WSS
from more import JS, STICKY_COOKIE, Server, curl, need, npm_modules, request
from peers import NODE, PythonServer, ask, client_context, connect, pattern, play, upgrade, ws

CONFIG = {"http": FORWARD, "listeners": [("127.0.0.1", "0", WSS)]}


class NodeApp(Server):
    """One of node/more's programs."""

    def __init__(self, script, place, *args, env=NODE):
        self.place, self.name, self.entry = place, place.name, place.entry
        self.start([need("node"), JS / script, place.host, place.port, *args], env=env)
        self.log.wait("ready")


# ---- Express with ws ----

@pytest.fixture
def app(place, keeper):
    return keeper(NodeApp("app.js", place()))


@pytest.fixture
def site(proxy, app):
    return proxy(app, **CONFIG)


def test_express_page(site):
    result = curl(site, "/", "-w", " %{http_code} %{content_type}")
    assert result.stdout.endswith("Hello 200 text/html; charset=utf-8"), result.stderr


def test_express_asset_is_not_sent_twice(site, tmp_path):
    tag = tmp_path / "etag"
    first = curl(site, "/static/app.js", "--etag-save", tag)
    again = curl(site, "/static/app.js", "--etag-compare", tag, "-w", "%{http_code}")
    assert first.stdout == '"use strict";'
    assert again.stdout == "304", again.stderr


def test_express_head(site):
    result = curl(site, "/static/app.js", "-I")
    assert "HTTP/1.1 200 OK" in result.stdout and "Content-Length: 13" in result.stdout


def test_express_404(site):
    assert curl(site, "/nowhere", "-o", "/dev/null", "-w", "%{http_code}").stdout == "404"


def test_express_knows_client_and_scheme(site):
    """By X-Forwarded-For and X-Forwarded-Proto, as 'trust proxy' reads them."""
    info = json.loads(curl(site, "/info").stdout)
    assert info == {"ip": "127.0.0.1", "ips": ["127.0.0.1"], "secure": True, "protocol": "https",
                    "hostname": "localhost"}


def test_express_login_leads_to_the_home_page(site, tmp_path):
    result = curl(site, "/login", "-L", "-c", tmp_path / "jar", "-d", "user=me&password=right")
    assert result.stdout == "welcome home", result.stderr


def test_express_login_with_a_wrong_password(site):
    result = curl(site, "/login", "-d", "password=wrong", "-w", " %{http_code}")
    assert result.stdout == "wrong password 401"


@pytest.mark.parametrize("size", [1000, 5_000_000])
def test_express_upload_of_a_form(site, tmp_path, size):
    (tmp_path / "file").write_bytes(pattern(size))
    result = curl(site, "/upload", "-F", f"file=@{tmp_path / 'file'}")
    seen = json.loads(result.stdout)
    assert size < seen["size"] < size + 1000
    assert seen["type"].startswith("multipart/form-data")


def test_express_upload_of_a_stream(site, tmp_path):
    """curl does not know how long its input is, and sends chunks."""
    (tmp_path / "file").write_bytes(pattern(3_000_000))
    with open(tmp_path / "file", "rb") as file:
        result = curl(site, "/upload", "-X", "POST", "-T", "-", stdin=file)
    assert json.loads(result.stdout)["size"] == 3_000_000, result.stderr


def test_express_upload_by_a_node_client(site):
    """Node's http sends chunks wherever it is not told a length."""
    script = """
        const request = require('https').request({ host: '127.0.0.1', port: process.argv[1],
            path: '/upload', method: 'POST', rejectUnauthorized: false, agent: false }, (response) =>
            response.pipe(process.stdout));
        for (let n = 0; n < 100; n++)
            request.write('x'.repeat(1000));
        request.end();"""
    result = subprocess.run([need("node"), "-e", script, str(site.address()[1])], text=True,
                            capture_output=True, timeout=4 * PATIENCE, env=NODE)
    assert json.loads(result.stdout)["size"] == 100_000, result.stderr


# ---- clients that ask again on the same connection ----

def connections(site):
    """Which of them have asked, by the ids in the log."""
    return {line["id"].partition(".")[0] for line in site.log.all("open")}


def test_curl_asks_again(site):
    other = f"https://localhost:{site.address()[1]}/info"
    result = curl(site, "/", "-w", "\n%{num_connects} ", other, other, "-o", "/dev/null",
                  "-o", "/dev/null", "-o", "/dev/null")
    assert result.stdout.split() == ["1", "0", "0"], result.stderr
    assert site.log.wait("open", id="1.3")["path"] == "/"


def test_python_asks_again(site):
    host, port = site.address()
    client = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE,
                                         context=client_context())
    client._create_connection = lambda address, *rest: socket.create_connection((host, port))
    for n in range(5):
        client.request("GET", "/static/app.js")
        assert client.getresponse().read() == b'"use strict";'
        client.request("POST", "/upload", iter([b"x" * 100] * n), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})
        assert json.loads(client.getresponse().read())["size"] == 100 * n
        client.request("HEAD", "/static/app.js")
        assert client.getresponse().read() == b""
    assert site.log.wait("open", id="1.15")
    assert connections(site) == {"1"}


def test_node_asks_again(site):
    """By an agent with keepAlive. (Of the body of a DELETE Node says nothing unless it is told.)"""
    script = """
        const https = require('https');
        const agent = new https.Agent({ keepAlive: true, maxSockets: 1 });
        const port = process.argv[1];
        const ask = (method, path, body) => new Promise((done, failed) => {
            const request = https.request({ host: '127.0.0.1', port, path, method, agent,
                rejectUnauthorized: false,
                headers: body ? { 'Transfer-Encoding': 'chunked' } : {} }, (response) => response.on('data', () => {})
                .on('end', () => done([response.statusCode, request.reusedSocket])));
            request.on('error', failed);
            if (body) request.write(body);
            request.end();
        });
        (async () => {
            const seen = [];
            for (const [method, path, body] of [['GET', '/'], ['POST', '/upload', 'x'],
                    ['GET', '/nowhere'], ['DELETE', '/', 'x'], ['GET', '/info']])
                seen.push(await ask(method, path, body));
            console.log(JSON.stringify(seen));
            agent.destroy();
        })();"""
    result = subprocess.run([need("node"), "-e", script, str(site.address()[1])], text=True,
                            capture_output=True, timeout=4 * PATIENCE, env=NODE)
    assert json.loads(result.stdout) == [[200, False], [200, True], [404, True], [404, True],
                                         [200, True]], result.stderr
    site.log.wait("open", id="1.5")
    assert connections(site) == {"1"}


def test_express_events_come_as_they_happen(site, app):
    """The stream has no end, so whoever collects it first would deliver nothing."""
    client = connect(site)
    client.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = client.read_head()
    assert head.get("Content-Type") == "text/event-stream"
    client.read_until(b"data: tick 0\n\n")
    for n in (1, 2):
        curl(site, "/tick", "-d", "")
        client.read_until(b"data: tick %d\n\n" % n)
    client.close()
    app.log.wait("listener")


def test_ws_beside_express_with_the_cookie_of_its_login(site):
    async def chat():
        async with ws(site, "/chat", extra_headers={"Cookie": "session=42"}) as client:
            for message in ("hello", b"\0" * 100_000, "ü" * 50_000):
                await client.send(message)
                assert await client.recv() == message
            await client.send("/close")
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            return client.close_code, client.close_reason
    assert play(chat()) == (4001, "as you wish")


def test_ws_beside_express_without_the_cookie(site):
    async def chat():
        async with ws(site, "/chat"):
            pass
    with pytest.raises(websockets.InvalidStatusCode) as refusal:
        play(chat())
    assert refusal.value.status_code == 401


def test_many_pages_and_sockets_at_once(site):
    results = []

    def fetch():
        results.append(curl(site, "/").stdout[-5:])
    jobs = [threading.Thread(target=fetch) for _ in range(10)]
    for job in jobs:
        job.start()

    async def chat():
        async with ws(site, "/chat", extra_headers={"Cookie": "session=42"}) as client:
            for n in range(50):
                await client.send(str(n))
                assert await client.recv() == str(n)
    play(chat())
    for job in jobs:
        job.join(PATIENCE)
    assert results == ["Hello"] * 10


# ---- websockets, with a page ----

PAGE = b"<!DOCTYPE html><title>by websockets</title>"


async def page_or_socket(path, headers):
    """What the library calls before each handshake."""
    if path == "/":
        return HTTPStatus.OK, [("Content-Type", "text/html")], PAGE
    if path == "/favicon.ico":
        return HTTPStatus.NOT_FOUND, [], b""
    return None


@pytest.fixture
def websockets_site(proxy, place, keeper):
    server = keeper(PythonServer(place(), process_request=page_or_socket))
    return proxy(server, **CONFIG)


def test_websockets_page(websockets_site):
    result = curl(websockets_site, "/", "-w", " %{http_code}", text=False)
    assert result.stdout == PAGE + b" 200", result.stderr


def test_websockets_missing_page(websockets_site):
    assert curl(websockets_site, "/favicon.ico", "-w", "%{http_code}").stdout == "404"


def test_websockets_socket_beside_its_page(websockets_site):
    async def echo():
        async with ws(websockets_site, "/echo") as client:
            await client.send("hello")
            assert await client.recv() == "hello"
    play(echo())


# ---- socket.io ----

@pytest.fixture
def chat_servers(place, keeper):
    """Two socket.io servers that know nothing of each other."""
    env = {**NODE, "NODE_PATH": str(npm_modules())}
    return [keeper(NodeApp("socketio.js", place(), name, env=env)) for name in ("one", "two")]


def socket_io(p, source=None, transports=("polling", "websocket"), messages=10):
    host, port = p.address()
    orders = {"url": f"https://localhost:{port}/", "ca": str(pki.DIR / "ec256.pem"),
              "from": source, "transports": transports, "messages": messages,
              "upgrade": "websocket" in transports, "patience": PATIENCE}
    result = subprocess.run([need("node"), JS / "socketio-client.js"], input=json.dumps(orders),
                            capture_output=True, text=True, timeout=4 * PATIENCE,
                            env={**os.environ, "NODE_PATH": str(npm_modules()),
                                 "NODE_OPTIONS": "--dns-result-order=ipv4first"})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(seen, first, last):
    assert "error" not in seen, seen
    assert (seen["first"], seen["last"]) == (first, last)
    assert seen["same"] is True and len(seen["names"]) == 1
    return seen["names"][0]


@pytest.mark.parametrize("balance", [IP_HASH, STICKY_COOKIE])
def test_socket_io_polls_first_and_then_upgrades(proxy, chat_servers, balance):
    p = proxy(*chat_servers, balance=balance, **CONFIG)
    name = check(socket_io(p), "polling", "websocket")
    server = chat_servers[("one", "two").index(name)]
    server.log.wait("connection", transport="polling")
    server.log.wait("upgrade", transport="websocket")


@pytest.mark.parametrize("balance", [IP_HASH, STICKY_COOKIE])
def test_socket_io_by_polling_alone(proxy, chat_servers, balance):
    p = proxy(*chat_servers, balance=balance, **CONFIG)
    check(socket_io(p, transports=["polling"]), "polling", "polling")


def test_socket_io_by_websocket_alone_needs_no_stickiness(proxy, chat_servers):
    p = proxy(*chat_servers, balance=ROUND_ROBIN, **CONFIG)
    check(socket_io(p, transports=["websocket"]), "websocket", "websocket")


@pytest.mark.parametrize("balance", [IP_HASH, STICKY_COOKIE])
def test_socket_io_clients_share_both_servers(proxy, chat_servers, balance):
    p = proxy(*chat_servers, balance=balance, **CONFIG)
    seen, names = [], set()

    def client(source):
        seen.append(socket_io(p, source, messages=4))
    jobs = [threading.Thread(target=client, args=(f"127.0.0.{n}",)) for n in range(2, 14)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(4 * PATIENCE)
    for one in seen:
        names.add(check(one, "polling", "websocket"))
    assert len(seen) == 12 and names == {"one", "two"}


@pytest.mark.parametrize("balance", [ROUND_ROBIN, STICKY_COOKIE])
def test_socket_io_that_drops_an_upgrade_stays_in_use(proxy, chat_servers, balance):
    """It ends those on a path that it does not serve after a second, without a byte."""
    p = proxy(*chat_servers, balance=balance, fail_ms=600000, **CONFIG)
    polling = request("/socket.io/?EIO=4&transport=polling")
    cookie = ask(p, polling)[0].get("Set-Cookie")
    strangers = [connect(p) for _ in range(4)]
    for stranger in strangers:
        stranger.send(upgrade("/nowhere"))
    for stranger in strangers:
        assert stranger.read_head().status == 502
    assert not p.log.all("backend")
    if cookie:
        polling = request("/socket.io/?EIO=4&transport=polling", Cookie=cookie.partition(";")[0])
    for _ in range(4):
        assert ask(p, polling)[0].status == 200
    seen = {line["backend"] for line in p.log.all("open")}
    assert len(seen) == (1 if cookie else 2)


def test_socket_io_polling_fails_without_stickiness(proxy, chat_servers):
    """So the tests above could."""
    p = proxy(*chat_servers, balance=ROUND_ROBIN, **CONFIG)
    assert "error" in socket_io(p, transports=["polling"])
