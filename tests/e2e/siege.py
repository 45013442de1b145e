"""What abuse is done with: a client that forges TLS records, a canary that echoes meanwhile, and a
siege, which watches the proxy's memory and descriptors and wants them back."""

import collections
import hashlib
import hmac
import json
import struct
import subprocess
import sys
import threading

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import pki
from harness import BUILD, E2E, PATIENCE, SANITIZE, Log, eventually
from more import memory_peak_kb, memory_peak_reset
from peers import Stream, TlsStream, client_context, connect, open_tunnel, tcp, upgrade

TABLE = BUILD / ("abuse-sanitized.txt" if SANITIZE else "abuse.txt")

CHANGE_CIPHER, ALERT, HANDSHAKE, DATA = 20, 21, 22, 23

# Kilobytes that a second wave of the same attack may touch beyond the first: its sessions need not
# lie in the same slots of the tables. A leak would be more.
TOLERANCE = 512 if SANITIZE else 256


# ---- forged records ----

def prf(secret, label, seed, size):
    """P_SHA256 (RFC 5246 5)."""
    seed = label + seed
    out, a = b"", seed
    while len(out) < size:
        a = hmac.digest(secret, a, hashlib.sha256)
        out += hmac.digest(secret, a + seed, hashlib.sha256)
    return out[:size]


class Forger(TlsStream):
    """A TLS client that makes its records itself once the handshake is done, so that they can be
    such as no library sends."""

    def __init__(self, proxy, folder, source=None):
        context = client_context()
        context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        context.keylog_filename = folder / "keylog"
        self.heard = b""
        super().__init__(tcp(proxy, source=source).sock, context)
        # in the ServerHello, behind the headers of record and message, and the version
        server_random = self.heard[11:43]
        client_random, master = [
            bytes.fromhex(word) for line in (folder / "keylog").read_text().splitlines()
            if line.startswith("CLIENT_RANDOM") for word in line.split()[1:]][-2:]
        keys = prf(master, b"key expansion", server_random + client_random, 40)
        self.key, self.iv = AESGCM(keys[:16]), keys[32:36]
        self.number = 1         # 0 was the message Finished

    def hear(self):
        data = super().hear()
        self.heard = (self.heard + data)[:43]
        return data

    def record(self, kind, payload=b""):
        """One record, not sent yet (RFC 5288 3)."""
        number = struct.pack("!Q", self.number)
        self.number += 1
        sealed = number + self.key.encrypt(self.iv + number, payload, number + struct.pack(
            "!BBBH", kind, 3, 3, len(payload)))
        return struct.pack("!BBBH", kind, 3, 3, len(sealed)) + sealed

    def records(self, data):
        return b"".join(self.record(DATA, data[at:at + 16384])
                        for at in range(0, len(data), 16384))


# ---- the canary ----

class Canary:
    """canary.py, running."""

    def __init__(self, proxy, place):
        host, port = proxy.address()
        self.log = Log()
        self.process = subprocess.Popen(
            [sys.executable, E2E / "canary.py", host, str(port), place.host, place.port,
             pki.DIR / "ec256.pem"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        self.reader = threading.Thread(target=self.log.follow, args=(self.process.stdout,),
                                       daemon=True)
        self.reader.start()
        self._wait("ready", 1)

    def _wait(self, word, nth):
        __tracebackhide__ = True
        try:
            self.log.wait(word, nth=nth, seconds=4 * PATIENCE)
        except AssertionError:
            raise AssertionError(f"the canary is dead or starves:\n{self.log.text}") from None

    def beats(self, reports=4):
        """Waits until it has reported so many more times: it still sings, and time has passed."""
        __tracebackhide__ = True
        self._wait("beats", len(self.log.all("beats")) + reports)

    def stop(self):
        """What it measured; every echo must have come, and in order."""
        __tracebackhide__ = True
        self.process.stdin.close()
        code = self.process.wait(8 * PATIENCE)
        self.reader.join(PATIENCE)
        assert code == 0, f"the canary died:\n{self.log.text}"
        return json.loads(self.log.lines[-1].text)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.reader.join(PATIENCE)
        self.process.stdout.close()


# ---- the siege ----

def is_over(stream):
    """Whether the proxy has ended that connection; what else came is read and thrown away."""
    stream.sock.setblocking(False)
    try:
        while stream.sock.recv(1 << 18):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        if stream.sock.fileno() >= 0:
            stream.sock.settimeout(PATIENCE)


class Siege:
    """One proxy under attack. The attackers' requests go to `backend`, those of the canary and of
    newcomers to backends of their own."""

    def __init__(self, proxy, backend, canary, newcomers):
        self.p, self.backend, self.canary, self.newcomers = proxy, backend, canary, newcomers
        self.most = collections.Counter()
        self.attackers = 0

    def note(self):
        """Looks how much is in use."""
        self.most["fds"] = max(self.most["fds"], self.p.descriptors())
        self.most["sessions"] = max(self.most["sessions"], int(self.p.totals()["sessions"]))

    def tcp(self, **options):
        self.attackers += 1
        return tcp(self.p, **options)

    def connect(self, **options):
        self.attackers += 1
        return connect(self.p, **options)

    def tunnel(self, **options):
        self.attackers += 1
        return open_tunnel(self.p, self.backend, **options)

    def ended(self, streams):
        """Waits until the proxy has ended all of these."""
        __tracebackhide__ = True
        left = list(streams)

        def all_over():
            left[:] = [stream for stream in left if not is_over(stream)]
            return not left
        self.note()
        eventually(all_over, 4 * PATIENCE)

    def newcomer(self):
        """Somebody else can open a tunnel and use it."""
        __tracebackhide__ = True
        client, server = open_tunnel(self.p, self.newcomers, source=self.elsewhere(),
                                     request=upgrade("/newcomer"))
        server.send(b"welcome")
        assert client.read(7) == b"welcome"
        client.send(b"thanks")
        assert server.read(6) == b"thanks"
        client.close()
        server.close()

    def elsewhere(self):
        return None if ":" in self.p.address()[0] else "127.0.0.77"

    def gauges(self):
        """What is in use beside totals that only grow: descriptors, and what SIGUSR1 counts."""
        grow = {"opened", "rejected", "probes", "full", "rx", "tx", "log-lost"}
        return {"fds": self.p.descriptors(),
                **{k: int(v) for k, v in self.p.totals().items()
                   if v is not True and k not in grow}}

    def peace(self):
        """Waits until only the canary's session is left. It may hold a buffer at that moment."""
        __tracebackhide__ = True
        for stream in Stream.kept:
            stream.close()
        Stream.kept.clear()
        try:
            eventually(lambda: (g := self.gauges())["fds"] == self.baseline["fds"]
                       and g["sessions"] == 1 and all(v <= 1 for k, v in g.items() if k != "fds"),
                       2 * PATIENCE)
        except AssertionError:
            raise AssertionError(f"not given back: {self.gauges()}, was {self.baseline}") from None

    def endure(self, attack):
        """Two waves: the first touches the memory that the attack can touch, the second must find
        and leave all as the first did. A row of the table."""
        __tracebackhide__ = True
        self.newcomer()
        eventually(lambda: self.gauges()["sessions"] == 1)
        self.baseline = self.gauges()
        rss = [self.p.memory_kb("Rss")]
        for _ in range(2):
            self.attackers = 0
            memory_peak_reset(self.p)
            attack(self)
            self.note()
            peak = memory_peak_kb(self.p)
            self.peace()
            self.newcomer()
            self.peace()
            rss.append(self.p.memory_kb("Rss"))
        assert rss[2] - rss[1] <= TOLERANCE, f"memory grows: {rss}"
        canary = self.canary.stop()
        eventually(lambda: not any(v for k, v in self.gauges().items() if k != "fds"))
        return {"attackers": self.attackers, **canary, "rss": rss, "peak": peak,
                "fds": [self.baseline["fds"], self.most["fds"]],
                "sessions": self.most["sessions"]}


def table(rows):
    """What record_property("abuse") collected. Times are the canary's, for an echo: the worst of
    those before the attack (calm), then the 99th percentile and the worst."""
    width = max(len(row["name"]) for row in rows)
    form = "{:%d} {:>6} | {:>6} {:>6} {:>7} {:>7} | {:>6} {:>6} {:>6} {:>6} | {:>5} {:>5} | {:>8}\n" \
        % width
    text = [form.format("", "conns", "echoes", "calm", "p99", "worst", "RSS", "wave 1", "peak",
                        "wave 2", "fds", "most", "sessions"),
            form.format("", "", "", "ms", "ms", "ms", "KB", "KB", "KB", "KB", "", "", "most")]
    for row in sorted(rows, key=lambda row: row["name"]):
        ms = [f"{row[k] * 1000:.1f}" for k in ("calm", "p99", "worst")]
        before, first, second = row["rss"]
        text.append(form.format(row["name"], row["attackers"], row["beats"], *ms, before, first,
                                row["peak"], second, *row["fds"], row["sessions"]))
    return "".join(text)
