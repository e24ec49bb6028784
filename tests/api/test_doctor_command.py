"""pard-doctor: what it finds here, what it says of absent and broken providers, and its exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.doctor_command import fitted, main
from pard_onnx.models import extras
from pard_onnx.models.extras import Origin, install_command, rebuild_command
from pard_onnx.runtime import doctor, kernels
from pard_onnx.runtime.providers.table import AUTO_ORDER, PLUGIN_ADVICE

CUDA, DIRECTML = "CUDAExecutionProvider", "DmlExecutionProvider"
Device = Callable[..., Any]


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_this_machine(pair_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys, *map(str, pair_folders))
    states = {one["key"]: one["state"] for one in report["providers"]}
    assert list(states) == list(AUTO_ORDER) and states["cpu"] == "ready"
    assert all("pip install " in one["install"] for one in report["providers"])
    assert [(one["provider"], one["result"]) for one in report["artifacts"]] == [("cpu", "right")] * 2
    assert report["usable"] and report["conflict"] is None and len(report["onnxruntime"]) == 1
    assert report["versions"][0][0] == "Python"


def test_the_tables_say_the_same(pair_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(pair_folders[0])]) == 0
    out = capsys.readouterr().out
    for words in ("webgpu", "absent", "pip install onnxruntime-ep-webgpu", "right", "CPU kernels"):
        assert words in out


@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.parametrize(
    "origin", [Origin(), Origin(folder=Path("/a folder/with a long name/pard-onnx"), editable=True)]
)
def test_lines_fit_the_terminal_and_commands_are_whole(
    columns: str,
    origin: Origin,
    pair_folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(extras, "origin", lambda: origin)
    monkeypatch.setattr(kernels, "load", lambda: None)  # a problem that ends in a command
    assert main([str(pair_folders[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = {f"  {install_command(key)}" for key in ("cuda", "migraphx", "windowsml")}
    commands |= {"  pip install onnxruntime-ep-webgpu", f"  {rebuild_command()}"}
    assert commands <= set(lines)
    commands |= {f"  {install_command(key)}" for key in AUTO_ORDER}
    commands |= {f"  {PLUGIN_ADVICE['amdgpu'].partition(': ')[2]}"}
    long = [line for line in lines if len(line) > int(columns) and line not in commands]
    assert [line for line in long if line not in str(pair_folders[0])] == []


WORDS = st.lists(st.from_regex(r"[a-zA-Z;:.]{1,10}", fullmatch=True).filter(lambda word: word != "pip"), max_size=20)
COMMANDS = (
    'pip install "pard-onnx[cuda]"', 'uv pip install -c "/a, b; c/d.txt" -e "/a, b; c[cpu]"', "pip uninstall -y a b",
    "pard-export --device cpu --precision int4", "pard-bench --cost", "pip install --no-binary a a",
)  # fmt: skip


@given(WORDS, st.sampled_from(COMMANDS), st.sampled_from(["", "; then try again", ", or ask"]), st.integers(12, 80))
def test_a_text_in_lines_keeps_its_words(before: list[str], command: str, after: str, width: int) -> None:
    text = f"{' '.join([*before, 'run:'])} {command}{after}"
    lines = list(fitted(text, width))
    assert f"  {command}" in lines
    assert all(len(line) <= width for line in lines if line != f"  {command}")
    rest = after.removeprefix(";").removeprefix(",")  # the mark after a command is not printed
    assert " ".join(lines).split() == f"{text.removesuffix(after)} {rest}".split()


def test_a_plugin_is_reported_with_its_version(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    fake = device(plugins={"AMDGPUExecutionProvider": 1})
    fake.register_execution_provider_library("AMDGPUExecutionProvider", "amdgpu-ep.dll")
    found = {one["key"]: one for one in told(capsys)["providers"]}
    assert (found["amdgpu"]["state"], found["amdgpu"]["detail"]) == ("ready", "plugin 0.4.0")


def test_what_is_here_is_tried_with_every_artifact(
    pair_folders: tuple[Path, Path], device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    device(CUDA, DIRECTML, "WebGpuExecutionProvider", broken={"WebGpuExecutionProvider": "no adapter"})
    report = told(capsys, str(pair_folders[0]))
    states = {one["key"]: (one["state"], one["detail"]) for one in report["providers"]}
    assert states["cuda"] == ("ready", "built in")
    assert states["webgpu"][0] == "fails" and "no adapter" in states["webgpu"][1]
    found = {one["provider"]: (one["result"], one["detail"]) for one in report["artifacts"]}
    assert found["cuda"][0] == "right" and "differ by" in found["cuda"][1] and "ms on the CPU" in found["cuda"][1]
    assert found["directml"][0] == "does not fit" and "pard-export --device directml" in found["directml"][1]


def test_an_artifact_that_runs_nowhere_is_exit_code_1(
    pair_folders: tuple[Path, Path], device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    device(broken={"CPUExecutionProvider": "no kernel for it"})
    report = told(capsys, str(pair_folders[0]), code=1)
    assert not report["usable"] and report["artifacts"][0]["result"] == "fails"


def test_without_onnxruntime_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    report = told(capsys, code=1)
    assert {one["state"] for one in report["providers"]} == {"absent"}
    assert report["conflict"].endswith(f"; run: {install_command('cpu')}")
    assert main([]) == 1


def test_a_folder_that_is_no_artifact_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "run pard-export" in err
