"""soak.py MINUTES BACKEND - many kinds of clients at once on one wssproxy, for long: tunnels whose
messages are numbered and compared with their echoes, pages up and down, clients that stall, leave
without a word or never get to the point; meanwhile backends freeze, die and come back, and
certificates change. Nothing may be lost or reordered but what a dead backend took with it, and
memory, descriptors and sessions have to be at the end what they were after the start.

The tunnels' backends are processes of tests/demo/backend.c, those of pages are in here. The load is
modest, so that both fit on one machine: what is looked for takes time, not force."""

import asyncio
import collections
import http.server
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import websockets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
import pki  # noqa: E402
from harness import BUILD, FORWARD, PATIENCE, WSS, Line, Log, Proxy  # noqa: E402
from peers import Place, Places, client_hello, connect, head, upgrade  # noqa: E402

TUNNELS, PAGES, STRANGERS = 32, 3, 2            # workers of each kind
ECHO_SERVERS = 3
RSS_SLACK = 256         # KB that may be touched after fill(): a set of buffers (100 KB) is held for a turn
NOISE = random.Random(1).randbytes(1 << 21)
CERTS = ["ec256", "ec384", "rsa2048"]
CONFIG = {"listeners": [("127.0.0.1", "0", WSS)], "http": FORWARD, "max_sessions": 64,
          "max_busy": 2, "max_per_ip": 0, "stall_ms": 60000, "fail_ms": 500, "linger_ms": 2000}


def slice_of(number, size):
    """The body of a message: `size` bytes of noise, from a place that its number says."""
    at = number * 7919 % (len(NOISE) - size)
    return NOISE[at:at + size]


# ---- the proxy's log, as it comes ----

class Follower(Log):
    """Keeps of each session no more than is needed, for there will be many, and nothing of those
    for pages, which may come from the port of a tunnel that has just ended."""

    def __init__(self):
        super().__init__()
        self.client_of = {}                     # id: client's address
        self.sessions = {}                      # client's address: its lines `open`, `close`
        self.counts = collections.Counter()
        self.totals = None

    def feed(self, text):
        line = Line(text)
        with self.news:
            self.counts[line.event] += 1
            if line.event == "open":
                if line["path"] == "/chat":
                    self.client_of[line["id"]] = line["client"]
                    self.sessions[line["client"]] = [line, None]
            elif line.event == "close":
                client = self.client_of.pop(line["id"], None)
                if client in self.sessions:
                    self.sessions[client][1] = line
            elif line.event == "reject":
                self.counts["reject " + line.fields.get("why", "suppressed")] += 1
            elif line.event == "stats":
                self.totals = line.fields if "rx" in line.fields else self.totals
            else:
                self.fed.append(line)
            self.news.notify_all()

    def session(self, client):
        """Its lines, once it is closed; forgets them."""
        with self.news:
            self.news.wait_for(lambda: self.sessions.get(client, (0, 0))[1], 2)
            return self.sessions.pop(client, (None, None))


# ---- backends ----

class EchoServer:
    """A backend that comes and goes, always at the same place."""

    def __init__(self, program, place):
        self.program, self.place, self.deaths = program, place, []
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [self.program, "-a", self.place.host, "-p", self.place.port],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout.readline().startswith(b"listen")

    def die(self):
        self.deaths.append(time.monotonic())
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.deaths.append(time.monotonic())

    def died_since(self, start):
        return any(death >= start for death in self.deaths)


class Pages(http.server.BaseHTTPRequestHandler):
    """GET /pages/N: N bytes. POST: how many bytes came, and their checksum."""

    protocol_version = "HTTP/1.1"

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        size = int(self.path.rpartition("/")[2])
        self.answer(slice_of(size, size))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"%d %d" % (len(body), zlib.crc32(body)))

    def log_message(self, *_):
        pass


# ---- clients ----

class Soak:
    def __init__(self, minutes, program):
        pki.make_all()
        places = Places(socket.AF_INET, "127.0.0.1")
        self.places = [Place("127.0.0.1", places.get(i)) for i in range(ECHO_SERVERS + 1)]
        self.echo = [EchoServer(program, place) for place in self.places[:-1]]
        self.of_name = {server.place.name: server for server in self.echo}
        pages = self.places[-1]
        self.pages = http.server.ThreadingHTTPServer((pages.host, int(pages.port)), Pages)
        threading.Thread(target=self.pages.serve_forever, daemon=True).start()
        self.folder = BUILD / "soak"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cert = -1
        self.change_certificate()
        self.log = Follower()
        self.proxy = Proxy({**CONFIG, "certs": [(None, self.folder / "cert.pem",
                                                 self.folder / "key.pem")],
                            "backends": [*(place.entry() for place in self.places[:-1]),
                                         pages.entry(path="/pages")]}, log=self.log)
        self.proxy.wait_ready()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for name in CERTS:
            self.context.load_verify_locations(pki.DIR / f"{name}.pem")
        self.seconds = minutes * 60
        self.faults = collections.defaultdict(list)
        self.done = collections.Counter()
        self.random = random.Random(os.urandom(8))
        self.stopping = asyncio.Event()

    def fault(self, kind, text):
        self.faults[kind].append(text)
        print(f"FAULT {kind}: {text}", flush=True)

    async def pause(self, seconds):
        """Less, when the time is over."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except asyncio.TimeoutError:
            pass

    # tunnels

    def size(self):
        kind = self.random.random()
        return self.random.randrange(200) if kind < 0.6 else self.random.randrange(20000) \
            if kind < 0.97 else self.random.randrange(400000)

    async def speak(self, ws, sent):
        """Numbered messages; now and then nothing for some time."""
        for number in range(self.random.randrange(1, 60)):
            if self.stopping.is_set():
                return
            body = slice_of(number * 31 + id(ws) % 1000, self.size())
            message = struct.pack("!II", number, zlib.crc32(body)) + body
            sent.append(message)
            await ws.send(message)
            self.done["messages"] += 1
            self.done["bytes"] += 2 * len(message)
            idle = self.random.random()
            await self.pause(self.random.expovariate(5) if idle < 0.95
                             else self.random.uniform(1, 8))

    async def listen(self, ws, sent):
        """Each echo has to be the next message that was sent. Sometimes it does not listen."""
        async for echo in ws:
            message = sent.popleft()
            if echo != message:
                self.fault("order", f"sent {message[:8]!r} ({len(message)} bytes), "
                           f"got {echo[:8]!r} ({len(echo)} bytes)")
            if self.random.random() < 0.003:
                self.done["stalls"] += 1
                await self.pause(self.random.uniform(1, 4))

    async def tunnel(self):
        """One session, and its end: clean, or not."""
        begin, client, sent = time.monotonic(), None, collections.deque()
        try:
            ws = await websockets.connect(
                f"wss://localhost:{self.port}/chat", host="127.0.0.1", ssl=self.context,
                ping_interval=None, open_timeout=PATIENCE, close_timeout=PATIENCE, max_size=None,
                max_queue=2, compression=None)
            client = "%s:%d" % ws.local_address
            self.done["tunnels"] += 1
            await self.converse(ws, sent)
        except (OSError, websockets.WebSocketException, asyncio.TimeoutError, EOFError) as error:
            await self.judge(begin, client, error)
        finally:
            if client:
                await self.line_of(client)

    async def converse(self, ws, sent):
        listener = asyncio.ensure_future(self.listen(ws, sent))
        try:
            await self.speak(ws, sent)
            if self.random.random() < 0.3:
                ws.transport.abort()
                self.done["aborts"] += 1
                return
            await self.till(lambda: not sent or listener.done())
            await ws.close()
            await listener
            if sent or ws.close_code != 1000:
                raise ConnectionError(f"closed by {ws.close_code}, {len(sent)} echoes missing")
        finally:
            for task in (listener, ws.transfer_data_task):
                task.cancel()
            await asyncio.gather(listener, ws.wait_closed(), return_exceptions=True)

    async def till(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def line_of(self, client):
        return await asyncio.get_running_loop().run_in_executor(None, self.log.session, client)

    async def judge(self, begin, client, error):
        """A session ended as it should not. The death of its backend excuses it, and of any one
        while it was not open yet."""
        opened, closed = await self.line_of(client) if client else (None, None)
        dead = [self.of_name[opened["backend"]]] if opened else self.echo
        if any(server.died_since(begin - 0.1) for server in dead):
            self.done["excused"] += 1
        else:
            self.fault("lost", f"{error!r}; {opened} ... {closed}")

    # pages

    async def request(self, data):
        """The answer's head and body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context,
                                                       server_hostname="localhost")
        try:
            writer.write(data)
            await writer.drain()
            answer, _, body = (await asyncio.wait_for(reader.read(-1), PATIENCE)) \
                .partition(b"\r\n\r\n")
            return answer, body, writer.get_extra_info("peercert")
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def page(self):
        size = self.size() * 2
        body = slice_of(size, size)
        if self.random.random() < 0.5:
            sent, wanted = head(f"GET /pages/{size} HTTP/1.1", {"Host": "localhost"}), body
        else:
            sent = head("POST /pages HTTP/1.1",
                        {"Host": "localhost", "Content-Length": size}) + body
            wanted = b"%d %d" % (size, zlib.crc32(body))
        answer, got, _ = await self.request(sent)
        if not answer.startswith(b"HTTP/1.1 200 ") or got != wanted:
            self.fault("pages", f"{sent[:30]!r}: {answer[:40]!r} and {len(got)} bytes")
        self.done["pages"] += 1
        await self.pause(self.random.expovariate(3))

    # those who come for nothing

    async def stranger(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        hello = client_hello()
        writer.write(self.random.choice([b"", hello[:self.random.randrange(len(hello))], hello,
                                         self.random.randbytes(300), b"GET / HTTP/1.1\r\n\r\n"]))
        await self.pause(self.random.uniform(0, 2))
        writer.transport.abort()
        self.done["strangers"] += 1

    # what happens to the others meanwhile

    def change_certificate(self):
        self.cert = (self.cert + 1) % len(CERTS)
        for source, name in ((f"{CERTS[self.cert]}.key", "key.pem"),
                             (f"{CERTS[self.cert]}.pem", "cert.pem")):
            shutil.copy(pki.DIR / source, self.folder / f"{name}.new")
            (self.folder / f"{name}.new").rename(self.folder / name)

    async def reload(self):
        """Another certificate, which the next client has to see; sometimes a broken one, which none
        may see."""
        await self.pause(self.random.uniform(3, 9))
        before = len(self.log.lines)
        broken = self.random.random() < 0.25
        if broken:
            (self.folder / "cert.pem").write_text("no certificate\n")
        else:
            self.change_certificate()
        self.proxy.signal(signal.SIGHUP)
        said = "reload failed" if broken else "reload ok"
        await self.till(lambda: any(line.text.startswith(said) for line in self.log.lines[before:]))
        _, _, shown = await self.request(head("GET /pages/1 HTTP/1.1", {"Host": "localhost"}))
        name = dict(part[0] for part in shown["subject"])["commonName"]
        if name != CERTS[self.cert]:
            self.fault("reloads", f"after '{said}': shows {name}, not {CERTS[self.cert]}")
        if broken:
            self.cert -= 1
            self.change_certificate()
        self.done["reloads"] += 1

    async def trouble(self):
        """A backend freezes for a moment, or dies and comes back."""
        await self.pause(self.random.uniform(3, 12))
        server = self.random.choice(self.echo)
        if self.random.random() < 0.5:
            server.process.send_signal(signal.SIGSTOP)
            await self.pause(self.random.uniform(0.2, 2))
            server.process.send_signal(signal.SIGCONT)
            self.done["freezes"] += 1
        else:
            server.die()
            await self.pause(self.random.uniform(0.2, 3))
            server.start()
            self.done["deaths"] += 1

    # all of it

    async def again_and_again(self, job, kind):
        while not self.stopping.is_set():
            try:
                await job()
            except Exception as error:      # whatever it is, the others go on
                self.fault(kind, f"{job.__name__}: {error!r}")
                await asyncio.sleep(0.1)

    async def look(self):
        """What is in use now."""
        self.log.totals = None
        self.proxy.signal(signal.SIGUSR1)
        await self.till(lambda: self.log.totals)
        t = self.log.totals
        return {"rss": self.proxy.memory_kb("Rss"), "fds": self.proxy.descriptors(),
                **{k: int(v) for k, v in t.items() if v is not True}}

    async def watch(self):
        """A line a minute."""
        start = time.monotonic()
        for minute in range(1, int(self.seconds // 60) + 1):
            await self.pause(start + 60 * minute - time.monotonic())
            use, d = await self.look(), self.done
            print(f"minute {minute}: tunnels={d['tunnels']} aborted={d['aborts']} "
                  f"messages={d['messages']} MB={d['bytes'] >> 20} stalls={d['stalls']} "
                  f"pages={d['pages']} strangers={d['strangers']} reloads={d['reloads']} "
                  f"freezes={d['freezes']} deaths={d['deaths']} lost-to-deaths={d['excused']} "
                  f"| rss={use['rss']}KB fds={use['fds']} "
                  f"sessions={use['sessions']} faults={sum(map(len, self.faults.values()))}",
                  flush=True)

    def fill(self):
        """Uses all that the proxy has, at once: sessions, buffers and both rings of keys. What is
        touched for the first time later would look like growth."""
        for n in range(2):
            self.proxy.signal(signal.SIGHUP)
            self.log.wait("reload", nth=n + 1)
        frame = b"\x82\xfe\x3f\x00" + bytes(4 + 0x3f00)

        def ask(client):
            client.send(b"\n")
            assert client.read_head().status == 101

        busy = []
        for n in range(2 * CONFIG["max_busy"]):         # places of long heads
            busy.append(connect(self.proxy))
            busy[n].send(upgrade(X="x" * 7500)[:-1])
        for client in busy:
            ask(client)
        others = []
        for _ in range(CONFIG["max_sessions"] - len(busy)):
            others.append(connect(self.proxy))
            others[-1].send(upgrade())
            others[-1].read_head()
        for client in busy:
            # an echo while the next record is half there
            client.sock.sendall(client.records(frame) + client.records(frame)[:-1])
            client.read(4 + 0x3f00)
        for client in busy + others:
            client.close()

    async def quiet(self):
        """What is in use when all clients have left and the proxy has noticed."""
        deadline, use = time.monotonic() + PATIENCE, await self.look()
        while use["sessions"] and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            use = await self.look()
        return use

    async def run(self):
        self.port = self.proxy.address()[1]
        self.fill()
        before = await self.quiet()
        jobs = [(self.tunnel, "lost")] * TUNNELS + [(self.page, "pages")] * PAGES \
            + [(self.stranger, "strangers")] * STRANGERS \
            + [(self.reload, "reloads"), (self.trouble, "trouble")]
        tasks = [asyncio.ensure_future(self.again_and_again(*job)) for job in jobs]
        watch = asyncio.ensure_future(self.watch())
        await asyncio.sleep(self.seconds)
        self.stopping.set()
        await asyncio.gather(*tasks, watch)
        return before, await self.quiet()

    def close(self):
        for server in self.echo:
            server.process.kill()
            server.process.wait()
        self.pages.shutdown()


def main():
    soak = Soak(float(sys.argv[1]), sys.argv[2])
    try:
        before, after = asyncio.run(soak.run())
        died = soak.proxy.faults()
    finally:
        soak.close()
        soak.proxy.process.kill()
    done, faults, log = soak.done, soak.faults, soak.log
    gauges = {k: v for k, v in after.items()
              if k not in ("rss", "fds", "opened", "rejected", "probes", "full", "rx", "tx", "log-lost")}
    held = {
        f"{done['messages']} messages came back whole and in order": not faults["order"],
        f"{done['tunnels']} tunnels: none lost but {done['excused']} with their backend":
            not faults["lost"] and done["tunnels"] > 0,
        f"{done['pages']} pages went up or down whole": not faults["pages"] and done["pages"] > 0,
        f"{done['reloads']} reloads of certificates": not faults["reloads"] and done["reloads"] > 0,
        f"{done['deaths']} deaths and {done['freezes']} freezes of backends":
            not faults["trouble"] and done["deaths"] + done["freezes"] > 0,
        f"{done['strangers']} strangers": not faults["strangers"] and done["strangers"] > 0,
        f"all was given back: {gauges}": not any(gauges.values()),
        f"descriptors: {before['fds']} before, {after['fds']} after": before["fds"] == after["fds"],
        f"resident memory: {before['rss']} KB before, {after['rss']} KB after":
            after["rss"] - before["rss"] <= RSS_SLACK,
        f"the log has a line for each of {after['opened']} sessions": after["log-lost"] == 0
            and after["opened"] == log.counts["open"] == log.counts["close"],
        f"the proxy ended in order {died}": not died,
    }
    for what, good in held.items():
        print("ok    " if good else "FAILED", what)
    print(f"{sum(held.values())} passed, {len(held) - sum(held.values())} failed")
    return not all(held.values())


if __name__ == "__main__":
    sys.exit(main())
