"""Providers and threads: what is refused, and what each session is given."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pard_onnx.models.errors import BadInput, BadProvider
from pard_onnx.models.extras import Origin
from pard_onnx.runtime.providers import table as providers
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads, physical_cores


def test_the_nearest_provider_is_suggested() -> None:
    with pytest.raises(BadProvider, match="unknown provider 'DirectMl'; did you mean 'directml'"):
        provider_named("DirectMl")


def test_without_a_near_one_all_are_named() -> None:
    with pytest.raises(BadProvider, match="known are cpu, cuda, directml, rocm, migraphx, amdgpu, webgpu"):
        provider_named("zzz")


def test_a_provider_that_is_not_installed_names_its_extra() -> None:
    with pytest.raises(BadProvider, match=r"pip install .*\[rocm\]"):
        require_installed("rocm")


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadProvider, match=r"pip install .*\[cpu\]"):
        require_installed("cpu")


def test_cpu_is_installed() -> None:
    assert require_installed("cpu") is providers.PROVIDERS["cpu"]


@pytest.mark.parametrize("name", ["windowsml", "WinML"])
def test_windows_ml_is_a_catalog_and_no_provider(name: str) -> None:
    with pytest.raises(BadProvider, match=f"provider '{name}': Windows ML is a catalog of providers; name npu"):
        provider_named(name)


def extras() -> dict[str, list[Requirement]]:
    """The requirements of each extra in pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    return {name: list(map(Requirement, lines)) for name, lines in project["optional-dependencies"].items()}


SYSTEMS = (
    "win32 AMD64",
    "win32 ARM64",
    "darwin arm64",
    "darwin x86_64",
    "linux x86_64",
    "linux aarch64",
    "linux ppc64",
)
# The systems that the registry has files for, by distribution, where these are not all.
FILES = {
    "onnxruntime-gpu": {"win32 AMD64", "linux x86_64"},
    "onnxruntime-directml": {"win32 AMD64"},
    "onnxruntime-rocm": {"linux x86_64"},
    "onnxruntime-migraphx": {"linux x86_64"},
    "onnxruntime-ep-webgpu": {"win32 AMD64", "win32 ARM64", "darwin arm64", "linux x86_64", "linux aarch64"},
    "windowsml": {"win32 AMD64", "win32 ARM64"},
}


def wanted(requirement: Requirement, system: str) -> bool:
    """Whether the requirement is for this system, by its marker."""
    names = dict(zip(("sys_platform", "platform_machine"), system.split(), strict=True))
    return requirement.marker is None or requirement.marker.evaluate(names)


@pytest.mark.parametrize("system", SYSTEMS)
def test_extras_ask_for_what_their_system_has_files_of_and_nothing_else(system: str) -> None:
    flavours = {key: value for key, value in extras().items() if key in (*providers.PROVIDERS, "windowsml")}
    assert flavours.keys() == {*providers.PROVIDERS, "windowsml"} - {"amdgpu", "npu"}
    for requirements in flavours.values():
        for one in requirements:
            assert wanted(one, system) == (system in FILES.get(one.name, SYSTEMS)), one


@pytest.mark.parametrize("platform", ["win32", "linux"])
@pytest.mark.parametrize("key", [key for key in providers.PROVIDERS if key != "amdgpu"])  # which has no extra
def test_the_advice_names_an_extra_that_brings_something_on_its_system(
    key: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pard_onnx.models.extras.origin", Origin)  # installed from an index
    words, _, command = providers.install_advice(key, platform).rpartition(": ")
    system = "win32 AMD64" if "Windows" in words else "linux x86_64" if "Linux" in words else f"{platform} x86_64"
    system = system.replace("win32 x86_64", "win32 AMD64")
    extra = command.removeprefix('pip install "pard-onnx[').removesuffix(']"')
    assert any(wanted(one, system) for one in extras()[extra])


def test_threads_are_at_least_one() -> None:
    with pytest.raises(BadInput, match="threads must be from 1 to 512, not 0"):
        Threads(0)
    assert physical_cores() >= 0


SHARED = """
import sys, onnxruntime as ort
from pard_onnx import load
pair = load(*sys.argv[1:3], share_threads=True)
first = pair.generate("the fox", max_new_tokens=8).tokens
again = load(*sys.argv[1:3], threads=1, share_threads=True)
assert again.generate("the fox", max_new_tokens=8).tokens == first
# The pool is the process's: a later load without the wish works, and uses it.
assert load(*sys.argv[1:3]).generate("the fox", max_new_tokens=8).tokens == first
"""

APART = """
import sys, onnxruntime as ort
from pard_onnx import load
pair = load(*sys.argv[1:3])
# Other libraries' sessions, with pools of their own, are untouched.
ort.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("program", [SHARED, APART], ids=["shared", "apart"])
def test_thread_pools_in_a_process_of_their_own(program: str, pair_folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", program, *map(str, pair_folders)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("key", [None, 5])
def test_a_provider_is_text(key: object) -> None:
    with pytest.raises(BadProvider, match=f"a provider is one of cpu, .*, not {key}"):
        provider_named(key)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [513, "2", 1.5])
def test_threads_are_a_number_that_a_machine_has(count: object) -> None:
    with pytest.raises(BadInput, match="threads must be"):
        Threads(count)  # type: ignore[arg-type]
