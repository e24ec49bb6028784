"""`pard-quantize` as its users meet it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.export_command import main as export_main
from pard_onnx.models.manifest import Manifest
from pard_onnx.quantize_command import main

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Tiny) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text('{"text": "def the quick brown fox"}\n' * 30)


def test_a_table_of_matrices_and_of_choices(capsys: Capture) -> None:
    arguments = ["model", "--recipe", "int4-mixed", "--budget", "0.8", "--calibration", "text.jsonl"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "output error" in out and "loss at 4 bits" in out and "model-int4-mixed: target, int4" in out
    assert "quantize" in err and "measure" in err
    told = Manifest.read(Path("model-int4-mixed")).quantization
    assert told is not None and told.calibration is not None and told.calibration.name == "text.jsonl"


def test_json(capsys: Capture) -> None:
    assert main(["model", "--recipe", "int4-importance", "--block-size", "32", "--no-verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "model-int4-importance-b32"
    assert found["quantization"]["rounding"] == "importance" and found["tensors"][0]["format"] == "int4-b32"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    (
        (["--recipe", "int4-gtpq"], "the nearest is int4-gptq"),
        (["--recipe", "int4-gptq", "--block-size", "5"], "--block-size 5"),
        (["--recipe", "int4-gptq", "--calibration", "empty.txt"], "has no text"),
        (["--recipe", "int4-gptq", "--calibration", "nowhere.txt"], "No such file"),
        (["--recipe", "int4-gptq", "--calibration", "broken.jsonl"], "line 2: is not JSON"),
        (["--recipe", "int4-rtn", "--calibration", "text.jsonl"], "looks at no text"),
        (["--recipe", "int4-gptq", "--budget", "0.6"], "is not mixed"),
        (["--recipe", "int4-mixed", "--budget", "lots"], "as 0.6"),
        (["--recipe", "int4-mixed", "--budget", "0.01"], "that 4 bits take"),
        (["--recipe", "int8-dynamic"], "neighbours"),
        (["--recipe", "int8-w8a8"], "the nearest is int8-a8w8"),
        (["--recipe", "int8-a8w8"], "int8-a8w8 with attention gqa: it needs a graph of plain operators"),
        (["--recipe", "int8-a8w8", "--device", "cuda", "--attention", "portable"], "int8-a8w8 on cuda"),
        (["--recipe", "int8-a16w8", "--device", "npu", "--io-dtype", "fp16"], "beside activations in float16"),
        (["--recipe", "int8-a16w8", "--device", "npu", "--kv-cache", "int8"], "only gqa stores int8 rows"),
        (["--recipe", "int8-a8w8", "--device", "npu", "--calibration", "empty.txt"], "has no text"),
        (["--recipe", "int8-a8w8", "--device", "npu", "--block-size", "32"], "it has one scale a row"),
        (["--recipe", "int4-rtn", "--prompts", "text.jsonl"], "only --optimize-for measures on prompts"),
        ([], "name what to quantize and how"),
    ),
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["model", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_exported_folder(tmp_path: Path, capsys: Capture) -> None:
    """In floats it is as good as its checkpoint, which it does not need; what its graphs have fixed stays."""
    assert export_main(["--model", "model", "--precision", "fp32", "--no-verify", "--context-length", "256"]) == 0
    (tmp_path / "model").rename(tmp_path / "gone")
    capsys.readouterr()
    for arguments, reason in (
        (
            ["--context-length", "128"],
            "--context-length 128: quantizing keeps the graphs of model-fp32, where it is 2",
        ),
        (["--device", "cuda"], "where it is cpu"),
        (["--static"], "--static: quantizing keeps the graphs of model-fp32, where it is false"),
        (["--draft-length", "1"], "--draft-length 1: quantizing keeps the graphs of model-fp32, where it is any"),
        (["--kv-cache", "int8", "--io-dtype", "fp16"], "--io-dtype fp16: quantizing keeps"),
        (["--draft-vocabulary", "50"], "where it is that of all ids"),
        (["--revision", "main"], "which has no revisions"),
        (["--output", "model-fp32", "--force"], "choose another --output"),
    ):
        assert main(["model-fp32", "--recipe", "int4-rtn", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and reason in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "model-fp32", "text.jsonl"]
    assert main(["model-fp32", "--recipe", "int4-gptq", "--calibration", "text.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "model-int4-gptq" and found["context_length"] == 256 and found["parity"]
    assert found["source"]["model"] == "model" and found["source"]["export"] == "fp32"
    assert main(["model-int4-gptq", "--recipe", "int4-rtn"]) == 2
    assert "is quantized already (int4-b64)" in capsys.readouterr().err
