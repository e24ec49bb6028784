"""Pairs whose draft proposes some ids alone: the same text as ever, reports that say what is lost, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pard_onnx import Pair, load
from pard_onnx.export_command import main
from pard_onnx.models.manifest import read_draft_ids
from pard_onnx.quantize_command import main as quantize_main

Folder = Callable[[str, str], Path]
Capture = pytest.CaptureFixture[str]
SIZE = 512  # of 2040


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reduced") / "draft"
    assert main(["--model", "demo-draft", "--draft-vocabulary", str(SIZE), "--output", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pair(demo_folder: Folder, reduced: Path) -> Pair:
    with load(demo_folder("demo-target", "int4"), reduced) as opened:
        yield opened


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(st.integers(0, 2036), min_size=1, max_size=12),
    length=st.sampled_from(("auto", 1, 4, 8)),
    temperature=st.sampled_from((0.0, 0.8)),
)
def test_the_text_is_the_targets_own(pair: Pair, prompt: list[int], length: int, temperature: float) -> None:
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    plain = pair.generate(prompt, draft_length=0, **options)
    drafted = pair.generate(prompt, draft_length=length, **options)
    assert drafted.stats.exact and drafted.tokens == plain.tokens


def test_what_is_proposed_is_accepted_and_of_the_vocabulary(pair: Pair, reduced: Path) -> None:
    assert pair.draft_manifest is not None
    draft, ids = pair.engine.models[1].session, set(read_draft_ids(reduced).tolist())
    draft.rollback(0)
    found, _ = draft.step([5, 300, 1999], 8)  # 1999: read all the same, whatever it may propose
    assert set(found.tolist()) <= ids and len(ids) == SIZE
    draft.rollback(0)
    stats = pair.generate("def mean(values):\n", max_new_tokens=64, draft_length=8).stats
    assert sum(stats.accepted) / len(stats.accepted) > 1.5


def test_a_report_has_coverage_and_no_perplexity(demo_folder: Folder, reduced: Path, capsys: Capture) -> None:
    whole, target = demo_folder("demo-draft", "int4"), demo_folder("demo-target", "int4")
    arguments = ["--report", str(whole), str(reduced), "--reference", "demo-draft", "--target", str(target)]
    capsys.readouterr()
    assert quantize_main([*arguments, "--tokens", "256", "--json"]) == 0
    one, other = json.loads(capsys.readouterr().out)["models"]
    for full, some in zip(one["fidelity"], other["fidelity"], strict=True):
        assert full["coverage"] == 1 and full["perplexity"] > 1
        assert 0.5 < some["coverage"] < 1 and some["perplexity"] is some["ratio"] is some["divergence"] is None
        assert 0 < some["agreement"] <= full["agreement"] < 1
    assert 1 < other["accepted"] <= one["accepted"] + 0.3 and other["bytes"] < one["bytes"] + 100_000


def test_a_report_as_a_table_and_a_plot(demo_folder: Folder, reduced: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "quality.svg"
    models = [str(demo_folder("demo-draft", "int4")), str(reduced)]
    capsys.readouterr()
    assert quantize_main(["--report", *models, "--tokens", "64", "--plot", str(picture)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "covered" in out and "tokens of the text that the draft's vocabulary has" in out and " - " in out
    assert picture.is_file()
    assert quantize_main(["--report", models[0], "--reference", models[1]]) == 2
    assert f"proposes {SIZE} ids alone; name one exported with all of them" in capsys.readouterr().err


@pytest.mark.parametrize("command", (["--model"], ["--recipe", "int4-rtn"]))
def test_bad_input_is_one_line_and_leaves_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = main if command == ["--model"] else quantize_main
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" ")
    before = sorted(tmp_path.iterdir())
    for arguments, reason in (
        (["demo-target", "--draft-vocabulary", "512"], "is a target, which must be able to say every token"),
        (["demo-draft", "--draft-vocabulary", "3000"], "--draft-vocabulary 3000: takes 64 to 2040"),
        (["demo-draft", "--draft-vocabulary", "8"], "--draft-vocabulary 8: takes 64 to 2040"),
        (["demo-draft", "--draft-vocabulary", "512", "--vocabulary-text", "empty.txt"], "has no text"),
        (["demo-draft", "--vocabulary-text", "empty.txt"], "add --draft-vocabulary N"),
    ):
        assert run([*command, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err
        assert sorted(tmp_path.iterdir()) == before
