"""Backends with TLS: who is believed and who is not, client certificates, resumption, and what
goes through."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from conftest import whole_config
from harness import FORWARD, PATIENCE, RUN, WS, C, eventually, run_once
from more import (TLS_NOVERIFY, TLS_PIN, TLS_VERIFY, Nginx, NodeHttps, OpensslServer, ScriptedTls,
                  answer, certificate_message, curl, identity, interrupted, key_of, memory_peak_kb,
                  memory_peak_reset, message, pem, record, request, server_context)
from peers import ask, asking, connect, pattern, play, switching, upgrade, ws

TLS = {"tls_backends": 1, "http": FORWARD}

slow = pytest.mark.skipif(bool(RUN), reason="takes too long in there")


def verified(place, **more):
    return place.entry(tls=TLS_VERIFY, sni="backend.test", ca=pem("cas"), **more)


def pinned(place, certificate="self-signed"):
    return place.entry(tls=TLS_PIN, ca=pem(certificate))


def trusting(place):
    return place.entry(tls=TLS_NOVERIFY)


@pytest.fixture
def nginx(place, keeper, tmp_path):
    count = iter(range(100))
    return lambda at=None, **options: keeper(
        Nginx(at or place(), tmp_path / f"nginx{next(count)}", **options))


@pytest.fixture
def node(place, keeper):
    return lambda at=None, **options: keeper(NodeHttps(at or place(), **options))


@pytest.fixture
def openssl_server(place, keeper):
    return lambda certificate, *args, at=None: keeper(
        OpensslServer(at or place(), certificate, *args))


@pytest.fixture
def scripted_tls(scripted):
    return lambda at=None, context=None: ScriptedTls(scripted(at), context)


def get(p, path="/"):
    return ask(p, request(path))


async def echo(p, *messages, path="/", **options):
    async with ws(p, path, **options) as client:
        for message in messages:
            await client.send(message)
            assert await client.recv() == message


def refused(p, backend, why):
    """The client gets 502, the log says why."""
    assert get(p)[0].status == 502
    return p.log.wait("backend", name=backend.name, down=True, why=why)


# ---- who is believed ----

@pytest.mark.parametrize("certificate, chain", [("ec", None), ("rsa", None),
                                                ("leaf", "leaf-chain")])
def test_verified_nginx_serves_websockets(proxy, nginx, place, python_server, certificate, chain):
    front, behind = place(), python_server()
    nginx(front, certificate=certificate, chain=chain and pem(chain), upstream=behind.place)
    p = proxy(verified(front), **TLS)
    play(echo(p, "one", b"two" * 1000, "drei" * 20000))


@pytest.mark.parametrize("certificate", ["ec", "rsa"])
def test_verified_node_serves_websockets(proxy, node, certificate):
    backend = node(certificate=certificate)
    p = proxy(verified(backend), **TLS)
    play(echo(p, "one", b"two" * 1000, "drei" * 20000))


def test_page_of_a_verified_nginx(proxy, nginx):
    backend = nginx()
    p = proxy(verified(backend), **TLS)
    answer, body = get(p, "/page?a=b")
    assert answer.status == 200
    assert body == b"from nginx"
    line = backend.log.wait("request", uri="/page?a=b", host="example.test")
    assert line["forwarded"] == "127.0.0.1"


def test_sni_is_the_entrys(proxy, nginx):
    backend = nginx()
    p = proxy(verified(backend), **TLS)
    get(p)
    backend.log.wait("request", sni="backend.test")


def test_host_is_the_name_to_send_and_to_verify(proxy, nginx):
    """localhost is among the certificate's names."""
    backend = nginx()
    p = proxy({"host": "localhost", "port": backend.place.port, "tls": TLS_VERIFY,
               "ca": pem("ca")}, **TLS)
    assert get(p)[0].status == 200
    backend.log.wait("request", sni="localhost")


def test_no_sni_for_an_address(proxy, nginx):
    backend = nginx()
    p = proxy(trusting(backend), **TLS)
    assert get(p)[0].status == 200
    backend.log.wait("request", sni="-")


def test_backend_is_offered_http11_only(proxy, node):
    backend = node()
    p = proxy(verified(backend), **TLS)
    assert json.loads(get(p)[1])["alpn"] == "http/1.1"


# ---- who is not ----

@pytest.mark.parametrize("certificate, why", [
    ("expired", "expired"), ("early", "not-yet-valid"), ("of-1970", "expired"),
    ("wrong-name", "name-mismatch"), ("unknown-ca", "unknown-ca"), ("self-signed", "unknown-ca"),
    ("critical", "critical-extension")])
def test_certificate_is_refused(proxy, nginx, certificate, why):
    backend = nginx(certificate=certificate)
    p = proxy(verified(backend), **TLS)
    refused(p, backend, why)
    assert backend.requests(0) == []


@pytest.mark.parametrize("certificate, why", [
    ("expired", "expired"), ("wrong-name", "name-mismatch"), ("unknown-ca", "unknown-ca")])
def test_certificate_of_node_is_refused(proxy, node, certificate, why):
    backend = node(certificate=certificate)
    p = proxy(verified(backend), **TLS)
    refused(p, backend, why)


def test_chain_without_its_intermediate_is_refused(proxy, nginx):
    backend = nginx(certificate="leaf")
    p = proxy(verified(backend), **TLS)
    refused(p, backend, "unknown-ca")


@pytest.mark.parametrize("certificate, chain, why", [
    ("leaf", "leaf-disorder", "bad-dn"), ("by-no-ca", "by-no-ca-chain", "not-ca")])
def test_chain_that_is_none_is_refused(proxy, nginx, certificate, chain, why):
    backend = nginx(certificate=certificate, chain=pem(chain))
    p = proxy(verified(backend), **TLS)
    refused(p, backend, why)


def test_backend_without_tls_is_named_so(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    server.receive()
    server.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert client.read_head().status == 502
    p.log.wait("backend", name=backend.name, down=True, why="not-tls")


def test_backend_without_our_version_is_named_so(proxy, openssl_server):
    backend = openssl_server("ec", "-tls1_3")
    p = proxy(verified(backend), **TLS)
    assert get(p)[0].status == 502
    line = p.log.wait("backend", name=backend.name, down=True)
    assert line["why"] == "tls-alert-70"


def test_root_that_is_not_known_spoils_no_bundle(proxy, nginx):
    """Distributions add such roots; the others must go on to count."""
    first, second = nginx(), nginx(certificate="rsa")
    p = proxy(*({**verified(b), "ca": pem("cas-odd"), "path": path}
                for b, path in ((first, "/one"), (second, "/two"))), **TLS)
    for path in ("/one", "/two"):
        assert get(p, path)[0].status == 200
    p.log.wait_text(r"^warning backends\[0\]: \S*/cas-odd\.pem: subject=Odd\\x20Root is skipped")
    assert p.log.text.count("skipped") == 1


@pytest.mark.parametrize("tls, ca", [(TLS_VERIFY, "odd-root"), (TLS_PIN, "odd-root"),
                                     (TLS_PIN, "cas-odd")])
def test_bundle_without_a_usable_root_is_refused(place, tls, ca):
    result = run_once(whole_config([place().entry(tls=tls, sni="backend.test", ca=pem(ca))], TLS),
                      "-t")
    assert result.returncode == 1
    assert f"config.h: backends[0]: {pem(ca)}: " in result.stderr


def test_key_that_does_not_sign_is_no_proof(proxy, scripted):
    """The right certificate, shown by someone who has only its public part, is worth nothing: the
    signature in the key exchange is another key's."""
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    fake = server_context("unknown-ca")
    # the server's first flight by the wrong key, the certificate in it replaced
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = fake.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(server.receive())
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    wrong, right = (ssl.PEM_cert_to_DER_cert(pem(n).read_text()) for n in ("unknown-ca", "ec"))
    server.send(with_certificate(outgoing.read(), wrong, right))
    assert client.read_head().status == 502
    p.log.wait("backend", name=backend.name, down=True, why="bad-signature")


def with_certificate(flight, old, new):
    """A TLS 1.2 server flight (a handshake message a record, as OpenSSL sends it) with another
    certificate in its Certificate message."""
    out, at = b"", 0
    while at < len(flight):
        size = int.from_bytes(flight[at + 3:at + 5], "big")
        body = flight[at + 5:at + 5 + size]
        if body[0] == 11:
            assert old in body
            one = len(new).to_bytes(3, "big") + new
            every = len(one).to_bytes(3, "big") + one
            body = b"\x0b" + len(every).to_bytes(3, "big") + every
        out += flight[at:at + 3] + len(body).to_bytes(2, "big") + body
        at += 5 + size
    return out


def test_nothing_of_the_request_goes_out_before_the_handshake(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request("/secret", Cookie="secret=1"))
    server = backend.accept()
    flight = server.receive()
    assert flight[0] == 22 and b"secret" not in flight
    server.half_close()
    assert b"secret" not in flight + server.read_to_end()
    assert client.read_head().status == 502


def test_backend_in_the_clear_is_no_tls_backend(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    server.receive()
    server.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert client.read_head().status == 502
    assert p.log.wait("backend", name=backend.name, down=True)["why"] == "not-tls"


def test_backend_that_ends_in_the_handshake(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    server.receive()
    server.close()
    assert client.read_head().status == 502
    p.log.wait("backend", name=backend.name, down=True, why="tls-eof")


def test_backends_share_a_bundle_of_many_anchors(proxy, scripted, tmp_path):
    """Each of them would fit alone, but not both."""
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(Path(pem("ca")).read_text() * 200)
    backends = [scripted() for _ in range(3)]
    proxy(*[{**verified(backend), "ca": str(bundle)} for backend in backends], **TLS)


def test_backend_that_resets_in_the_handshake(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    server.receive()
    server.reset()
    assert client.read_head().status == 502
    p.log.wait("backend", name=backend.name, down=True)


def handshake_by_hand(p, backend, asked=None):
    """A client that has asked, its backend's end, and TLS for that, which moves no bytes itself."""
    client = connect(p)
    client.send(asked or request())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = server_context().wrap_bio(incoming, outgoing, server_side=True)
    return client, backend.accept(), tls, incoming, outgoing


def reset_behind(p, server, data):
    """The proxy sees both at once."""
    p.signal(signal.SIGSTOP)
    server.send(data)
    server.reset()
    p.signal(signal.SIGCONT)


def test_backend_that_resets_when_the_handshake_is_done(proxy, scripted):
    """Its last words and the reset are there before the request is written."""
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client, *ends = handshake_by_hand(p, backend)
    finish_reset_behind(p, *ends)
    assert client.read_head().status == 502
    p.log.wait("backend", name=backend.name, down=True, why="reset")


def test_backend_that_resets_amid_the_handshake(proxy, scripted):
    """What it sent behind its flight is there while the answer to that meets the reset."""
    backend = scripted()
    p = proxy(verified(backend), handshake_ms=60000, **TLS)
    client, server, tls, incoming, outgoing = handshake_by_hand(p, backend)
    incoming.write(server.receive())
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    warning = b"\x15\x03\x03\x00\x02\x01\x5a"
    reset_behind(p, server, outgoing.read() + warning * 3)
    assert client.read_head().status == 502


BODY = pattern(5000)


def test_body_goes_to_the_next_when_a_backend_resets_behind_its_flight(proxy, scripted, scripted_tls):
    backend, other = scripted(), scripted_tls()
    p = proxy(verified(backend), verified(other), handshake_ms=60000, **TLS)
    client, server, tls, incoming, outgoing = handshake_by_hand(
        p, backend, request(method="POST", body=BODY))
    incoming.write(server.receive())
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    reset_behind(p, server, outgoing.read())
    gets_it_whole(p, client, backend, other)


def test_request_goes_to_the_next_when_a_backend_resets_before_it(proxy, scripted, scripted_tls):
    """Right behind the handshake, at whose end the request is written."""
    backend, other = scripted(), scripted_tls()
    p = proxy(verified(backend), verified(other), **TLS)
    client, server, tls, incoming, outgoing = handshake_by_hand(
        p, backend, request(method="POST", body=BODY))
    finish_reset_behind(p, server, tls, incoming, outgoing)
    gets_it_whole(p, client, backend, other)


def finish_reset_behind(p, server, tls, incoming, outgoing):
    while True:
        incoming.write(server.receive())
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            server.send(outgoing.read())
    reset_behind(p, server, outgoing.read())


def gets_it_whole(p, client, failed, other):
    """The other backend does, and the failed one is put aside."""
    server = other.accept()
    head = server.read_head()
    assert (head.first, head.get("Content-Length")) == ("POST / HTTP/1.1", str(len(BODY)))
    assert server.read(len(BODY)) == BODY
    server.send(answer(body=b"thanks"))
    assert client.read_head().status == 200
    p.log.wait("backend", name=failed.name, down=True)


def test_backend_that_is_silent_in_the_handshake(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), handshake_ms=1000, **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    assert client.read_head().status == 502
    p.log.wait("backend", name=backend.name, down=True, why="tls-timeout")
    server.read_to_end()


def test_refused_port_of_a_tls_backend(proxy, place):
    here = place()
    p = proxy(verified(here), **TLS)
    refused(p, here, "refused")


def test_backend_of_tls13_alone(proxy, nginx):
    backend = nginx(protocols="TLSv1.3")
    p = proxy(verified(backend), **TLS)
    assert get(p)[0].status == 502
    assert p.log.wait("backend", name=backend.name, down=True)["why"].startswith("tls-")


def test_client_that_leaves_during_the_backends_handshake(proxy, scripted):
    backend = scripted()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    server.receive()
    client.close()
    p.log.wait_ending("eof")
    server.read_to_end()


def test_distrusted_backend_is_replaced_by_the_next_at_once(proxy, nginx):
    bad, good = nginx(certificate="expired"), nginx()
    p = proxy(verified(bad), verified(good), **TLS)
    for _ in range(3):
        assert get(p)[0].status == 200
    p.log.wait("backend", name=bad.name, down=True, why="expired")
    assert len(good.requests(3)) == 3 and bad.requests(0) == []


def test_failed_handshakes_count_as_failures(proxy, nginx):
    """Though TCP connects each time."""
    backend = nginx(certificate="expired")
    p = proxy(verified(backend), max_fails=2, **TLS)
    assert get(p)[0].status == 502
    assert p.log.all("backend") == []
    refused(p, backend, "expired")


def test_upgrade_fails_over_from_a_distrusted_backend(proxy, nginx, node):
    bad, good = nginx(certificate="wrong-name"), node()
    p = proxy(verified(bad), verified(good), **TLS)
    play(echo(p, "hello"))
    p.log.wait("open", backend=good.name)


def test_backend_comes_up_when_its_certificate_is_renewed(proxy, nginx, place):
    here = place()
    old = nginx(here, certificate="expired")
    p = proxy(verified(here), fail_ms=300, **TLS)
    refused(p, old, "expired")
    old.close()
    nginx(here)
    eventually(lambda: get(p)[0].status == 200)
    p.log.wait("backend", name=here.name, up=True)


def test_tls_and_clear_backends_side_by_side(proxy, nginx, python_server):
    secure, clear = nginx(), python_server()
    p = proxy(verified(secure), clear, **TLS)
    assert get(p)[0].status == 200
    play(echo(p, "in the clear"))
    assert get(p)[0].status == 200
    assert len(secure.requests(2)) == 2


# ---- pins ----

def test_pinned_key_is_believed_whatever_the_certificate_says(proxy, nginx, place):
    """It is self-signed, and for another name than the backend's."""
    backend = nginx(certificate="self-signed")
    p = proxy(pinned(backend), **TLS)
    assert get(p)[0].status == 200


def test_pinned_rsa_key(proxy, nginx):
    backend = nginx(certificate="self-signed-rsa")
    p = proxy(pinned(backend, "self-signed-rsa"), **TLS)
    assert get(p)[0].status == 200


def test_renewed_certificate_of_the_pinned_key_is_believed(proxy, nginx):
    backend = nginx(certificate="renewed")
    p = proxy(pinned(backend), **TLS)
    assert get(p)[0].status == 200


@pytest.mark.parametrize("certificate", ["unknown-ca", "ec", "self-signed-rsa"])
def test_changed_key_is_refused(proxy, nginx, certificate):
    backend = nginx(certificate=certificate)
    p = proxy(pinned(backend), **TLS)
    refused(p, backend, "pin-mismatch")
    assert backend.requests(0) == []


def test_pinned_certificate_behind_another_is_refused(proxy, nginx, tmp_path):
    """Only the first certificate of a chain is the server's."""
    chain = tmp_path / "chain.pem"
    chain.write_text(pem("ec").read_text() + pem("self-signed").read_text())
    backend = nginx(certificate="ec", chain=chain)
    p = proxy(pinned(backend), **TLS)
    refused(p, backend, "pin-mismatch")


# ---- no verification ----

@pytest.mark.parametrize("certificate", ["self-signed", "expired", "wrong-name", "rsa"])
def test_anyone_is_believed_without_verification(proxy, nginx, certificate):
    backend = nginx(certificate=certificate)
    p = proxy(trusting(backend), **TLS)
    assert get(p)[0].status == 200


def test_no_verification_is_warned_of_at_start(proxy, place):
    here = place()
    p = proxy(trusting(here), **TLS)
    assert here.name in p.log.wait_text("(?i)verif").text


def test_verification_is_not_warned_of(proxy, place):
    p = proxy(verified(place()), **TLS)
    get(p)
    assert "verif" not in p.log.text.lower()


# ---- client certificates ----

@pytest.mark.parametrize("name, subject", [("client-ec", "gateway 7"), ("client-rsa", "gateway 8")])
def test_client_certificate_convinces_nginx(proxy, nginx, name, subject):
    backend = nginx(client_ca="client-ca", more="add_header X-DN $ssl_client_s_dn always;")
    p = proxy(verified(backend, **identity(name)), **TLS)
    answer, _ = get(p)
    assert answer.status == 200
    assert answer.get("X-DN") == f"CN={subject}"
    backend.log.wait("request", verify="SUCCESS")


@pytest.mark.parametrize("name, subject", [("client-ec", "gateway 7"), ("client-rsa", "gateway 8")])
def test_client_certificate_convinces_node(proxy, node, name, subject):
    backend = node(client_ca="client-ca")
    p = proxy(verified(backend, **identity(name)), **TLS)
    facts = json.loads(get(p)[1])
    assert facts["authorized"] is True
    assert facts["subject"] == subject


def test_websocket_to_a_backend_that_requires_certificates(proxy, node):
    backend = node(client_ca="client-ca")
    p = proxy(verified(backend, **identity("client-ec")), **TLS)
    play(echo(p, "hello", b"x" * 70000))


@pytest.mark.parametrize("version", ["-tls1_2"])
@pytest.mark.parametrize("certificate", ["rsa", "ec"])
def test_client_certificate_convinces_openssl(proxy, openssl_server, version, certificate):
    backend = openssl_server(certificate, version, "-Verify", "2", "-verify_return_error",
                             "-CAfile", pem("client-ca"))
    p = proxy(verified(backend, **identity("client-ec")), **TLS)
    assert get(p)[0].status == 200


@pytest.mark.parametrize("name", ["client-stranger", "client-expired"])
def test_refused_client_certificate_is_said_so(proxy, openssl_server, name):
    backend = openssl_server("ec", "-tls1_2", "-Verify", "2", "-verify_return_error",
                             "-CAfile", pem("client-ca"))
    p = proxy(verified(backend, **identity(name)), **TLS)
    refused(p, backend, "certificate-refused")


def test_backend_that_asks_in_vain_for_a_certificate(proxy, openssl_server):
    backend = openssl_server("ec", "-tls1_2", "-Verify", "2", "-verify_return_error",
                             "-CAfile", pem("client-ca"))
    p = proxy(verified(backend), **TLS)
    assert get(p)[0].status == 502
    why = p.log.wait("backend", name=backend.name, down=True)["why"]
    assert why == "certificate-refused" or why.startswith("tls-")


@pytest.mark.parametrize("client", [{}, {"name": "client-stranger"}])
def test_nginx_says_itself_that_it_wants_another_certificate(proxy, nginx, client):
    """nginx lets the handshake pass and answers 400: its page is what the client gets."""
    backend = nginx(client_ca="client-ca")
    more = identity(client["name"]) if client else {}
    p = proxy(verified(backend, **more), **TLS)
    answer, body = get(p)
    assert answer.status == 400
    assert b"SSL certificate" in body


def test_certificate_is_not_shown_to_those_who_do_not_ask(proxy, node):
    backend = node()
    p = proxy(verified(backend, **identity("client-ec")), **TLS)
    assert json.loads(get(p)[1])["subject"] is None


def test_each_backend_gets_its_own_certificate(proxy, node):
    one, two = node(client_ca="client-ca"), node(client_ca="client-ca")
    p = proxy(verified(one, **identity("client-ec")), verified(two, **identity("client-rsa")),
              **TLS)
    subjects = [json.loads(get(p)[1])["subject"] for _ in range(4)]
    assert subjects == ["gateway 7", "gateway 8"] * 2


def test_slot_that_showed_a_certificate_shows_none_to_the_next_backend(proxy, node):
    """One slot, so one TLS context for both."""
    one, two = node(client_ca="client-ca", refuse=False), node(client_ca="client-ca", refuse=False)
    p = proxy(verified(one, **identity("client-ec")), verified(two), max_sessions=1, max_busy=1,
              **TLS)
    subjects = [json.loads(get(p)[1])["subject"] for _ in range(2)]
    assert subjects == ["gateway 7", None]


# ---- configuration and files ----

@pytest.mark.parametrize("entry, named", [
    ({"tls": TLS_VERIFY, "sni": "backend.test", "ca": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
    ({"tls": TLS_VERIFY, "sni": "backend.test"}, "backends[0]"),
    ({"tls": TLS_VERIFY, "ca": "CA"}, "sni"),
    ({"tls": TLS_PIN}, "backends[0]"),
    ({"tls": TLS_VERIFY, "sni": "backend.test", "ca": "CA", "cert": "CERT"}, "backends[0]"),
    ({"tls": TLS_VERIFY, "sni": "backend.test", "ca": "CA", "key": "KEY"}, "backends[0]"),
    ({"tls": TLS_VERIFY, "sni": "backend.test", "ca": "CA", "cert": "CERT", "key": "OTHER"},
     "client-ec.pem"),
    ({"tls": TLS_VERIFY, "sni": "backend.test", "ca": "KEY"}, "client-ec.key"),
])
def test_bad_entry_of_a_tls_backend_is_named(place, entry, named):
    files = {"CA": pem("ca"), "CERT": pem("client-ec"), "KEY": key_of("client-ec"),
             "OTHER": key_of("client-rsa")}
    entry = {k: v if isinstance(v, C) else files.get(v, v) for k, v in entry.items()}
    result = run_once(whole_config([place().entry(**entry)], TLS), "-t")
    assert result.returncode == 1
    assert named in result.stderr


def test_tls_backend_without_tls_backends_is_named(place):
    result = run_once(whole_config([verified(place())], {"tls_backends": 0}), "-t")
    assert result.returncode == 1
    assert "tls_backends" in result.stderr


def test_sighup_loads_a_new_authority(proxy, nginx, live_files):
    """The backends move to another authority while the proxy runs."""
    ca = live_files / "ca.pem"
    shutil.copy(pem("ca-rsa"), ca)
    backend = nginx()
    p = proxy(backend.entry(tls=TLS_VERIFY, sni="backend.test", ca=ca), max_fails=0, **TLS)
    assert get(p)[0].status == 502
    shutil.copy(pem("ca"), ca)
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert get(p)[0].status == 200


def test_sighup_with_a_broken_authority_keeps_the_old(proxy, nginx, live_files):
    ca = live_files / "ca.pem"
    shutil.copy(pem("ca"), ca)
    backend = nginx()
    p = proxy(backend.entry(tls=TLS_VERIFY, sni="backend.test", ca=ca), max_fails=0, **TLS)
    ca.write_text("-----BEGIN CERTIFICATE-----\nbroken\n")
    p.signal(signal.SIGHUP)
    assert str(ca) in p.log.wait("reload", failed=True).text
    assert get(p)[0].status == 200


# ---- resumption ----

def test_session_with_the_backend_is_resumed(proxy, nginx):
    backend = nginx()
    p = proxy(verified(backend), **TLS)
    for _ in range(3):
        assert get(p)[0].status == 200
    assert [line["reused"] for line in backend.requests(3)] == [".", "r", "r"]


def test_session_is_resumed_with_client_certificates(proxy, nginx):
    backend = nginx(client_ca="client-ca")
    p = proxy(verified(backend, **identity("client-ec")), **TLS)
    for _ in range(2):
        assert get(p)[0].status == 200
    backend.log.wait("request", reused="r", verify="SUCCESS")


def test_each_backend_is_resumed_by_itself(proxy, nginx):
    one, two = nginx(), nginx()
    p = proxy(verified(one), verified(two), **TLS)
    for _ in range(4):
        assert get(p)[0].status == 200
    for backend in (one, two):
        assert [line["reused"] for line in backend.requests(2)] == [".", "r"]


def test_backend_that_has_forgotten_the_session(proxy, nginx, place):
    here = place()
    first = nginx(here)
    p = proxy(verified(here), **TLS)
    assert get(p)[0].status == 200
    first.close()
    second = nginx(here)
    for _ in range(2):
        assert get(p)[0].status == 200
    assert [line["reused"] for line in second.requests(2)] == [".", "r"]


def test_backend_that_never_resumes(proxy, nginx):
    backend = nginx(more="ssl_session_cache off; ssl_session_tickets off;")
    p = proxy(verified(backend), **TLS)
    for _ in range(3):
        assert get(p)[0].status == 200
    assert {line["reused"] for line in backend.requests(3)} == {"."}


def test_resumption_is_no_way_around_verification(proxy, nginx, place):
    """Who answers at the backend's address later, without its session, must show a certificate."""
    here = place()
    first = nginx(here)
    p = proxy(verified(here), **TLS)
    assert get(p)[0].status == 200
    first.close()
    impostor = nginx(here, certificate="unknown-ca")
    refused(p, impostor, "unknown-ca")
    assert impostor.requests(0) == []


def test_sighup_ends_resumption_of_old_sessions(proxy, nginx):
    """Or a certificate that the new files distrust would be believed for as long as it likes."""
    backend = nginx()
    p = proxy(verified(backend), **TLS)
    assert get(p)[0].status == 200
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert get(p)[0].status == 200
    assert [line["reused"] for line in backend.requests(2)] == [".", "."]


# ---- a device without a clock ----

@pytest.fixture
def in_1970(monkeypatch):
    """Environment in which it is 1970; the library makes system calls of its own."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs faketime, see PACKAGES.more")
    if RUN:
        pytest.skip("needs a library preloaded")
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAKETIME": "@1970-01-01 00:00:10",
                   "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
                   "ASAN_OPTIONS": "verify_asan_link_order=0"}
    date = subprocess.run(["date", "-u", "+%Y"], env=environment, capture_output=True, text=True)
    assert date.stdout == "1970\n"
    monkeypatch.setenv("CC", "gcc")         # clang's sanitizers do not start in 1970
    return environment


def test_device_whose_clock_says_1970_verifies_its_backend(proxy, nginx, in_1970):
    backend = nginx()
    p = proxy(verified(backend), popen={"env": in_1970}, seccomp=0, **TLS)
    assert get(p)[0].status == 200


def test_certificate_that_ended_before_the_program_was_made_is_refused_in_1970(proxy, nginx,
                                                                               in_1970):
    backend = nginx(certificate="of-1970")
    p = proxy(verified(backend), popen={"env": in_1970}, seccomp=0, **TLS)
    refused(p, backend, "expired")


# ---- what goes through ----

def tunnel(p, backend):
    client, server = asking(p, backend, upgrade())
    server.send(switching())
    assert client.read_head().status == 101
    return client, server


def test_both_directions_at_once_byte_for_byte(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    up, down = pattern(3_000_000), pattern(3_000_000, seed=2)
    jobs = [threading.Thread(target=end.send, args=(data,))
            for end, data in ((client, up), (server, down))]
    received = {}

    def receive(name, end, n):
        received[name] = end.read(n)
    jobs += [threading.Thread(target=receive, args=("down", client, len(down)))]
    # a TLS object is not for two threads: the server's end reads in between
    for job in jobs[:1] + jobs[2:]:
        job.start()
    got = server.read(len(up))
    jobs[1].start()
    for job in jobs:
        job.join(PATIENCE)
    assert got == up
    assert received["down"] == down


def test_head_and_bytes_behind_it_arrive_whole(proxy, scripted_tls):
    """What the client sends behind its head waits for the 101, on TLS backends too."""
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client = connect(p)
    client.send(upgrade() + b"early bird")
    server = backend.accept()
    assert server.read_head().first == "GET / HTTP/1.1"
    assert not server.has_input()
    server.send(switching() + b"and down")
    assert client.read_head().status == 101
    assert server.read(10) == b"early bird"
    assert client.read(8) == b"and down"


def test_one_byte_at_a_time(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    for byte in pattern(200):
        client.send(bytes([byte]))
        assert server.read(1) == bytes([byte])
        server.send(bytes([byte ^ 255]))
        assert client.read(1) == bytes([byte ^ 255])


def test_end_of_the_backend_is_passed_on(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    data = pattern(100_000)
    server.send(data)
    server.close_notify()
    server.half_close()
    assert client.read_to_end() == data
    assert client.saw_close_notify
    client.close_notify()
    client.close()
    p.log.wait("close", by="backend", why="eof")


def test_end_of_the_backend_without_close_notify_is_an_end_all_the_same(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    server.send(b"last words")
    server.half_close()
    assert client.read_to_end() == b"last words"


@pytest.mark.parametrize("whole", [True, False])
def test_answer_without_a_length_ends_with_close_notify(proxy, scripted_tls, whole):
    """RFC 9112 9.8: a bare FIN may be anyone's, so such an answer was cut off."""
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = asking(p, backend, request())
    server.send(answer() + b"some of it")
    assert client.read_until(b"some of it")
    if whole:
        server.close_notify()
    server.half_close()
    if whole:
        assert client.read_to_end() == b"" and client.saw_close_notify
    else:
        with pytest.raises(ConnectionResetError):
            client.read_to_end()
        assert not client.saw_close_notify
    client.close()
    p.log.wait("close", by="backend", why="done" if whole else "short")


def test_end_of_the_client_is_a_close_notify_for_the_backend(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    data = pattern(100_000)
    client.send(data)
    client.close_notify()
    assert server.read_to_end() == data
    assert server.saw_close_notify


@pytest.mark.parametrize("end", ["client", "backend"])
def test_reset_of_one_side_resets_the_other(proxy, scripted_tls, end):
    backend = scripted_tls()
    p = proxy(verified(backend), frames=0, **TLS)
    client, server = tunnel(p, backend)
    one, other = (client, server) if end == "client" else (server, client)
    one.reset()
    with pytest.raises(ConnectionResetError):
        other.read_to_end()
    p.log.wait("close", by=end, why="reset")


def test_damaged_record_of_the_backend_ends_the_session(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    record = bytearray(server.records(b"x" * 100))
    record[-1] ^= 1
    server.sock.sendall(record)
    assert client.read_to_end() == b"\x88\2\3\xf4"        # 1012
    p.log.wait("close", by="backend", code="1012")


@pytest.mark.parametrize("by", [b"", b"\1"])
@pytest.mark.parametrize("way", [verified, pinned, trusting])
def test_chain_that_is_interrupted(proxy, scripted, way, by):
    """By a backend, or who is in its place."""
    backend = scripted()
    p = proxy(way(backend), listeners=[("127.0.0.1", "0", WS)], **TLS)
    client = connect(p)
    client.send(request())
    server = backend.accept()
    server.read(int.from_bytes(server.read(5)[3:], "big"))
    hello = bytes([3, 3, *range(32), 0, 0xc0, 0x2b, 0])
    server.send(record(22, message(2, hello)))
    interrupted(p, server, certificate_message("self-signed"), by)
    server.close()
    assert client.read_head().status == 502


def test_tunnel_at_rest_lends_its_buffers_and_wakes(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    client, server = tunnel(p, backend)
    client.send(b"one")
    assert server.read(3) == b"one"
    eventually(lambda: p.totals()["records"] == "0")
    server.send(b"two")
    assert client.read(3) == b"two"
    eventually(lambda: p.totals()["records"] == "0")
    client.send(b"three")
    assert server.read(5) == b"three"


def test_backend_that_takes_nothing_blocks_no_other(proxy, scripted_tls):
    backend = scripted_tls()
    p = proxy(verified(backend), **TLS)
    stuck, _ = tunnel(p, backend)
    live, server = tunnel(p, backend)
    stuck.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            stuck.sock.send(stuck.records(bytes(16000)))
    for n in range(50):
        live.send(b"%02d" % n)
        assert server.read(2) == b"%02d" % n


def test_few_buffers_serve_many_sessions_in_turn(proxy, node):
    backend = node()
    p = proxy(verified(backend), max_busy=2, **TLS)
    sizes = []

    def client():
        sizes.append(len(get(p, "/source/100000")[1]))
    jobs = [threading.Thread(target=client) for _ in range(12)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PATIENCE)
    assert sizes == [100000] * 12


def test_sessions_leave_no_descriptor(proxy, nginx):
    good = nginx()
    bad = nginx(certificate="expired")
    p = proxy(verified(good), verified(bad), max_fails=0, **TLS)
    get(p)
    before = p.descriptors()
    for _ in range(20):
        assert get(p)[0].status == 200
    eventually(lambda: p.descriptors() <= before)


# ---- sizes ----

GIB = 1 << 30


@pytest.fixture
def steady():
    """Runs a transfer and says what it did to the proxy's memory: most resident, dirty for good."""
    def run(p, transfer):
        transfer(1 << 20)       # what the first one touches is touched now
        memory_peak_reset(p)
        peak, dirty = memory_peak_kb(p), p.memory_kb()
        transfer(GIB)
        return memory_peak_kb(p) - peak, p.memory_kb() - dirty
    return run


@slow
def test_download_of_1_gib_grows_no_memory(proxy, nginx, tmp_path, steady):
    (tmp_path / "files").mkdir()
    for size in (1 << 20, GIB):
        with open(tmp_path / "files" / str(size), "wb") as f:
            f.truncate(size)
    backend = nginx(files=tmp_path / "files",
                    locations="location /files/ { alias %s/; }" % (tmp_path / "files"))
    p = proxy(verified(backend), **TLS)

    def download(size):
        result = curl(p, f"/files/{size}", "-o", "/dev/null", "-w", "%{http_code} %{size_download}")
        assert result.stdout == f"200 {size}", result.stderr
    peak, dirty = steady(p, download)
    print(f"resident +{peak} KB, dirty +{dirty} KB")
    assert peak < 512 and dirty < 512


def test_upload_of_1_gib_grows_no_memory(proxy, node, tmp_path, steady):
    backend = node()
    p = proxy(verified(backend), **TLS)

    def upload(size):
        file = tmp_path / str(size)
        with open(file, "wb") as f:
            f.truncate(size)
        result = curl(p, "/sink", "-T", file)
        assert json.loads(result.stdout)["size"] == size, result.stderr
    peak, dirty = steady(p, upload)
    print(f"resident +{peak} KB, dirty +{dirty} KB")
    assert peak < 512 and dirty < 512


def test_answer_that_its_client_stopped_does_not_look_whole(proxy, scripted_tls):
    """BearSSL takes nothing more from a backend that was told the end."""
    backend = scripted_tls()
    p = proxy(verified(backend), listeners=[("127.0.0.1", "0", WS)], **TLS)
    client, server = asking(p, backend, request())
    server.send(answer() + b"half")
    client.read_head()
    assert client.read(4) == b"half"
    client.half_close()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
