"""The PROXY protocol towards backends: whom a connection is for, before anything else on it."""

import socket
import struct

import pytest

from harness import FORWARD, PATIENCE, WS, WSS, C, eventually
from more import (Nginx, Server, TlsServerStream, accepts, curl, key_of, need, pem,
                  server_context)
from peers import Stream, connect, play, switching, upgrade, ws

PLAIN = {"listeners": [("127.0.0.1", "0", WS)], "http": FORWARD}
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def header_of(stream):
    """Command, and the addresses and ports of both ends, as text; of LOCAL: none."""
    assert stream.read(12) == SIGNATURE
    command, family, length = struct.unpack(">BBH", stream.read(4))
    rest = stream.read(length) if length else b""
    if not rest:
        return command, family
    size, af = {0x11: (4, socket.AF_INET), 0x21: (16, socket.AF_INET6)}[family]
    assert len(rest) == 2 * size + 4
    ends = [socket.inet_ntop(af, rest[at:at + size]) for at in (0, size)]
    return command, *zip(ends, struct.unpack(">HH", rest[2 * size:]))


def ends_of(client):
    return client.sock.getsockname()[:2], client.sock.getpeername()[:2]


def told(p, backend):
    """A client, and what its backend was told before the request."""
    client = connect(p)
    client.send(upgrade())
    server = backend.accept()
    said = header_of(server)
    assert server.read_head().first == "GET / HTTP/1.1"
    server.send(switching())
    assert client.read_head().status == 101
    client.send(b"hello")
    assert server.read(5) == b"hello"
    return said, ends_of(client)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("kind", [WS, WSS])
def test_header_tells_both_ends(proxy, scripted, address, kind):
    backend = scripted()
    p = proxy(backend.entry(proxy=1), listeners=[(address, "0", kind)])
    (command, client, server), ends = told(p, backend)
    assert command == 0x21 and (client, server) == ends


def test_ipv4_on_a_dual_listener_is_ipv4(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(proxy=1), listeners=[("::", "0", WS)])
    client = Stream(socket.create_connection(("127.0.0.1", p.ports[0]), PATIENCE))
    client.send(upgrade())
    assert header_of(backend.accept()) == (0x21, *ends_of(client))


def test_none_without_it(proxy, scripted):
    backend = scripted()
    p = proxy(backend, **PLAIN)
    client = connect(p)
    client.send(upgrade())
    assert backend.accept().read_head().first == "GET / HTTP/1.1"


def test_next_backend_is_told_as_well(proxy, scripted, place):
    down, backend = place(), scripted()
    p = proxy(down.entry(proxy=1), backend.entry(proxy=1), **PLAIN)
    for _ in range(2):
        (command, client, _), ends = told(p, backend)
        assert command == 0x21 and client == ends[0]


def test_unix_socket(proxy, live_files):
    path = live_files / "backend"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    p = proxy({"host": f"unix:{path}", "proxy": 1}, **PLAIN)
    client = connect(p)
    client.send(upgrade())
    listener.settimeout(PATIENCE)
    sock = listener.accept()[0]
    listener.close()
    with sock, sock.makefile("rb") as stream:
        assert header_of(stream) == (0x21, *ends_of(client))
        assert stream.readline() == b"GET / HTTP/1.1\r\n"


def test_header_is_before_tls(proxy, scripted):
    backend = scripted()
    p = proxy(backend.entry(proxy=1, tls=C("TLS_NOVERIFY")), tls_backends=1, **PLAIN)
    client = connect(p)
    client.send(upgrade())
    sock = backend.listener.accept()[0]
    # not a byte of TLS may be taken from behind it
    first = b"".join(sock.recv(1) for _ in range(28))
    assert first[:12] == SIGNATURE and first[12:16] == b"\x21\x11\x00\x0c"
    server = TlsServerStream(sock, server_context())
    assert server.read_head().first == "GET / HTTP/1.1"


def test_checks_are_nobodys(proxy, scripted):
    backend = scripted()
    proxy(backend.entry(proxy=1), check_ms=50, **PLAIN)
    for _ in range(2):
        check = backend.accept()
        assert header_of(check) == (0x20, 0)
        assert check.read_to_end() == b""


# ---- servers that others wrote ----

class Haproxy(Server):
    """haproxy that expects the header at a place, says on / whom it was told of, and passes the
    rest to a server. Its log has each connection."""

    def __init__(self, place, folder, upstream, bind="accept-proxy"):
        self.place, self.name, self.entry = place, place.name, place.entry
        folder.mkdir(parents=True, exist_ok=True)
        facts = "%[src]:%[src_port] %[dst]:%[dst_port]"
        (folder / "haproxy.cfg").write_text(f"""
global
    log stdout format raw local0
defaults
    mode http
    log global
    log-format "said %ci:%cp term=%ts"
    error-log-format "failed %ci:%cp %[fc_err_str]"
    timeout connect 30s
    timeout client 60s
    timeout server 60s
frontend f
    bind {place.host}:{place.port} {bind}
    http-request return status 200 content-type text/plain lf-string "{facts}" if {{ path / }}
    default_backend b
backend b
    server s {upstream.host}:{upstream.port}
""")
        self.start([need("haproxy"), "-db", "-f", folder / "haproxy.cfg"])
        eventually(lambda: accepts(place) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.text


def whom(p):
    """What a server that says whom it was told of says to curl, and what is so."""
    said = curl(p, "/", "-w", " %{local_ip}:%{local_port} %{remote_ip}:%{remote_port}").stdout
    words = said.split()
    return words[:2], words[2:]


def test_haproxy(proxy, place, keeper, python_server, tmp_path):
    python = python_server()
    server = keeper(Haproxy(place(), tmp_path, python.place))
    p = proxy(server.entry(proxy=1), http=FORWARD)
    said, so = whom(p)
    assert said == so

    async def echo():
        async with ws(p, "/echo") as client:
            await client.send("hello")
            assert await client.recv() == "hello"
    play(echo())


def test_haproxy_with_tls(proxy, place, keeper, python_server, tmp_path):
    (tmp_path / "both.pem").write_bytes(pem("ec").read_bytes() + key_of("ec").read_bytes())
    server = keeper(Haproxy(place(), tmp_path, python_server().place,
                            f"accept-proxy ssl crt {tmp_path}/both.pem"))
    p = proxy(server.entry(proxy=1, tls=C("TLS_PIN"), ca=pem("ec")), tls_backends=1, http=FORWARD)
    said, so = whom(p)
    assert said == so


def test_haproxy_misses_no_header_of_checks(proxy, place, keeper, python_server, tmp_path):
    server = keeper(Haproxy(place(), tmp_path, python_server().place))
    p = proxy(server.entry(proxy=1), check_ms=20, http=FORWARD, listeners=[("127.0.0.1", "0", WS)])
    server.log.wait_text("^failed .* Success", nth=3)       # a connection, and nothing else
    said, so = whom(p)
    assert said == so
    missed = [line for line in server.log.all("failed") if "waiting for PROXY" in line.text]
    assert len(missed) == 1                                 # our own, see accepts()
    assert p.log.all("backend") == []


def test_nginx(proxy, place, keeper, tmp_path):
    server = keeper(Nginx(place(), tmp_path, listen="proxy_protocol", locations="""
        location = / {
            return 200 "$proxy_protocol_addr:$proxy_protocol_port \
$proxy_protocol_server_addr:$proxy_protocol_server_port";
        }"""))
    p = proxy(server.entry(proxy=1, tls=C("TLS_PIN"), ca=pem("ec")), tls_backends=1, http=FORWARD)
    said, so = whom(p)
    assert said == so
