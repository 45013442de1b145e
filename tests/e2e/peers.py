"""The two ends that wssproxy stands between: byte streams that tests script line by line, and
WebSocket servers and clients that others wrote."""

import asyncio
import base64
import hashlib
import json
import os
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

import websockets

import pki
from harness import BUILD, E2E, PATIENCE, WORKER, WSS

KEY = "dGhlIHNhbXBsZSBub25jZQ=="                    # of RFC 6455
UPGRADE = {"Host": "example.test", "Connection": "Upgrade", "Upgrade": "websocket",
           "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": KEY}
NODE = {**os.environ, "NODE_PATH": "/usr/share/nodejs"}


# ---- HTTP heads ----

def head(first, fields=(), extra=()):
    """A head: first line, fields as a dict (None leaves one out), further lines as they are."""
    lines = [f"{k}: {v}" for k, v in dict(fields).items() if v is not None]
    text = "\r\n".join([first, *lines, *extra, "", ""])
    return text.encode("latin-1")


def upgrade(target="/", method="GET", version="HTTP/1.1", extra=(), **fields):
    """A WebSocket upgrade; Some_Field=value replaces one of its fields, or adds one."""
    changed = {k.replace("_", "-"): v for k, v in fields.items()}
    return head(f"{method} {target} {version}", {**UPGRADE, **changed}, extra)


def accept_of(key):
    digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return base64.b64encode(digest).decode()


def switching(key=KEY, extra=(), **fields):
    """The 101 that answers an upgrade; Some_Field=value as above."""
    changed = {k.replace("_", "-"): v for k, v in fields.items()}
    return head("HTTP/1.1 101 Switching Protocols",
                {"Upgrade": "websocket", "Connection": "Upgrade",
                 "Sec-WebSocket-Accept": accept_of(key), **changed}, extra)


class Head:
    """A head as it was received."""

    def __init__(self, raw):
        self.raw = raw
        self.first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        self.fields = [(n, v.strip(" \t")) for n, _, v in (line.partition(":") for line in lines)]

    def all(self, name):
        return [v for n, v in self.fields if n.lower() == name.lower()]

    def get(self, name):
        """The value of a field that is there once, None when it is not there."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    @property
    def status(self):
        return int(self.first.split()[1])


# ---- streams ----

class Stream:
    """A connected socket with deadlines, and what was read ahead of need."""

    kept = []       # or those that a test does not name would be closed when it least expects it

    def __init__(self, sock):
        self.kept.append(self)
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ahead = b""

    def send(self, data):
        self.sock.sendall(data)

    def receive(self):
        """Some bytes, or b'' at the end."""
        if self.ahead:
            data, self.ahead = self.ahead, b""
            return data
        return self._receive()

    def _receive(self):
        return self.sock.recv(1 << 18)

    def read_until(self, mark):
        data = b""
        while mark not in data:
            more = self.receive()
            assert more, f"ended before {mark!r}, after {data!r}"
            data += more
        end = data.index(mark) + len(mark)
        self.ahead = data[end:]
        return data[:end]

    def read(self, n):
        parts, size = [], 0
        while size < n:
            more = self.receive()
            assert more, f"ended after {size} of {n} bytes"
            parts.append(more)
            size += len(more)
        data = b"".join(parts)
        self.ahead = data[n:]
        return data[:n]

    def read_to_end(self):
        return b"".join(iter(self.receive, b""))

    def read_head(self):
        return Head(self.read_until(b"\r\n\r\n"))

    def has_input(self):
        """Whether bytes, or an end, have arrived already; waits for nothing."""
        if self.ahead:
            return True
        self.sock.setblocking(False)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
            return True
        except BlockingIOError:
            return False
        finally:
            self.sock.settimeout(PATIENCE)

    def half_close(self):
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class TlsStream(Stream):
    """TLS over a socket, with the records in our hands: they can be split, and the ways in which
    a session ends can be told apart."""

    lock = threading.RLock()    # OpenSSL's objects are not for two threads at once

    def __init__(self, sock, context, name="localhost", session=None):
        super().__init__(sock)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name,
                                    session=session)
        self.saw_close_notify = False
        self._until_done(self.tls.do_handshake)

    def _until_done(self, step):
        while True:
            try:
                with self.lock:
                    return step()
            except ssl.SSLWantReadError:
                self.flush()
                data = self.hear()
                with self.lock:
                    if data:
                        self.incoming.write(data)
                    else:
                        self.incoming.write_eof()
            finally:
                self.flush()

    def hear(self):
        return self.sock.recv(1 << 18)

    def flush(self):
        with self.lock:
            data = self.outgoing.read()
        if data:
            self.sock.sendall(data)

    def records(self, data):
        """The records of that data, not sent yet."""
        with self.lock:
            if data:
                self.tls.write(data)
            return self.outgoing.read()

    def send(self, data):
        for at in range(0, len(data), 1 << 18):
            self.sock.sendall(self.records(data[at:at + (1 << 18)]))

    def _receive(self):
        try:
            data = self._until_done(lambda: self.tls.read(1 << 18))
        except ssl.SSLZeroReturnError:      # when our own close_notify went before
            data = b""
        except ssl.SSLError as error:
            if error.reason != "UNEXPECTED_EOF_WHILE_READING":
                raise
            return b""
        self.saw_close_notify = not data
        return data

    def close_notify(self):
        """Sends it, and does not wait for the answer."""
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        self.flush()


def client_context(trust="ec256", versions=(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2)):
    """Verifies the certificate of that name; trust None: anyone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF    # an end without close_notify is told apart
    context.minimum_version, context.maximum_version = versions
    if trust:
        context.load_verify_locations(pki.DIR / f"{trust}.pem")
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def client_hello():
    """The first record of a handshake."""
    outgoing = ssl.MemoryBIO()
    tls = client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()


def tcp(proxy, kind=None, source=None):
    """A bare TCP connection to a listener, from that address."""
    return Stream(socket.create_connection(proxy.address(kind), PATIENCE,
                                           source and (source, 0)))


def connect(proxy, kind=None, source=None, context=None, **tls):
    """A client of the first listener (of that kind): TLS when it is a WSS one; with proxy.before, it
    has asked already."""
    stream = tcp(proxy, kind, source)
    if proxy.kind(kind) == WSS:
        stream = TlsStream(stream.sock, context or client_context(), **tls)
    if proxy.before:
        proxy.before(stream)
    return stream


def ask(proxy, request, kind=None):
    """Sends a request, reads all that comes; the head of the answer and what followed it."""
    with connect(proxy, kind) as client:
        client.send(request)
        answer = client.read_head()
        return answer, client.read_to_end()


def asking(proxy, backend, request, kind=None):
    """A client that has sent a request, and its backend's end, which has read the head."""
    client = connect(proxy, kind)
    client.send(request)
    server = backend.accept()
    server.read_head()
    return client, server


def open_tunnel(proxy, backend, kind=None, request=None, **options):
    """A client and the backend's end of its tunnel."""
    client = connect(proxy, kind, **options)
    return client, tunnel_on(client, backend, request)


def tunnel_on(client, backend, request=None):
    """The backend's end of a tunnel of a client that is connected."""
    client.send(request or upgrade())
    server = backend.accept()
    server.read_head()
    server.send(switching())
    assert client.read_head().status == 101
    return server


def pattern(n, seed=1):
    """n bytes in which no shift or swap goes unnoticed."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest()
                    for i in range(n // 32 + 1))[:n]


# ---- backends ----

class Places:
    """Addresses for backends. The kernel chooses the ports; they stay reserved (bound, never
    listening, so a connection is refused) while the tests run, and the next run takes the same
    ones if they are free: tests with equal configurations share a binary."""

    def __init__(self, family, address):
        self.family, self.address = family, address
        self.file = BUILD / f"ports-{WORKER}-{family.name}"
        self.kept = [int(n) for n in self.file.read_text().split()] if self.file.exists() else []
        self.held = []

    def get(self, index):
        while len(self.held) <= index:
            self.held.append(self._reserve(len(self.held)))
            ports = [h.getsockname()[1] for h in self.held]
            self.file.write_text(" ".join(map(str, ports + self.kept[len(ports):])))
        return self.held[index].getsockname()[1]

    def _reserve(self, index):
        for port in [*self.kept[index:index + 1], 0]:
            holder = socket.socket(self.family)
            try:
                holder.bind((self.address, port))
                # only now: nobody else may hold it, but our backends may bind it too
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                return holder
            except OSError:
                holder.close()
        raise OSError("no free port")


class Place:
    """Where a backend is, or could be."""

    def __init__(self, host, port):
        self.host, self.port = host, str(port)
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def entry(self, **more):
        return {"host": self.host, "port": self.port, **more}

    def listen(self, backlog=1024):
        listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, int(self.port)))
        listener.listen(backlog)
        listener.settimeout(PATIENCE)
        return listener


class Scripted:
    """A backend that the test plays itself, connection by connection."""

    def __init__(self, place, backlog=1024):
        self.place, self.name, self.entry = place, place.name, place.entry
        self.listener = place.listen(backlog)

    def accept(self):
        return Stream(self.listener.accept()[0])

    def untouched(self):
        """Whether nobody has connected since the last accept()."""
        self.listener.setblocking(False)
        try:
            self.listener.accept()[0].close()
            return False
        except BlockingIOError:
            return True
        finally:
            self.listener.settimeout(PATIENCE)

    def close(self):
        self.listener.close()


class PythonServer:
    """The websockets library as a backend. What it does depends on the path: /headers sends what
    it was asked as JSON, /ping says when its ping was answered, /close/4001 closes with that
    code, all echo."""

    def __init__(self, place, **options):
        self.place, self.name, self.entry = place, place.name, place.entry
        self.listener = place.listen()
        self.options = {"max_size": None, "ping_interval": None, **options}
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self.ready.wait(PATIENCE)

    async def _serve(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.closed = asyncio.Queue()
        async with websockets.serve(self._handle, sock=self.listener, **self.options):
            self.ready.set()
            await self.stop.wait()

    async def _handle(self, ws):
        try:
            await self._play(ws)
        except websockets.ConnectionClosed:
            pass
        finally:
            await ws.wait_closed()
            self.closed.put_nowait((ws.close_code, ws.close_reason))

    async def _play(self, ws):
        if ws.path == "/headers":
            await ws.send(json.dumps(list(ws.request_headers.raw_items())))
        if ws.path == "/ping":
            await (await ws.ping(b"are you there?"))
            await ws.send("pong seen")
        if ws.path.startswith("/close/"):
            await ws.close(int(ws.path.split("/")[2]), "as you wish")
        async for message in ws:
            await ws.send(message)

    def next_closed(self):
        """Code and reason that the next session to end was closed with."""
        return asyncio.run_coroutine_threadsafe(self.closed.get(), self.loop).result(PATIENCE)

    def close(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join(PATIENCE)


class NodeServer:
    """The ws library as a backend, with the same paths."""

    def __init__(self, place):
        self.place, self.name, self.entry = place, place.name, place.entry
        self.process = subprocess.Popen(["node", E2E / "node" / "server.js", place.host,
                                         place.port], stdout=subprocess.PIPE, text=True, env=NODE)
        assert self.process.stdout.readline() == "ready\n"

    def next_closed(self):
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


# ---- clients ----

def play(coroutine, seconds=4 * PATIENCE):
    """Runs an asynchronous client to its end."""
    async def within():
        return await asyncio.wait_for(coroutine, seconds)
    return asyncio.run(within())


def ws(proxy, path="/", kind=None, source=None, **options):
    """A client by the websockets library, to be used with 'async with'."""
    host, port = proxy.address(kind)
    secure = proxy.kind(kind) == WSS
    options = {"max_size": None, "ping_interval": None, "open_timeout": PATIENCE,
               "close_timeout": PATIENCE, **options}
    if secure:
        options.setdefault("ssl", client_context())
        options.setdefault("server_hostname", "localhost")
    if source:
        options["local_addr"] = (source, 0)
    return websockets.connect(f"{'wss' if secure else 'ws'}://example.test:{port}{path}",
                              host=host, port=port, **options)


def node_client(proxy, kind=None, **orders):
    """Has Node's ws play what node/client.js describes; returns what it saw."""
    host, port = proxy.address(kind)
    scheme = "wss" if proxy.kind(kind) == WSS else "ws"
    orders = {"url": f"{scheme}://localhost:{port}{orders.pop('path', '/')}", "host": host,
              "ca": str(Path(pki.DIR / "ec256.pem")), "patience": PATIENCE, **orders}
    result = subprocess.run(["node", E2E / "node" / "client.js"], input=json.dumps(orders),
                            capture_output=True, text=True, env=NODE, timeout=4 * PATIENCE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
