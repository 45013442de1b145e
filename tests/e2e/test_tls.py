"""The TLS front: keys and certificates, versions, suites, resumption, broken handshakes."""

import os
import re
import shlex
import socket
import ssl
import subprocess
import threading

import pytest

import pki
from conftest import certificate
from harness import E2E, PATIENCE, WS, WSS, C, eventually
from peers import (Stream, TlsStream, ask, client_context, connect, head, node_client,
                   open_tunnel, play, switching, tcp, upgrade, ws)

CHACHA = C("BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256")
AES_GCM = C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256")
AES_CBC = C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA")
GET = head("GET / HTTP/1.1", {"Host": "example.test"})


def s_client(proxy, *args, stdin=b"", trust="ec256"):
    """What openssl s_client says of the proxy: output and errors as one text."""
    host, port = proxy.address(WSS)
    result = subprocess.run(["openssl", "s_client", "-connect", f"{host}:{port}", "-CAfile",
                             str(pki.DIR / f"{trust}.pem"), *args], input=stdin,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    return result.stdout.decode("latin-1")


def serves(proxy, trust):
    """A handshake that verifies that certificate, and an answer through it."""
    client = connect(proxy, context=client_context(trust))
    client.send(GET)
    return client.read_head().status == 426


# ---- keys and certificates ----

@pytest.mark.parametrize("name, key", [
    ("rsa2048", "rsa2048.key"), ("rsa2048", "rsa2048.pkcs1"),
    ("rsa3072", "rsa3072.key"), ("rsa3072", "rsa3072.pkcs1"),
    ("ec256", "ec256.key"), ("ec256", "ec256.sec1"),
    ("ec384", "ec384.key"), ("ec384", "ec384.sec1"),
    ("params", "params.key"),
])
def test_serves_with_key(proxy, place, name, key):
    p = proxy(place(), certs=[certificate(name, key)])
    assert serves(p, name)


@pytest.mark.parametrize("form", ["crlf", "noeol"])
def test_serves_with_files_as_editors_leave_them(proxy, place, form):
    p = proxy(place(), certs=[certificate(form)])
    assert serves(p, "ec256")


@pytest.mark.parametrize("key", ["rsa4096.key", "rsa4096.pkcs1"])
def test_serves_with_the_certificate_of_the_tutorials(proxy, place, key):
    p = proxy(place(), certs=[certificate("rsa4096", key)])
    context = client_context("rsa4096")
    context.check_hostname = False      # that command makes no subjectAltName
    client = connect(p, context=context)
    client.send(GET)
    assert client.read_head().status == 426


def test_chain_is_sent_whole_and_in_file_order(proxy, place):
    p = proxy(place(), certs=[(None, pki.DIR / "chain.pem", pki.DIR / "leaf.key")])
    seen = s_client(p, "-showcerts", trust="root")
    assert re.findall(r"^ *\d s:CN = (\w+)", seen, re.M) == ["leaf", "intermediate"]
    assert "Verify return code: 0 (ok)" in seen


def test_gnutls_verifies_the_chain_and_gets_an_answer(proxy, place):
    p = proxy(place(), certs=[(None, pki.DIR / "chain.pem", pki.DIR / "leaf.key")])
    host, port = p.address()
    request, ours = os.pipe()           # stays open: gnutls-cli leaves at its end
    os.write(ours, GET)
    result = subprocess.run(
        ["gnutls-cli", "--x509cafile", pki.DIR / "root.pem", "--sni-hostname", "localhost",
         "--verify-hostname", "localhost", "--port", str(port), host],
        stdin=request, capture_output=True, timeout=PATIENCE)
    os.close(request)
    os.close(ours)
    assert b"The certificate is trusted" in result.stdout, result.stdout
    assert b"HTTP/1.1 426 " in result.stdout


def test_node_verifies_the_certificate(proxy, node_server):
    p = proxy(node_server())
    assert node_client(p, sizes=[10])["echoed"] == 2


# ---- versions and suites ----

@pytest.mark.parametrize("version", ["tls1", "tls1_1", "tls1_3"])
def test_version_is_refused(proxy, place, version):
    p = proxy(place())
    seen = s_client(p, f"-{version}", "-cipher", "ALL:@SECLEVEL=0")
    assert "Cipher is (NONE)" in seen
    assert version != "tls1_3" or "alert protocol version" in seen
    p.log.wait_ending("tls-version", status="-")


def test_tls12_is_what_a_client_of_all_versions_gets(proxy, place):
    p = proxy(place())
    assert "Protocol  : TLSv1.2" in s_client(p)


def test_old_version_by_configuration(proxy, place):
    p = proxy(place(), tls_min=C("BR_TLS10"), ciphers=[AES_GCM, AES_CBC])
    seen = s_client(p, "-tls1", "-cipher", "ALL:@SECLEVEL=0")
    assert re.search(r"Protocol *: TLSv1$", seen, re.M)


def test_no_common_suite(proxy, place):
    p = proxy(place())
    seen = s_client(p, "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA")
    assert "Cipher is (NONE)" in seen
    p.log.wait_ending("tls-cipher", status="-")


@pytest.mark.parametrize("first, second, chosen", [
    (CHACHA, AES_GCM, "ECDHE-ECDSA-CHACHA20-POLY1305"),
    (AES_GCM, CHACHA, "ECDHE-ECDSA-AES128-GCM-SHA256"),
])
def test_order_of_suites_is_the_proxys(proxy, place, first, second, chosen):
    p = proxy(place(), ciphers=[first, second], ciphers_by_cpu=0)
    wishes = ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"]
    for offer in (wishes, wishes[::-1]):
        seen = s_client(p, "-tls1_2", "-cipher", ":".join(offer))
        assert f"Cipher is {chosen}" in seen


@pytest.mark.parametrize("signs, chosen", [
    ("RSA-SHA256:+SIGN-RSA-PSS-RSAE-SHA256", "RSA"), ("ECDSA-SHA256:+SIGN-RSA-SHA256", "ECDSA")])
def test_certificate_is_one_whose_signatures_the_client_takes(proxy, place, signs, chosen):
    """GnuTLS offers suites of both kinds in any case."""
    p = proxy(place(), certs=[certificate("ec256"), certificate("rsa2048")])
    host, port = p.address()
    result = subprocess.run(
        ["gnutls-cli", "--insecure", "--port", str(port), host, "--priority",
         f"NORMAL:-VERS-ALL:+VERS-TLS1.2:-SIGN-ALL:+SIGN-{signs}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    assert f"-(ECDHE-X25519)-({chosen}-SHA256)-" in result.stdout, result.stdout + result.stderr


def test_order_of_suites_follows_the_cpu(proxy, place):
    with open("/proc/cpuinfo") as cpuinfo:
        aes = re.search(r"^flags.*\baes\b", cpuinfo.read(), re.M)
    suites = [CHACHA, AES_GCM] if aes else [AES_GCM, CHACHA]
    p = proxy(place(), ciphers=suites, ciphers_by_cpu=1)
    chosen = "AES128-GCM-SHA256" if aes else "CHACHA20-POLY1305"
    assert f"Cipher is ECDHE-ECDSA-{chosen}" in s_client(p)


def test_open_line_names_version_and_suite(proxy, scripted):
    backend = scripted()
    p = proxy(backend, ciphers=[CHACHA])
    open_tunnel(p, backend)
    line = p.log.wait("open")
    assert (line["tls"], line["suite"]) == ("1.2", "ECDHE_ECDSA_CHACHA20")


# ---- extensions, resumption, renegotiation ----

def test_alpn_selects_http11(proxy, place):
    p = proxy(place())
    assert "ALPN protocol: http/1.1" in s_client(p, "-alpn", "h2,http/1.1")


def test_client_without_alpn_is_served(proxy, place):
    p = proxy(place())
    assert "No ALPN negotiated" in s_client(p, "-tls1_2")
    assert serves(p, "ec256")


def test_client_without_sni_is_served(proxy, place):
    p = proxy(place())
    context = client_context(None)
    client = connect(p, context=context, name=None)
    client.send(GET)
    assert client.read_head().status == 426


def open_again(p, backend):
    """Two tunnels one after the other, the second with the TLS session of the first."""
    context = client_context()
    first, _ = open_tunnel(p, backend, context=context)
    session = first.tls.session
    second, _ = open_tunnel(p, backend, context=context, session=session)
    return second.tls.session_reused


def test_session_is_resumed(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    assert open_again(p, backend)
    assert p.log.wait("open")["resumed"] == "0"
    assert p.log.wait("open", nth=2)["resumed"] == "1"


def test_session_is_not_resumed_without_a_cache(proxy, scripted):
    backend = scripted()
    p = proxy(backend, session_cache=0)
    assert not open_again(p, backend)
    assert p.log.wait("open", nth=2)["resumed"] == "0"


def test_openssl_resumes(proxy, place):
    p = proxy(place())
    seen = s_client(p, "-tls1_2", "-reconnect")
    assert len(re.findall(r"^Reused, TLSv1.2", seen, re.M)) == 5


def test_renegotiation_is_refused(proxy, place):
    p = proxy(place())
    seen = s_client(p, "-tls1_2", "-legacy_renegotiation", stdin=b"R\n")
    assert "RENEGOTIATING" in seen
    assert re.search("no.renegotiation", seen)


@pytest.mark.parametrize("record_max", [16384, 512])
def test_handshake_is_in_records_as_small_as_wanted(proxy, place, record_max):
    """Its certificate alone is larger."""
    p = proxy(place(), certs=[certificate("rsa4096")], record_max=record_max)
    seen = s_client(p, "-tls1_2", "-msg", "-quiet", "-no_ign_eof", trust="rsa4096")
    sizes = [int(high + low, 16) for high, low in re.findall(
        r"^<<< .*RecordHeader.*\n +\S\S \S\S \S\S (\S\S) (\S\S)", seen, re.M)]
    assert "verify error" not in seen and len(sizes) > 2
    assert max(sizes) <= record_max and (max(sizes) > 512) == (record_max > 512), sizes


# ---- handshakes that fail ----

def test_client_that_distrusts_the_certificate(proxy, place):
    p = proxy(place())
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(p, context=client_context("other"))
    p.log.wait_ending("tls-alert", status="-", alert="48")


def test_alert_counts_before_the_end_behind_it(proxy, place):
    """They come at once, while the proxy has nothing else to do."""
    p = proxy(place())
    for _ in range(100):
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(p, context=client_context("other"))
    p.log.wait("reject", nth=100)
    assert {line["why"] for line in p.log.all("reject")} == {"tls-alert"}


HELLO = bytes([22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3, *range(32), 0, 0, 2, 0xc0, 0x2b, 1, 0])
PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x21, 0x11, 0, 12]) + bytes(12)


def spoilt(at, byte):
    return HELLO[:at] + bytes([byte]) + HELLO[at + 1:]


@pytest.mark.parametrize("garbage, why, more, alert", [
    (b"\x16\x03\x01\x00\x05hello", "tls-error", {"cause": "unexpected-message"}, 10),
    (spoilt(43, 33), "tls-error", {"cause": "malformed"}, 50),          # session ID
    (spoilt(45, 9), "tls-error", {"cause": "malformed"}, 50),           # suites
    (spoilt(48, 9), "tls-error", {"cause": "malformed"}, 50),           # compression methods
    (spoilt(9, 2), "tls-version", {}, 70),
    (b"\x17\x03\x03\x00\x10" + bytes(16), "tls-error", {"cause": "unexpected-message"}, 10),
    (b"\x16\x03\x01\xff\xff" + bytes(0xffff), "tls-error", {"cause": "record-length"}, 22),
    (b"\x80\x2e\x01\x00\x02" + bytes(41), "not-tls", {}, 70),
    (bytes(range(255, 0, -1)) * 4, "not-tls", {}, 70),
    (PROXY_V2 + HELLO, "not-tls", {}, 70),
], ids=["no-hello", "long-id", "long-suites", "long-compression", "version-2", "early-data",
        "long-record", "sslv2", "noise", "proxy-v2"])
def test_handshake_of_garbage(proxy, place, garbage, why, more, alert):
    p = proxy(place())
    client = tcp(p)
    client.send(garbage)
    client.half_close()
    p.log.wait_ending(why, status="-", **more)
    assert client.read(7) == bytes([21, 3, 3, 0, 2, 2, alert])
    assert serves(p, "ec256")


def test_client_without_http11_is_named_so(proxy, place):
    p = proxy(place())
    assert "alert number 120" in s_client(p, "-tls1_2", "-alpn", "h2")
    p.log.wait_ending("alpn", status="-")


@pytest.mark.parametrize("name", ["a.example.", "x.b.example."])
def test_server_name_with_the_final_dot(proxy, place, name):
    """Browsers send it for https://a.example./"""
    p = proxy(place(), certs=[certificate("other"), certificate("ec256", server_name="a.example"),
                              certificate("ec256", server_name="*.b.example")])
    assert "subject=CN = ec256" in s_client(p, "-tls1_2", "-servername", name)


# ---- those who ask nothing ----

def probe_silent(p):
    tcp(p).close()


def probe_reset(p):
    tcp(p).reset()


def probe_tls(p):
    connect(p).close()


def probe_tls_reset(p):
    connect(p).reset()


def probe_waits(p):
    tcp(p).read_to_end()


def probe_tls_waits(p):
    connect(p).read_to_end()


def probe_clear(p):
    tcp(p, WS).close()


PROBES = [probe_silent, probe_reset, probe_tls, probe_tls_reset, probe_waits, probe_tls_waits,
          probe_clear]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("log_probes", [0, 1])
def test_probe_is_counted_and_fills_no_log(proxy, place, probe, log_probes):
    waits = {"handshake_ms": 500, "head_ms": 500, "idle_ms": 0} if "waits" in probe.__name__ else {}
    p = proxy(place(), log_probes=log_probes, **waits,
              listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS)])
    probe(p)
    eventually(lambda: p.totals()["probes"] == "1")
    assert len(p.log.all("reject")) == log_probes


@pytest.mark.parametrize("half", [b"\x16", b"\x16\x03\x01\x00\xa0\x01", HELLO])
def test_half_a_handshake_is_no_probe(proxy, place, half):
    p = proxy(place(), log_probes=0)
    client = tcp(p)
    client.send(half)
    client.half_close()
    p.log.wait("reject")
    assert p.totals()["probes"] == "0"


@pytest.mark.parametrize("kind", [WSS, WS])
def test_half_a_request_is_no_probe(proxy, place, kind):
    p = proxy(place(), log_probes=0, listeners=[("127.0.0.1", "0", kind)])
    client = connect(p)
    client.send(b"G")
    client.close()
    p.log.wait_ending("eof")
    assert p.totals()["probes"] == "0"


def test_client_that_got_no_buffer_is_no_probe(proxy, scripted):
    """It said hello, but what another has said beyond its request holds what it takes to read it."""
    p = proxy(scripted(), log_probes=0, max_busy=1, handshake_ms=1000, stall_ms=60000)
    first = connect(p)
    first.send(upgrade() + b"early")
    eventually(lambda: p.totals()["records"] == "1")
    second = tcp(p)
    second.send(HELLO)
    p.log.wait_ending("handshake-timeout")
    assert p.totals()["probes"] == "0"


def test_plain_http_on_the_tls_port_gets_a_plain_answer(proxy, place):
    p = proxy(place())
    client = tcp(p)
    client.send(GET)
    answer = client.read_head()
    assert answer.status == 400
    assert answer.get("Connection") == "close"
    client.read_to_end()
    p.log.wait_ending("plain-http", status="400")


def test_client_that_leaves_before_the_handshake(proxy, place):
    p = proxy(place())
    tcp(p).close()
    p.log.wait_ending("eof", status="-")


def test_client_that_resets_in_the_handshake(proxy, place):
    p = proxy(place())
    client = tcp(p)
    client.send(b"\x16\x03\x01")
    client.reset()
    p.log.wait_ending("reset", status="-")


def test_silent_client_is_cut_after_handshake_ms(proxy, place):
    p = proxy(place(), handshake_ms=300)
    client = tcp(p)
    assert client.read_to_end() == b""
    p.log.wait_ending("handshake-timeout", status="-")


def test_trickled_handshake_gets_no_more_than_handshake_ms(proxy, place):
    p = proxy(place(), handshake_ms=500)
    client = tcp(p)
    with pytest.raises(OSError):
        for byte in b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc" + bytes(PATIENCE * 20):
            client.send(bytes([byte]))
            client.sock.settimeout(0.05)
            try:
                if not client.sock.recv(1):
                    raise ConnectionError
            except TimeoutError:
                pass
    p.log.wait_ending("handshake-timeout", status="-")


def test_endless_warnings_before_the_handshake(proxy, place):
    p = proxy(place())
    client = tcp(p)
    with pytest.raises(ConnectionError):
        for _ in range(10000):
            client.send(b"\x15\x03\x03\x00\x02\x01\x5a" * 100)
    p.log.wait_ending("flood", status="-")


def test_handshakes_do_not_stall_a_tunnel(proxy, scripted):
    """RSA-4096 makes each handshake long: between two of them a tunnel must get its turn."""
    backend = scripted()
    p = proxy(backend, certs=[certificate("rsa4096")], session_cache=0, handshake_ms=600000)
    context = client_context(None)
    client, server = open_tunnel(p, backend, context=context)
    crowd = [threading.Thread(target=lambda: connect(p, context=context)) for _ in range(30)]
    for one in crowd:
        one.start()
    turns = 0
    while any(one.is_alive() for one in crowd):
        client.send(b"ping")
        assert server.read(4) == b"ping"
        turns += 1
    assert turns >= len(crowd) / 2


@pytest.fixture
def no_random(tmp_path):
    """Environment in which the system has no random bytes while a file exists."""
    library, flag = tmp_path / "norandom.so", tmp_path / "flag"
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-o", library,
                    E2E / "norandom.c"], check=True)
    return flag, {**os.environ, "LD_PRELOAD": str(library), "NO_RANDOM": str(flag),
                  "ASAN_OPTIONS": "verify_asan_link_order=0"}


def test_handshake_without_entropy_is_refused_and_others_go_on(proxy, scripted, no_random):
    flag, environment = no_random
    backend = scripted()
    p = proxy(backend, popen={"env": environment})
    client, server = open_tunnel(p, backend)
    flag.touch()
    with pytest.raises((ssl.SSLError, OSError)):
        connect(p)
    p.log.wait_ending("no-random", status="-")
    client.send(b"alive")
    assert server.read(5) == b"alive"
    flag.unlink()
    assert serves(p, "ec256")


# ---- listeners ----

def test_listener_on_ipv6(proxy, scripted):
    backend = scripted()
    p = proxy(backend, listeners=[("::1", "0", WSS)])
    open_tunnel(p, backend)
    assert p.log.wait("open")["client"].startswith("[::1]:")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_dual_stack_listener_shows_plain_addresses(proxy, scripted, address):
    backend = scripted()
    p = proxy(backend, listeners=[("::", "0", WS)])
    client = Stream(socket.create_connection((address, p.ports[0]), PATIENCE))
    client.send(upgrade())
    server = backend.accept()
    assert server.read_head().get("X-Forwarded-For") == address
    server.send(switching())
    shown = f"[{address}]:" if ":" in address else f"{address}:"
    assert p.log.wait("open")["client"].startswith(shown)


def test_several_listeners_of_both_kinds(proxy, python_server):
    p = proxy(python_server(), listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", WS),
                                          ("::1", "0", WS)])

    async def echo(kind):
        async with ws(p, kind=kind) as client:
            await client.send("hello")
            return await client.recv()
    assert play(echo(WSS)) == play(echo(WS)) == "hello"
    assert ask(p, GET, kind=WS)[0].status == 426


def test_plain_listener_refuses_tls(proxy, place):
    p = proxy(place(), listeners=[("127.0.0.1", "0", WS)])
    with pytest.raises(OSError):
        TlsStream(tcp(p).sock, client_context())
    p.log.wait_ending("request-line", status="400")
