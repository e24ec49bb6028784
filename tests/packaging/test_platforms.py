"""The table of platforms, the checks of a library, and the files of registries."""

import json
import os
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import kernel_sources
import pytest
import registries
import wheels
import yaml
from library import Refused, check_library
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, mac_platforms
from packaging.utils import parse_wheel_filename
from platforms import PLATFORMS, PURE, Platform

from pard_onnx.runtime import kernels

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BY_TAG = {platform.tag: platform for platform in PLATFORMS}
HOSTS = [
    ("win_amd64", ["win_amd64"]),
    ("win_arm64", ["win_arm64"]),
    ("macosx_11_0_arm64", list(mac_platforms((15, 0), "arm64"))),
    ("macosx_11_0_x86_64", list(mac_platforms((13, 0), "x86_64"))),
    ("manylinux_2_17_x86_64.manylinux2014_x86_64", ["manylinux_2_17_x86_64", "linux_x86_64"]),
    ("manylinux_2_17_aarch64.manylinux2014_aarch64", ["manylinux2014_aarch64", "linux_aarch64"]),
    ("musllinux_1_2_x86_64", ["musllinux_1_2_x86_64", "linux_x86_64"]),
    ("musllinux_1_2_aarch64", ["musllinux_1_2_aarch64", "linux_aarch64"]),
    (PURE, ["linux_riscv64"]),
    (PURE, ["win32"]),
]


def wheel_tags(tag: str) -> frozenset[Tag]:
    return parse_wheel_filename(f"pard_onnx-1.0-py3-none-{tag}.whl")[3]


@pytest.mark.parametrize(("expected", "host"), HOSTS, ids=[host[0] for _, host in HOSTS])
def test_a_machine_gets_its_own_wheel(expected: str, host: list[str]) -> None:
    accepted = list(compatible_tags((3, 12), "cp312", host))
    ranks = {
        tag: min((accepted.index(one) for one in wheel_tags(tag) if one in accepted), default=None)
        for tag in (*BY_TAG, PURE)
    }
    found = {tag: rank for tag, rank in ranks.items() if rank is not None}
    assert min(found, key=lambda tag: found[tag]) == expected
    assert set(found) == {expected, PURE}


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda one: one.tag)
def test_the_processor_of_tag_and_target_is_one(platform: Platform) -> None:
    machine = re.search(r"(x86_64|amd64|aarch64|arm64)$", platform.tag)
    assert machine is not None
    assert machine[1] in (platform.architecture.name, *platform.architecture.aliases)
    assert platform.system.library == ("_cpu.dll" if platform.tag.startswith("win") else "_cpu.so")


# The local compiler's library: it exports what it takes from libstdc++'s templates
GLIBC = BY_TAG["manylinux_2_17_x86_64.manylinux2014_x86_64"]
LOCAL = replace(GLIBC, system=replace(GLIBC.system, further_exports="_Z.*"))
local = pytest.mark.skipif(
    sys.platform != "linux" or kernels.load() is None, reason="needs a library that was built on Linux"
)


@local
def test_what_the_local_compiler_built_needs_its_own_libraries() -> None:
    with pytest.raises(Refused, match=r"needs .*libstdc\+\+\.so\.6.*, which not every system has"):
        check_library(kernels.LIBRARY, LOCAL)


@local
def test_a_library_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = replace(LOCAL.system, dependencies=".*")
    here, path = replace(LOCAL, system=system), tmp_path / "folder" / "_cpu.so"
    path.parent.mkdir()
    shutil.copy(kernels.LIBRARY, path)
    names = kernel_sources.exported_names()
    check_library(path, here)
    for tag, message in (("win_amd64", "is no PE file"), ("musllinux_1_2_aarch64", "is for X86_64, not for AARCH64")):
        with pytest.raises(Refused, match=message):
            check_library(path, BY_TAG[tag])
    monkeypatch.setattr("kernel_sources.exported_names", lambda: names - {"pard_isa"})
    with pytest.raises(Refused, match="exports pard_isa, which no source marks"):
        check_library(path, here)
    check_library(path, replace(here, system=replace(system, further_exports="_Z.*|pard_isa")))
    monkeypatch.setattr("kernel_sources.exported_names", lambda: names | {"pard_new"})
    with pytest.raises(Refused, match="does not export pard_new"):
        check_library(path, here)
    monkeypatch.setattr("kernel_sources.exported_names", lambda: names)
    path.write_bytes(path.read_bytes() + str(path.parent).encode())
    with pytest.raises(Refused, match="contains the builder's path"):
        check_library(path, here)
    path.write_bytes(b"text")
    with pytest.raises(Refused, match="is no ELF file"):
        check_library(path, here)


@pytest.mark.parametrize(
    ("tag", "found", "fine"),
    [
        ("manylinux_2_17_x86_64.manylinux2014_x86_64", "manylinux_2_17_x86_64", True),
        ("manylinux_2_17_x86_64.manylinux2014_x86_64", "manylinux_2_5_x86_64", True),
        ("manylinux_2_17_x86_64.manylinux2014_x86_64", "manylinux_2_34_x86_64", False),
        ("manylinux_2_17_x86_64.manylinux2014_x86_64", "linux_x86_64", False),
        ("musllinux_1_2_aarch64", "musllinux_1_1_aarch64", True),
        ("musllinux_1_2_aarch64", "manylinux_2_17_aarch64", False),
    ],
)
def test_the_tag_of_linux_is_auditwheels(tag: str, found: str, fine: bool) -> None:
    path = Path(f"pard_onnx-1.0-py3-none-{tag}.whl")
    if fine:
        wheels.check_linux_tag(path, json.dumps({"overall_tag": found}))
    else:
        with pytest.raises(Refused, match=r"^pard_onnx-1\.0"):
            wheels.check_linux_tag(path, json.dumps({"overall_tag": found}))


@pytest.mark.parametrize(("name", "largest"), [("a-py3-none-any.whl", 12_000_000), ("a.tar.gz", 100_000_000)])
def test_a_large_file_is_refused(name: str, largest: int, tmp_path: Path) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, largest)
    wheels.check_size(path)
    os.truncate(path, largest + 1)
    with pytest.raises(Refused, match=rf"^{re.escape(name)}: has {largest + 1:,} bytes, and may have {largest:,}$"):
        wheels.check_size(path)


def test_wheels_have_the_exported_pair_and_no_checkpoint() -> None:
    """Of all files that git has, as package-data in pyproject.toml names them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for package, patterns in settings["package-data"].items():
        parent = max((one for one in settings["package-dir"] if f"{package}.".startswith(f"{one}.")), key=len)
        folder = ROOT / settings["package-dir"][parent] / package.removeprefix(parent).replace(".", "/").strip("/")
        found |= {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    exported = {path for path in (ROOT / "models/demo/exported").rglob("*") if path.is_file()}
    assert len(exported) >= 12 and exported <= found
    weights = {path for path in found if path.stat().st_size > 1_000_000}
    assert weights == {path for path in exported if path.name == "model.onnx.data"}
    assert not [path for path in found if path.suffix == ".safetensors"]


def test_a_folder_with_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.whl").touch()
    with pytest.raises(SystemExit) as refused:
        wheels.main([str(tmp_path)])
    assert refused.value.code == 2
    assert f"{tmp_path}: has files in it" in capsys.readouterr().err


def test_registries_have_the_values_of_the_sdist(tmp_path: Path) -> None:
    sdist = tmp_path / "pard_onnx-1.2.3.tar.gz"
    sdist.write_bytes(b"abc")
    assert registries.main([str(sdist), str(tmp_path / "out")]) == 0
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    recipe = yaml.safe_load((tmp_path / "out/conda-forge/recipe.yaml").read_text())
    assert (recipe["context"]["version"], recipe["source"]["sha256"]) == ("1.2.3", digest)
    formula = (tmp_path / "out/homebrew/pard-onnx.rb").read_text()
    assert "pard_onnx-1.2.3.tar.gz" in formula and digest in formula
    assert "@" not in re.sub(r"python@3\.\d+", "", formula)
    with pytest.raises(SystemExit, match="is no sdist"):
        registries.fill("", tmp_path / "pard_onnx-1.2.3-py3-none-any.whl")


def test_the_recipe_needs_what_the_package_needs() -> None:
    recipe = yaml.safe_load((ROOT / "packaging/conda-forge/recipe.yaml").read_text())
    run = {Requirement(one.replace(" ", "")) for one in recipe["requirements"]["run"]}
    extra = PROJECT["optional-dependencies"]["cpu"]
    python = f"python{PROJECT['requires-python']}"
    assert run == {Requirement(one) for one in [*PROJECT["dependencies"], *extra, python]}
    assert recipe["about"]["license"] == PROJECT["license"]


def test_only_the_job_that_publishes_has_a_right() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert workflow["permissions"] == {}
    jobs = workflow["jobs"]
    trusted = [name for name, job in jobs.items() if "id-token" in job["permissions"]]
    assert trusted == ["publish"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert "tag" in jobs["publish"]["if"]
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
