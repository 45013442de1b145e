"""What the tests of TLS backends, plain requests, balancing and names need beside harness and
peers: a certificate authority, real servers that others wrote, a namespace with our own files."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

import pytest

import pki
from harness import BUILD, E2E, PATIENCE, WSS, C, Log, eventually
from peers import NODE, Stream, TlsStream, client_context, connect, head

TLS_OFF, TLS_VERIFY, TLS_PIN, TLS_NOVERIFY = map(
    C, ("TLS_OFF", "TLS_VERIFY", "TLS_PIN", "TLS_NOVERIFY"))
LEAST_CONN, STICKY_COOKIE = C("LEAST_CONN"), C("STICKY_COOKIE")
JS = E2E / "node" / "more"


# ---- certificates ----
#
# Each line: name of the files, key, who signs (None: itself), common name, what else.

AUTHORITY = "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign,cRLSign"
SERVER_NAMES = "DNS:backend.test,DNS:localhost,DNS:server01,DNS:server02,DNS:server03"
CERTIFICATES = [
    # those that sign: for servers, an intermediate, one that nobody trusts, for clients
    ("ca", "ec", None, "the authority", AUTHORITY, None),
    ("ca-rsa", "rsa", None, "the RSA authority", AUTHORITY, None),
    ("between", "ec", "ca", "between", AUTHORITY, None),
    ("stranger", "ec", None, "the authority", AUTHORITY, None),
    ("client-ca", "ec", None, "clients", AUTHORITY, None),
    # backends
    ("ec", "ec", "ca", "backend.test", SERVER_NAMES, None),
    ("rsa", "rsa", "ca-rsa", "backend.test", SERVER_NAMES, None),
    ("leaf", "ec", "between", "backend.test", SERVER_NAMES, None),
    ("expired", "ec", "ca", "backend.test", SERVER_NAMES, ("20200101", "20210101")),
    ("early", "ec", "ca", "backend.test", SERVER_NAMES, ("20450101", "20490101")),
    ("of-1970", "ec", "ca", "backend.test", SERVER_NAMES, ("19690101", "19720101")),
    ("wrong-name", "ec", "ca", "other.test", "DNS:other.test", None),
    ("critical", "ec", "ca", "backend.test",
     f"subjectAltName={SERVER_NAMES}\n1.2.3.4=critical,DER:0500", None),
    ("not-ca", "ec", "ca", "between", "basicConstraints=critical,CA:FALSE", None),
    ("by-no-ca", "ec", "not-ca", "backend.test", SERVER_NAMES, None),
    ("p521", "p521", "ca", "backend.test", SERVER_NAMES, None),
    ("ed25519", "ed25519", "ca", "backend.test", SERVER_NAMES, None),
    ("odd-root", "ed25519", None, "Odd Root", AUTHORITY, None),
    ("unknown-ca", "ec", "stranger", "backend.test", SERVER_NAMES, None),
    ("self-signed", "ec", None, "backend.test", SERVER_NAMES, None),
    ("self-signed-rsa", "rsa", None, "backend.test", SERVER_NAMES, None),
    # clients
    ("client-ec", "ec", "client-ca", "gateway 7", "", None),
    ("client-rsa", "rsa", "client-ca", "gateway 8", "", None),
    ("client-stranger", "ec", "stranger", "gateway 9", "", None),
    ("client-expired", "ec", "client-ca", "gateway 10", "", ("20200101", "20210101")),
    ("client-early", "ec", "client-ca", "gateway 11", "", ("20450101", "20490101")),
    ("client-key-usage", "ec", "client-ca", "gateway 12", "keyUsage=critical,keyAgreement", None),
    # the proxy's own
    ("a.example", "ec", "ca", "a.example", "DNS:a.example", None),
    ("a.example-rsa", "rsa", "ca-rsa", "a.example", "DNS:a.example", None),
    ("wild", "ec", "ca", "any of b.example", "DNS:*.b.example", None),
    ("default", "ec", "ca", "default", "DNS:default.example", None),
]
# From before BUILD_TIME, for the device whose clock says 1970, and for whatever ours says.
VALID = ("20000101", "20440101")
PKI = BUILD / "pki-more"


def openssl(*args):
    result = subprocess.run(["openssl", *map(str, args)], capture_output=True, text=True, cwd=PKI)
    assert result.returncode == 0, result.stderr


def issue(name, key, issuer, common_name, extensions, dates):
    kind = {"ec": ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            "p521": ["EC", "-pkeyopt", "ec_paramgen_curve:P-521"], "ed25519": ["ED25519"],
            "rsa": ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"]}[key]
    openssl("genpkey", "-algorithm", *kind, "-out", f"{name}.key")
    openssl("req", "-new", "-utf8", "-key", f"{name}.key", "-subj", f"/CN={common_name}",
            "-out", f"{name}.csr")
    if extensions.startswith("DNS:"):
        extensions = f"subjectAltName={extensions}"
    (PKI / "ca.conf").write_text(
        "[ca]\ndefault_ca=own\n[own]\ndatabase=index\nrand_serial=yes\nnew_certs_dir=issued\n"
        f"default_md={'default' if key == 'ed25519' and issuer is None else 'sha256'}\npolicy=any\nunique_subject=no\nx509_extensions=ext\n"
        f"[any]\ncommonName=supplied\n[ext]\n{extensions}\n")
    (PKI / "index").write_text("")
    start, end = dates or VALID
    signer = ["-selfsign", "-keyfile", f"{name}.key"] if issuer is None else \
        ["-cert", f"{issuer}.pem", "-keyfile", f"{issuer}.key"]
    openssl("ca", "-batch", "-notext", "-config", "ca.conf", "-in", f"{name}.csr",
            "-out", f"{name}.pem", "-startdate", f"{start}000000Z", "-enddate", f"{end}000000Z",
            *signer)


@functools.cache
def certificates():
    """The folder with all of them; made once."""
    recipe = json.dumps([CERTIFICATES, VALID])
    with open(BUILD / "pki-more.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = PKI / "done"
        if not done.exists() or done.read_text() != recipe \
                or not pki.is_recent(done):
            shutil.rmtree(PKI, ignore_errors=True)
            (PKI / "issued").mkdir(parents=True)
            for line in CERTIFICATES:
                issue(*line)
            (PKI / "leaf-chain.pem").write_text(
                (PKI / "leaf.pem").read_text() + (PKI / "between.pem").read_text())
            (PKI / "leaf-disorder.pem").write_text("".join(
                (PKI / f"{name}.pem").read_text() for name in ("leaf", "ca", "between")))
            (PKI / "by-no-ca-chain.pem").write_text(
                (PKI / "by-no-ca.pem").read_text() + (PKI / "not-ca.pem").read_text())
            (PKI / "cas-odd.pem").write_text("".join(
                (PKI / f"{name}.pem").read_text() for name in ("ca", "odd-root", "ca-rsa")))
            (PKI / "client-cas-odd.pem").write_text("".join(
                (PKI / f"{name}.pem").read_text() for name in ("odd-root", "client-ca")))
            (PKI / "cas.pem").write_text(
                (PKI / "ca.pem").read_text() + (PKI / "ca-rsa.pem").read_text())
            # the same key in another certificate
            (PKI / "renewed.key").write_text((PKI / "self-signed.key").read_text())
            openssl("req", "-x509", "-key", "renewed.key", "-subj", "/CN=renewed", "-days", 3650,
                    "-out", "renewed.pem")
            for path in PKI.glob("*.*"):
                path.chmod(0o644)
            done.write_text(recipe)
    return PKI


def pem(name):
    return certificates() / f"{name}.pem"


def key_of(name):
    return certificates() / f"{name}.key"


def showing(name=None):
    """A client that shows the certificate of that name, or none."""
    context = client_context()
    if name:
        context.load_cert_chain(pem(name), key_of(name))
    return context


def identity(name):
    """.cert and .key of a backend's entry."""
    return {"cert": pem(name), "key": key_of(name)}


# ---- TLS servers that others wrote ----

def need(program):
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"needs {program}, see PACKAGES.more")
    return path


def accepts(place):
    try:
        socket.create_connection((place.host, int(place.port)), PATIENCE).close()
        return True
    except ConnectionRefusedError:
        return False


class Server:
    """A server process; what it prints is a log to wait on."""

    def start(self, command, **popen):
        self.log = Log()
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)
        self.reader = threading.Thread(target=self.log.follow, args=(self.process.stdout,),
                                       daemon=True)
        self.reader.start()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.reader.join(PATIENCE)
        self.process.stdout.close()


class Nginx(Server):
    """nginx with TLS at a place. `certificate` is of certificates(); `client_ca`: asks for client
    certificates and requires them. What it knows of each request is a line 'request' of its log.
    `upstream`: a server (by its place) that it passes everything to, WebSockets too."""

    FACTS = ("reused=$ssl_session_reused verify=$ssl_client_verify sni=$ssl_server_name "
             "tls=$ssl_protocol cipher=$ssl_cipher method=$request_method uri=$request_uri "
             "status=$status host=$http_host forwarded=$http_x_forwarded_for "
             "length=$content_length")

    def __init__(self, place, folder, certificate="ec", key=None, chain=None, client_ca=None,
                 upstream=None, protocols="TLSv1.2 TLSv1.3", more="", locations="", files=None,
                 listen=""):
        self.place, self.name, self.entry = place, place.name, place.entry
        folder.mkdir(parents=True, exist_ok=True)
        client = f"ssl_client_certificate {pem(client_ca)}; ssl_verify_client on;" \
            if client_ca else ""
        passing = "" if upstream is None else f"""
            proxy_pass http://{upstream.host}:{upstream.port};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header Host $http_host;
            proxy_set_header X-Client-Verify $ssl_client_verify;
            proxy_set_header X-Client-DN $ssl_client_s_dn;
            proxy_buffering off; proxy_request_buffering off;"""
        (folder / "nginx.conf").write_text(f"""
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
    map $http_upgrade $connection_upgrade {{ default upgrade; "" close; }}
    log_format facts 'request {self.FACTS}';
    access_log /dev/stdout facts;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0; proxy_read_timeout 300s;
    server {{
        listen {place.host}:{place.port} ssl {listen};
        ssl_certificate {chain or pem(certificate)};
        ssl_certificate_key {key_of(key or certificate)};
        ssl_protocols {protocols};
        ssl_session_cache shared:tls:1m;
        {client} {more}
        root {files or folder};
        {locations}
        location / {{ {passing or "return 200 'from nginx';"} }}
    }}
}}
""")
        self.start([need("nginx"), "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"])
        eventually(lambda: accepts(place) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.text

    def requests(self, n):
        """The lines of all its requests, once there are n. (It writes them behind its answers.)"""
        __tracebackhide__ = True
        if n:
            self.log.wait("request", nth=n)
        return self.log.all("request")


class NodeHttps(Server):
    """node/more/https.js: what it does is written there. It prints 'ready' and lines of facts."""

    def __init__(self, place, certificate="ec", client_ca=None, refuse=True, **options):
        self.place, self.name, self.entry = place, place.name, place.entry
        orders = {"host": place.host, "port": int(place.port), "cert": str(pem(certificate)),
                  "key": str(key_of(certificate)), "refuse": refuse,
                  "clientCa": str(pem(client_ca)) if client_ca else None, **options}
        self.start([need("node"), JS / "https.js", json.dumps(orders)], env=NODE)
        self.log.wait("ready")


class OpensslServer(Server):
    """openssl s_server with arguments of the test's; it answers each GET with a page of facts."""

    def __init__(self, place, certificate, *args):
        self.place, self.name, self.entry = place, place.name, place.entry
        self.start(["openssl", "s_server", "-accept", f"{place.host}:{place.port}", "-www",
                    "-cert", pem(certificate), "-key", key_of(certificate), *args])
        self.log.wait("ACCEPT")


# ---- a TLS backend that the test plays itself ----

class TlsServerStream(TlsStream):
    """The server's end of a TLS connection."""

    def __init__(self, sock, context):
        Stream.__init__(self, sock)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.saw_close_notify = False
        self._until_done(self.tls.do_handshake)


def server_context(certificate="ec"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem(certificate), key_of(certificate))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


class ScriptedTls:
    """peers.Scripted, with TLS."""

    def __init__(self, scripted, context=None):
        self.scripted, self.context = scripted, context or server_context()
        self.place, self.name, self.entry = scripted.place, scripted.name, scripted.entry

    def accept(self):
        return TlsServerStream(self.scripted.listener.accept()[0], self.context)


def idle_cpu(p, seconds=0.5):
    """CPU seconds that it burns while nothing happens."""
    before = p.cpu_seconds()
    threading.Event().wait(seconds)
    return p.cpu_seconds() - before


# ---- requests that are no upgrade ----

def request(target="/", method="GET", body=None, version="HTTP/1.1", extra=(), **fields):
    """A request with Host, the last of its connection; Some_Field=value adds a field or replaces
    one, None takes it away."""
    named = {"Host": "example.test", "Connection": "close"}
    if body is not None:
        named["Content-Length"] = str(len(body))
    named.update((k.replace("_", "-"), v) for k, v in fields.items())
    return head(f"{method} {target} {version}", named, extra) + (body or b"")


def answer(status="200 OK", body=None, extra=(), **fields):
    named = {} if body is None else {"Content-Length": str(len(body))}
    named.update((k.replace("_", "-"), v) for k, v in fields.items())
    return head(f"HTTP/1.1 {status}", named, extra) + (body or b"")


def asks_before(backend):
    """Has a client ask for a page first, which that scripted backend serves."""
    def ask_before(client):
        client.send(request("/before", Connection=None))
        server = backend.accept()
        assert server.read_head().first == "GET /before HTTP/1.1"
        server.send(answer(body=b"before"))
        assert client.read_head().status == 200
        assert client.read(6) == b"before"
        assert server.read_to_end() == b""
        server.close()
    return ask_before


def exchange(p, backend, sent, answered, kind=None):
    """One request through the proxy: what the backend got, what the client got: head and body."""
    client = connect(p, kind)
    client.send(sent)
    server = backend.accept()
    got = server.read_head()
    length = int(got.get("Content-Length") or 0)
    body = server.read(length) if length else b""
    server.send(answered)
    server.close()
    answered = client.read_head(), client.read_to_end()
    client.close()
    return (got, body), answered


def curl(p, path, *args, host="localhost", text=True, ca=None, kind=None, **options):
    """curl, to the first listener (of that kind), which it knows as `host`."""
    address, port = p.address(kind)
    scheme = "https" if p.kind(kind) == WSS else "http"
    command = [need("curl"), "-sS", "--http1.1", "--noproxy", "*", "--max-time", str(6 * PATIENCE),
               "--cacert", ca or pki.DIR / "ec256.pem",
               "--connect-to", f"{host}:{port}:{address}:{port}",
               *args, f"{scheme}://{host}:{port}{path}"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=text,
                          timeout=7 * PATIENCE, **options)


# ---- Node packages that Debian lacks ----

@functools.cache
def npm_modules():
    """Folder of the packages that package-lock.json names, installed once."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, for socket.io")
    folder = BUILD / "npm"
    wanted = (JS / "package-lock.json").read_text()
    with open(BUILD / "npm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists() or done.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(JS / name, folder)
            result = subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                                    cwd=folder, capture_output=True, text=True)
            if result.returncode != 0:
                pytest.skip(f"npm ci could not install socket.io: {result.stderr[-300:]}")
            done.write_text(wanted)
    return folder / "node_modules"


# ---- a namespace of mounts, with files of ours in /etc ----

@functools.cache
def unshare():
    """The command that begins one: as root, or as root of a user namespace."""
    if shutil.which("unshare"):
        for options in (["-m"], ["-rm"]):
            probe = subprocess.run(["unshare", *options, "mount", "-t", "tmpfs", "none", "/mnt"],
                                   capture_output=True)
            if probe.returncode == 0:
                return ["unshare", *options]
    pytest.skip("needs a mount namespace: root, or unprivileged user namespaces")


class Etc:
    """Files that a process in its own mount namespace finds in /etc; they may change while it
    runs. (Written in place: a bind mount is of the inode.)"""

    PATHS = {"hosts": "/etc/hosts", "resolv": "/etc/resolv.conf", "nsswitch": "/etc/nsswitch.conf",
             "passwd": "/etc/passwd", "group": "/etc/group",
             "authorities": "/etc/ssl/certs/ca-certificates.crt"}

    def __init__(self, folder, **files):
        self.folder = folder
        for name, text in files.items():
            self.write(name, text)
        self.names = list(files)

    def write(self, name, text):
        (self.folder / f"etc-{name}").write_text(text)

    def wrapper(self):
        """The command line to run a program by. nscd, which reads files of its own, is out of reach."""
        steps = ["{ [ ! -d /run/nscd ] || mount -t tmpfs none /run/nscd; }"]
        for name in self.names:
            if not Path(self.PATHS[name]).exists():
                pytest.skip(f"needs a {self.PATHS[name]} to put another in its place")
            steps.append(f"mount --bind {shlex.quote(str(self.folder / f'etc-{name}'))} "
                         f'"$(realpath {self.PATHS[name]})"')
        return [*unshare(), "sh", "-c", " && ".join([*steps, 'exec "$0" "$@"'])]


FILES_ONLY = "hosts: files\n"       # nsswitch.conf: no DNS
LOCALHOST = "127.0.0.1 localhost\n"


class NameServer:
    """A DNS server on a loopback address of its own. It takes questions, and answers none until it is
    told what to say."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.address = self._bind()
        self.asked = threading.Event()
        self.questions = []
        self.answer = None
        self.given = set()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _bind(self):
        for n in range(1, 255):
            address = f"127.53.{os.getpid() & 255}.{n}"
            try:
                self.socket.bind((address, 53))
                return address
            except PermissionError:
                pytest.skip("needs root, for port 53")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        pytest.skip("needs port 53, which somebody has for all addresses")

    def etc(self, folder, options):
        """The files of a program that asks this one, and no other."""
        return Etc(folder, hosts=LOCALHOST, nsswitch="hosts: files dns\n",
                   resolv=f"nameserver {self.address}\noptions {options}\n")

    def _serve(self):
        while True:
            query, client = self.socket.recvfrom(512)
            if not query:
                return
            self.questions.append((query, client))
            self.asked.set()
            if self.answer:
                self._reply(query, client)

    def answer_all(self, address):
        """The questions that hang, and those to come."""
        self.answer = address
        for question in list(self.questions):
            self._reply(*question)

    def _reply(self, query, client):
        """The address for A, no data for all else."""
        end = query.index(b"\0", 12) + 5
        is_a = query[end - 4:end - 2] == b"\0\1"
        reply = query[:2] + b"\x81\x80\0\1" + struct.pack(">H", is_a) + bytes(4) + query[12:end]
        if is_a:
            reply += b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(self.answer)
        self.socket.sendto(reply, client)
        self.given.add(self.answer)

    def close(self):
        self.socket.sendto(b"", self.socket.getsockname())
        self.thread.join(PATIENCE)
        self.socket.close()


# ---- processes ----

def status_of(pid):
    """What the kernel says of it: key, list of words."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


def children_of(pid):
    """By looking at all processes, for few kernels have a list of them."""
    children = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if status_of(path.name)["PPid"] == [str(pid)]:
                children.append(int(path.name))
    return children


# ---- memory ----

def memory_peak_kb(p):
    """The most that was resident since memory_peak_reset()."""
    status = Path(f"/proc/{p.pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+)", status, re.M)[1])


def memory_peak_reset(p):
    Path(f"/proc/{p.pid}/clear_refs").write_text("5")


# ---- TLS by hand ----

def record(content, payload):
    return bytes([content, 3, 3]) + len(payload).to_bytes(2, "big") + payload


def message(kind, body):
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


def certificate_message(name):
    """A chain of one (RFC 5246 7.4.2)."""
    der = ssl.PEM_cert_to_DER_cert(pem(name).read_text())
    one = len(der).to_bytes(3, "big") + der
    return message(11, len(one).to_bytes(3, "big") + one)


def interrupted(p, stream, chain, by):
    """Its chain in two records, and between them a ChangeCipherSpec; BearSSL ignores an empty one
    before there is a key, and then nothing of the chain may be forgotten."""
    for part in record(22, chain[:200]), record(20, by), record(22, chain[200:]):
        with contextlib.suppress(ConnectionError):
            stream.send(part)
        p.totals()
        p.totals()
