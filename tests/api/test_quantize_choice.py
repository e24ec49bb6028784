"""pard-quantize --optimize-for: the fastest format of a draft, found and kept by the command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import quantized
from rich.console import Console

from pard_onnx import load, quantize_choice
from pard_onnx.benchmarks.measures import draft_choice
from pard_onnx.benchmarks.measures.draft_choice import best_draft
from pard_onnx.models.manifest import FILE_NAME, Manifest, MeasuredFormat, Throughput
from pard_onnx.quantize.recipes import DRAFT_FORMATS
from pard_onnx.quantize_command import main

Folder = Callable[[str, str], Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def area(width, height):\n    return width * height\n\n" * 8)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def mean(values):\\n"}\n{"prompt": "class Stack:\\n"}\n')
    return tmp_path


WITH = ("--calibration", "text.txt", "--prompts", "prompts.jsonl", "--no-verify")


SOME = ("int4-gptq", "int8-dynamic")  # one that looks at text, one that is for drafts alone


def test_the_shipped_pair(demo_folder: Folder, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert set(SOME) < set(DRAFT_FORMATS)
    monkeypatch.setattr(quantize_choice, "DRAFT_FORMATS", SOME)
    target = demo_folder("demo-target", "int4")
    capsys.readouterr()
    arguments = ["demo-draft", "--optimize-for", "throughput", "--target", str(target), *WITH, "--output", "out"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)["quantization"]
    found = told["throughput"]
    assert (found["target"], found["precision"]) == ("demo-target", "int4") and found["plain"] > 0
    assert [one["recipe"] for one in found["tried"]] == list(SOME)
    assert all(one["accepted"] > 1.5 and 1 <= one["draft_length"] <= 12 for one in found["tried"])
    assert all(f"trying {name}" in err for name in SOME)
    manifest = Manifest.read(here / "out")
    assert manifest.quantization is not None and manifest.quantization.throughput is not None
    assert manifest.quantization.recipe == told["recipe"] == best_draft(manifest.quantization.throughput.tried).recipe
    assert sorted(path.name for path in here.iterdir()) == ["out", "prompts.jsonl", "text.txt"]
    assert not [path for path in (here / "out").iterdir() if path.is_dir()]
    with load(target, here / "out") as pair:
        assert pair.generate("def area(", max_new_tokens=8).text


def test_a_table(capsys: Capture) -> None:
    tried = (
        MeasuredFormat("int8-rtn", 2_000_000, 7, 0.012, 3.25, 81.5),
        MeasuredFormat("int4-rtn", 1_000_000, 6, 0.009, 3.0, 92.5),
    )
    Console(width=100).print(quantize_choice.table(Throughput("Qwen/Some-Target", "int8", 50.0, tried)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "int8-rtn 2.0 7 12.00 3.25 81.5" in lines and "int4-rtn 1.0 6 9.00 3.00 92.5 chosen" in lines
    assert "with Some-Target, int8, which has 50.0 tok/s without a draft" in lines


def test_an_interruption_leaves_nothing(
    demo_folder: Folder, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(_: object, made: dict[str, Path], *__: object) -> None:
        assert (made["int4-rtn"] / FILE_NAME).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_choice, "DRAFT_FORMATS", ("int4-rtn",))
    monkeypatch.setattr(draft_choice, "compare_drafts", interrupt)
    target = demo_folder("demo-target", "int4")
    before = sorted(here.iterdir())
    assert main(["demo-draft", "--optimize-for", "throughput", "--target", str(target), *WITH]) == 130
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    (
        (["demo-target", "--target", "TARGET"], "is a target, whose format is a matter of its quality"),
        (["demo-draft"], "for which target? add --target DIR"),
        (["demo-draft", "--target", "nowhere"], "neither an exported folder nor a hub id"),
        (["demo-draft", "--target", "DRAFT"], "is a draft, not a target"),
        (["demo-draft", "--target", "TARGET", "--recipe", "int4-rtn"], "--recipe beside --optimize-for throughput"),
        (["demo-draft", "--target", "TARGET", "--block-size", "32"], "--block-size beside --optimize-for throughput"),
        (["demo-draft", "--target", "TARGET", "--device", "webgpu"], "measures on the CPU"),
        (["demo-draft", "--target", "TARGET", "--prompts", "none.jsonl"], "none.jsonl: the prompts cannot be read"),
        (["demo-draft", "--target", "TARGET", "--calibration", "none.txt"], "--calibration none.txt: No such file"),
        (["demo-draft", "--target", "TARGET", "--report", "TARGET"], "--report beside --optimize-for throughput"),
        (["--target", "TARGET"], "of which draft?"),
        (["QUANTIZED", "--target", "TARGET"], "is quantized already (awq)"),
        (["TINY", "--target", "TARGET"], "its tokenizer is not that of"),
    ),
)
def test_bad_input_is_one_line_and_leaves_nothing(
    demo_folder: Folder,
    tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    here: Path,
    arguments: list[str],
    reason: str,
    capsys: Capture,
) -> None:
    names = {"TARGET": demo_folder("demo-target", "int4"), "DRAFT": demo_folder("demo-draft", "int4")}
    names["TINY"] = tiny(tmp_path_factory.mktemp("tiny") / "draft", role="draft")
    names["QUANTIZED"], _ = quantized.write(tmp_path_factory.mktemp("tiny") / "awq", "awq", role="draft", layers=1)
    before = sorted(here.iterdir())
    capsys.readouterr()
    assert main([*(str(names.get(word, word)) for word in arguments), "--optimize-for", "throughput"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err
    assert sorted(here.iterdir()) == before
