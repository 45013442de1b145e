"""wssproxy on kernels and systems that lack what it likes to have: it does without, or says why not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

import pki                                          # noqa: E402
from harness import BUILD, SYSLOG, WSS, Proxy, build, config_text, eventually    # noqa: E402
from more import unshare                            # noqa: E402
from peers import Place, Places, Scripted, Stream, open_tunnel         # noqa: E402
import socket                                       # noqa: E402


@pytest.fixture(scope="session")
def lacking():
    """A command that runs another without these things."""
    pki.make_all()
    program = BUILD / "lacking"
    subprocess.run(["cc", "-O1", "-o", program, HERE / "lacking.c"], check=True)
    probe = subprocess.run([program, "--", "/bin/true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"needs a kernel with filters of system calls: {probe.stderr}")
    return lambda *things: [program, *things, "--"]


@pytest.fixture
def backend():
    places = Places(socket.AF_INET, "127.0.0.1")
    server = Scripted(Place(places.address, places.get(0)))
    yield server
    server.close()
    for stream in Stream.kept:
        stream.close()
    Stream.kept.clear()


@pytest.fixture
def start(backend):
    started = []

    def go(wrapper, ready=True, **config):
        entries = {"listeners": [("127.0.0.1", "0", WSS)],
                   "certs": [(None, pki.DIR / "ec256.pem", pki.DIR / "ec256.key")],
                   "backends": [backend.entry()], **config}
        proxy = Proxy(entries, wrapper)
        started.append(proxy)
        return proxy.wait_ready() if ready else proxy
    yield go
    for proxy in started:
        assert not proxy.faults(), proxy.log.text


def relays(proxy, backend):
    client, server = open_tunnel(proxy, backend)
    client.send(b"up")
    assert server.read(2) == b"up"
    server.send(b"down")
    assert client.read(4) == b"down"
    return client, server


@pytest.mark.parametrize("thing", ["user-timeout", "prctl"])
def test_does_without(start, lacking, backend, thing):
    proxy = start(lacking(thing))
    client, server = relays(proxy, backend)
    client.send(b"again")
    assert server.read(5) == b"again"


def test_without_getrandom_it_says_so_and_does_not_start_weak(start, lacking):
    proxy = start(lacking("getrandom"), ready=False)
    assert proxy.wait_exit() == 1
    assert "getrandom" in proxy.log.text and not proxy.log.all("listen")


def test_without_epoll_it_says_so(start, lacking):
    proxy = start(lacking("epoll"), ready=False)
    assert proxy.wait_exit() == 1
    assert "CONFIG_EPOLL" in proxy.log.text


def test_without_entropy_it_says_once_that_it_waits(start, lacking):
    """The kernel's wait is over at once here; a start before there is any would be weak."""
    proxy = start(lacking("entropy"))
    assert len(re.findall("waits for entropy", proxy.log.text)) == 1


@pytest.mark.parametrize("address", ["::", "::1"])
def test_without_ipv6(start, lacking, backend, address):
    """"::" is what config.def.h has: it means IPv4 as well, so it has to serve that where there is
    nothing else. An IPv6 address of its own can't be had, which is said."""
    proxy = start(lacking("ipv6"), ready=False, listeners=[(address, "0", WSS)])
    if address == "::1":
        assert proxy.wait_exit() == 1
        assert "listeners[0]" in proxy.log.text and "::1" in proxy.log.text
        return
    proxy.wait_ready()
    proxy.entries["listeners"] = [("127.0.0.1", "0", WSS)]
    relays(proxy, backend)


def unshared(script):
    """A command that runs another where a part of the file system is not as it was."""
    return [*unshare(), "sh", "-c", f'{script}; exec "$@"', "sh"]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
EMPTY_ETC = "mkdir -p /tmp/empty && mount -t tmpfs none /etc"


@as_root
def test_without_passwd_a_number_will_do(start, backend):
    proxy = start(unshared(EMPTY_ETC), user="1000")
    relays(proxy, backend)
    status = Path(f"/proc/{proxy.pid}/status").read_text()
    assert "Uid:\t1000\t1000\t1000\t1000" in status and "Gid:\t1000\t1000" in status


@as_root
def test_without_passwd_a_name_is_named(start):
    proxy = start(unshared(EMPTY_ETC), ready=False, user="nobody")
    assert proxy.wait_exit() == 1
    assert "nobody" in proxy.log.text and "number" in proxy.log.text


@as_root
def test_without_a_syslog_daemon_the_log_goes_to_stderr(start, backend):
    proxy = start(unshared("mount -t tmpfs none /dev && mknod /dev/null c 1 3"), log_to=SYSLOG,
                  ready=False)
    proxy.log.wait_text("/dev/log")
    proxy.log.wait_text("listen address=")


@as_root
def test_read_only_root(start, backend):
    proxy = start(unshared("mount -o remount,bind,ro / || mount --bind / / && mount -o remount,bind,ro /"))
    relays(proxy, backend)


@as_root
def test_without_dev_null(start, backend):
    proxy = start(unshared("mount -t tmpfs none /dev"))
    relays(proxy, backend)
