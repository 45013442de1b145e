"""Starting, checking, signals, logs and privileges."""

import contextlib
import datetime
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

import pki
from conftest import certificate, whole_config
from harness import (INSTRUMENTED, PATIENCE, RUN, SYSLOG, WS, WSS, BuildFailed, Log, build, config_text, eventually,
                     run_once)
from more import TLS_PIN, Etc, key_of, pem, unshare
from peers import (Stream, ask, client_context, client_hello, connect, head, open_tunnel, tcp,
                   upgrade)

GET = head("GET / HTTP/1.1", {"Host": "example.test"})

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# In a chroot the leak check of the address sanitizer misses /proc.
NO_LEAK_CHECK = {"env": {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}}


def serves(proxy, trust="ec256"):
    client = connect(proxy, context=client_context(trust))
    client.send(GET)
    return client.read_head().status == 426


# ---- options ----

def test_check_accepts_a_good_configuration_and_prints_the_ceiling(place):
    result = run_once(whole_config([place()], {}), "-t")
    assert result.returncode == 0
    assert re.search(r"\d", result.stdout + result.stderr)


def test_check_needs_no_port(place):
    """It is run beside the proxy that it checks for."""
    here = place()
    with here.listen():
        config = {"listeners": [(here.host, here.port, WS)]}
        assert run_once(whole_config([place()], config), "-t").returncode == 0


def test_version_prints_the_configuration_one_entry_a_line(place):
    here = place()
    result = run_once(whole_config([here], {"head_ms": 4321}), "-v")
    lines = result.stdout.splitlines()
    assert result.returncode == 0
    assert any("wssproxy" in line for line in lines)
    assert any("BearSSL" in line for line in lines)
    assert any(line.startswith("head_ms") and "4321" in line for line in lines)
    assert any("backend" in line and here.port in line for line in lines)
    assert any("listener" in line and "127.0.0.1" in line for line in lines)


@pytest.mark.parametrize("args", [["-x"], ["-t", "more"], ["file"]])
def test_bad_usage_ends_with_2(place, args):
    result = run_once(whole_config([place()], {}), *args)
    assert result.returncode == 2
    assert "usage" in result.stderr.lower()


# ---- what keeps it from starting ----

BROKEN = {
    # entries of config.h, and what the message must name
    "no-certificate": ([(None, "/nonexistent/cert.pem", pki.DIR / "ec256.key")],
                       ["/nonexistent/cert.pem", "No such file"]),
    "no-key": ([(None, pki.DIR / "ec256.pem", "/nonexistent/key.pem")],
               ["/nonexistent/key.pem", "No such file"]),
    "key-of-another-ec": ([certificate("ec256", "other.key")], ["certs[0]", "ec256.pem"]),
    "key-of-another-rsa": ([certificate("rsa2048", "rsa3072.key")], ["rsa2048.pem"]),
    "key-of-another-kind": ([certificate("ec256", "rsa2048.key")], ["ec256.pem"]),
    "truncated-certificate": ([certificate("truncated", "ec256.key")], ["truncated.pem"]),
    "truncated-key": ([certificate("ec256", "truncated.key")], ["truncated.key"]),
    "key-as-certificate": ([(None, pki.DIR / "ec256.key", pki.DIR / "ec256.key")], ["ec256.key"]),
    "certificate-as-key": ([certificate("ec256", "ec256.pem")], ["ec256.pem"]),
    "directory": ([(None, pki.DIR, pki.DIR / "ec256.key")], [str(pki.DIR)]),
    "empty-file": ([(None, "/dev/null", pki.DIR / "ec256.key")], ["/dev/null"]),
}


@pytest.mark.parametrize("certs, named", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_named(place, certs, named):
    entries = whole_config([place()], {"certs": certs})
    for args in ([], ["-t"]):
        result = run_once(entries, *args)
        assert result.returncode == 1
        assert all(part in result.stderr for part in named), result.stderr


def test_port_in_use_is_named(place):
    here = place()
    with here.listen():
        config = {"listeners": [(here.host, here.port, WS)]}
        result = run_once(whole_config([place()], config))
    assert result.returncode == 1
    assert all(part in result.stderr for part in (here.host, here.port, "in use"))


@pytest.mark.parametrize("config, named", [
    ({"listeners": [("not an address", "443", WSS)]}, "not an address"),
    ({"listeners": [("127.0.0.1", "no-such-port", WSS)]}, "no-such-port"),
    ({"user": "no-such-user"}, "no-such-user"),
    ({"group": "no-such-group"}, "no-such-group"),
    ({"listeners": [("127.0.0.1", "65536", WSS)]}, "65536"),
    ({"chroot_dir": "/no/such/dir"}, "/no/such/dir"),
    ({"chroot_dir": "/dev/null"}, "Not a directory"),
    ({"chroot_dir": "."}, "absolute"),
    ({"listeners": [(None, "443", WSS)]}, "NULL"),
    ({"cookie_name": "a; b"}, "a; b"),
    ({"origins": ["https://a.example/", None]}, "a.example/"),
    ({"origins": ["same", "https://A.example", None]}, "A.example"),
    ({"origins": ["a.example", None]}, "a.example"),
    ({"origins": ["*", None]}, "NULL for any"),
    ({"origins": ["https://*.a.example", None]}, "each one by itself"),
])
def test_bad_entry_is_named(place, config, named):
    """At start, and by the check."""
    for args in ([], ["-t"]):
        result = run_once(whole_config([place()], config), *args)
        assert result.returncode == 1
        assert result.stderr.startswith(f"wssproxy: config.h: {[*config][0]}")
        assert named in result.stderr


@pytest.mark.parametrize("backend, named", [
    ({"host": "127.0.0.1", "port": "0"}, 'port "0"'),
    ({"host": "127.0.0.1", "port": None}, 'port "NULL"'),
    ({"host": "127.0.0.1", "port": "80", "path": "chat"}, '"chat"'),
    ({"host": "unix:"}, "unix:"),
    ({"host": "fe80::1", "port": "80"}, '"fe80::1" is link-local'),
    ({"host": "febf:0:0:1::", "port": "80"}, "is link-local"),
    ({"host": "fe80::1%eth0", "port": "80"}, '"fe80::1%eth0" is no address and can\'t be a name'),
    ({"host": "ws://api.lan", "port": "80"}, "has a scheme: give the name alone"),
    ({"host": "api.lan:3000", "port": "80"}, '"api.lan:3000"'),
    ({"host": "[2001:db8::1]", "port": "80"}, "brackets"),
    ({"host": "api lan", "port": "80"}, '"api lan"'),
])
def test_bad_backend_is_named(place, backend, named):
    result = run_once(whole_config([place(), backend], {}), "-t")
    assert result.returncode == 1
    assert result.stderr.startswith("wssproxy: config.h: backends[1]")
    assert named in result.stderr


@pytest.mark.parametrize("entry, value", [
    ("max_sessions", 0), ("max_busy", 0), ("head_max", 100), ("head_max", 60000),
    ("head_ms", 0), ("idle_ms", 100), ("hash_bits4", 33), ("hash_bits6", 129),
    ("source_bits6", 65), ("source_bits6", 0), ("user_timeout_ms", 119999)])
def test_bad_number_is_refused_and_named(place, entry, value):
    """By the compiler where it can know, at start where it can't."""
    entries = whole_config([place()], {entry: value})
    try:
        result = run_once(entries, "-t")
    except BuildFailed as refusal:
        message = re.search("static.assert.*failed.*", str(refusal))[0]
    else:
        assert result.returncode == 1
        message = result.stderr
    assert entry in message


# ---- log ----

def test_start_and_listen_lines(proxy, place):
    p = proxy(place(), listeners=[("127.0.0.1", "0", WSS), ("::1", "0", WS)])
    assert p.log.lines[0].event == "start" and p.log.lines[0]["version"]
    assert [line["kind"] for line in p.log.all("listen")] == ["WSS", "WS"]
    assert re.fullmatch(r"\[::1\]:\d+", p.log.all("listen")[1]["address"])


def test_open_and_close_lines(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend, request=upgrade("/chat?secret=1"))
    line = p.log.wait("open")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line["client"])
    assert line["host"] == "example.test"
    assert line["path"] == "/chat"
    assert line["backend"] == backend.name
    assert line["resumed"] == "0" and line["ms"].isdigit()
    client.send(b"12345")
    assert server.read(5) == b"12345"
    server.send(b"1234567")
    server.close()
    client.read_to_end()
    client.close()
    end = p.log.wait("close")
    assert (end["id"], end["by"], end["why"]) == (line["id"], "backend", "eof")
    assert re.fullmatch(r"\d+\.\d", end["s"])
    assert (end["rx"], end["tx"]) == ("5", "7")


def test_log_holds_no_query_strings(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    open_tunnel(p, backend, request=upgrade("/chat?token=hidden"))
    ask(p, head("GET /page?token=hidden HTTP/1.1", {"Host": "example.test"}))
    p.log.wait_ending("not-websocket")
    assert "hidden" not in p.log.text


def test_odd_bytes_are_escaped_in_the_log(proxy, scripted):
    """One session, one line, and no field that it did not earn."""
    backend = scripted()
    p = proxy(backend)
    open_tunnel(p, backend, request=upgrade('/a"b=c'))
    assert p.log.wait("open")["path"] == r"/a\x22b\x3dc"


def test_path_is_no_format_in_the_log(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    path = "/%s%n%x%1000000c%%"
    open_tunnel(p, backend, request=upgrade(path))
    assert p.log.wait("open")["path"] == path


@pytest.mark.parametrize("path, host", [
    ("/\rclose", "a"), ("/\nclose", "a"), ("/\x1b[2J", "a"), ("/\0", "a"), ("/\xc2\x85", "a"),
    ("/", "a\nclose id=1"),
    ("/", "a\x1b[2J"), ("/", "a\0b"), ("/", "a why=done")])
def test_request_makes_no_line_of_its_own(proxy, scripted, path, host):
    backend = scripted()
    p = proxy(backend)
    client = connect(p)
    client.send(upgrade(path, Host=host))
    assert client.read_head().status == 400
    client.close()
    p.log.wait("reject", status="400")
    p.stop()
    events = [line.event for line in p.log.lines if line.event not in ("warning", "cert")]
    assert events == ["start", "listen", "reject", "stop", "stop"]
    assert all(char.isprintable() for line in p.log.lines for char in line.text)


def test_flood_of_rejects_does_not_fill_the_log(proxy, place):
    p = proxy(place(), listeners=[("127.0.0.1", "0", WS)], log_rejects=3)
    p.signal(signal.SIGSTOP)            # so that all come at one moment
    clients = [tcp(p) for _ in range(50)]
    for client in clients:
        client.send(GET)
    p.signal(signal.SIGCONT)
    for client in clients:
        assert client.read_head().status == 426
    p.log.wait("reject", suppressed="47")
    assert len(p.log.all("reject", status="426")) == 3
    assert p.totals()["rejected"] == "50"
    ask(p, GET)
    p.log.wait("reject", nth=4, status="426")


@pytest.fixture
def without_reader(place):
    """A proxy that logs into a small pipe, or to a terminal, that nobody reads; closes, if asked, its
    reading end. Gives its address, and the end that it writes to."""
    processes, ends = [], []

    def start(close, terminal, wrapper=()):
        here = place()
        config = {"listeners": [(here.host, here.port, WS)]}
        read_end, write_end = os.openpty() if terminal else os.pipe()
        ends.append(write_end)
        if not terminal:
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 8192)
        binary = build(config_text(whole_config([place()], config)))
        processes.append(subprocess.Popen([*wrapper, binary], stderr=write_end))
        with os.fdopen(read_end, "rb", buffering=0, closefd=close) as log:
            text = b""
            while b"listen" not in text:
                more = log.read(4096)
                assert more, text
                text += more
        return here, write_end
    yield start
    for process in processes:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    for end in ends:
        os.close(end)


def many_lines(here):
    for _ in range(400):
        with Stream(socket.create_connection((here.host, int(here.port)), PATIENCE)) as client:
            client.send(GET)
            assert client.read_head().status == 426


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("close", [True, False], ids=["reader-died", "reader-stuck"])
def test_log_that_nobody_reads_stops_nothing(without_reader, close, terminal):
    many_lines(without_reader(close, terminal)[0])


@pytest.mark.skipif(INSTRUMENTED or bool(RUN), reason="needs no /proc itself")
def test_terminal_that_nobody_reads_stops_nothing_without_proc(without_reader):
    """It can't be opened again; what others have of it stays as it was."""
    here, terminal = without_reader(False, True, [*unshare(), "sh", "-c",
                                                  'mount -t tmpfs none /proc && exec "$0"'])
    many_lines(here)
    assert not fcntl.fcntl(terminal, fcntl.F_GETFL) & os.O_NONBLOCK


def test_log_that_may_not_grow_stops_nothing(place, tmp_path):
    """SIGXFSZ would end it."""
    here = place()
    config = whole_config([place()], {"listeners": [(here.host, here.port, WS)]})
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([*RUN, build(config_text(config))], stderr=log, preexec_fn=lambda:
                                   resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    try:
        eventually(lambda: is_open(here))
        for _ in range(30):
            with Stream(socket.create_connection((here.host, int(here.port)))) as client:
                client.send(GET)
                assert client.read_head().status == 426
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert (tmp_path / "log").stat().st_size == 1000


def is_open(here):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((here.host, int(here.port))).close()
        return True
    return False


# ---- SIGHUP ----

@pytest.fixture
def live_certs(live_files):
    """A certs[] entry whose files can be exchanged."""
    chain, key = live_files / "cert.pem", live_files / "key.pem"

    def put(name, key_name=None):
        for source, target in ((f"{name}.pem", chain), (f"{key_name or name}.key", key)):
            shutil.copy(pki.DIR / source, target.with_suffix(".new"))
            target.with_suffix(".new").rename(target)
    put("ec256")
    return [(None, chain, key)], put


def test_sighup_loads_new_certificates_and_touches_no_session(proxy, scripted, live_certs):
    certs, put = live_certs
    backend = scripted()
    p = proxy(backend, certs=certs)
    client, server = open_tunnel(p, backend)
    put("other")
    p.signal(signal.SIGHUP)
    assert p.log.wait("reload", ok=True)["certs"] == "1"
    assert serves(p, "other")
    client.send(b"still here")
    assert server.read(10) == b"still here"


@pytest.mark.parametrize("name, key", [("truncated", "ec256"), ("ec256", "truncated"),
                                       ("ec256", "other")])
def test_sighup_with_broken_files_keeps_the_old(proxy, scripted, live_certs, name, key):
    certs, put = live_certs
    backend = scripted()
    p = proxy(backend, certs=certs)
    client, server = open_tunnel(p, backend)
    put(name, key)
    p.signal(signal.SIGHUP)
    assert str(certs[0][1].parent) in p.log.wait("reload", failed=True).text
    assert serves(p, "ec256")
    client.send(b"still here")
    assert server.read(10) == b"still here"
    put("other")
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert serves(p, "other")
    assert len(p.log.all("reload", failed=True)) == 1


def test_sighup_with_a_missing_file_keeps_the_old(proxy, place, live_certs):
    certs, _ = live_certs
    p = proxy(place(), certs=certs)
    certs[0][2].unlink()
    p.signal(signal.SIGHUP)
    assert "key.pem" in p.log.wait("reload", failed=True).text
    assert serves(p, "ec256")


def test_sighup_changes_the_kind_of_key(proxy, place, live_certs):
    certs, put = live_certs
    p = proxy(place(), certs=certs)
    for n, name in enumerate(("rsa2048", "ec384", "rsa3072", "ec256")):
        put(name)
        p.signal(signal.SIGHUP)
        p.log.wait("reload", ok=True, nth=n + 1)
        assert serves(p, name)


def test_sighup_while_a_handshake_is_under_way(proxy, place, live_certs):
    certs, put = live_certs
    p = proxy(place(), certs=certs)
    half = tcp(p)
    half.send(b"\x16\x03\x01")
    put("other")
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert serves(p, "other")


def test_second_sighup_waits_for_a_handshake_with_the_first_key(proxy, place, live_certs):
    """There is room for two sets of keys."""
    certs, put = live_certs
    p = proxy(place(), certs=certs)
    half = tcp(p)
    half.send(client_hello())
    assert half.read(1) == b"\x16"
    for name in ("other", "ec384"):
        put(name)
        p.signal(signal.SIGHUP)
        p.log.wait("reload", ok=True)
    for _ in range(2):
        p.totals()      # it has seen the second signal, and acted
    assert len(p.log.all("reload")) == 1
    half.close()
    p.log.wait_ending("eof")
    assert serves(p, "ec384")
    p.log.wait("reload", ok=True, nth=2)


# ---- SIGTERM ----

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_proxy_ends_with_0(proxy, place, number):
    p = proxy(place())
    p.signal(number)
    assert p.wait_exit() == 0
    assert p.log.wait("stop")["signal"] == number.name


def test_drain_lets_sessions_finish_and_takes_no_more(proxy, scripted):
    backend = scripted()
    p = proxy(backend, drain_ms=600000)
    first, (client, server) = open_tunnel(p, backend), open_tunnel(p, backend)
    p.signal(signal.SIGTERM)
    p.log.wait("stop")
    first[0].receive()
    for end in first:
        end.close()
    eventually(lambda: is_refused(p))
    client.send(b"not yet")
    assert server.read(7) == b"not yet"
    client.close_notify()
    assert server.read_to_end() == b""
    server.close()
    client.close()
    assert p.wait_exit() == 0
    p.log.wait("close", why="eof")


def is_refused(p):
    try:
        tcp(p).close()
        return False
    except ConnectionRefusedError:
        return True


def test_drain_ends_after_drain_ms(proxy, scripted):
    backend = scripted()
    p = proxy(backend, drain_ms=300)
    client, server = open_tunnel(p, backend)
    p.signal(signal.SIGTERM)
    client.read_to_end()
    assert p.wait_exit() == 0
    p.log.wait("close", by="proxy", why="drain")


def test_second_sigterm_ends_at_once(proxy, scripted):
    backend = scripted()
    p = proxy(backend, drain_ms=600000)
    streams = [open_tunnel(p, backend) for _ in range(3)]
    p.signal(signal.SIGTERM)
    p.log.wait("stop")
    p.signal(signal.SIGTERM)
    assert p.wait_exit() == 0
    for client, _ in streams:
        client.read_to_end()


def test_drain_with_sessions_at_rest(proxy, scripted):
    backend = scripted()
    p = proxy(backend, drain_ms=300)
    open_tunnel(p, backend)
    eventually(lambda: p.totals()["records"] == "0")
    p.signal(signal.SIGTERM)
    assert p.wait_exit() == 0
    p.log.wait("close", why="drain")


def test_restart_on_the_same_port_at_once(proxy, place):
    """What the one before it closed first is still in TIME_WAIT."""
    here, listener = place(), place()
    for _ in range(2):
        p = proxy(here, listeners=[(listener.host, listener.port, WS)])
        assert ask(p, GET)[0].status == 426
        p.signal(signal.SIGTERM)
        assert p.wait_exit() == 0


# ---- SIGUSR1 ----

def test_sigusr1_logs_totals(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    client.send(b"12345")
    assert server.read(5) == b"12345"
    p.signal(signal.SIGUSR1)
    totals = p.log.wait_text(r"^stats .*sessions=")
    assert totals["sessions"] == "1"
    assert p.log.wait_text(r"^stats backend=")["backend"] == backend.name


def test_sigusr1_has_a_line_for_each_backend(proxy, place):
    places = [place(), place(), place()]
    p = proxy(*places)
    p.signal(signal.SIGUSR1)
    p.log.wait_text(r"^stats backend=", nth=3)
    lines = [line for line in p.log.all("stats") if "backend" in line.fields]
    assert [line["backend"] for line in lines] == [here.name for here in places]


def test_many_signals_harm_nobody(proxy, scripted):
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    for n in range(200):
        p.signal((signal.SIGUSR1, signal.SIGHUP, signal.SIGPIPE)[n % 3])
        client.send(b"%03d" % n)
        assert server.read(3) == b"%03d" % n


# ---- what is said of certificates ----

def told(result_or_log, entry):
    """The line of a certificate, by the check or by a proxy."""
    log = result_or_log
    if not isinstance(log, Log):
        log = Log()
        for text in result_or_log.stderr.splitlines():
            log.feed(text)
        log.end()
    return log.wait("cert", entry=entry)


def end_date(path):
    text = subprocess.run(["openssl", "x509", "-in", path, "-noout", "-enddate", "-dateopt", "iso_8601"],
                          capture_output=True, text=True, check=True).stdout
    return text.removeprefix("notAfter=").split()[0]


def test_certificates_are_told(proxy, place):
    """Those that it shows to backends, too."""
    config = {"certs": [certificate("ec256"), certificate("chain", "leaf.key")], "tls_backends": 1}
    backend = place().entry(tls=TLS_PIN, ca=pki.DIR / "ec256.pem", cert=pki.DIR / "rsa4096.pem",
                            key=pki.DIR / "rsa4096.key")
    check = run_once(whole_config([backend], config), "-t")
    p = proxy(backend, **config)
    for output in (check, p.log):
        for entry, name, issuer in (("certs[0]", "ec256", "ec256"), ("certs[1]", "chain", "intermediate"),
                                    ("backends[0]", "rsa4096", "localhost")):
            line, until = told(output, entry), end_date(pki.DIR / f"{name}.pem")
            left = datetime.date.fromisoformat(until) - datetime.datetime.now(datetime.timezone.utc).date()
            assert (line["names"], line["issuer"], line["until"]) == ("localhost", issuer, until)
            assert abs(int(line["days"]) - left.days) <= 1      # midnight may pass
    assert "is not valid" not in p.log.text and "expired" not in p.log.text


@pytest.mark.parametrize("subject, names, said", [
    ("/CN=a b", "DNS:a.example,IP:127.0.0.1,DNS:*.b.example", "a.example,*.b.example"),
    ("/O=none/CN=a b", "IP:127.0.0.1", r"a\x20b"), ("/CN=one/O=two", None, "one"), ("/", None, "-"),
    ("/CN=a", ",".join(f"DNS:{n}.example" for n in range(100)), None)])
def test_names_of_a_certificate(place, live_files, subject, names, said):
    chain, key = live_files / "cert.pem", pki.DIR / "ec256.key"
    extension = ["-addext", f"subjectAltName={names}"] if names else []
    subprocess.run(["openssl", "req", "-x509", "-key", key, "-out", chain, "-days", "3", "-subj", subject,
                    *extension], check=True, capture_output=True)
    result = run_once(whole_config([place()], {"certs": [(None, chain, key)]}), "-t")
    line = told(result, "certs[0]")
    if said:
        assert line["names"] == said
    else:
        assert line["names"].startswith("0.example,1.example,") and line["days"] in ("2", "3")


@pytest.mark.parametrize("name, what", [("expired", "has expired"), ("of-1970", "has expired"),
                                        ("early", "is not valid before .*clock")])
def test_certificate_that_is_not_valid_now_is_warned_about(proxy, place, name, what):
    certs = [certificate("ec256"), (None, pem(name), key_of(name))]
    warning = rf"^warning certs\[1\]: {pem(name)} {what}"
    check = run_once(whole_config([place()], {"certs": certs}), "-t")
    assert check.returncode == 0 and re.search(warning, check.stderr, re.M)
    assert (int(told(check, "certs[1]")["days"]) < 0) == ("expired" in what)
    p = proxy(place(), certs=certs)
    p.log.wait_text(warning)
    p.signal(signal.SIGHUP)
    p.log.wait_text(warning, nth=2)
    assert "warning certs[0]" not in p.log.text


def test_reload_says_which_certificates_changed(proxy, place, live_certs):
    certs, put = live_certs
    p = proxy(place(), certs=[certificate("rsa2048"), *certs])
    put("other")
    for n, changed in ((1, "1"), (2, "0")):
        p.signal(signal.SIGHUP)
        assert p.log.wait("reload", ok=True, nth=n)["changed"] == changed
        line = p.log.wait("cert", entry="certs[1]", nth=1 + n)
        assert (line["issuer"], line["changed"]) == ("other", changed)
        assert p.log.wait("cert", entry="certs[0]", nth=1 + n)["changed"] == "0"


@as_root
def test_check_names_files_that_sighup_could_not_read(place, live_certs, live_files):
    certs, _ = live_certs
    live_files.chmod(0o755)
    certs[0][2].chmod(0o600)
    config = whole_config([place()], {"certs": certs})
    assert "SIGHUP" not in run_once(config, "-t").stderr
    for more, why in (({"user": "nobody"}, "Permission denied"), ({"chroot_dir": live_files}, "No such file")):
        result = run_once({**config, **more}, "-t", env=NO_LEAK_CHECK["env"])
        assert result.returncode == 0
        assert f"certs[0]: {certs[0][2]}: {why}" in result.stderr
        assert "SIGHUP will fail" in result.stderr


# ---- privileges ----

def status_of(p):
    """What the kernel says of it, once it serves: ports are announced before privileges go."""
    assert serves(p)
    lines = Path(f"/proc/{p.pid}/status").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


@as_root
def test_user_and_group_are_given_up_for_good(proxy, place):
    p = proxy(place(), user="nobody", group="nogroup")
    status = status_of(p)
    assert status["Uid"] == ["65534"] * 4
    assert status["Gid"] == ["65534"] * 4
    assert set(status["Groups"]) <= {"65534"}
    assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == 0


@as_root
def test_user_alone_takes_its_group(proxy, place):
    p = proxy(place(), user="nobody")
    status = status_of(p)
    assert status["Uid"] == status["Gid"] == ["65534"] * 4
    assert set(status["Groups"]) <= {"65534"}


@as_root
def test_user_and_group_by_number(proxy, place):
    p = proxy(place(), user="65534", group="65534")
    assert status_of(p)["Uid"] == ["65534"] * 4


ETC = {"passwd": "root:x:0:0::/:/bin/sh\nwss:x:1234:1235:a:/:/bin/sh\n", "group": "wss:x:1236:nobody,root\n"}


@as_root
def test_user_and_group_of_these_files(proxy, place, live_files):
    """And none else: groups that list the user are not taken."""
    etc = Etc(live_files, passwd=ETC["passwd"] + "x" * 1000000, group=ETC["group"] + "other:x:1237:wss\n")
    p = proxy(place(), user="wss", group="wss", popen={"wrapper": etc.wrapper()})
    status = status_of(p)
    assert (status["Uid"], status["Gid"], status["Groups"]) == (["1234"] * 4, ["1236"] * 4, ["1236"])


@as_root
@pytest.mark.parametrize("files, named", [
    ({"passwd": "root:x:0:0::/:/bin/sh\n"}, ('user "wss"', "/etc/passwd", "LDAP", "number")),
    ({"passwd": "wss:x::100:::\n"}, ('user "wss"', "/etc/passwd", "number")),
    ({"passwd": "wss:x:100::::\n"}, ('user "wss"', "/etc/passwd", "number")),
    ({"passwd": "x" * 1000000 + "\n" + ETC["passwd"]}, ('user "wss"', "/etc/passwd: too large", "number")),
    ({"group": ""}, ('group "wss"', "/etc/group", "LDAP", "number"))],
    ids=["no-user", "no-uid", "no-gid", "large", "no-group"])
def test_user_or_group_without_an_id_is_named(place, live_files, files, named):
    etc = Etc(live_files, **{**ETC, **files})
    binary = build(config_text(whole_config([place()], {"user": "wss", "group": "wss" if "group" in files else None})))
    for args in ([], ["-t"]):
        result = subprocess.run([*etc.wrapper(), *RUN, binary, *args], capture_output=True, text=True, timeout=PATIENCE)
        assert result.returncode == 1
        assert all(part in result.stderr for part in named), result.stderr


@as_root
def test_chroot(proxy, scripted, live_files):
    backend = scripted()
    p = proxy(backend, chroot_dir=live_files, user="nobody", popen=NO_LEAK_CHECK)
    assert serves(p)
    assert os.readlink(f"/proc/{p.pid}/root") == str(live_files)
    assert os.readlink(f"/proc/{p.pid}/cwd") == str(live_files)
    open_tunnel(p, backend)     # there is no /dev/urandom in there


@as_root
def test_sighup_in_a_chroot_reads_certificates_in_there(proxy, place, live_files, live_certs):
    certs, put = live_certs
    p = proxy(place(), certs=certs, chroot_dir=live_files, popen=NO_LEAK_CHECK)
    inside = live_files / str(live_files).lstrip("/")
    inside.mkdir(parents=True)
    shutil.copy(pki.DIR / "other.pem", inside / "cert.pem")
    shutil.copy(pki.DIR / "other.key", inside / "key.pem")
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    assert serves(p, "other")


def test_it_leaves_no_core_with_keys(proxy, place):
    p = proxy(place())
    limits = Path(f"/proc/{p.pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.M)


# ---- syslog ----

@pytest.fixture
def dev_log():
    """The right to /dev/log, which is one for all tests that run on this machine."""
    with open_directory("/dev") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if Path("/dev/log").exists():
            pytest.skip("/dev/log is taken")
        yield


@contextlib.contextmanager
def open_directory(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def syslog_daemon(path="/dev/log"):
    log = Log()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sink:
        sink.bind(str(path))
        os.chmod(path, 0o666)
        try:
            threading.Thread(target=read_syslog, args=(sink, log), daemon=True).start()
            yield log
        finally:
            os.unlink(path)
            sink.shutdown(socket.SHUT_RDWR)


@as_root
def test_syslog(dev_log, proxy, scripted):
    """Also when the daemon is started again, which gives it another socket."""
    backend = scripted()
    with syslog_daemon() as log:
        p = proxy(backend, log_to=SYSLOG, ready=False)
        p.wait_ready(log)
        open_tunnel(p, backend)
        log.wait("open")
    open_tunnel(p, backend)
    with syslog_daemon() as log:
        open_tunnel(p, backend)
        assert log.wait("open")["id"] == "3"
        p.signal(signal.SIGUSR1)
        assert log.wait_text("^stats sessions").fields["log-lost"] == "1"
        p.signal(signal.SIGTERM)
        log.wait("stop")
        p.signal(signal.SIGTERM)
        assert p.wait_exit() == 0


@as_root
def test_syslog_daemon_that_comes_later(dev_log, proxy, scripted):
    """Until then, and while it is gone, stderr has the log; one line finds out that it is gone."""
    backend = scripted()
    p = proxy(backend, log_to=SYSLOG)
    assert "stderr" in p.log.wait_text("^warning log_to: /dev/log: No such file").text
    open_tunnel(p, backend)
    assert p.log.wait("open")["id"] == "1"
    with syslog_daemon() as log:
        open_tunnel(p, backend)
        assert log.wait("open")["id"] == "2"
    open_tunnel(p, backend)
    open_tunnel(p, backend)
    assert p.log.wait("open", nth=2)["id"] == "4"
    assert not p.log.all("open", id="2")
    assert p.totals()["log-lost"] == "1"


@as_root
@pytest.mark.parametrize("inside", [False, True])
def test_syslog_in_a_chroot(dev_log, proxy, scripted, live_files, inside):
    """The check says it as the start does."""
    backend = scripted()
    config = {"log_to": SYSLOG, "chroot_dir": live_files, "user": "nobody"}
    if inside:
        (live_files / "dev").mkdir()
        live_files.chmod(0o755)
    with syslog_daemon(live_files / "dev/log") if inside else contextlib.nullcontext() as log:
        p = proxy(backend, popen=NO_LEAK_CHECK, **config)
        open_tunnel(p, backend)
        (log or p.log).wait("open")
        assert ("\nwarning chroot_dir: dev/log in it: No such file" in p.log.text) == (not inside)


@as_root
def test_syslog_daemon_that_is_slow(dev_log, proxy, scripted, live_files):
    """What it has no room for is lost, and it is not given up: in a chroot nobody would find it again."""
    backend = scripted()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sink:
        sink.bind("/dev/log")
        os.chmod("/dev/log", 0o666)
        p = proxy(backend, log_to=SYSLOG, chroot_dir=live_files, user="nobody", popen=NO_LEAK_CHECK, ready=False)
        log = Log()
        while not log.all("listen"):
            log.feed(sink.recv(8192).decode().partition(": ")[2])
        p.wait_ready(log)
        for _ in range(100):
            open_tunnel(p, backend)
        assert not p.log.all("open")
        threading.Thread(target=read_syslog, args=(sink, log), daemon=True).start()
        log.wait("open")
        eventually(lambda: open_tunnel(p, backend) and len(log.all("open")) > 1 and not p.log.all("open"))
        sink.shutdown(socket.SHUT_RDWR)
    os.unlink("/dev/log")


def read_syslog(sink, log):
    """Facility daemon is 3: priorities 24 to 31."""
    while True:
        try:
            datagram = sink.recv(8192)
        except OSError:
            return
        if not datagram:
            return
        match = re.fullmatch(rb"<(2[4-9]|3[01])>(?:.* )?wssproxy(?:\[\d+\])?: (.*)", datagram, re.S)
        log.feed(match[2].decode().rstrip("\n\0") if match else f"odd {datagram!r}")
