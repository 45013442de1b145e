"""What the program may still do once it serves: nothing but that. An intruder is played by a library
that is preloaded (intruder.c)."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import pki
from conftest import whole_config
from harness import E2E, RUN, SANITIZE, WSS, eventually, run_once
from more import STICKY_COOKIE, TLS_PIN, children_of, status_of
from peers import ask, client_context, connect, head, open_tunnel

GET = head("GET / HTTP/1.1", {"Host": "example.test"})
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
filtered = pytest.mark.skipif(SANITIZE or bool(RUN) or not Path("/proc/sys/kernel/seccomp").exists(),
                              reason="needs the filter, and a library preloaded")


def serves(p):
    """Privileges go after ports are announced."""
    assert ask(p, GET)[0].status == 426


def build_intruder(path, *flags):
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), *flags, "-o", path, E2E / "intruder.c"],
                   check=True)
    return path


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_intruder(tmp_path_factory.mktemp("intruder") / "intruder.so", "-shared", "-fPIC")


@pytest.fixture(scope="session")
def foreign_calls(tmp_path_factory):
    """Whether this kernel runs calls of another machine at all. Its configuration doesn't tell: a
    command line or a hypervisor may have taken them away."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "order").write_text("foreign")
    result = subprocess.run([build_intruder(folder / "alone", "-DALONE")], capture_output=True,
                            env={**os.environ, "INTRUDER": str(folder / "order")})
    return os.uname().machine == "x86_64" and result.returncode == 0 and b"result=-1" in result.stderr


@pytest.fixture
def intruded(proxy, library, live_files):
    """A proxy with the intruder in it, and what has it make a call."""
    order = live_files / "order"
    live_files.chmod(0o755)

    def start(*backends, **config):
        p = proxy(*backends, popen={"env": {**os.environ, "LD_PRELOAD": str(library),
                                            "INTRUDER": str(order)}}, **config)

        def call(name):
            order.with_suffix(".new").write_text(name)
            order.with_suffix(".new").rename(order)
        return p, call
    return start


def handshake(p):
    try:
        connect(p, context=client_context(None)).close()
    except OSError:
        pass


# ---- the filter ----

CALLS = ["execve", "fork", "ptrace", "kill", "mmap", "mprotect", "open-to-write", "open-and-create",
         "open-and-truncate", "unlink", "netlink", "packet", "udp", "sctp", "unix", "bind", "listen", "sendmsg", "setuid",
         "chroot", "foreign"]


@filtered
@pytest.mark.parametrize("name", CALLS)
def test_forbidden_call_ends_the_program(intruded, foreign_calls, place, name):
    if name == "foreign" and not foreign_calls:
        pytest.skip("needs a kernel that runs another machine's calls (int $0x80)")
    p, call = intruded(place())
    call(name)
    handshake(p)
    assert p.wait_exit() == -signal.SIGSYS
    assert "intruder" not in p.log.text
    p.process.returncode = 0        # it is meant to be killed


@filtered
def test_files_may_be_read(intruded, place):
    """Or SIGHUP could not: what is forbidden above is what differs."""
    p, call = intruded(place())
    call("open-to-read")
    handshake(p)
    assert p.log.wait("intruder", call="open-to-read")["result"] == "0"


@filtered
@pytest.mark.parametrize("name", ["execve", "ptrace", "kill", "tkill", "tgkill", "listen", "prlimit",
                                  "io_uring"])
def test_call_that_no_resolver_makes_fails(intruded, place, name):
    here = place()
    p, call = intruded({"host": "name.test", "port": here.port}, resolve_ms=100)
    p.log.wait("backend", down=True, why="unresolved")
    call(name)
    p.signal(signal.SIGHUP)
    line = p.log.wait("intruder", call=name)
    assert (line["result"], line["errno"]) == ("-1", "EPERM")


def filters(status):
    """How many there are (None: an old kernel): a container has its own, which all inherit."""
    return status.get("Seccomp_filters")


@filtered
def test_kernel_knows_of_the_filter(proxy, place, no_names):
    here = place()
    p = proxy({"host": "name.test", "port": here.port}, popen=no_names)
    p.log.wait("backend", down=True, why="unresolved")
    serves(p)
    for pid in (p.pid, *children_of(p.pid)):
        status = status_of(pid)
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"]
        assert filters(status) != filters(status_of("self")) or filters(status) is None
    assert "warning seccomp" not in p.log.text


@filtered
def test_seccomp_0_sets_no_filter(proxy, place):
    p = proxy(place(), seccomp=0)
    serves(p)
    status, ours = status_of(p.pid), status_of("self")
    assert (status["Seccomp"], filters(status)) == (ours["Seccomp"], filters(ours))
    assert status["NoNewPrivs"] == ["1"]


@filtered
def test_kernel_without_filters_is_said_once(proxy, scripted, live_files):
    """Played by a filter of the parent's that fails prctl(PR_SET_SECCOMP)."""
    backend = scripted()
    p = proxy(backend, popen={"preexec_fn": refuse_filters})
    open_tunnel(p, backend)
    assert p.log.text.count("\nwarning seccomp") == 1


def refuse_filters():
    import ctypes
    import struct
    machine = os.uname().machine
    if machine != "x86_64":
        return
    ops = [(0x20, 0, 0, 0), (0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22),
           (0x06, 0, 0, 0x00050016), (0x06, 0, 0, 0x7fff0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *op) for op in ops))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(ops), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)
    if libc.prctl(22, 2, program, 0, 0) != 0:
        os._exit(99)


def test_stop_and_continue_is_no_harm(proxy, scripted):
    """The kernel goes on with a wait that was interrupted by a call of its own."""
    backend = scripted()
    p = proxy(backend)
    client, server = open_tunnel(p, backend)
    for n in range(3):
        p.signal(signal.SIGSTOP)
        eventually(lambda: status_of(p.pid)["State"][0] == "T")
        p.signal(signal.SIGCONT)
        eventually(lambda: status_of(p.pid)["State"][0] != "T")
        client.send(b"%03d" % n)
        assert server.read(3) == b"%03d" % n


# ---- capabilities ----

NONE = ["0000000000000000"]
SETS = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]


@as_root
@pytest.mark.parametrize("config", [{}, {"user": "nobody"}, {"user": "0"}], ids=["root", "nobody", "0"])
def test_no_capability_is_left(proxy, place, no_names, config):
    p = proxy({"host": "name.test", "port": place().port}, popen=no_names, **config)
    p.log.wait("backend", down=True, why="unresolved")
    serves(p)
    for pid in (p.pid, *children_of(p.pid)):
        status = status_of(pid)
        assert {name: status[name] for name in SETS} == {name: NONE for name in SETS}


def low_port():
    """One that nobody has, the same each time if it can be: it is part of the configuration."""
    for port in range(1023, 600, -1):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return str(port)
    pytest.skip("needs a free port below 1024")


@as_root
def test_root_without_capabilities_binds_a_low_port_before(proxy, place):
    p = proxy(place(), listeners=[("127.0.0.1", low_port(), WSS)])
    serves(p)
    assert status_of(p.pid)["CapEff"] == NONE


@as_root
@pytest.mark.skipif(SANITIZE or bool(RUN), reason="needs a library preloaded")
@pytest.mark.parametrize("user, name", [
    *((user, name) for user in (None, "nobody") for name in ("setuid-other", "chroot", "raw", "sethostname")),
    ("nobody", "setuid"), ("nobody", "setgid")])
def test_there_is_no_way_back(intruded, place, user, name):
    """Without the filter, which would end it."""
    p, call = intruded(place(), seccomp=0, user=user)
    call(name)
    handshake(p)
    line = p.log.wait("intruder", call=name)
    assert (line["result"], line["errno"]) == ("-1", "EPERM")


@as_root
def test_file_that_sighup_could_not_read_is_named_at_start(proxy, place, live_files):
    key = live_files / "key.pem"
    shutil.copy(pki.DIR / "ec256.key", key)
    p = proxy(place(), certs=[(None, pki.DIR / "ec256.pem", key)], user="nobody")
    assert str(key) in p.log.wait_text("^warning certs").text
    serves(p)


@as_root
def test_files_of_backends_that_sighup_could_not_read_are_named_at_start(proxy, place, live_files):
    key = live_files / "key.pem"
    ca = live_files / "ca.pem"
    shutil.copy(pki.DIR / "ec256.key", key)
    shutil.copy(pki.DIR / "ec256.pem", ca)
    ca.chmod(0o600)
    p = proxy(place().entry(tls=TLS_PIN, ca=ca, cert=pki.DIR / "ec256.pem", key=key), tls_backends=1,
              client_ca=ca, user="nobody")
    for text in (f"backends[0]: {ca}", f"backends[0]: {key}", f"client_ca[0]: {ca}"):
        p.log.wait_text("^" + re.escape(f"warning {text}: Permission denied"))


@as_root
@pytest.mark.parametrize("user, warned", [(None, True), ("root", False), ("nobody", False)])
def test_root_that_was_not_asked_for_is_warned_about(proxy, place, user, warned):
    p = proxy(place(), user=user)
    serves(p)
    assert ("\nwarning user" in p.log.text) == warned


@pytest.mark.parametrize("secret", ["", "of the tests"])
def test_cookie_without_a_secret_is_warned_about(proxy, place, secret):
    p = proxy(place(), balance=STICKY_COOKIE, cookie_secret=secret)
    assert ("warning cookie_secret" in p.log.text) == (not secret)


# ---- secrets ----

@pytest.fixture
def own_files(live_files):
    """A certs[] entry that nobody may read."""
    live_files.chmod(0o755)
    for name in ("ec256.pem", "ec256.key"):
        shutil.copy(pki.DIR / name, live_files / name)
        (live_files / name).chmod(0o600)
        if os.geteuid() == 0:
            os.chown(live_files / name, NOBODY, NOBODY)
    return [(None, live_files / "ec256.pem", live_files / "ec256.key")]


@pytest.mark.parametrize("name", ["mem", "environ", "maps", "fd", "stack"])
def test_process_of_the_same_user_reads_nothing_of_it(proxy, place, own_files, name):
    if not Path("/proc/self", name).exists():
        pytest.skip(f"needs a kernel with /proc/PID/{name}")
    same = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    p = proxy(place(), certs=own_files, popen=same)
    serves(p)
    look = ["ls"] if name == "fd" else ["dd", "bs=1", "count=1", "status=none"]
    path = f"/proc/{p.pid}/{name}"
    result = subprocess.run([*look, path if name == "fd" else f"if={path}"], capture_output=True,
                            text=True, **same)
    assert result.returncode != 0
    assert re.search("Permission denied|Operation not permitted", result.stderr)


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o400, False), (0o640, True), (0o604, True),
                                          (0o610, True)])
def test_key_that_others_may_read_is_warned_about(proxy, place, own_files, mode, warned):
    own_files[0][2].chmod(mode)
    p = proxy(place(), certs=own_files)
    serves(p)
    lines = [line.text for line in p.log.all("warning") if "open to group or others" in line.text]
    assert bool(lines) == warned
    assert all(str(own_files[0][2]) in line for line in lines)


def test_version_and_log_hold_no_secret(proxy, scripted):
    backend = scripted()
    config = {"balance": STICKY_COOKIE, "cookie_secret": "correct-horse"}
    p = proxy(backend, **config)
    open_tunnel(p, backend)
    p.signal(signal.SIGHUP)
    p.log.wait("reload", ok=True)
    shown = run_once(whole_config([backend], config), "-v")
    for text in (p.log.text, shown.stdout, shown.stderr):
        assert "correct-horse" not in text
        assert "PRIVATE KEY" not in text
