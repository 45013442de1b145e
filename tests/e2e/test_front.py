"""What clients meet: certificates by name, client certificates, redirects, origins,
X-Forwarded-For, old TLS."""

import shutil
import signal
import socket
import ssl
import subprocess
from threading import Thread

import pytest

from conftest import certificate, whole_config
from harness import (APPEND, FORWARD, OFF, PATIENCE, REDIRECT, REFUSE, REPLACE, WS, WSS, C,
                     run_once)
from more import (answer, certificate_message, curl, exchange, interrupted, key_of, pem, request,
                  showing)
from peers import (TlsStream, ask, asking, client_context, client_hello, connect, open_tunnel,
                   switching, tcp, upgrade)

BOTH = [("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)]


def entry(server_name, name):
    return (server_name, pem(name), key_of(name))


def subject(stream):
    """Common name of the certificate that was shown."""
    certificate = ssl.DER_cert_to_PEM_cert(stream.tls.getpeercert(True))
    text = subprocess.run(["openssl", "x509", "-noout", "-subject", "-nameopt", "multiline"],
                          input=certificate, capture_output=True, text=True, check=True).stdout
    return text.rpartition("= ")[2].strip()


def key_kind(stream):
    certificate = ssl.DER_cert_to_PEM_cert(stream.tls.getpeercert(True))
    text = subprocess.run(["openssl", "x509", "-noout", "-text"], input=certificate,
                          capture_output=True, text=True, check=True).stdout
    return "rsa" if "rsaEncryption" in text else "ec"


def hello(p, name, context=None):
    """A TLS session that asked for that server name."""
    return connect(p, context=context or client_context(None), name=name)


# ---- certificates by server name ----

def certs():
    return [entry("a.example", "a.example"), entry("*.b.example", "wild"), entry(None, "default")]


@pytest.mark.parametrize("name, shown", [
    ("a.example", "a.example"), ("A.Example", "a.example"),
    ("x.b.example", "any of b.example"), ("X.B.EXAMPLE", "any of b.example"),
    ("b.example", "default"), ("y.x.b.example", "default"), ("xb.example", "default"),
    ("a.example.org", "default"), ("b.a.example", "default"), ("other.test", "default"),
    (None, "default")])
def test_certificate_by_server_name(proxy, place, name, shown):
    p = proxy(place(), certs=certs())
    assert subject(hello(p, name)) == shown


def test_clients_verify_what_they_are_shown(proxy, scripted):
    backend = scripted()
    p = proxy(backend, certs=certs(), http=FORWARD)
    context = ssl.create_default_context(cafile=pem("ca"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    for name in ("a.example", "x.b.example", "default.example"):
        client = hello(p, name, context)
        client.send(request())
        server = backend.accept()
        server.read_head()
        server.send(answer(body=b"page"))
        assert client.read_head().status == 200


def test_order_of_the_entries_does_not_matter(proxy, place):
    p = proxy(place(), certs=list(reversed(certs())))
    assert subject(hello(p, "a.example")) == "a.example"
    assert subject(hello(p, "x.b.example")) == "any of b.example"
    assert subject(hello(p, "z.example")) == "default"


def test_exact_name_goes_before_a_wildcard(proxy, place):
    p = proxy(place(), certs=[entry("*.example", "wild"), entry("a.example", "a.example"),
                              entry(None, "default")])
    assert subject(hello(p, "a.example")) == "a.example"
    assert subject(hello(p, "c.example")) == "any of b.example"


def test_without_a_default_unknown_names_are_refused(proxy, place):
    p = proxy(place(), certs=[entry("a.example", "a.example")])
    assert subject(hello(p, "a.example")) == "a.example"
    with pytest.raises((ssl.SSLError, OSError)):
        hello(p, "other.test")


def test_session_of_one_name_is_not_resumed_for_another(proxy, place):
    """RFC 6066 3: the client would talk to a certificate that it has not seen."""
    p = proxy(place(), certs=certs())
    context = client_context(None)
    first = hello(p, "a.example", context)
    session = first.tls.session
    again = connect(p, context=context, name="a.example", session=session)
    assert again.tls.session_reused
    other = connect(p, context=context, name="other.test", session=session)
    assert not other.tls.session_reused
    assert subject(other) == "default"


# ---- RSA and EC for the same name ----

@pytest.mark.parametrize("ciphers, kind", [("ECDHE+aECDSA+AESGCM", "ec"),
                                           ("ECDHE+aRSA+AESGCM", "rsa"),
                                           ("ECDHE+CHACHA20", "ec")])
@pytest.mark.parametrize("reverse", [False, True])
def test_rsa_and_ec_for_the_same_name(proxy, place, ciphers, kind, reverse):
    both = [entry("a.example", "a.example"), entry("a.example", "a.example-rsa")]
    p = proxy(place(), certs=both[::-1] if reverse else both)
    context = client_context(None)
    context.set_ciphers(ciphers)
    assert key_kind(hello(p, "a.example", context)) == kind


def test_rsa_and_ec_as_default(proxy, place):
    p = proxy(place(), certs=[entry(None, "a.example-rsa"), entry(None, "a.example")])
    for ciphers, kind in (("ECDHE+aECDSA+AESGCM", "ec"), ("ECDHE+aRSA+AESGCM", "rsa")):
        context = client_context(None)
        context.set_ciphers(ciphers)
        assert key_kind(hello(p, None, context)) == kind


def test_named_entry_without_a_fitting_key_does_not_fall_to_another_name(proxy, place):
    """a.example has an EC key only: who can RSA only is refused, and not shown the default."""
    p = proxy(place(), certs=[entry("a.example", "a.example"), entry(None, "a.example-rsa")])
    context = client_context(None)
    context.set_ciphers("ECDHE+aRSA+AESGCM")
    with pytest.raises((ssl.SSLError, OSError)):
        hello(p, "a.example", context)


def test_sighup_changes_the_certificate_of_one_name(proxy, place, live_files):
    chain, key = live_files / "chain.pem", live_files / "key.pem"

    def put(name):
        shutil.copy(pem(name), chain)
        shutil.copy(key_of(name), key)
    put("a.example")
    p = proxy(place(), certs=[("a.example", chain, key), entry(None, "default")])
    assert subject(hello(p, "a.example")) == "a.example"
    put("wild")
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert subject(hello(p, "a.example")) == "any of b.example"
    assert subject(hello(p, "other.test")) == "default"


# ---- client certificates ----

@pytest.fixture
def guarded(proxy, scripted):
    """A proxy that requires client certificates, and its backend."""
    backend = scripted()
    return lambda **more: (proxy(backend, **{"client_ca": pem("client-ca"), "http": FORWARD,
                                             "listeners": BOTH, **more}), backend)


def page(p, backend, client, **fields):
    client.send(request(**fields))
    server = backend.accept()
    got = server.read_head()
    server.send(answer(body=b"page"))
    assert client.read_head().status == 200
    return got


@pytest.mark.parametrize("name, common_name", [("client-ec", "gateway 7"),
                                               ("client-rsa", "gateway 8")])
def test_subject_goes_to_the_backend(guarded, name, common_name):
    p, backend = guarded()
    got = page(p, backend, connect(p, context=showing(name)))
    assert got.get("X-SSL-Client-CN") == common_name


def test_subject_goes_with_an_upgrade(guarded):
    p, backend = guarded()
    client = connect(p, context=showing("client-ec"))
    client.send(upgrade())
    server = backend.accept()
    assert server.read_head().get("X-SSL-Client-CN") == "gateway 7"
    server.send(switching())
    assert client.read_head().status == 101


@pytest.mark.parametrize("name, cause", [
    (None, "no-certificate"), ("client-stranger", "unknown-ca"), ("client-expired", "expired"),
    ("client-early", "not-yet-valid"), ("client-key-usage", "key-usage")])
def test_client_without_a_good_certificate_is_refused(guarded, name, cause):
    p, backend = guarded()
    with pytest.raises((ssl.SSLError, OSError)):
        client = connect(p, context=showing(name))
        client.send(request())
        assert client.receive() == b""
        raise ConnectionError("ended without an answer")
    p.log.wait_ending("client-cert", cause=cause)
    assert backend.untouched()


@pytest.mark.parametrize("by", [b"", b"\1", b"\1\1", b"\0"])
@pytest.mark.parametrize("name", ["client-ec", "client-stranger"])
def test_chain_that_is_interrupted(guarded, name, by):
    p, backend = guarded()
    client = tcp(p)
    client.send(client_hello())
    client.read_until(b"\x0e\0\0\0")          # ServerHelloDone
    interrupted(p, client, certificate_message(name), by)
    client.close()
    p.log.wait("reject")
    got = page(p, backend, connect(p, context=showing("client-ec")))
    assert got.get("X-SSL-Client-CN") == "gateway 7"


def test_authority_that_is_not_known_spoils_no_bundle(guarded):
    p, backend = guarded(client_ca=pem("client-cas-odd"))
    got = page(p, backend, connect(p, context=showing("client-ec")))
    assert got.get("X-SSL-Client-CN") == "gateway 7"
    p.log.wait_text(r"^warning client_ca\[0\]: \S*: subject=Odd\\x20Root is skipped")


@pytest.mark.parametrize("name", ["X-SSL-Client-CN", "x-ssl-client-cn", "X_SSL_Client_CN",
                                  "X-Ssl_Client-Cn"])
def test_forged_subject_is_replaced(guarded, name):
    p, backend = guarded()
    got = page(p, backend, connect(p, context=showing("client-ec")), **{name: "root"})
    forged = [(n, v) for n, v in got.fields if n.lower().replace("_", "-") == "x-ssl-client-cn"]
    assert forged == [("X-SSL-Client-CN", "gateway 7")]


@pytest.mark.parametrize("kind", [WSS, WS])
@pytest.mark.parametrize("line", ["X-SSL-Client-CN: root", "x_ssl_client_cn: root"])
def test_forged_subject_is_dropped_where_no_certificate_is_asked_for(proxy, scripted, kind, line):
    backend = scripted()
    p = proxy(backend, http=FORWARD, listeners=BOTH)
    (got, _), _ = exchange(p, backend, request(extra=[line]), answer(body=b""), kind)
    assert "root" not in got.raw.decode()


def test_forged_subject_is_dropped_on_a_clear_listener_beside(guarded):
    p, backend = guarded()
    got = page(p, backend, connect(p, WS), X_SSL_Client_CN="root")
    assert got.all("X-SSL-Client-CN") == []


def test_connection_can_not_take_the_subject_away(guarded):
    p, backend = guarded()
    got = page(p, backend, connect(p, context=showing("client-ec")),
               Connection="close, X-SSL-Client-CN")
    assert got.get("X-SSL-Client-CN") == "gateway 7"


def test_session_is_not_resumed_without_the_certificate(guarded):
    """A resumed handshake asks for none."""
    p, backend = guarded()
    context = showing("client-ec")
    first = connect(p, context=context)
    page(p, backend, first)
    second = connect(p, context=context, session=first.tls.session)
    assert not second.tls.session_reused
    assert page(p, backend, second).get("X-SSL-Client-CN") == "gateway 7"


def test_curl_shows_its_certificate(guarded):
    p, backend = guarded()
    seen = []

    def serve():
        server = backend.accept()
        seen.append(server.read_head())
        server.send(answer(body=b"page"))
    thread = Thread(target=serve)
    thread.start()
    result = curl(p, "/", "--cert", pem("client-rsa"), "--key", key_of("client-rsa"))
    thread.join(PATIENCE)
    assert result.stdout == "page", result.stderr
    assert seen[0].get("X-SSL-Client-CN") == "gateway 8"


def test_sighup_loads_a_new_client_ca(proxy, scripted, live_files):
    ca = live_files / "client-ca.pem"
    shutil.copy(pem("client-ca"), ca)
    backend = scripted()
    p = proxy(backend, client_ca=ca, http=FORWARD)
    page(p, backend, connect(p, context=showing("client-ec")))
    shutil.copy(pem("stranger"), ca)
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    page(p, backend, connect(p, context=showing("client-stranger")))
    with pytest.raises((ssl.SSLError, OSError)):
        client = connect(p, context=showing("client-ec"))
        client.send(request())
        client.read_head()


@pytest.mark.parametrize("file", ["/nowhere/ca.pem", "key"])
def test_bad_client_ca_is_named(place, file):
    file = key_of("ec") if file == "key" else file
    result = run_once(whole_config([place()], {"client_ca": file}), "-t")
    assert result.returncode == 1
    assert "client_ca" in result.stderr and str(file) in result.stderr


# ---- client certificates by listener ----

REQUIRED, OPTIONAL, OFF_HERE = C("VERIFY_REQUIRED"), C("VERIFY_OPTIONAL"), C("VERIFY_OFF")


def listener(ca=None, verify=REQUIRED):
    return ("127.0.0.1", "0", WSS, ca and pem(ca), verify)


class At:
    """A client of the nth listener; it asks for a page, and tells whether its session was resumed and
    what the backend hears of its name."""

    def __init__(self, p, n, context, session=None):
        sock = socket.create_connection(("127.0.0.1", p.ports[n]), PATIENCE)
        self.stream = TlsStream(sock, context, session=session)
        self.session = self.stream.tls.session

    def name(self, p, backend):
        return page(p, backend, self.stream, X_SSL_Client_CN="root").get("X-SSL-Client-CN")


def refused(p, backend, n, context, session=None):
    """Whether that client gets nothing of a page, nor the backend any of its request."""
    with pytest.raises((ssl.SSLError, OSError)):
        client = At(p, n, context, session).stream
        client.send(request())
        assert client.receive() == b""
        raise ConnectionError("ended without an answer")
    return backend.untouched()


@pytest.fixture
def ways(proxy, scripted):
    """A proxy with a listener for each way to treat client certificates, and its backend."""
    backend = scripted()
    p = proxy(backend, http=FORWARD, client_ca=pem("client-ca"), listeners=[
        listener(), listener(verify=OPTIONAL), listener(verify=OFF_HERE),
        listener("stranger"), listener("stranger", OPTIONAL)])
    return p, backend


CLIENTS = {"none": None, "client-ec": "gateway 7", "client-stranger": "gateway 9"}
# who is trusted there, and whether one need not show a certificate
WAYS = ("client-ca", 0), ("client-ca", 1), (None, 1), ("stranger", 0), ("stranger", 1)


def let_in(client, way):
    """What a backend hears of that client's name there; False: it is refused."""
    authority, optional = way
    if client == "none" or authority is None:
        return None if optional else False
    signer = "client-ca" if client == "client-ec" else client.removeprefix("client-")
    return CLIENTS[client] if signer == authority else False


@pytest.mark.parametrize("client", CLIENTS)
def test_each_listener_has_its_own_way_with_client_certificates(ways, client):
    p, backend = ways
    context = showing(None if client == "none" else client)
    for n, way in enumerate(WAYS):
        wanted = let_in(client, way)
        if wanted is False:
            assert refused(p, backend, n, context)
        else:
            assert At(p, n, context).name(p, backend) == wanted


@pytest.mark.parametrize("name, cause", [
    ("client-stranger", "unknown-ca"), ("client-expired", "expired"),
    ("client-early", "not-yet-valid"), ("client-key-usage", "key-usage")])
def test_bad_certificate_is_refused_where_none_is_needed(ways, name, cause):
    """Or its name would be anyone's."""
    p, backend = ways
    assert refused(p, backend, 1, showing(name))
    p.log.wait_ending("client-cert", cause=cause)


@pytest.mark.parametrize("first, client", [
    (first, client) for first, way in enumerate(WAYS) for client in CLIENTS
    if let_in(client, way) is not False])
def test_session_of_one_listener_is_no_pass_for_another(ways, first, client):
    """Who has a session from where no certificate is asked for, or another authority is trusted,
    offers it everywhere, and back again."""
    p, backend = ways
    context = showing(None if client == "none" else client)
    start = At(p, first, context)
    start.name(p, backend)
    for n in [*range(len(WAYS)), first]:
        wanted = let_in(client, WAYS[n])
        if wanted is False:
            assert refused(p, backend, n, context, start.session)
            continue
        again = At(p, n, context, start.session)
        assert again.stream.tls.session_reused == (WAYS[n][0] is None and WAYS[first][0] is None)
        assert again.name(p, backend) == wanted


def test_sighup_loads_each_authority_again(proxy, scripted, live_files):
    backend = scripted()
    files = [live_files / "a.pem", live_files / "b.pem"]
    for file, name in zip(files, ("client-ca", "stranger")):
        shutil.copy(pem(name), file)
    p = proxy(backend, http=FORWARD, listeners=[
        ("127.0.0.1", "0", WSS, file, verify) for file, verify in zip(files, (REQUIRED, OPTIONAL))])
    assert At(p, 1, showing("client-stranger")).name(p, backend) == "gateway 9"
    assert refused(p, backend, 0, showing("client-stranger"))
    shutil.copy(pem("stranger"), files[0])
    shutil.copy(pem("client-ca"), files[1])
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert At(p, 0, showing("client-stranger")).name(p, backend) == "gateway 9"
    assert refused(p, backend, 1, showing("client-stranger"))


def test_many_listeners_with_one_bundle_count_it_once(place):
    """16 authorities at most, in all."""
    entries = whole_config([place()], {"listeners": [listener("client-ca") for _ in range(20)]})
    assert run_once(entries, "-t").returncode == 0


# ---- redirects ----

@pytest.fixture
def redirecting(proxy, place):
    """A REDIRECT listener beside a WSS one with a port that is known."""
    front = place()
    return lambda: proxy(place(), listeners=[(front.host, front.port, WSS),
                                             ("127.0.0.1", "0", REDIRECT)]), front.port


@pytest.mark.parametrize("sent, location", [
    (request("/chat?room=1"), "https://example.test:{}/chat?room=1"),
    (request("/", Host="example.test:80"), "https://example.test:{}/"),
    (request("/", Host="example.test:8080"), "https://example.test:{}/"),
    (request("/x", Host="[2001:db8::1]:80"), "https://[2001:db8::1]:{}/x"),
    (request("/x", Host="[2001:db8::1]"), "https://[2001:db8::1]:{}/x"),
    (request("/x", Host="192.0.2.1"), "https://192.0.2.1:{}/x"),
    (request("http://other.test/y?z"), "https://other.test:{}/y?z"),
    (request("http://other.test"), "https://other.test:{}/"),
    (request("*", "OPTIONS"), "https://example.test:{}/"),
    (upgrade("/chat"), "https://example.test:{}/chat"),
    (request("/form", "POST", body=b"a=b"), "https://example.test:{}/form"),
])
def test_redirect_keeps_host_and_target(redirecting, sent, location):
    start, port = redirecting
    p = start()
    head, _ = ask(p, sent, REDIRECT)
    assert head.status == 308
    assert head.get("Location") == location.format(port)


def test_redirect_to_the_usual_port_says_none(proxy, place):
    """Where the WSS listener is elsewhere, 443 is meant."""
    p = proxy(place(), listeners=[("127.0.0.1", "0", REDIRECT)])
    assert ask(p, request("/x"))[0].get("Location") == "https://example.test/x"


@pytest.mark.parametrize("seen, location", [
    ("8443", "https://example.test:8443/x"), ("443", "https://example.test/x")])
def test_redirect_to_the_port_that_clients_see(proxy, place, seen, location):
    front = place()
    p = proxy(place(), redirect_port=seen,
              listeners=[(front.host, front.port, WSS), ("127.0.0.1", "0", REDIRECT)])
    assert ask(p, request("/x", Host="example.test:8080"), REDIRECT)[0].get("Location") == location


def test_redirect_listener_dials_no_backend(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", REDIRECT)], http=FORWARD)
    ask(p, request("/"))
    assert backend.untouched()


@pytest.mark.parametrize("sent, status", [
    (request(Host=None), 400), (request(extra=["Host: b"]), 400), (b"rubbish\r\n\r\n", 400),
    (request(Host="a b"), 400), (request("a:443", "CONNECT"), 405)])
def test_redirect_listener_is_as_strict(redirecting, sent, status):
    p = redirecting[0]()
    head, _ = ask(p, sent, REDIRECT)
    assert head.status == status
    assert head.all("Location") == []


@pytest.mark.parametrize("host", ["evil.example%0d%0aSet-Cookie:x", "a\"><script>", "a/b", "a\\b",
                                  "user@evil.example"])
def test_redirect_repeats_no_odd_host(redirecting, host):
    p = redirecting[0]()
    head, body = ask(p, request(Host=host), REDIRECT)
    assert head.status in (308, 400)
    assert head.all("Set-Cookie") == []
    if head.status == 308:
        assert head.get("Location").startswith("https://") and "<" not in head.get("Location")


def test_curl_follows_a_redirect(proxy, scripted, place):
    front = place()
    backend = scripted()
    p = proxy(backend, http=FORWARD, listeners=[(front.host, front.port, WSS),
                                                ("127.0.0.1", "0", REDIRECT)])

    def serve():
        server = backend.accept()
        server.read_head()
        server.send(answer(body=b"secure page"))
    thread = Thread(target=serve)
    thread.start()
    result = curl(p, "/", "-L", kind=REDIRECT)
    thread.join(PATIENCE)
    assert result.stdout == "secure page", result.stderr


# ---- what certificate authorities ask for, in the clear ----

CHALLENGE = "/.well-known/acme-challenge/"
TOKEN = CHALLENGE + "LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"


@pytest.fixture
def challenged(proxy, scripted):
    """A proxy whose REDIRECT listener has a backend for challenges, and that, and the one for all else."""
    def start(path=CHALLENGE, **config):
        other, acme = scripted(), scripted()
        p = proxy({**other.entry(), "path": config.pop("beside", None)},
                  {**acme.entry(), "path": path},
                  listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", REDIRECT)], **config)
        return p, acme, other
    return start


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("config", [{}, {"path": CHALLENGE[:-1]}, {"http": FORWARD},
                                    {"client_ca": pem("client-ca")}, {"beside": "/.well-known/"}],
                         ids=["refuse", "no-slash", "forward", "client-ca", "beside"])
def test_challenge_is_answered_in_the_clear(challenged, method, config):
    p, acme, other = challenged(**config)
    sent, (head, body) = exchange(p, acme, request(TOKEN, method), answer(body=b"proof"), REDIRECT)
    assert sent[0].first == f"{method} {TOKEN} HTTP/1.1"
    assert sent[0].get("X-Forwarded-Proto") == "http"
    assert head.status == 200
    assert body == (b"proof" if method == "GET" else b"")
    assert other.untouched()
    # what is for TLS, stays there
    assert ask(p, request("/"), REDIRECT)[0].status == 308


def test_what_follows_a_challenge_is_redirected(challenged):
    """On the same connection."""
    p, acme, other = challenged(http=FORWARD)
    client = connect(p, REDIRECT)
    client.send(request(TOKEN, Connection=None) + request("/private") + request(TOKEN))
    server = acme.accept()
    assert server.read_head().first == f"GET {TOKEN} HTTP/1.1"
    server.send(answer(body=b"proof"))
    assert client.read_head().status == 200
    assert client.read(5) == b"proof"
    assert client.read_head().status == 308
    client.read_to_end()
    assert acme.untouched() and other.untouched()


def test_challenge_of_another_host_name(challenged):
    """It is routed by its path, as all is."""
    p, acme, _ = challenged()
    sent, (head, _) = exchange(p, acme, request("http://other.test" + TOKEN), answer(body=b"proof"),
                               REDIRECT)
    assert sent[0].first == f"GET {TOKEN} HTTP/1.1"
    assert sent[0].get("Host") == "other.test"
    assert head.status == 200


@pytest.mark.parametrize("http", [REFUSE, FORWARD])
@pytest.mark.parametrize("sent", [
    request("/"), request(CHALLENGE), request(CHALLENGE[:-1]), request(CHALLENGE + "../x"),
    request(CHALLENGE + "a/../../../x"), request(CHALLENGE + ".."), request(CHALLENGE + "%2e%2e/x"),
    request(CHALLENGE + "%2E%2E%2Fx"), request(CHALLENGE + "a%00b"), request(CHALLENGE + "a/b"),
    request(CHALLENGE + "a\\..\\b"), request(CHALLENGE + "/etc/passwd"), request(CHALLENGE + "a;b"),
    request(CHALLENGE + "a?b"), request(CHALLENGE + "?a"), request("/" + TOKEN), request("/x" + TOKEN), request("/x/.." + TOKEN),
    request(TOKEN.replace("acme", "Acme")), request(TOKEN.replace("/.", "/%2e")),
    request(TOKEN.replace("/acme", "//acme")), request("http://other.test/x?" + TOKEN),
    request("http://other.test/x" + TOKEN), request("http://other.test" + CHALLENGE + "../x"),
    request("http://other.test?" + TOKEN), request(TOKEN, "POST", body=b"a=b"),
    request(TOKEN, "POST"), request(TOKEN, "PUT"), request(TOKEN, "DELETE"), request(TOKEN, "OPTIONS"),
    request(TOKEN, "get"), request(TOKEN, "head"), request(TOKEN, "GETX"), request(TOKEN, "HEADX"),
    request(TOKEN, body=b"body"), request(TOKEN, extra=["Transfer-Encoding: chunked"]) + b"0\r\n\r\n",
    upgrade(TOKEN), upgrade(CHALLENGE + "../x"),
    request("*", "OPTIONS")])
def test_nothing_but_challenges_gets_through(challenged, sent, http):
    p, acme, other = challenged(http=http)
    assert ask(p, sent, REDIRECT)[0].status == 308
    assert acme.untouched() and other.untouched()


@pytest.mark.parametrize("sent, status", [
    (request(TOKEN, "CONNECT"), 405), (request(CHALLENGE + "a#b"), 400), (request(CHALLENGE + "\xe4"), 400),
    (request(TOKEN, Host=None), 400), (request(TOKEN, extra=["Host: b"]), 400),
    (request(TOKEN, version="HTTP/1.0"), 505), (request(TOKEN, extra=["Content-Length: 0x1"]), 400)])
def test_requests_for_challenges_are_judged_as_strictly(challenged, sent, status):
    p, acme, other = challenged()
    assert ask(p, sent, REDIRECT)[0].status == status
    assert acme.untouched() and other.untouched()


@pytest.mark.parametrize("paths", [(None,), ("/",), ("/.well-known",), ("/.well-known/",),
                                   ("/.well-known/", None), ("/.well-known/acme-challenge/other", None),
                                   ("/.well-known/acme-challenger", "/"), ("/x", "/chat")])
def test_challenge_without_a_backend_of_its_own_is_redirected(proxy, scripted, paths):
    """Those of others see nothing that came in the clear."""
    backends = [scripted() for _ in paths]
    p = proxy(*({**b.entry(), "path": path} for b, path in zip(backends, paths)), http=FORWARD,
              listeners=[("127.0.0.1", "0", REDIRECT)])
    assert ask(p, request(TOKEN))[0].status == 308
    assert all(b.untouched() for b in backends)


def test_answer_to_a_challenge_is_never_a_tunnel(challenged):
    p, acme, _ = challenged()
    _, (head, body) = exchange(p, acme, request(TOKEN), switching(), REDIRECT)
    assert head.status == 502


# ---- origins ----

@pytest.mark.parametrize("origin, host, status", [
    ("https://example.test", "example.test", 101),
    ("http://example.test", "example.test", 101),
    ("https://example.test:8443", "example.test:8443", 101),
    ("https://[2001:db8::1]", "[2001:db8::1]", 101),
    ("https://example.test:8443", "example.test", 403),
    ("https://example.test.evil.test", "example.test", 403),
    ("https://xexample.test", "example.test", 403),
    ("https://evil.test", "example.test", 403),
    ("ftp://example.test", "example.test", 403),
    ("null", "example.test", 403), ("", "example.test", 403), ("https://", "example.test", 403),
])
def test_origin_same(proxy, scripted, origin, host, status):
    backend = scripted()
    p = proxy(backend, origins=["same"])
    client = connect(p)
    client.send(upgrade(Origin=origin, Host=host))
    if status == 101:
        server = backend.accept()
        server.read_head()
        server.send(switching())
    assert client.read_head().status == status
    if status == 403:
        assert backend.untouched()


@pytest.mark.parametrize("origin, host", [("https://Example.Test", "example.test"),
                                          ("https://example.test", "EXAMPLE.test"),
                                          ("https://example.test", "example.test:443")])
def test_origin_same_knows_case_and_the_usual_port(proxy, scripted, origin, host):
    """Browsers write origins in lower case and without :443; a Host may come in any form."""
    backend = scripted()
    p = proxy(backend, origins=["same"])
    client, server = asking(p, backend, upgrade(Origin=origin, Host=host))
    server.send(switching())
    assert client.read_head().status == 101


def test_origin_same_of_an_absolute_target(proxy, scripted):
    """The host that is asked for is the target's."""
    backend = scripted()
    p = proxy(backend, origins=["same"])
    assert ask(p, upgrade("http://real.test/", Origin="https://example.test"))[0].status == 403
    assert backend.untouched()


def test_origin_same_and_others(proxy, scripted):
    backend = scripted()
    p = proxy(backend, origins=["https://app.example", "same"])
    for origin in ("https://app.example", "https://example.test"):
        client, server = asking(p, backend, upgrade(Origin=origin))
        server.send(switching())
        assert client.read_head().status == 101
    assert ask(p, upgrade(Origin="https://other.example"))[0].status == 403


def test_upgrade_without_origin_where_origins_are_given(proxy, scripted):
    """No browser sends that; what is not allowed is refused."""
    backend = scripted()
    p = proxy(backend, origins=["same"])
    assert ask(p, upgrade())[0].status == 403
    assert backend.untouched()


def test_origin_none_lets_programs_in(proxy, scripted):
    backend = scripted()
    p = proxy(backend, origins=["https://app.example", "none"])
    for fields in ({}, {"Origin": "https://app.example"}):
        client, server = asking(p, backend, upgrade(**fields))
        server.send(switching())
        assert client.read_head().status == 101
    for origin in ("https://other.example", "none", "null", ""):
        assert ask(p, upgrade(Origin=origin))[0].status == 403
    assert backend.untouched()


def test_origins_do_not_concern_pages(proxy, scripted):
    backend = scripted()
    p = proxy(backend, origins=["https://app.example"], http=FORWARD)
    _, (head, _) = exchange(p, backend, request(Origin="https://other.example"), answer(body=b""))
    assert head.status == 200


# ---- X-Forwarded-For of pages ----

@pytest.mark.parametrize("mode, came, passed", [
    (APPEND, [], ["127.0.0.1"]),
    (APPEND, ["192.0.2.1"], ["192.0.2.1, 127.0.0.1"]),
    (APPEND, ["192.0.2.1, 192.0.2.2", "192.0.2.3"], ["192.0.2.1, 192.0.2.2, 192.0.2.3, 127.0.0.1"]),
    (REPLACE, ["192.0.2.1"], ["127.0.0.1"]),
    (REPLACE, [], ["127.0.0.1"]),
    (OFF, ["192.0.2.1"], ["192.0.2.1"]),
    (OFF, [], []),
])
def test_x_forwarded_for_of_a_page(proxy, scripted, mode, came, passed):
    backend = scripted()
    p = proxy(backend, x_forwarded_for=mode, http=FORWARD)
    sent = request(extra=[f"X-Forwarded-For: {value}" for value in came])
    (got, _), _ = exchange(p, backend, sent, answer(body=b""))
    assert got.all("X-Forwarded-For") == passed


@pytest.mark.parametrize("name", ["X-Real-IP", "X-Forwarded-Proto", "x_real_ip",
                                  "X_Forwarded_Proto"])
@pytest.mark.parametrize("mode", [APPEND, REPLACE])
def test_forged_fields_of_a_page_are_replaced(proxy, scripted, name, mode):
    backend = scripted()
    p = proxy(backend, x_forwarded_for=mode, http=FORWARD)
    (got, _), _ = exchange(p, backend, request(extra=[f"{name}: forged"]), answer(body=b""))
    assert b"forged" not in got.raw
    assert got.get("X-Real-IP") == "127.0.0.1"
    assert got.get("X-Forwarded-Proto") == "https"


# ---- old TLS ----

CBC = [C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA"), C("BR_TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"),
       C("BR_TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA"), C("BR_TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA"),
       C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256")]
OLD = {"tls_min": C("BR_TLS10"), "ciphers": CBC}


def s_client(p, *args, name="localhost"):
    """openssl s_client sends a request; what it printed."""
    result = subprocess.run(
        ["openssl", "s_client", "-connect", "%s:%d" % p.address(), "-servername", name,
         "-ign_eof", *args], input=request().decode(), capture_output=True, text=True,
        timeout=PATIENCE)
    return result.stdout + result.stderr


@pytest.mark.parametrize("key", ["ec256", "rsa2048"])
@pytest.mark.parametrize("option, version", [("-tls1", "TLSv1"), ("-tls1_1", "TLSv1.1"),
                                             ("-tls1_2", "TLSv1.2")])
@pytest.mark.parametrize("size", ["AES128-SHA", "AES256-SHA"])
def test_old_tls_by_configuration(proxy, place, key, option, version, size):
    p = proxy(place(), certs=[certificate(key)], http=REFUSE, **OLD)
    shown = s_client(p, option, "-cipher", f"ECDHE-{'ECDSA' if key == 'ec256' else 'RSA'}-{size}"
                     ":@SECLEVEL=0")
    assert f"Protocol  : {version}\n" in shown, shown
    assert "HTTP/1.1 426 " in shown


def test_new_clients_get_the_best_of_an_old_configuration(proxy, place):
    p = proxy(place(), **OLD)
    assert connect(p).tls.version() == "TLSv1.2"


@pytest.mark.parametrize("option", ["-tls1", "-tls1_1"])
def test_old_tls_is_refused_by_default(proxy, place, option):
    p = proxy(place())
    assert "HTTP/1.1" not in s_client(p, option, "-cipher", "ALL:@SECLEVEL=0")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_tunnel_over_tls10(proxy, scripted):
    """Its first record is split in two against BEAST; that is nothing that a backend sees."""
    backend = scripted()
    p = proxy(backend, **OLD)
    context = client_context(versions=(ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1))
    context.set_ciphers("ALL:@SECLEVEL=0")
    client, server = open_tunnel(p, backend, context=context)
    for n in (1, 100, 20000, 100000):
        data = bytes(n % 251 for n in range(n))
        client.send(data)
        assert server.read(n) == data
        server.send(data)
        assert client.read(n) == data
    assert p.log.wait("open")["tls"] == "1.0"


@pytest.mark.parametrize("cipher", ["DES-CBC3-SHA", "ECDHE-ECDSA-DES-CBC3-SHA", "AES128-SHA",
                                    "AES128-GCM-SHA256", "NULL", "RC4-SHA"])
def test_suites_that_are_never_served(proxy, place, cipher):
    """3DES, RC4, and all without forward secrecy."""
    p = proxy(place(), **OLD)
    assert "HTTP/1.1" not in s_client(p, "-tls1_2", "-cipher", f"{cipher}:@SECLEVEL=0")


@pytest.mark.parametrize("suite", ["BR_TLS_RSA_WITH_3DES_EDE_CBC_SHA",
                                   "BR_TLS_RSA_WITH_AES_128_GCM_SHA256"])
def test_weak_suite_in_the_configuration_is_refused(place, suite):
    result = run_once(whole_config([place()], {"ciphers": [C(suite)]}), "-t")
    assert result.returncode == 1
    assert "ciphers[0]" in result.stderr


def test_cbc_suite_for_tls12_alone_is_refused(place):
    result = run_once(whole_config([place()], {"ciphers": CBC}), "-t")
    assert result.returncode == 1
    assert "ciphers[0]" in result.stderr and "tls_min" in result.stderr
