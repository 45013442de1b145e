"""Boots one emulated router: kernel, busybox, wssproxy started by README's line of /etc/inittab; and
takes clients of this host through it. Everything that is waited for has its time.

    device.py mipsel|armhf|arm64 COMPILER"""

import asyncio
import gzip
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

import websockets               # noqa: E402

import pki                      # noqa: E402
from harness import BUILD, REPO, WSS, C, config_text    # noqa: E402

MACHINE, CC = sys.argv[1:]
CROSS = BUILD / "cross" / CC
PACKAGES = BUILD / "cross" / "packages" / MACHINE
WORK = BUILD / "device" / MACHINE
ROOT = WORK / "root"
SESSIONS = 200

BOOT = {
    "mipsel": (["qemu-system-mipsel", "-M", "malta", "-m", "32", "-vga", "none",
                "-device", "pcnet,netdev=n,romfile="], "nokaslr console=ttyS0", ["mii", "pcnet32"]),
    "armhf": (["qemu-system-arm", "-M", "virt", "-m", "64",
               "-device", "virtio-net-device,netdev=n"], "console=ttyAMA0",
              ["failover", "net_failover", "virtio_mmio", "virtio_net"]),
    "arm64": (["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a53", "-m", "128",
               "-device", "virtio-net-device,netdev=n"], "console=ttyAMA0",
              ["failover", "net_failover", "virtio_mmio", "virtio_net"]),
}


def say(text):
    print(f"{time.monotonic() - START:6.1f} s  {text}", flush=True)


# ---- the image ----

def inittab_line():
    """The one that README shows."""
    lines = re.findall(r"^ +(::respawn:\S*wssproxy)$", (REPO / "README").read_text(), re.M)
    assert len(lines) == 1, lines
    return lines[0]


def program(echo, secure):
    """wssproxy with a configuration for the device."""
    files = "/etc/wssproxy/"
    text = config_text({
        "listeners": [("0.0.0.0", "443", WSS)],
        "certs": [(None, files + "cert.pem", files + "key.pem")],
        "backends": [{"host": "10.0.2.2", "port": str(echo)},
                     {"host": "10.0.2.2", "port": str(secure), "path": "/verified",
                      "tls": C("TLS_VERIFY"), "sni": "localhost", "ca": files + "root.pem"},
                     {"host": "server01", "port": "3000", "path": "/named"}],
        "tls_backends": 1, "max_sessions": 256, "max_busy": 16, "max_per_ip": 0, "head_ms": 60000,
        "handshake_ms": 120000, "idle_ms": 600000, "connect_ms": 20000, "response_ms": 60000,
        "user": "1000", **optional("resolve_names", 1)})
    config = WORK / "config.h"
    config.write_text(text)
    source = CROSS / "wssproxy"
    for name in ("wssproxy.c", "wssproxy.h", "Makefile"):
        shutil.copy2(REPO / name, source / name)
    line = re.search(rf"^ +(make CC={CC} .*)$", (REPO / "README").read_text(), re.M)[1]
    subprocess.run([*shlex.split(line), "-s", f"CONFIG={config}", f"OUT={WORK / 'wssproxy'}"],
                   cwd=source, check=True,
                   env={**os.environ, "SOURCE_DATE_EPOCH": str(int(time.time()))})
    return WORK / "wssproxy"


def optional(name, value):
    """An entry, if config.def.h has it."""
    known = re.search(rf"\b{name}\b", (REPO / "config.def.h").read_text())
    return {name: value} if known else {}


def image(binary):
    """A root directory as cpio: busybox, the network card's modules, and what wssproxy reads. There
    is no /etc/passwd, no resolv.conf, and no network until the test asks for it."""
    shutil.rmtree(ROOT, ignore_errors=True)
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc/init.d", "etc/wssproxy", "lib",
                 "usr/local/sbin"):
        (ROOT / name).mkdir(parents=True)
    shutil.copy(PACKAGES / "bin/busybox", ROOT / "bin/busybox")
    (ROOT / "bin/sh").symlink_to("busybox")
    (ROOT / "init").symlink_to("bin/busybox")
    shutil.copy(binary, ROOT / "usr/local/sbin/wssproxy")
    modules = BOOT[MACHINE][2]
    for name in modules:
        found = list(PACKAGES.glob(f"lib/modules/*/kernel/**/{name}.ko"))
        shutil.copy(found[0], ROOT / "lib")
    shutil.copy(pki.DIR / "ec256.pem", ROOT / "etc/wssproxy/cert.pem")
    shutil.copy(pki.DIR / "ec256.key", ROOT / "etc/wssproxy/key.pem")
    (ROOT / "etc/wssproxy/key.pem").chmod(0o600)
    os.chown(ROOT / "etc/wssproxy/key.pem", 1000, 1000)
    shutil.copy(pki.DIR / "root.pem", ROOT / "etc/wssproxy/root.pem")
    (ROOT / "etc/inittab").write_text(f"::sysinit:/etc/init.d/rcS\n{inittab_line()}\n"
                                      "::respawn:-/bin/sh\n")
    (ROOT / "etc/init.d/rcS").write_text("\n".join([
        "#!/bin/sh", "/bin/busybox mount -t proc proc /proc", "/bin/busybox --install -s /bin",
        "mount -t devtmpfs dev /dev", "mount -t sysfs sys /sys", "mount -t tmpfs tmp /tmp",
        *[f"insmod /lib/{name}.ko" for name in modules],
        "ip link set lo up", "date -s 1970-01-01\\ 00:01:00", "mount -o remount,ro /", ""]))
    (ROOT / "etc/init.d/rcS").chmod(0o755)
    names = subprocess.run(["find", ".", "-print0"], cwd=ROOT, check=True, capture_output=True)
    archive = subprocess.run(["cpio", "--quiet", "-0", "-o", "-H", "newc"], cwd=ROOT, check=True,
                             input=names.stdout, capture_output=True)
    path = WORK / "initramfs"
    path.write_bytes(gzip.compress(archive.stdout, 1))
    return path


# ---- the machine ----

class Machine:
    """Its console: what it says is kept, and a shell takes commands there."""

    def __init__(self, initramfs, port):
        command, console, _ = BOOT[MACHINE]
        kernel = next(PACKAGES.glob("boot/vmlinuz-*"))
        self.text = ""
        self.news = threading.Condition()
        self.count = 0
        self.process = subprocess.Popen(
            [*command, "-kernel", str(kernel), "-initrd", str(initramfs), "-append",
             f"{console} panic=-1", "-no-reboot", "-nographic", "-monitor", "none",
             "-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{port}-:443"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        with open(WORK / "console", "wb", buffering=0) as copy:
            while data := os.read(self.process.stdout.fileno(), 4096):
                copy.write(data)
                with self.news:
                    self.text += data.decode("utf-8", "replace").replace("\r", "")
                    self.news.notify_all()

    def mark(self):
        return len(self.text)

    def wait(self, pattern, seconds, start=0):
        """The match, in what it said after start."""
        with self.news:
            self.news.wait_for(lambda: re.search(pattern, self.text[start:], re.M), seconds)
            found = re.search(pattern, self.text[start:], re.M)
        assert found, f"the console did not say {pattern!r} within {seconds} s"
        return found

    def shell(self, command, seconds=30):
        """Runs a command there; its output, which the log may be mixed into."""
        self.count += 1
        start = self.mark()
        line = f"{{ {command}; }} 2>&1; echo done''{self.count}=$?\n"
        for byte in line.encode():                  # slowly: the serial line has a short queue
            self.process.stdin.write(bytes([byte]))
            self.process.stdin.flush()
            time.sleep(0.002)
        end = self.wait(rf"^.*done{self.count}=(\d+)$", seconds, start)
        output = self.text[start:start + end.start()].partition("\n")[2]
        return int(end[1]), output

    def free_kb(self):
        """MemAvailable and MemFree."""
        output = self.shell("cat /proc/meminfo")[1]
        return {name: int(re.search(rf"{name}: *(\d+) kB", output)[1])
                for name in ("MemTotal", "MemFree", "MemAvailable")}

    def end(self):
        self.process.kill()
        self.process.wait()


# ---- clients and backends on this host ----

def context():
    c = ssl.create_default_context(cafile=pki.DIR / "ec256.pem")
    return c


def url(port, path="/"):
    return f"wss://localhost:{port}{path}"


async def open_session(port, path="/"):
    return await websockets.connect(url(port, path), host="127.0.0.1", ssl=context(),
                                    open_timeout=90, ping_interval=None, close_timeout=5)


async def echo_once(port, path="/", text="hello"):
    client = await open_session(port, path)
    await client.send(text)
    got = await asyncio.wait_for(client.recv(), 60)
    await client.close()
    assert got == text, got


async def until_echo(port, seconds):
    """Tries until the proxy is there again; how long that took."""
    start = time.monotonic()
    while True:
        try:
            await asyncio.wait_for(echo_once(port), 60)
            return time.monotonic() - start
        except (OSError, websockets.exceptions.WebSocketException, EOFError, ssl.SSLError,
                asyncio.TimeoutError):
            if time.monotonic() - start > seconds:
                raise
            await asyncio.sleep(0.2)


async def echo_server(client, path=None):
    try:
        async for message in client:
            await client.send(message)
    except websockets.exceptions.ConnectionClosed:
        pass


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


async def in_thread(function, *args):
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


# ---- what is tried ----

async def hold_sessions(machine, port, before):
    """200 sessions at a time, each of which speaks, rests, and speaks again. Not all in the same
    moment: the emulated network card has room for 32 frames, and what it loses comes again after 1,
    2, 4 and more seconds."""
    turn = asyncio.Semaphore(8)

    async def in_turn(step):
        async def one(client):
            async with turn:
                await step(client)
        await asyncio.gather(*[one(client) for client in clients])

    async def again(client):
        await client.send("second")
        assert await asyncio.wait_for(client.recv(), 60) == "second"

    async def one():
        async with turn:
            client = await open_session(port)
            await client.send("first")
            assert await asyncio.wait_for(client.recv(), 60) == "first"
            return client
    start = time.monotonic()
    clients = await asyncio.gather(*[one() for _ in range(SESSIONS)])
    took = time.monotonic() - start
    say(f"{SESSIONS} sessions: {SESSIONS / took:.1f} handshakes/s, the later ones beside those open")
    await asyncio.sleep(2)
    held = await in_thread(machine.free_kb)
    await in_turn(again)
    for name in ("MemFree", "MemAvailable"):
        say(f"{name}: {before[name]} KB before, {held[name]} KB with {SESSIONS} sessions: "
            f"{(before[name] - held[name]) / SESSIONS:.1f} KB each")
    await in_turn(lambda client: client.close())
    ceiling = int(machine.wait(r"start version=.* memory=(\d+)KB", 1)[1])
    output = (await in_thread(machine.shell, "grep VmRSS /proc/$(started)/status"))[1]
    rss = int(re.search(r"VmRSS:\s+(\d+) kB", output)[1])
    say(f"resident: {rss} KB, with program and stack; tables: at most {ceiling} KB")
    assert rss < ceiling + 700, "more memory than it said"


async def measure_messages(port, seconds=5):
    """Messages and their echoes a second, by 8 clients."""
    clients = [await open_session(port) for _ in range(8)]
    end = time.monotonic() + seconds

    async def talk(client):
        n = 0
        while time.monotonic() < end:
            await client.send("x" * 64)
            await asyncio.wait_for(client.recv(), 60)
            n += 1
        return n
    counts = await asyncio.gather(*[talk(client) for client in clients])
    say(f"64-byte messages and their echoes: {sum(counts) / seconds:.0f}/s")
    await asyncio.gather(*[client.close() for client in clients])


async def full_disk(machine, port):
    """A log on a file system without room loses lines, and nothing else."""
    code, output = await in_thread(machine.shell, (
        "mkdir -p /tmp/log; mount -t tmpfs -o size=8k log /tmp/log; mount -o remount,rw / && sed -i /respawn.*wssproxy/d /etc/inittab && kill -HUP 1;"
        # init takes a signal and acts on it before it looks after its children again
        " while grep -q 'Pnd:.*[13579bdf]$' /proc/1/status; do :; done;"
        " kill -9 $(started); while pidof wssproxy; do :; done;"
        " (/usr/local/sbin/wssproxy 2>/tmp/log/log </dev/null >/dev/null &)"), 40)
    await until_echo(port, 60)
    await in_thread(machine.shell, "dd if=/dev/zero of=/tmp/log/fill bs=1k; true")
    for _ in range(5):
        await echo_once(port)
    code, output = await in_thread(machine.shell, "df /tmp/log; pidof wssproxy")
    assert code == 0, output
    assert re.search(r" 100% +/tmp/log", output), output
    say("full disk under the log: sessions go on")


async def play(machine, port):
    await in_thread(machine.wait, r"start version=.*", 120)
    await in_thread(machine.wait, r"listen address=.*", 30)
    say("wssproxy started by: " + inittab_line())
    say("console: " + machine.wait(r"start version=.*", 1)[0])
    say("console: " + machine.wait(r"Memory: .*", 1)[0])
    # the one that init started; its child asks the resolver
    await in_thread(machine.shell, "started() { for p in $(pidof wssproxy); do grep -q 'PPid:.1$' "
                    "/proc/$p/status && echo $p; done; }")
    code, output = await in_thread(machine.shell, "date; ls /etc/resolv.conf /etc/passwd; mount")
    assert "1970" in output and output.count("No such file") == 2, output
    assert re.search(r" / .*\bro\b", output), output
    say("1970, no resolv.conf, no passwd, read-only root")
    await in_thread(machine.shell, "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up;"
                    " ip route add default via 10.0.2.2")
    say(f"network up after the proxy: echo after {await until_echo(port, 60):.1f} s")
    code, output = await in_thread(machine.shell, "grep -E 'Uid|CapPrm|Seccomp:' /proc/$(started)/status")
    assert "1000\t1000\t1000\t1000" in output, output
    assert re.search(r"CapPrm:\s+0{16}$", output, re.M) and re.search(r"Seccomp:\s+2$", output, re.M), output
    say("a user of its own, no capabilities, and the kernel's filter of system calls")
    await echo_once(port, "/verified")
    say("a verified TLS backend in 1970")
    await in_thread(machine.wait, r"backend name=server01:3000 down why=unresolved", 60)
    try:
        await echo_once(port, "/named")
        raise AssertionError("a backend without a name served")
    except websockets.exceptions.InvalidStatusCode as answer:
        assert answer.status_code == 502, answer.status_code
    say("a backend whose name nobody can resolve: 502, and no other harm")
    await hold_sessions(machine, port, await in_thread(machine.free_kb))
    await measure_messages(port)
    start = machine.mark()
    await in_thread(machine.shell, "kill -HUP $(started)")
    await in_thread(machine.wait, r"reload ok.*", 20, start)
    await echo_once(port)
    say("SIGHUP: " + machine.wait(r"reload ok.*", 1, start)[0])
    start = machine.mark()
    await in_thread(machine.shell, "kill -9 $(started)")
    await in_thread(machine.wait, r"listen address=.*", 30, start)
    say(f"kill -9: echo again after {await until_echo(port, 60):.1f} s")
    await full_disk(machine, port)
    after = await in_thread(machine.free_kb)
    say(f"memory at the end: {after}")


async def main():
    WORK.mkdir(parents=True, exist_ok=True)
    pki.make_all()
    echo, secure, port = free_port(), free_port(), free_port()
    initramfs = image(program(echo, secure))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    server.load_cert_chain(pki.DIR / "chain.pem", pki.DIR / "leaf.key")
    async with websockets.serve(echo_server, "127.0.0.1", echo, ping_interval=None), \
            websockets.serve(echo_server, "127.0.0.1", secure, ssl=server, ping_interval=None):
        say("boots")
        machine = Machine(initramfs, port)
        try:
            await asyncio.wait_for(play(machine, port), 800)
        except BaseException:
            print(machine.text[-6000:])
            raise
        finally:
            machine.end()


START = time.monotonic()
asyncio.run(main())
