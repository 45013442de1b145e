"""Configurations as products have them, and what is wrong with others: each fault is named, with its
cure, all of them in one run, or by the compiler."""

import os
import re
import resource
import subprocess

import pytest

import pki
from conftest import certificate, whole_config
from harness import (FORWARD, PATIENCE, REDIRECT, REPO, SYSLOG, WS, WSS, BuildFailed, C, build, config_text,
                     run_once)
from more import key_of, pem

CBC = C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA")
GCM = C("BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256")
VERIFY, PIN = C("TLS_VERIFY"), C("TLS_PIN")
STICKY = C("STICKY_COOKIE")

# entries of config.h
PRODUCTS = {
    "kvm": {
        "listeners": [("0.0.0.0", "443", WSS), ("0.0.0.0", "80", REDIRECT)],
        "backends": [{"host": "unix:/run/kvm.sock", "path": "/api"},
                     {"host": "127.0.0.1", "port": "8000", "path": "/stream", "max_conns": 4},
                     {"host": "127.0.0.1", "port": "8080"}],
        "http": FORWARD, "max_sessions": 32, "max_busy": 4, "resolve_names": 0},
    "home-automation": {
        "backends": [{"host": "homeassistant.lan", "port": "8123"},
                     {"host": "nodered.lan", "port": "1880", "path": "/red"},
                     {"host": "cam.lan", "port": "80", "name": "*.cam.example"}],
        "http": FORWARD, "idle_ms": 0, "max_sessions": 64, "origins": ["same", None]},
    "charge-points": {
        "listeners": [("0.0.0.0", "8443", WSS, pem("client-ca"), C("VERIFY_REQUIRED")),
                      ("::1", "443", WSS, pem("client-ca"), C("VERIFY_OPTIONAL")),
                      ("::1", "8080", WS)],
        "backends": [{"host": "csms.example", "port": "443", "path": "/ocpp", "tls": VERIFY,
                      "ca": pem("stranger"), "cert": pem("client-ec"), "key": key_of("client-ec")}],
        "tls_backends": 1, "origins": ["none", None]},
    "shop": {
        "certs": [(None, pki.DIR / "ec256.pem", pki.DIR / "ec256.key"),
                  ("*.b.example", pki.DIR / "rsa2048.pem", pki.DIR / "rsa2048.key")],
        "backends": [{"host": f"192.0.2.{n}", "port": "3000", "weight": n} for n in range(1, 5)],
        "balance": STICKY, "cookie_secret": "Ahoo7ul9", "check_ms": 2000, "max_sessions": 2000,
        "max_busy": 32, "log_to": SYSLOG},
    "old-meters": {
        "backends": [{"host": "192.0.2.1", "port": "3000", "tls": PIN, "ca": pem("stranger")}],
        "tls_backends": 1, "tls_min": C("BR_TLS10"), "ciphers": [GCM, CBC]},
}


def product(name, **changes):
    return whole_config([], {**PRODUCTS[name], **changes})


def backend(name, /, index=0, lacks=(), **changes):
    """The entry backends of a product, one of them changed."""
    backends = [dict(b) for b in PRODUCTS[name]["backends"]]
    backends[index].update(changes)
    for field in lacks:
        del backends[index][field]
    return {"backends": backends}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    result = run_once(product(name), "-t")
    assert result.returncode == 0 and "wssproxy:" not in result.stderr


@pytest.mark.parametrize("name, changes, culprit, cure", [
    ("kvm", {"listeners": [("gateway.lan", "443", WSS)]}, "listeners[0]", "literal"),
    ("kvm", backend("kvm", 0, host="/run/kvm.sock", port="80"), "backends[0].host", "can't be a name"),
    ("kvm", backend("kvm", 1, host="localhost"), "backends[1].host", "set resolve_names to 1"),
    ("kvm", backend("kvm", 2, host=None), "backends[2].host", "missing"),
    ("kvm", backend("kvm", 2, port=None), "backends[2].port", "give 1 to 65535"),
    ("kvm", backend("kvm", 1, path="stream"), "backends[1].path", "begin it with /"),
    ("kvm", backend("kvm", 1, name="kvm.lan:443"), "backends[1].name", "without scheme, port and path"),
    ("kvm", backend("kvm", 1, name="https://kvm.lan"), "backends[1].name", "as in a URL"),
    ("kvm", backend("kvm", 1, name="*"), "backends[1].name", "NULL for any"),
    ("kvm", backend("kvm", 1, name="k*.lan"), "backends[1].name", "*.example"),
    ("kvm", backend("kvm", 1, name="2001:db8::1"), "backends[1].name", "[2001:db8::1]"),
    ("kvm", backend("kvm", 1, host_header="https://kvm.lan"), "backends[1].host_header", "no scheme"),
    ("kvm", backend("kvm", 1, host_header=""), "backends[1].host_header", "name or address"),
    ("kvm", backend("kvm", 1, host_header="a" * 129), "backends[1].host_header", "128"),
    ("kvm", backend("kvm", 1, weight=257), "backends[1].weight = 257", "at most 256"),
    ("home-automation", backend("home-automation", host="ws://api.lan"), "backends[0].host",
     "give the name alone; its port is .port"),
    ("home-automation", backend("home-automation", host="https://api.lan:8123/x"), "backends[0].host",
     "https: .tls = TLS_VERIFY"),
    ("home-automation", backend("home-automation", host="api.lan:8123"), "backends[0].host", "no port"),
    ("home-automation", {"origins": ["https://A.example", None]}, "origins[0]", "in lower case"),
    ("charge-points", backend("charge-points", lacks=["ca"]), "backends[0].ca", "a PEM file"),
    ("charge-points", backend("charge-points", lacks=["key"]), "backends[0].key", "go together"),
    ("charge-points", backend("charge-points", lacks=["cert"]), "backends[0].cert", "go together"),
    ("charge-points", backend("charge-points", lacks=["tls"]), "backends[0].tls", "TLS_VERIFY?"),
    ("charge-points", backend("charge-points", host="192.0.2.1"), "backends[0].sni", "needs a name"),
    ("charge-points", {"tls_backends": 0}, "backends[0].tls", "set tls_backends to 1"),
    ("charge-points", {"listeners": [("::1", "443", WS, pem("client-ca"))]}, "listeners[0].client_ca",
     "only WSS"),
    ("charge-points", {"listeners": [("::1", "443", WSS, None, C("VERIFY_OPTIONAL"))]},
     "listeners[0].verify_client", "needs kind WSS and a client_ca"),
    ("charge-points", {"listeners": [("::1", "443", WSS, None, C("VERIFY_REQUIRED"))]},
     "listeners[0].verify_client", "needs kind WSS and a client_ca"),
    ("shop", {"certs": [(None, None, pki.DIR / "ec256.key")]}, "certs[0].chain", "a PEM file"),
    ("shop", {"certs": [(None, pki.DIR / "ec256.pem", None)]}, "certs[0].key", "a PEM file"),
    ("shop", {"cookie_name": "a b"}, "cookie_name", "letters, digits"),
    ("shop", {"redirect_port": "0"}, "redirect_port", "give 1 to 65535"),
    ("shop", {"redirect_port": "https"}, "redirect_port", "give 1 to 65535"),
    ("shop", {"redirect_port": ""}, "redirect_port", "give 1 to 65535"),
    ("shop", {"record_max": 511}, "record_max", "give 512 to 16384"),
    ("shop", {"record_max": 16385}, "record_max", "give 512 to 16384"),
    ("old-meters", {"ciphers": [GCM]}, "tls_min", "need CBC suites"),
    ("old-meters", {"tls_min": C("BR_TLS12")}, "ciphers[1]", "tls_min below BR_TLS12"),
    ("old-meters", backend("old-meters", lacks=["ca"]), "backends[0].ca", "its certificate"),
])
def test_one_fault_is_named_with_its_cure(name, changes, culprit, cure):
    result = run_once(product(name, **changes), "-t")
    assert result.returncode == 1
    assert result.stderr.startswith(f"wssproxy: config.h: {culprit}")
    assert cure in result.stderr
    assert result.stderr.count("wssproxy: ") == 1


WRONG = {
    "listeners": [("a", "443", WSS), ("::1", "b", WSS)], "head_ms": 0, "cookie_name": "c d",
    "certs": [(None, "/nowhere/1.pem", None), ("a", pki.DIR / "ec256.pem", "/nowhere/2.key"),
              certificate("ec256", "other.key")],
    "backends": [{"host": "e:1", "port": "f", "path": "g", "tls": VERIFY},
                 {"host": "::1", "port": "80", "tls": PIN, "ca": "/nowhere/3.pem"}],
    "tls_backends": 1, "chroot_dir": "/nowhere",
    "user": "no-such-user"}
SAID = ["listeners[0]", "listeners[1]", "head_ms", "cookie_name", "certs[0].key", "backends[0].host",
        "backends[0].port", "backends[0].path", "backends[0].ca", "chroot_dir", "user"]
FILES = ["certs[1]: /nowhere/2.key", f"certs[2]: {pki.DIR}/ec256.pem", "backends[1]: /nowhere/3.pem"]


def test_all_faults_are_told_in_one_run():
    result = run_once(whole_config([], WRONG), "-t")
    assert result.returncode == 1 and result.stdout == ""
    lines = result.stderr.splitlines()
    for culprit in SAID + FILES:
        assert len([line for line in lines if line.startswith(f"wssproxy: config.h: {culprit}")]) == 1
    assert len(lines) == len(SAID + FILES)


def test_it_does_not_start_with_faults():
    result = run_once(whole_config([], WRONG))
    assert result.returncode == 1
    assert all(f"config.h: {culprit}" in result.stderr for culprit in SAID if culprit != "user")


def test_check_sees_a_limit_of_descriptors_that_is_too_small(place):
    entries = whole_config([place()], {"max_sessions": 1000})

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)       # root may raise it
    result = run_once(entries, "-t", preexec_fn=limit)
    assert "wssproxy: config.h: max_sessions = 1000 needs" in result.stderr
    assert "ulimit -n" in result.stderr
    assert result.returncode == 1


def test_check_warns_of_an_empty_secret():
    result = run_once(product("shop", cookie_secret=""), "-t")
    assert result.returncode == 0
    assert result.stderr.startswith("warning cookie_secret is empty")


# ---- the compiler ----

def make(tmp_path, text, *variables):
    """What make says of a config.h with that text."""
    (tmp_path / "config.h").write_text(text)
    return subprocess.run(["make", "-s", "-C", REPO, f"CONFIG={tmp_path}/config.h", f"OUT={tmp_path}/wssproxy",
                           *variables], capture_output=True, text=True, timeout=4 * PATIENCE)


@pytest.mark.parametrize("flags", ["-O0", "-O0 -Wno-error -Wno-int-conversion"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("entries, culprit", [
    ({"backends": [{"host": "127.0.0.1", "port": 24311}]}, "24311"),
    ({"listeners": [("::", 443, WSS)]}, "443"),
    ({"balance": FORWARD}, "FORWARD"),
])
def test_value_of_another_kind_does_not_compile(tmp_path, compiler, flags, entries, culprit):
    """A start would die of the first two."""
    result = make(tmp_path, config_text(entries), f"CC={compiler}", f"CFLAGS={flags}")
    assert result.returncode != 0
    line, column = re.search(r"/config\.h:(\d+):(\d+): error: ", result.stderr).groups()
    source = (tmp_path / "config.h").read_text().splitlines()[int(line) - 1]
    assert source[int(column) - 1:].startswith(culprit)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("old", ["", "#define config_version 0"])
def test_config_of_another_version_does_not_compile(tmp_path, compiler, old):
    text = re.sub(r"(?m)^#define config_version .*", old, config_text({}))
    text = re.sub(r"(?m)^static const unsigned stall_ms .*", "", text)
    result = make(tmp_path, text, f"CC={compiler}", "CFLAGS=-O0")
    assert result.returncode != 0
    first = re.search(r".*error: .*", result.stderr)[0]
    assert f"{tmp_path}/config.h is of config_version 0, config.def.h of 2: diff the two" in first
    assert "stall_ms" in result.stderr


def test_config_of_another_version_is_told_without_make(place):
    with pytest.raises(BuildFailed, match="config_version 7"):
        build(config_text({"config_version": 7}))


# ---- which program is it? ----

def version(tmp_path):
    result = subprocess.run([tmp_path / "wssproxy", "-v"], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0
    return result.stdout


def test_version_begins_with_the_build_and_the_configuration(tmp_path):
    text = config_text({"backends": [{"host": "192.0.2.1", "port": "24311"}]})
    assert make(tmp_path, text, "CFLAGS=-O0").returncode == 0
    first, *more = version(tmp_path).splitlines()
    sources = [(REPO / name).read_bytes() for name in ("wssproxy.c", "wssproxy.h")]
    checksum = subprocess.run(["cksum"], input=b"".join([*sources, text.encode()]), capture_output=True)
    assert re.fullmatch(r"wssproxy \S+ build=" + checksum.stdout.decode().strip().replace(" ", "-"), first)
    assert more[0].startswith("listeners[0] = :: 443 WSS")
    assert more[2].startswith("backends[0] = 192.0.2.1:24311")
    program = (tmp_path / "wssproxy").read_bytes()
    (tmp_path / "wssproxy").unlink()
    assert make(tmp_path, text, "CFLAGS=-O0").returncode == 0
    assert (tmp_path / "wssproxy").read_bytes() == program
    assert make(tmp_path, text.replace("24311", "24312"), "CFLAGS=-O0").returncode == 0
    assert version(tmp_path).splitlines()[0] != first


def test_version_of_a_faulty_configuration_tells_the_fault():
    result = run_once(product("kvm", head_ms=0), "-v")
    assert result.returncode == 1
    assert "head_ms" in result.stderr
