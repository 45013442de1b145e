"""Hellos that come anew or with a session, from clients of three libraries: which protocols and what
name they ask for decides whether they are served, resumed or refused."""

import socket
import ssl
import subprocess
import threading

import pytest

from conftest import certificate
from gnutls import GnutlsClient, GnutlsError
from harness import FORWARD, PATIENCE, SANITIZE, C
from peers import TlsStream, client_context, connect, head

GET = head("GET / HTTP/1.1", {"Host": "localhost", "Connection": "close"})
SUITES = [C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
          C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA")]
LACKING = {120}         # no_application_protocol
BROKEN = {50}            # decode_error

HTTP11 = b"\x00\x10\x00\x0b\x00\x09\x08http/1.1"
H2_AND_HTTP11 = b"\x00\x10\x00\x0e\x00\x0c\x02h2\x08http/1.1"
H2 = b"\x00\x10\x00\x05\x00\x03\x02h2"
PADDING = b"\xaa\xaa\x00\x05....."

# what the client asks for, as what the hello says it then, and the alerts that may answer it
PROTOCOLS = {
    "none": ([], None, {None}),
    "http": (["http/1.1"], None, {None}),
    "h2": (["h2"], None, LACKING),
    "both": (["h2", "http/1.1"], None, {None}),
    "other": (["acme-tls/1", "http/1.0"], None, LACKING),
    "empty": (["http/1.1"], b"\x00\x10\x00\x02\x00\x00" + PADDING, LACKING),
    "twice": (["h2", "http/1.1"], H2 + H2, LACKING),
    "past-end": (["http/1.1"], HTTP11.replace(b"\x08http", b"\x09http"), BROKEN),
    "behind": (["http/1.1"], HTTP11.replace(b"\x00\x09\x08", b"\x00\x08\x07"), BROKEN),
}
NAMES = {"unnamed": None, "right": "localhost", "dot": "localhost.", "other-name": "b.example"}
VERSIONS = {"1.0": ssl.TLSVersion.TLSv1, "1.1": ssl.TLSVersion.TLSv1_1,
            "1.2": ssl.TLSVersion.TLSv1_2}
VISITS = [("1.2", name) for name in NAMES] + [("1.0", "right"), ("1.1", "right")]
if SANITIZE:            # where the fuzz target `resume` goes through names of all kinds
    VISITS = [("1.2", "right")]


class Between:
    """A relay for one connection after the other. It changes hellos, and sees whether the proxy
    answers with an alert: that is in the clear."""

    def __init__(self, proxy):
        self.target = proxy.address()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.change = (b"", b"")
        self.alert = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            with client, socket.create_connection(self.target, PATIENCE) as server:
                client.settimeout(PATIENCE)
                self._relay(client, server)

    def _relay(self, client, server):
        with client.makefile("rb") as records:
            header = records.read(5)
            hello = header + records.read(int.from_bytes(header[3:], "big"))
            old, new = self.change
            assert not old or hello.count(old) == 1
            server.sendall(hello.replace(old, new) if old else hello)
            up = threading.Thread(target=self._copy, args=(records.read1, server))
            up.start()
            first = server.recv(7, socket.MSG_WAITALL)
            if first[:1] == b"\x15":
                self.alert = first[6]
            client.sendall(first)
            self._copy(server.recv, client)
            up.join()

    @staticmethod
    def _copy(read, to):
        try:
            for data in iter(lambda: read(1 << 16), b""):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Openssl:
    """Each client asks once for each call, offers its last session, and says what came."""

    def __init__(self, version, folder):
        self.options = {"1.0": "-tls1", "1.1": "-tls1_1", "1.2": "-tls1_2"}[version]
        self.session = folder / "session.pem"

    def ask(self, port, name, protocols):
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", self.options,
                   "-no_ticket", "-cipher", "ALL:@SECLEVEL=0", "-ign_eof", "-quiet",
                   "-sess_out", self.session]
        command += ["-servername", name] if name else ["-noservername"]
        command += ["-alpn", ",".join(protocols)] if protocols else []
        command += ["-sess_in", self.session] if self.session.exists() else []
        return subprocess.run(command, input=GET, capture_output=True, timeout=PATIENCE).stdout


class Gnutls:
    def __init__(self, version, _):
        self.version = version
        self.session = None

    def ask(self, port, name, protocols):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            try:
                client = GnutlsClient(sock, self.version, name, protocols, self.session)
            except GnutlsError:
                return b""
            self.session = client.session_data()
            client.send(GET)
            answer = b"".join(iter(client.receive, b""))
            client.close()
            return answer


class Python:
    def __init__(self, version, _):
        self.context = client_context(None, (VERSIONS[version], VERSIONS[version]))
        self.context.options |= ssl.OP_NO_TICKET
        self.context.set_ciphers("ALL:@SECLEVEL=0")
        self.session = None

    def ask(self, port, name, protocols):
        if protocols:
            self.context.set_alpn_protocols(protocols)
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            try:
                client = TlsStream(sock, self.context, name, self.session)
            except ssl.SSLError:
                return b""
            self.session = client.tls.session
            client.send(GET)
            return client.read_to_end()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
@pytest.mark.parametrize("version, name", VISITS)
@pytest.mark.parametrize("wish", PROTOCOLS)
@pytest.mark.parametrize("again", [False, True], ids=["full", "resumed"])
@pytest.mark.parametrize("kind", [Openssl, Gnutls, Python])
def test_hello(proxy, python_server, keeper, tmp_path, kind, again, wish, version, name):
    p = proxy(python_server(), http=FORWARD, tls_min=C("BR_TLS10"), ciphers=SUITES, certs=[
        certificate("ec256"), certificate("ec384", server_name="b.example")])
    protocols, said, alerts = PROTOCOLS[wish]
    between = keeper(Between(p))
    client = kind(version, tmp_path)
    if again:
        assert client.ask(between.port, "localhost", []).startswith(b"HTTP/1.1 ")
    if said:
        between.change = (H2_AND_HTTP11 if "h2" in protocols else HTTP11, said)
    answer = client.ask(between.port, NAMES[name], protocols)
    assert between.alert in alerts
    if between.alert:
        assert answer == b""
        p.log.wait("reject")
        assert len(p.log.all("open")) == again
    else:
        assert answer.startswith(b"HTTP/1.1 ")
        line = p.log.wait("open", nth=1 + again)
        assert line["tls"] == version
        if name != "dot":
            assert line["resumed"] == str(int(again and name == "right"))
    assert serves(p)


def serves(p):
    client = connect(p)
    client.send(GET)
    return client.read_head().status > 0


def test_two_commands_do_not_end_the_process(proxy, place, tmp_path):
    p = proxy(place())
    host, port = p.address()
    session = tmp_path / "s.pem"
    command = f"openssl s_client -connect {host}:{port} -tls1_2 -no_ticket"
    first = subprocess.run(f"{command} -sess_out {session} </dev/null", shell=True,
                           capture_output=True, timeout=PATIENCE)
    assert b"\nNew, TLSv1.2," in first.stdout
    second = subprocess.run(f"{command} -sess_in {session} -alpn h2 </dev/null", shell=True,
                            capture_output=True, timeout=PATIENCE)
    assert b"SSL alert number 120" in second.stderr
    assert serves(p)
