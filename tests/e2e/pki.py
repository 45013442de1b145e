"""Keys and certificates of the tests, made once by openssl and kept in the build directory."""

import fcntl
import subprocess
import time

from harness import BUILD

DIR = BUILD / "pki"
NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
EC_OF = {"ec256": "prime256v1", "ec384": "secp384r1"}
CA = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=keyCertSign"]


def openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, cwd=DIR)


def self_sign(name, *extra):
    openssl("req", "-x509", "-key", f"{name}.key", "-out", f"{name}.pem", "-days", 3650,
            "-subj", f"/CN={name}", "-addext", NAMES, *extra)


def make_ec(name, curve):
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}",
            "-pkeyopt", "ec_param_enc:named_curve", "-out", f"{name}.key")


def make_rsa(name, bits):
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", f"rsa_keygen_bits:{bits}",
            "-out", f"{name}.key")


def sign(name, issuer, *extensions):
    """A certificate for name.key by issuer, name.pem."""
    openssl("req", "-new", "-key", f"{name}.key", "-subj", f"/CN={name}", "-out", f"{name}.csr")
    (DIR / f"{name}.ext").write_text("\n".join(extensions) + "\n")
    openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{issuer}.pem", "-CAkey",
            f"{issuer}.key", "-days", 3650, "-extfile", f"{name}.ext", "-set_serial", 17,
            "-out", f"{name}.pem")


def make_single(name):
    """A self-signed certificate and its key in PKCS#8 and in the older form."""
    if name == "rsa4096":   # the command of a hundred tutorials
        openssl("req", "-x509", "-newkey", "rsa:4096", "-keyout", "rsa4096.key", "-out",
                "rsa4096.pem", "-days", 365, "--nodes", "-subj", "/CN=localhost")
    elif name.startswith("rsa"):
        make_rsa(name, int(name[3:]))
        self_sign(name)
    else:
        make_ec(name, EC_OF[name])
        self_sign(name)
    if name.startswith("rsa"):
        openssl("rsa", "-in", f"{name}.key", "-traditional", "-out", f"{name}.pkcs1")
    else:
        openssl("ec", "-in", f"{name}.key", "-out", f"{name}.sec1")


def make_chain():
    """chain.pem: leaf and intermediate, to be verified with root.pem alone."""
    for name in ("root", "intermediate", "leaf"):
        make_ec(name, "prime256v1")
    openssl("req", "-x509", "-key", "root.key", "-out", "root.pem", "-days", 3650,
            "-subj", "/CN=root", *CA)
    sign("intermediate", "root", "basicConstraints=critical,CA:TRUE", "keyUsage=keyCertSign")
    sign("leaf", "intermediate", "basicConstraints=CA:FALSE", NAMES)
    chain = (DIR / "leaf.pem").read_text() + (DIR / "intermediate.pem").read_text()
    (DIR / "chain.pem").write_text(chain)


def make_odd_forms():
    """Files as editors and old tools leave them."""
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-out", "params.key")
    self_sign("params")
    for kind in ("pem", "key"):
        text = (DIR / f"ec256.{kind}").read_bytes()
        (DIR / f"crlf.{kind}").write_bytes(text.replace(b"\n", b"\r\n"))
        (DIR / f"noeol.{kind}").write_bytes(text.rstrip(b"\n"))
        (DIR / f"truncated.{kind}").write_bytes(text[:len(text) // 2])


def is_recent(mark):
    """Whether what was made at that time is good now; made later than now, it is not good yet."""
    return 0 <= time.time() - mark.stat().st_mtime < 300 * 86400


def make_all():
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / ".gitignore").write_text("*\n")
    with open(BUILD / "pki.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = DIR / "complete"
        if complete.exists() and is_recent(complete):
            return
        DIR.mkdir(exist_ok=True)
        for name in ("rsa2048", "rsa3072", "rsa4096", "ec256", "ec384"):
            make_single(name)
        make_ec("other", "prime256v1")
        self_sign("other")
        make_chain()
        make_odd_forms()
        for key in [*DIR.glob("*.key"), *DIR.glob("*.pkcs1"), *DIR.glob("*.sec1")]:
            key.chmod(0o600)
        complete.touch()
