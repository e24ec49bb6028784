"""Reports on the shipped models: what they say, how they look, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.quantize_command import main

Folder = Callable[[str, str], Path]
Capture = pytest.CaptureFixture[str]


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_targets_against_their_checkpoint(demo_folder: Folder, capsys: Capture) -> None:
    """The fp32 graph is the checkpoint; int8 loses less than half a per cent, int4 more."""
    names = [demo_folder("demo-target", precision) for precision in ("fp32", "int8", "int4")]
    capsys.readouterr()
    assert run("--report", *names, "--reference", "demo-target", "--tokens", "4096", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["role"], out["tokens"], out["partner"]) == ("target", 4096, None)
    assert out["reference"]["name"] == "target" and out["reference"]["precision"] == "bfloat16"
    fp32, int8, int4 = (model["fidelity"][0] for model in out["models"])
    assert fp32["perplexity"] == pytest.approx(out["reference"]["fidelity"][0]["perplexity"], rel=1e-5)
    assert fp32["divergence"] == pytest.approx(0, abs=1e-6) and fp32["agreement"] == 1
    assert int8["ratio"]["value"] < 1.005
    assert int4["ratio"]["value"] > int8["ratio"]["value"]
    assert 0 < int8["divergence"] < int4["divergence"] and int8["agreement"] > int4["agreement"]
    sizes = [model["bytes"] for model in out["models"]]
    assert sizes == sorted(sizes, reverse=True)
    for model, name in zip(out["models"], names, strict=True):
        assert model["bytes"] == sum(f.stat().st_size for f in name.iterdir() if f.name != "pard_onnx.json")
        assert all(seconds > 0 for _, seconds in model["costs"]["points"])


def test_drafts_in_a_pair(demo_folder: Folder, tmp_path: Path, capsys: Capture) -> None:
    """Rows after tokens and after masks; the mean accepted length; a table and a picture."""
    pytest.importorskip("matplotlib")
    target, fp32, int4 = (
        demo_folder(*name) for name in (("demo-target", "int4"), ("demo-draft", "fp32"), ("demo-draft", "int4"))
    )
    picture = tmp_path / "quality.svg"
    capsys.readouterr()
    assert run("--report", int4, "--reference", fp32, "--target", target, "--tokens", "1024", "--plot", picture) == 0
    out = capsys.readouterr().out
    assert "demo-draft-int4" in out and "after masks" in out and "drafts: steps" in out and "±" in out
    assert f"mean length on shipped prompts with {target.name}" in out
    assert "demo-draft-int4, masks" in picture.read_text(encoding="utf-8")
    assert run("--report", int4, "--target", target, "--tokens", "1024", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    assert 2 < model["accepted"] < 9 and found["reference"] is None and found["draft_length"] == 8
    real, masked = model["fidelity"]
    assert (real["rows"], masked["rows"]) == ("tokens", "masks") and masked["count"] == 7 * real["count"]
    assert real["perplexity"] < masked["perplexity"] and real["ratio"] is None


def test_a_text_of_ones_own(demo_folder: Folder, tmp_path: Path, capsys: Capture) -> None:
    """A text that says the same again and again is foreseen; without a reference there is nothing to compare."""
    file = tmp_path / "mine.txt"
    file.write_text("def area(width, height):\n    return width * height\n\n\n" * 40, encoding="utf-8")
    folder = demo_folder("demo-target", "int4")
    capsys.readouterr()
    assert run("--report", folder, "--text", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "mine.txt" and found["models"][0]["fidelity"][0]["perplexity"] < 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: the text cannot be read"),
        (["--text", "empty.txt"], "empty.txt: is empty; name a file of text"),
        (["--text", "short.txt"], "the text has 1 tokens; a report needs at least 12"),
        (["--text", "bytes.txt"], "bytes.txt: the text cannot be read"),
        (["--tokens", "5"], "--tokens must be at least 12, not 5"),
        (["--reference", "demo-draft"], "demo-draft: is not the model of"),
        (["--reference", "no folder"], "neither a checkpoint folder nor a hub id"),
        (["--draft", "nowhere"], "'nowhere': neither an exported folder nor a hub id"),
        (["--target", "DRAFT"], "the models to report on are targets; their partner is a --draft DIR"),
        (["--draft", "TARGET"], "is a target, not a draft"),
        (["--plot", "picture.bmp"], "--plot picture.bmp: the name ends in one of"),
        (["--reference", "DRAFT"], "is a draft; a report is on targets alone"),
    ],
)
def test_bad_options(
    demo_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("a")
    Path("bytes.txt").write_bytes(b"\xff\xfe\xff")
    target, draft = demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int4")
    capsys.readouterr()
    named = {"DRAFT": str(draft), "TARGET": str(target)}
    assert run("--report", target, *(named.get(option, option) for option in options)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err


def test_neither_a_model_nor_a_report(capsys: Capture) -> None:
    assert run("--json") == 2
    assert "MODEL --quality good, or --recipe NAME; or what to compare: --report DIR..." in capsys.readouterr().err


def test_models_of_two_roles_are_refused(demo_folder: Folder, capsys: Capture) -> None:
    both = demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int4")
    capsys.readouterr()
    assert run("--report", *both) == 2
    assert "is a draft; a report is on targets alone" in capsys.readouterr().err
