"""The recipes beside this file, by stubs of what they are for: they build, install what their scripts
name, and what they start comes up, comes up again, loads certificates and ends."""

import hashlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

PKG = Path(__file__).resolve().parent
sys.path.insert(0, str(PKG.parent / "e2e"))

import pki                                                      # noqa: E402
from harness import BUILD, PATIENCE, REPO, SYSLOG, WSS, Log, build, config_text, eventually  # noqa: E402

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
VERSION = re.search(r"^VERSION = (\S+)", (REPO / "Makefile").read_text(), re.M)[1]
CONFIG_OF_ITS_OWN = "\n/* one of its own */\n"


def run(*command, **options):
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


def hash_of(path, algorithm="sha256"):
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def recipe(name):
    return (PKG / name).read_text()


# ---- what the recipes say ----

@pytest.mark.parametrize("name", ["buildroot/wssproxy.mk", "openwrt/Makefile"])
def test_recipe_is_of_this_version(name):
    assert re.search(r"^(?:WSSPROXY|PKG)_VERSION ?:?= ?(\S+)", recipe(name), re.M)[1] == VERSION


def test_yocto_recipe_is_of_this_version():
    assert [p.name for p in (PKG / "yocto").iterdir()] == [f"wssproxy_{VERSION}.bb"]


def test_hashes_of_the_licence_are_right():
    assert f"sha256  {hash_of(REPO / 'LICENSE')}  LICENSE\n" in recipe("buildroot/wssproxy.hash")
    assert f"file://LICENSE;md5={hash_of(REPO / 'LICENSE', 'md5')} " in recipe(f"yocto/wssproxy_{VERSION}.bb")


def test_the_library_is_the_same_for_all():
    known = {re.search(r"\b[0-9a-f]{64}\b", recipe(name))[0]
             for name in ("openwrt/Makefile", f"yocto/wssproxy_{VERSION}.bb")}
    assert known == {"6705bba1714961b41a728dfc5debbe348d2966c117649392f8c8139efc83ff14"}


# ---- builds ----

@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What `make dist` packs, and what it says of it."""
    place = tmp_path_factory.mktemp("dist") / "wssproxy"
    shutil.copytree(REPO, place, ignore=lambda folder, names:
                    {"build", ".git", "config.h", "wssproxy", "wssproxy.flags"} & set(names)
                    if Path(folder) in (REPO, REPO / "tests") else ())
    output = run("make", "dist", cwd=place)
    return place / f"wssproxy-{VERSION}.tar.gz", output


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """BearSSL's archive, as far as names go: Debian's sources, packed again."""
    packages = REPO / "tests/build/cross/packages"
    run(REPO / "tests/cross/foreign", packages, "source", "bearssl")
    place = tmp_path_factory.mktemp("library")
    run("tar", "-C", packages, "--exclude=bearssl/build", "--transform=s,^bearssl,bearssl-0.6,", "-czf",
        place / "bearssl-0.6.tar.gz", "bearssl")
    return place / "bearssl-0.6.tar.gz"


def test_dist_says_its_hash(dist):
    archive, output = dist
    assert f"{hash_of(archive)}  {archive.name}" in output


def entry(program, name):
    """An entry of the configuration that a program was built with."""
    shown = subprocess.run([program, "-v"], capture_output=True, text=True)
    return re.search(rf"^{name}(?: =|=) ?(\S+)", shown.stdout, re.M)[1]


@pytest.fixture(scope="module")
def buildroot(tmp_path_factory, dist):
    place = tmp_path_factory.mktemp("buildroot")
    package = place / "package/wssproxy"
    shutil.copytree(PKG / "buildroot", package)
    run("tar", "xzf", dist[0], cwd=package)
    (package / f"wssproxy-{VERSION}").rename(package / "src")

    def make(name, *settings):
        folders = {f: place / name / f for f in ("BUILD_DIR", "TARGET_DIR")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        run("make", "-f", PKG / "stubs/buildroot.mk", f"PKGDIR={package}", *settings,
            *[f"{k}={v}" for k, v in folders.items()])
        return folders["TARGET_DIR"]
    return make, package


@pytest.fixture(scope="module")
def target(buildroot):
    return buildroot[0]("default", 'BR2_PACKAGE_WSSPROXY_CONFIG=""')


def test_buildroot_installs(target):
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == {
        "usr/sbin/wssproxy", "etc/init.d/S50wssproxy", "usr/lib/systemd/system/wssproxy.service"}
    assert os.access(target / "etc/init.d/S50wssproxy", os.X_OK)
    assert entry(target / "usr/sbin/wssproxy", "log_to") == "SYSLOG"


def test_buildroot_takes_the_config_that_is_asked_for(buildroot, tmp_path):
    """Not the one that lies among the sources, which somebody has tried something with."""
    make, package = buildroot
    text = (REPO / "config.def.h").read_text()
    stray = package / "src/config.h"
    stray.write_text(text.replace("max_per_ip   = 128", "max_per_ip   = 111"))
    assert "111" in stray.read_text()
    own = tmp_path / "config.h"
    own.write_text(text.replace("max_per_ip   = 128", "max_per_ip   = 222"))
    try:
        default = make("stray", "BR2_PACKAGE_WSSPROXY_CONFIG=")
        assert entry(default / "usr/sbin/wssproxy", "max_per_ip") == "128"
        chosen = make("own", f'BR2_PACKAGE_WSSPROXY_CONFIG="{own}"')
        assert entry(chosen / "usr/sbin/wssproxy", "max_per_ip") == "222"
        assert entry(chosen / "usr/sbin/wssproxy", "log_to") == "STDERR"
    finally:
        stray.unlink()


@pytest.fixture(scope="module")
def openwrt(tmp_path_factory, dist, library):
    top = tmp_path_factory.mktemp("openwrt")
    shutil.copytree(PKG / "stubs/openwrt", top, dirs_exist_ok=True)
    package = top / "package/wssproxy"
    shutil.copytree(PKG / "openwrt", package)
    shutil.copy(dist[0], package)
    (top / "dl").mkdir()
    shutil.copy(library, top / "dl")
    run("make", "-C", package, f"TOPDIR={top}", "compile")
    return top, package


def test_openwrt_builds_and_installs(openwrt):
    top, package = openwrt
    root = top / "root"
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == {
        "usr/sbin/wssproxy", "etc/init.d/wssproxy"}
    assert entry(root / "usr/sbin/wssproxy", "log_to") == "SYSLOG"
    assert "libbearssl" not in run("readelf", "-d", root / "usr/sbin/wssproxy")


def test_openwrt_finds_the_licences(openwrt):
    top, package = openwrt
    licences = run("make", "-s", "-C", package, f"TOPDIR={top}", "show-licences")
    assert re.search(r"^PKG_LICENSE:=ISC MIT$", recipe("openwrt/Makefile"), re.M)
    assert {"LICENSE", "bearssl-0.6/LICENSE.txt"} <= set(licences.split())


def yocto_step(name, variables):
    """A function of the recipe, with its variables replaced."""
    text = recipe(f"yocto/wssproxy_{VERSION}.bb")
    body = re.search(rf"^{name}\(\) \{{\n(.*?)^\}}", text, re.M | re.S)[1]
    default = re.search(r'^WSSPROXY_CONFIG \?= "(.*)"', text, re.M)[1]
    for _ in range(2):
        body = re.sub(r"\$\{(\w+)\}", lambda m: str({"WSSPROXY_CONFIG": default, **variables}[m[1]]), body)
    return 'set -e; oe_runmake() { make "$@"; }\n' + body


def test_yocto_builds_and_installs(openwrt, tmp_path):
    """The steps of its recipe, with the objects of the library that are there already."""
    work = tmp_path / "work"
    shutil.copytree(openwrt[0] / f"build/wssproxy-{VERSION}", work / f"wssproxy-{VERSION}", symlinks=True)
    source = work / f"wssproxy-{VERSION}"
    (source / "bearssl-0.6").rename(work / "bearssl-0.6")
    for stray in ("config.h", "wssproxy", "wssproxy.flags"):
        (source / stray).unlink()
    image = tmp_path / "image"
    image.mkdir()
    variables = {"S": source, "D": image, "prefix": "/usr", "sysconfdir": "/etc", "sbindir": "/usr/sbin",
                 "systemd_system_unitdir": "/usr/lib/systemd/system"}
    for step in ("do_configure", "do_compile", "do_install"):
        run("sh", "-c", yocto_step(step, variables), cwd=source,
            env={**os.environ, "CC": "cc", "CFLAGS": "-O0", "LDFLAGS": ""})
    assert {str(p.relative_to(image)) for p in image.rglob("*") if p.is_file()} == {
        "usr/sbin/wssproxy", "usr/share/man/man8/wssproxy.8", "etc/init.d/wssproxy",
        "usr/lib/systemd/system/wssproxy.service"}
    assert entry(image / "usr/sbin/wssproxy", "log_to") == "SYSLOG"
    systemd_knows(image)
    text = recipe(f"yocto/wssproxy_{VERSION}.bb")
    assert f"LICENSE.txt;md5={hash_of(work / 'bearssl-0.6/LICENSE.txt', 'md5')}" in text


# ---- systemd ----

def systemd_knows(root):
    """Its unit, in a system that has no more than the units that all have."""
    units = root / "usr/lib/systemd/system"
    for name in ("basic", "sysinit", "shutdown", "multi-user", "network"):
        (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\n")
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy("/bin/kill", root / "bin/kill")
    assert run("systemd-analyze", "verify", "--man=no", f"--root={root}", "wssproxy.service") == ""


def test_systemd_knows_the_unit_as_make_installs_it(tmp_path, target):
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    shutil.copy(PKG / "wssproxy.service", units)
    run("make", "install", f"DESTDIR={tmp_path}", f"OUT={target / 'usr/sbin/wssproxy'}", cwd=REPO)
    systemd_knows(tmp_path)


def test_systemd_knows_the_unit_as_buildroot_installs_it(target, tmp_path):
    shutil.copytree(target, tmp_path / "root")
    systemd_knows(tmp_path / "root")


def test_systemd_tries_for_ever():
    unit = recipe("wssproxy.service")
    sections = dict(re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", unit, re.M | re.S))
    assert "\nStartLimitIntervalSec=0\n" in sections["Unit"]
    assert "\nRestart=always\n" in sections["Service"]


def test_systemd_leaves_the_copy_alone_and_is_quick():
    """By reading: what makes way has five seconds until nobody listens."""
    unit = recipe("wssproxy.service")
    assert "\nKillMode=process\n" in unit
    assert int(re.search(r"^RestartSec=(\d+)$", unit, re.M)[1]) < 5


# ---- a root with busybox, and the scripts in it ----

def build_static(**config):
    """wssproxy as a static program that logs to syslog, on a port that the kernel chooses."""
    pki.make_all()
    kept = os.environ.get("LDFLAGS")
    os.environ["LDFLAGS"] = "-static"
    try:
        return build(config_text({
            "listeners": [("127.0.0.1", "0", WSS)], "resolve_names": 0, "log_to": SYSLOG,
            "certs": [(None, "/etc/wssproxy/cert.pem", "/etc/wssproxy/key.pem")],
            "backends": [{"host": "127.0.0.1", "port": "1"}], **config}))
    finally:
        os.environ.pop("LDFLAGS") if kept is None else os.environ.update(LDFLAGS=kept)


@pytest.fixture(scope="module")
def program():
    return build_static()


@pytest.fixture(scope="module")
def way_program():
    """One that makes way, on a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return build_static(make_way=1, listeners=[("127.0.0.1", str(port), WSS)])


class Root:
    """A system of busybox, in process and mount namespaces of its own; its first process is a shell
    that takes commands, or busybox's init."""

    def __init__(self, program, at="usr/sbin"):
        self.path = Path(tempfile.mkdtemp(prefix="wssproxy-"))      # short, for dev/log is a socket
        for folder in ("bin", "dev", "etc/init.d", "etc/wssproxy", "proc", "tmp", "var/run", at):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy("/bin/busybox", self.path / "bin/busybox")
        for name in ("sh", "start-stop-daemon", "sleep", "rm", "kill", "killall", "basename", "grep",
                     "logger", "init"):
            (self.path / "bin" / name).symlink_to("busybox")
        shutil.copy(program, self.path / at / "wssproxy")
        self.console = self.path / "tmp/console"
        os.mknod(self.path / "dev/null", 0o666 | 0o020000, os.makedev(1, 3))
        self.log = Log()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path / "dev/log"))
        threading.Thread(target=self.follow, daemon=True).start()
        self.process = None

    def follow(self):
        while True:
            try:
                data = self.socket.recv(4096)
            except OSError:
                return
            text = data.decode("utf-8", "replace").rstrip("\0\n")
            self.log.feed(re.sub(r"^<\d+>.*?wssproxy(\[\d+\])?: ", "", text))

    def install(self, source, at, mode=0o755):
        shutil.copy(source, self.path / at)
        (self.path / at).chmod(mode)

    def certificate(self, name="ec256"):
        """As a good hook does it: the key first, each by a rename."""
        for suffix, to in ((".key", "key.pem"), (".pem", "cert.pem")):
            shutil.copy(pki.DIR / f"{name}{suffix}", self.path / "etc/wssproxy/new")
            (self.path / "etc/wssproxy/new").chmod(0o600)
            (self.path / "etc/wssproxy/new").rename(self.path / "etc/wssproxy" / to)

    def boot(self, *first):
        script = f'mount -t proc proc {self.path}/proc && exec chroot {self.path} "$@"'
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh",
             *(first or ("/bin/sh",))],
            stdin=subprocess.PIPE, stdout=self.console.open("w") if first else subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)

    def sh(self, command):
        """Status and output of a command."""
        self.process.stdin.write(f"{{ {command}; }} 2>&1 </dev/null; echo ended=$?\n")
        self.process.stdin.flush()
        output = ""
        while not (end := re.match(r"ended=(\d+)$", line := self.process.stdout.readline())):
            assert line, f"the shell ended: {output}"
            output += line
        return int(end[1]), output

    def ok(self, command):
        status, output = self.sh(command)
        assert status == 0, output
        return output

    def pids(self):
        """Of the program, as this machine counts them."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(proc / "root") == str(self.path) and (proc / "comm").read_text() == "wssproxy\n":
                    found.append(int(proc.name))
            except OSError:
                pass
        return found

    def serves(self, nth=1):
        """By its nth start: a client gets its certificate, by an address that is in the log."""
        port = self.log.wait("listen", nth=nth)["address"].rpartition(":")[2]
        context = ssl.create_default_context(cafile=pki.DIR / "ec256.pem")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", int(port)), PATIENCE) as plain, \
                context.wrap_socket(plain, server_hostname="localhost") as client:
            assert client.getpeercert()

    def first(self):
        """The first process in there."""
        child = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return child.read_text().split()[0]

    def nobody_notices(self, restart):
        """Newcomers come all the time meanwhile, and a client stays."""
        port = int(self.log.wait("listen")["address"].rpartition(":")[2])
        came, faults, over = [], [], threading.Event()

        def come():
            while not over.is_set():
                try:
                    self.serves()
                    came.append(1)
                except OSError as error:
                    faults.append(error)
        thread = threading.Thread(target=come)
        with socket.create_connection(("127.0.0.1", port), PATIENCE):
            thread.start()
            restart()
            self.log.wait("listen", nth=2)
            seen = len(came)
            eventually(lambda: faults or len(came) > seen + 5)
            assert len(self.pids()) == 2
        over.set()
        thread.join()
        assert not faults
        eventually(lambda: len(self.pids()) == 1)
        self.log.wait("stop", signal="SIGUSR2")

    def close(self):
        if self.process:
            self.process.kill()         # and with it all that is in there
            self.process.wait()
        eventually(lambda: not self.pids())
        self.socket.close()
        shutil.rmtree(self.path)


@pytest.fixture
def root(program):
    made = []

    def make(*args, program=program):
        made.append(Root(program, *args))
        return made[-1]
    yield make
    for one in made:
        one.close()


S50 = "/etc/init.d/S50wssproxy"


def with_s50(r):
    r.install(PKG / "buildroot/S50wssproxy", S50[1:])
    return r


@as_root
def test_s50_without_a_certificate_waits_for_it(root):
    r = with_s50(root())
    r.boot()
    r.ok(f"{S50} start")
    r.log.wait_text("cert.pem")
    r.certificate()
    r.serves()


@as_root
def test_s50_as_a_whole(root):
    r = with_s50(root())
    r.certificate()
    r.boot()
    assert r.ok(f"{S50} start") == "Starting wssproxy: OK\n"
    r.serves()
    r.ok(f"{S50} start")
    assert len(r.pids()) == 1, "it was started twice"
    r.ok(f"{S50} reload")
    r.log.wait("reload", ok=True)
    os.kill(r.pids()[0], signal.SIGKILL)
    r.serves(nth=2)
    r.ok(f"{S50} restart")
    r.serves(nth=3)
    assert len(r.pids()) == 1
    assert r.ok(f"{S50} stop") == "Stopping wssproxy: OK\n"
    assert r.pids() == [] and len(r.log.all("stop", signal="SIGTERM")) == 2
    assert r.sh(f"{S50} stop")[0] != 0 and r.sh(f"{S50} reload")[0] != 0
    assert r.sh(f"{S50} whatever")[0] == 1


@as_root
def test_s50_restarts_and_nobody_notices(root, way_program):
    r = with_s50(root(program=way_program))
    r.certificate()
    r.boot()
    r.ok(f"{S50} start")
    r.serves()
    r.nobody_notices(lambda: r.ok(f"{S50} restart"))
    r.ok(f"{S50} stop")
    assert r.pids() == []


def with_inittab(r):
    line, = re.findall(r"^ +(::respawn:\S*wssproxy)$", (REPO / "README").read_text(), re.M)
    (r.path / "etc/inittab").write_text(f"{line}\n")
    return r


@as_root
def test_init_starts_the_next_one_and_nobody_notices(root, way_program):
    line, = re.findall(r"^ +(killall -USR2 wssproxy)$", (REPO / "README").read_text(), re.M)
    r = with_inittab(root("usr/local/sbin", program=way_program))
    r.certificate()
    r.boot("/bin/init")
    r.serves()
    r.nobody_notices(lambda: run("nsenter", "-t", str(r.first()), "-p", "-m", "chroot", r.path, *line.split()))


@as_root
def test_inittab_line_of_the_readme(root):
    r = with_inittab(root("usr/local/sbin"))
    r.boot("/bin/init")
    eventually(lambda: "cert.pem" in r.console.read_text())
    r.certificate()
    r.serves()
    os.kill(r.pids()[0], signal.SIGKILL)
    r.serves(nth=2)


class Procd:
    """Plays procd to what the script told it."""

    def __init__(self, root):
        self.root = root
        self.instance, self.triggers = {}, {}
        self.read = 0
        self.ended = threading.Event()
        self.thread = None
        self.stderr = root.path / "tmp/stderr"
        self.stderr.touch()

    def script(self, action):
        status, output = self.root.sh(f"/bin/sh /etc/rc.common /etc/init.d/wssproxy {action}")
        assert status == 0, output
        lines = (self.root.path / "tmp/procd").read_text().splitlines()
        for event, *words in [line.split("\t") for line in lines[self.read:]]:
            if event == "trigger":
                self.triggers[words[0]] = words[2:]
            elif event == "signal":
                assert words[:2] == ["wssproxy", "*"]
                for pid in self.root.pids():
                    os.kill(pid, signal.Signals["SIG" + words[2]])
            elif event == "set":
                assert self.instance["close"], "no instance: nothing would ever be started"
                if self.thread:
                    continue            # nothing has changed
                self.thread = threading.Thread(target=self.keep, daemon=True)
                self.thread.start()
            else:
                self.instance[event] = words
        self.read = len(lines)

    def event(self, name):
        path, action = self.triggers[name]
        assert path == "/etc/init.d/wssproxy"
        self.script(action)

    def keep(self):
        """respawn: a threshold, the seconds until it is tried again, how often (0: for ever)."""
        _, seconds, tries = map(int, self.instance["respawn"])
        assert tries == 0
        command = self.instance["command"]
        while not self.ended.is_set():
            with self.stderr.open("a") as stderr:
                subprocess.run(["nsenter", "-t", self.root.first(), "-p", "-m", "chroot", self.root.path,
                                *command], stderr=stderr)
            self.ended.wait(seconds)

    def close(self):
        self.ended.set()
        for pid in self.root.pids():
            os.kill(pid, signal.SIGKILL)
        if self.thread:
            self.thread.join()


@as_root
def test_procd_without_a_certificate_waits_for_it_and_acme_renews_it(root):
    r = root()
    r.install(PKG / "openwrt/files/wssproxy.init", "etc/init.d/wssproxy")
    r.install(PKG / "stubs/rc.common", "etc/rc.common")
    r.boot()
    r.ok("true")
    procd = Procd(r)
    try:
        procd.script("start")
        assert procd.instance["stderr"] == ["1"]
        assert int(procd.instance["term_timeout"][0]) * 1000 > 10000       # drain_ms
        eventually(lambda: "cert.pem" in procd.stderr.read_text())
        r.certificate()
        procd.event("acme.issue")
        r.serves()
        procd.event("acme.renew")
        r.log.wait("reload", ok=True)
    finally:
        procd.close()


@as_root
def test_procd_restarts_and_nobody_notices(root, way_program):
    r = root(program=way_program)
    r.install(PKG / "openwrt/files/wssproxy.init", "etc/init.d/wssproxy")
    r.install(PKG / "stubs/rc.common", "etc/rc.common")
    r.certificate()
    r.boot()
    r.ok("true")
    procd = Procd(r)
    try:
        procd.script("start")
        r.serves()
        r.nobody_notices(lambda: procd.script("restart"))
    finally:
        procd.close()
