"""What the compiler says of a config.h, and what a program says of its own."""

import re
import subprocess

import pytest

from harness import FORWARD, PATIENCE, REPO, WSS, BuildFailed, build, config_text


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
    assert f"{tmp_path}/config.h is of config_version 0, config.def.h of 1: diff the two" in first
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
