"""The choice of a draft's format: pure from curves and acceptance, and by command on the shipped pair."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import quantized
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pard_onnx import load, quantize_choice
from pard_onnx.benchmarks.measures.draft_choice import CLOSE, FORMATS, best, weighed
from pard_onnx.models.manifest import FILE_NAME, Manifest, Throughput, Tried
from pard_onnx.quantize_command import main
from pard_onnx.runtime.tuning.steps import RoundCosts, StepCosts, measure_in_turn

Folder = Callable[[str, str], Path]
Capture = pytest.CaptureFixture[str]
FLAT = StepCosts(((1, 0.010), (32, 0.010)))  # verifying costs the same at any width
STEEP = StepCosts(((1, 0.010), (32, 0.320)))


def draft(milliseconds: float) -> StepCosts:
    return StepCosts(((1, milliseconds / 1000), (32, milliseconds / 1000)))


def test_a_format_is_weighed_at_its_best_length() -> None:
    """A round of 1 + .8 + .6 tokens; where verifying is free, all positions pay, where each costs as much as the
    first, none beyond it does."""
    free = weighed("a", 5, RoundCosts(draft(2), FLAT), (0.8, 0.6))
    assert (free.draft_length, free.accepted, free.step_seconds) == (2, pytest.approx(2.4), 0.002)
    assert free.tokens_per_second == pytest.approx(2.4 / 0.012)
    dear = weighed("b", 5, RoundCosts(draft(2), STEEP), (0.8, 0.1))
    assert dear.draft_length == 1 and dear.tokens_per_second == pytest.approx(1.8 / 0.022)


def test_speed_is_weighed_against_acceptance() -> None:
    """The faster draft wins beside a fast target, the better one beside a slow one."""
    profiles = {"fast": (0.5, 0.2), "good": (0.8, 0.6)}
    steps = {"fast": draft(1), "good": draft(8)}
    for verify, expected in ((0.002, "fast"), (0.1, "good")):
        target = StepCosts(((1, verify), (32, verify)))
        tried = [weighed(name, 1, RoundCosts(steps[name], target), profiles[name]) for name in profiles]
        assert best(tried).recipe == expected


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(1, 100)), min_size=1, max_size=5))
def test_the_smallest_of_about_the_fastest(facts: list[tuple[int, float]]) -> None:
    tried = [Tried(str(i), size, 1, 0.1, 2.0, rate) for i, (size, rate) in enumerate(facts)]
    chosen, most = best(tried), max(rate for _, rate in facts)
    assert chosen.tokens_per_second >= CLOSE * most
    assert all(one.bytes >= chosen.bytes for one in tried if one.tokens_per_second >= CLOSE * most)


def test_models_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    steps = [lambda width, name=name: calls.append((name, width)) for name in "ab"]
    found = measure_in_turn(steps, (1, 4), 2)
    assert [[width for width, _ in curve.points] for curve in found] == [[1, 4], [1, 4]]
    assert calls[4:] == [("a", 1), ("b", 1), ("a", 4), ("b", 4)] * 2


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def area(width, height):\n    return width * height\n\n" * 8)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def mean(values):\\n"}\n{"prompt": "class Stack:\\n"}\n')
    return tmp_path


WITH = ("--calibration", "text.txt", "--prompts", "prompts.jsonl", "--no-verify")


SOME = ("int4-gptq", "int8-dynamic")  # one that looks at text, one that is for drafts alone


def test_the_shipped_pair(demo_folder: Folder, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert set(SOME) < set(FORMATS)
    monkeypatch.setattr(quantize_choice, "FORMATS", SOME)
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
    assert manifest.quantization.recipe == told["recipe"] == best(manifest.quantization.throughput.tried).recipe
    assert sorted(path.name for path in here.iterdir()) == ["out", "prompts.jsonl", "text.txt"]
    assert not [path for path in (here / "out").iterdir() if path.is_dir()]
    with load(target, here / "out") as pair:
        assert pair.generate("def area(", max_new_tokens=8).text


def test_a_table(capsys: Capture) -> None:
    tried = (Tried("int8-rtn", 2_000_000, 7, 0.012, 3.25, 81.5), Tried("int4-rtn", 1_000_000, 6, 0.009, 3.0, 92.5))
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

    monkeypatch.setattr(quantize_choice, "FORMATS", ("int4-rtn",))
    monkeypatch.setattr(quantize_choice, "compare", interrupt)
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
