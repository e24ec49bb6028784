"""The table of sources: complete, and read by setup.py, which says what it does not build."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_sources
import pytest
from kernel_sources import ARCHITECTURES, COMMON_SOURCES, FOLDER, architecture_of, exported_names, sources_for

from pard_onnx.runtime import kernels

ROOT = Path(__file__).parents[2]
COMPILER = """#!{python}
import pathlib, sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
if "-o" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


def test_every_source_stands_in_the_table_once() -> None:
    own = [source for architecture in ARCHITECTURES for source in architecture.sources]
    listed = sorted([*COMMON_SOURCES, *own])
    assert listed == sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.cpp"))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_an_architecture_is_found_by_all_of_its_names(architecture: kernel_sources.Architecture) -> None:
    for name in (architecture.name, *architecture.aliases):
        assert architecture_of(name) is architecture_of(name.upper()) is architecture
    assert {*COMMON_SOURCES, *architecture.sources} == set(sources_for(architecture))


@pytest.mark.parametrize("machine", ["i686", "win32", "armv7l", "riscv64", "ppc64le", "universal2", "x86", ""])
def test_there_are_no_kernels_for_other_processors(machine: str) -> None:
    assert architecture_of(machine) is None


@pytest.mark.skipif(kernels.load() is None, reason="the kernels are not built here")
def test_the_library_has_the_functions_that_the_sources_export() -> None:
    native = ctypes.CDLL(str(kernels.LIBRARY))
    assert {"RegisterCustomOps", "pard_isa", "pard_select_isa"} <= exported_names()
    assert all(getattr(native, name) for name in exported_names())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What setup.py reads, in a folder of its own, with a compiler that notes how it is called and compiles nothing."""
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml", "packaging/long_description.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(FOLDER, tmp_path / "runtime/kernels/native", ignore=shutil.ignore_patterns("__pycache__"))
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(tmp_path / "log")))
    compiler.chmod(0o755)
    return tmp_path


def build(tree: Path, compiler: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext; in the output, warnings of setuptools beside its own."""
    compiler = compiler or str(tree / "compiler")
    tools = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), compiler)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    return subprocess.run(command, cwd=tree, env=os.environ | tools | environment, capture_output=True, text=True)


def compiled(tree: Path) -> dict[str, list[str]]:
    """The arguments of the compiler for each source."""
    calls = [line.split() for line in (tree / "log").read_text().splitlines()]
    prefix = FOLDER.relative_to(ROOT).as_posix() + "/"
    return {call[call.index("-c") + 1].removeprefix(prefix): call for call in calls if "-c" in call}


@pytest.mark.skipif(os.name == "nt", reason="MSVC has no log of its calls")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_setup_compiles_the_sources_of_the_architecture(tree: Path, architecture: kernel_sources.Architecture) -> None:
    done = build(tree, _PYTHON_HOST_PLATFORM=f"linux-{architecture.name}")
    assert (done.returncode, "not built" in done.stderr) == (0, False), done.stderr
    calls = compiled(tree)
    assert set(calls) == set(sources_for(architecture))
    assert all(set(kernel_sources.UNIX_FLAGS) <= set(call) for call in calls.values())


@pytest.mark.skipif(os.name == "nt", reason="MSVC has no log of its calls")
def test_a_source_is_compiled_with_flags_of_its_own(tree: Path) -> None:
    table = tree / "runtime/kernels/native/kernel_sources.py"
    text = table.read_text()
    changed = text.replace('"isa/gemm_avx2.cpp": ()', '"isa/gemm_avx2.cpp": ("-march=haswell", "-DA=1")')
    assert changed != text
    table.write_text(changed)
    assert build(tree, _PYTHON_HOST_PLATFORM="linux-x86_64").returncode == 0
    calls = compiled(tree)
    assert [source for source, call in calls.items() if "-march=haswell" in call] == ["isa/gemm_avx2.cpp"]
    assert "-DA=1" in calls["isa/gemm_avx2.cpp"]
    link = (tree / "log").read_text().splitlines()[-1]
    assert all(source.replace(".cpp", ".o") in link for source in calls)


@pytest.mark.parametrize(
    ("environment", "compiler", "reason"),
    [
        ({"_PYTHON_HOST_PLATFORM": "linux-riscv64"}, "", "there are none for riscv64, only for x86_64, aarch64"),
        ({"_PYTHON_HOST_PLATFORM": "macosx-11.0-universal2"}, "", "there are none for universal2"),
        ({}, "false", "the C++ compiler failed"),
        ({}, "/nowhere/c++", "the C++ compiler failed"),
    ],
    ids=["processor", "two processors", "compiler fails", "no compiler"],
)
@pytest.mark.skipif(os.name == "nt", reason="reads CXX and a POSIX variable of sysconfig")
def test_setup_says_why_no_kernels_are_built(
    tree: Path, environment: dict[str, str], compiler: str, reason: str
) -> None:
    done = build(tree, compiler, **environment)
    assert done.returncode == 0, done.stderr
    assert f"pard-onnx: the CPU kernels are not built: {reason}" in done.stderr
    required = build(tree, compiler, PARD_ONNX_BUILD_KERNELS="required", **environment)
    assert required.returncode != 0
    assert reason in required.stderr


def test_kernels_can_be_left_out(tree: Path) -> None:
    done = build(tree, PARD_ONNX_BUILD_KERNELS="off")
    assert (done.returncode, done.stderr, (tree / "log").exists()) == (0, "", False)


def test_another_choice_is_refused(tree: Path) -> None:
    done = build(tree, PARD_ONNX_BUILD_KERNELS="yes")
    assert done.returncode != 0
    assert "PARD_ONNX_BUILD_KERNELS=yes: takes auto, required, off" in done.stderr


ON_A_MAC = """
import os, sys, setuptools
setuptools.setup = lambda **_: None
names = {"__file__": "setup.py"}
exec(compile(open("setup.py").read(), "setup.py", "exec"), names)
sys.platform = "darwin"
names["platform"].machine = lambda: "arm64"
names["get_platform"] = lambda: os.environ.get("_PYTHON_HOST_PLATFORM", "macosx-10.13-universal2")
print(names["target_machine"](), os.environ["_PYTHON_HOST_PLATFORM"] if names["get_platform"]()[-1] != "2" else "")
print(os.environ.get("ARCHFLAGS"))
"""


@pytest.mark.parametrize(
    ("flags", "machine", "host", "used"),
    [
        (None, "arm64", "macosx-10.13-arm64", "-arch arm64"),
        ("-arch x86_64", "x86_64", "macosx-10.13-x86_64", "-arch x86_64"),
        ("-arch arm64 -arch x86_64", "universal2", "", "-arch arm64 -arch x86_64"),
    ],
)
def test_on_macos_the_library_is_for_one_processor(
    tree: Path, flags: str | None, machine: str, host: str, used: str
) -> None:
    """Under a Python for two processors; as far as it can be tried elsewhere."""
    environment = {name: value for name, value in os.environ.items() if name != "ARCHFLAGS"}
    environment |= {"ARCHFLAGS": flags} if flags else {}
    command = [sys.executable, "-c", ON_A_MAC]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{machine} {host}", used], done.stderr
