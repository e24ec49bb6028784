"""pard-doctor: what it finds here, what it says of absent and broken providers, and its exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pard_onnx.doctor_command import main
from pard_onnx.runtime import doctor
from pard_onnx.runtime.providers.table import AUTO_ORDER

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


def test_lines_fit_40_columns_and_commands_are_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main([]) == 0
    providers = capsys.readouterr().out.partition("providers, in")[2].splitlines()
    assert all(len(line) <= 40 for line in providers), providers
    assert {f'  pip install "pard-onnx[{key}]"' for key in ("cuda", "migraphx")} <= set(providers)
    assert providers[providers.index("directml  absent") + 1 :][:2] == [
        "  on Windows",
        '  pip install "pard-onnx[windowsml]"',
    ]


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
    assert report["conflict"].startswith("onnxruntime is not installed; pip install")
    assert main([]) == 1


def test_a_folder_that_is_no_artifact_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "run pard-export" in err
