"""`pard-export` as its users meet it: the hub id, JSON, and every bad input in one line with exit code 2."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import SHA, edit_json, save_in_hub_cache, save_safetensors, weights

from pard_onnx.export_command import main
from pard_onnx.models.manifest import Manifest

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_the_first_command_of_a_user(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    """A hub id, through a stand-in for the hub client's cache."""
    source = tiny(tmp_path / "source", "qwen2", "draft", dtype="bfloat16")
    save_in_hub_cache(source, tmp_path / "hub", "amd/PARD-Qwen2.5-0.5B")
    assert main(["--model", "amd/PARD-Qwen2.5-0.5B", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "PARD-Qwen2.5-0.5B-int4"
    found_in = {
        "model": "amd/PARD-Qwen2.5-0.5B",
        "revision": SHA,
        "quantization": None,
        "export": None,
        "adapter": None,
    }
    assert found["source"] == found_in
    manifest = Manifest.read(tmp_path / "PARD-Qwen2.5-0.5B-int4")
    assert manifest.role == "draft" and manifest.parity is not None
    manifest.verify(tmp_path / "PARD-Qwen2.5-0.5B-int4")


def test_progress_goes_to_stderr_and_the_result_to_stdout(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    tiny(tmp_path / "model")
    assert main(["--model", "model", "--precision", "fp32", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("out: target, fp32") and "weights" not in out
    assert "weights" in err and "trace" in err


def test_roles(tmp_path: Path, tiny: Tiny) -> None:
    tiny(tmp_path / "draft", "qwen3", "draft")
    assert main(["--model", "draft", "--role", "target", "--no-verify", "--output", "out"]) == 0
    assert Manifest.read(tmp_path / "out").role == "target"


def test_a_device_names_the_folder_and_the_result(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    tiny(tmp_path / "model", layers=1)
    assert main(["--model", "model", "--device", "npu", "--draft-length", "3", "--no-verify"]) == 0
    assert capsys.readouterr().out.startswith("model-npu-fp32: target, fp32, for npu, ")
    assert main(["--model", "model", "--device", "npu", "--opset", "21", "--no-verify", "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["attention"], found["opset"], found["io_dtype"]) == (
        "npu",
        "portable",
        21,
        "float32",
    )
    assert [graph["width"] for graph in found["graphs"]] == [1, 8, 128]
    assert not (tmp_path / "model-npu-fp32" / "model.4.onnx").exists()


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = weights(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        del tensors[name]
        save_safetensors(folder / "model.safetensors", tensors)

    return change


def not_finite(folder: Path) -> None:
    tensors = weights(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = np.nan
    save_safetensors(folder / "model.safetensors", tensors)


def configured(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


BAD: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), [], "config.json"),
    "unknown family": (configured(model_type="mamba"), [], "llama, qwen2, qwen3"),
    "no mask id": (configured(pard_token=...), [], "mask id"),
    "mask id too large": (configured(pard_token=320), [], "320"),
    "no weights": (drop_weights, [], "no weights"),
    "pickles": (pickled, [], "never loaded"),
    "truncated": (truncated, [], "truncated"),
    "missing tensor": (without("model.layers.1.mlp.down_proj.weight"), [], "model.layers.1.mlp.down_proj.weight"),
    "not finite": (not_finite, [], "model.layers.0.self_attn.k_proj.weight"),
    "sliding window": (configured(use_sliding_window=True, sliding_window=64, max_window_layers=0), [], "liding"),
    "context length": (lambda f: None, ["--context-length", "100000"], "100000"),
    "revision of a folder": (lambda f: None, ["--revision", "main"], "main"),
    "unreadable by transformers": (configured(use_cache="often"), [], "transformers refuses it: Validation error"),
    "unbuildable by transformers": (configured(pad_token_id=99999), [], "config.json: transformers refuses it"),
    "unknown device": (lambda f: None, ["--device", "dircetml"], "unknown device 'dircetml'; did you mean directml?"),
    "fused on directml": (lambda f: None, ["--device", "directml", "--attention", "gqa"], "use --attention portable"),
    "int4 on the NPU": (lambda f: None, ["--device", "npu", "--precision", "int4"], "use fp32"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), [], "tokenizer.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    spoil, options, expected = BAD[case]
    folder = tiny(tmp_path / "model", "qwen2", "draft")
    spoil(folder)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["--model", "model", "--output", "out", "--no-verify", *options]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and len(errors) == 1 and err.endswith(errors[0] + "\n")
    assert expected in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ("nowhere", "org/model-that-is-not-cached", "C:\\models\\x", ""))
def test_a_model_that_is_not_there(name: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["--model", name, "--output", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_names_absent_files(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    folder = tiny(tmp_path / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert main(["--model", "model", "--output", "out"]) == 2
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err


def test_an_existing_output_is_kept(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    tiny(tmp_path / "model")
    (tmp_path / "out").mkdir()
    assert main(["--model", "model", "--output", "out"]) == 2
    assert "--force" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from pard_onnx.export.graphs import traced

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(traced, "finish", stop)
    yield


def test_ctrl_c_leaves_nothing(tmp_path: Path, tiny: Tiny, interrupted: None) -> None:
    tiny(tmp_path / "model")
    assert main(["--model", "model", "--output", "out"]) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("options", (["--output", "."], ["--output", "", "--force"], ["--output", "m", "--force"]))
def test_the_checkpoint_is_not_its_own_output(
    options: list[str], tmp_path: Path, tiny: Tiny, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    monkeypatch.chdir(tmp_path if "m" in options else tmp_path / "m")
    assert main(["--model", str(tmp_path / "m"), *options]) == 2
    assert "holds the checkpoint itself" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_an_output_that_cannot_be_made_is_told_in_one_line(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    tiny(tmp_path / "model")
    (tmp_path / "file").touch()
    assert main(["--model", "model", "--output", "file/out"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "file/out: cannot be written" in err


def test_names_that_look_like_markup(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    tiny(tmp_path / "model")
    assert main(["--model", "model", "--no-verify", "--output", "[red]out[x]"]) == 0
    assert capsys.readouterr().out.startswith("[red]out[x]: target, int4")


def test_bad_options_are_told_in_one_line(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "a", "--precision", "int3"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "int3" in err and "pard-export --help" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_sigterm_leaves_nothing(tmp_path: Path, tiny: Tiny) -> None:
    from pard_onnx.export.graphs import traced

    def end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    tiny(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced, "finish", end)
        assert main(["--model", "model", "--output", "out"]) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


LIGHT = """
import sys
import pard_onnx.chat_command, pard_onnx.doctor_command, pard_onnx.export_command, pard_onnx.generate_command
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_commands_begin_without_heavy_imports() -> None:
    """So that a missing onnxruntime or export extra is one line that names what to install."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
