"""Certificates from an authority, by HTTP-01: a real one (pebble), a real client (uacme) and a web
server (busybox) that has what it is asked for, behind a listener of kind REDIRECT."""

import json
import os
import shutil
import ssl
import subprocess

import pytest

import pki
from harness import PATIENCE, REDIRECT, WSS, eventually
from more import FILES_ONLY, Etc, Server, accepts, key_of, need, pem
from peers import client_context, connect

NAME = "gateway.test"
UNDER = ".well-known/acme-challenge"

# README's lines, with other places.
RENEW = f"""\
set -e
export UACME_CHALLENGE_PATH=$PLACE/www/{UNDER}
uacme -a "$URL" -c $PLACE/uacme $FORCE -y -t EC -h /usr/share/uacme/uacme.sh issue {NAME} ||
    exit $(($? - 1))
install -m 644 $PLACE/uacme/{NAME}/cert.pem $INSIDE/cert.pem
install -m 600 -o $OWNER $PLACE/uacme/private/{NAME}/key.pem $INSIDE/key.pem
kill -HUP $PID
"""


@pytest.fixture
def started(keeper):
    """A program that serves at that place, once it does."""
    class Started(Server):
        def __init__(self, place, *command, **options):
            self.place = place
            self.start(command, **options)
            eventually(lambda: accepts(place))
    return lambda place, *command, **options: keeper(Started(place, *command, **options))


@pytest.fixture
def etc(live_files):
    return Etc(live_files, nsswitch=FILES_ONLY, hosts=f"127.0.0.1 localhost {NAME}\n",
               authorities=pem("ca").read_text())


@pytest.fixture
def web(place, live_files, started):
    (live_files / "www" / UNDER).mkdir(parents=True)
    here = place()
    started(here, need("busybox"), "httpd", "-f", "-p", f"{here.host}:{here.port}", "-h", live_files / "www")
    return here


@pytest.fixture
def authority(place, live_files, started, etc):
    """One that asks port `http` of NAME; its URL."""
    def start(http):
        here, manage = place(), place()
        config = {"pebble": {
            "listenAddress": f"{here.host}:{here.port}", "certificate": str(pem("ec")),
            "privateKey": str(key_of("ec")), "httpPort": http, "tlsPort": 1,
            "managementListenAddress": f"{manage.host}:{manage.port}"}}
        file = live_files / "pebble.json"
        file.write_text(json.dumps(config))
        started(here, *etc.wrapper(), need("pebble"), "-config", file,
                env={**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"})
        return f"https://localhost:{here.port}/dir"
    return start


def shown(p):
    """Issuer and number of the certificate that clients see."""
    context = client_context(None)
    context.load_cert_chain(pem("client-ec"), key_of("client-ec"))
    client = connect(p, context=context, name=NAME)
    text = ssl.DER_cert_to_PEM_cert(client.tls.getpeercert(True))
    result = subprocess.run(["openssl", "x509", "-noout", "-issuer", "-serial"], input=text,
                            capture_output=True, text=True, check=True)
    return result.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("confined", [False, True], ids=["open", "user-and-chroot"])
def test_certificate_is_issued_and_renewed(proxy, place, web, authority, etc, live_files, confined):
    """All the while clients of TLS need certificates of their own."""
    need("uacme")
    root = live_files / "root"
    inside = root / str(live_files)[1:] if confined else live_files
    inside.mkdir(parents=True, exist_ok=True)
    files = {"cert.pem": pki.DIR / "ec256.pem", "key.pem": pki.DIR / "ec256.key", "ca.pem": pem("client-ca")}
    for name, file in files.items():
        shutil.copy(file, inside / name)
        if confined:
            (live_files / name).symlink_to(inside / name)
            shutil.chown(inside / name, "nobody")
    more = {"user": "nobody", "chroot_dir": root,   # where there is no /proc for a sanitizer
            "popen": {"env": {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}}} if confined else {}
    p = proxy(place(), {**web.entry(), "path": f"/{UNDER}/"}, client_ca=live_files / "ca.pem",
              listeners=[("127.0.0.1", "0", WSS), ("127.0.0.1", "0", REDIRECT)],
              certs=[(None, live_files / "cert.pem", live_files / "key.pem")], **more)
    assert "warning certs" not in p.log.text
    before = shown(p)
    assert "Pebble" not in before
    url = authority(p.ports[1])
    environment = {**os.environ, "PLACE": str(live_files), "INSIDE": str(inside), "URL": url,
                   "OWNER": "nobody" if confined else "root", "PID": str(p.pid)}

    def run(script, force):
        subprocess.run([*etc.wrapper(), "sh", "-c", script], check=True, timeout=4 * PATIENCE,
                       env={**environment, "FORCE": force})
    run('uacme -a "$URL" -c $PLACE/uacme -y new', "")
    for n in 1, 2:
        run(RENEW, "-f" if n > 1 else "")
        p.log.wait("reload", nth=n, ok=True)
        after = shown(p)
        assert "Pebble" in after and after != before
        before = after
    run(RENEW, "")                  # not due
    assert len(p.log.all("reload")) == 2
    assert p.log.all("cert", names=NAME, changed="1")
