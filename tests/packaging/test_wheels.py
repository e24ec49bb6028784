"""Everything that is published, built with zig: minutes long. The wheel for this machine generates text."""

import json
import os
import platform as machine
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import wheels
from platforms import PLATFORMS, PURE, Platform

from pard_onnx import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
ROOT = Path(__file__).parents[2]
HERE = f"manylinux_2_17_{machine.machine()}"
PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and all wheels."""
    for name in ("auditwheel", "build", "lief", "twine", "ziglang"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("dist")
    assert wheels.main([str(folder)]) == 0
    return folder


def wheel(folder: Path, tag: str) -> Path:
    [path] = folder.glob(f"*-{tag}*.whl")
    return path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda one: one.tag)
def test_a_wheel_is_the_pure_one_and_a_library(built: Path, platform: Platform) -> None:
    pure, found = contents(wheel(built, PURE)), contents(wheel(built, platform.tag))
    library = f"pard_onnx/runtime/kernels/{platform.system.library}"
    assert set(found) - set(pure) == {library}
    assert {name: found[name] for name in pure} == pure
    endings = (".cpp", ".h", ".so", ".dll", ".pdb", ".lib", ".safetensors")
    assert not [name for name in pure if name.endswith(endings)]
    assert wheel(built, platform.tag).stat().st_size < 12_000_000


def test_the_sdist_has_all_that_git_has(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {member.name.partition("/")[2] for member in archive}
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(known.splitlines()) <= found
    assert {name for name in found - set(known.splitlines()) if "egg-info" not in name} == {"PKG-INFO", "setup.cfg"}


def test_an_unpacked_sdist_elsewhere_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """In another folder, with an empty cache of zig; for one platform, as it takes a minute for each."""
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
        epoch = archive.getmembers()[0].mtime
    [tree] = tmp_path.glob("pard_onnx-*")
    cache = str(tmp_path / "zig")
    environment = {"SOURCE_DATE_EPOCH": str(epoch), "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    tags = ["win_amd64", PURE]
    options = [option for tag in tags for option in ("--platform", tag)]
    command = [sys.executable, str(tree / "packaging/wheels.py"), str(tmp_path / "again"), *options]
    subprocess.run(command, env=os.environ | environment, cwd=tmp_path, check=True)
    paths = sorted((tmp_path / "again").iterdir())
    assert len(paths) == 3
    for path in paths:
        assert path.read_bytes() == (built / path.name).read_bytes(), path.name


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel of this machine is found by its Linux tag")
@pytest.mark.parametrize("tag", [HERE, PURE])
def test_the_wheel_generates_what_this_environment_does(built: Path, tag: str, tmp_path: Path) -> None:
    pair = ["demo-target", "demo-draft"]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, f"{wheel(built, tag)}[cpu]"], check=True)
    command = [str(tmp_path / "venv/bin/pard-generate"), "--target", pair[0], "--draft", pair[1]]
    command += ["--prompt", PROMPT, "--max-new-tokens", "24", "--json"]
    cache = {"PARD_ONNX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with load(*pair) as here:
        result = here.generate(PROMPT, max_new_tokens=24)
    expected = ("onnxruntime", found["text"]) if tag == PURE else (result.stats.kernel, result.text)
    assert (found["kernel"], found["text"]) == expected
    assert found["text"]
