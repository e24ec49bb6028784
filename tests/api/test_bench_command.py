"""pard-bench on the shipped pair: what it reports, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.bench_command import main
from pard_onnx.benchmarks.drafters import labels

Folder = Callable[[str, str], Path]
WAYS = ["plain", "plain, exact", "auto", "PARD K=2", "PARD K=3"]


@pytest.fixture
def pair(demo_folder: Folder) -> list[str]:
    return ["--pair", str(demo_folder("demo-target", "int4")), str(demo_folder("demo-draft", "int8"))]


@pytest.fixture
def short(pair: list[str]) -> list[str]:
    return [*pair, "--limit", "3", "--max-new-tokens", "24"]


def test_a_sweep_as_json(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "--sweep-k", "2..3", "--cost", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert set(out) == {"machine", "versions", "provider", "max_new_tokens", "pairs", "comparisons", "curves"}
    (one,) = out["pairs"]
    assert [way["name"] for way in one["ways"]] == WAYS
    assert [way["agreement"] for way in one["ways"][1:]] == [1, 1, 1, 1]
    for way in one["ways"]:
        assert 24 < way["new_tokens"] <= 72
        assert way["decode_tokens_per_second"] > way["overall_tokens_per_second"] > 0
        assert sum(way["shares"].values()) == pytest.approx(1)
        assert way["speed_up"]["low"] <= way["speed_up"]["value"] <= way["speed_up"]["high"]
    longest = one["ways"][-1]
    assert len(longest["acceptance"]) == 3
    # The last rounds of a text are shorter, so the mean is not exactly 1 + the sum of the acceptances.
    assert longest["mean_accepted"] == pytest.approx(1 + sum(longest["acceptance"]), abs=0.2)
    assert [curve["role"] for curve in out["curves"]] == ["target", "draft"]
    assert [row["draft_length"] for row in one["predictions"]] == [0, 1, 2, 3]
    assert one["peak_bytes"] > 10e6


def test_tables_and_a_plot(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.png"
    assert main([*short, "--draft-length", "4", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "PARD K=4" in out and "speed-up" in out and "accepted by position" in out and "peak memory" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def drafts(demo_folder: Folder, pard2_folder: Folder) -> list[str]:
    """A target that gives features, a PARD draft and a PARD-2 draft."""
    names = str(demo_folder("demo-draft", "int8")), str(pard2_folder("draft", "int4"))
    return ["--target", str(pard2_folder("target", "int4")), "--draft", names[0], "--draft", names[1]]


def test_drafts_side_by_side(
    drafts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "160")
    short = ["--limit", "2", "--max-new-tokens", "24", "--sweep-k", "2..3", "--plot", str(tmp_path / "speed.svg")]
    assert main([*drafts, *short]) == 0
    out = capsys.readouterr().out
    labels = ["demo-draft-int8", "draft-int4 (dependent)", "draft-int4 (independent)"]
    acceptance = out[out.index("acceptance") :].splitlines()
    for label in ["lookup", *(f"{label} {how}" for label in labels for how in ("K=2", "K=3", "auto"))]:
        assert any(line.strip().startswith(label) for line in acceptance), label
    assert "<svg" in (tmp_path / "speed.svg").read_text(encoding="utf-8")
    assert main([*drafts, *short[:4], "--draft-length", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["comparisons"]
    assert found["pairs"] == [] and one["draft"] == ", ".join(["lookup", *labels])
    ways = {way["name"]: way for way in one["ways"]}
    assert list(ways)[:3] == ["plain", "plain, exact", "lookup"] and len(ways) == 3 + 2 * len(labels)
    assert all(way["agreement"] == 1 for way in one["ways"][1:])
    assert [way["drafter"] for way in one["ways"][3:]] == [label for label in labels for _ in range(2)]
    for label in labels:
        assert len(ways[f"{label} K=3"]["acceptance"]) == 3
    pard2 = [ways[f"{label} K=3"]["mean_accepted"] for label in labels[1:]]
    assert pard2[0] != pard2[1]  # a random projection: the modes propose other tokens


@pytest.mark.parametrize("mode", ["target-dependent", "target-independent"])
def test_drafts_in_one_mode(drafts: list[str], mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*drafts, "--draft-mode", mode, "--limit", "1", "--max-new-tokens", "6", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert one["draft"] == f"lookup, demo-draft-int8, draft-int4 ({mode.removeprefix('target-')})"


def test_drafts_beside_a_target_that_gives_no_features(
    demo_folder: Folder, drafts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    drafts[1] = str(demo_folder("demo-target", "int4"))
    short = ["--limit", "1", "--max-new-tokens", "6", "--json"]
    assert main([*drafts, *short]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["comparisons"][0]["draft"] == "lookup, demo-draft-int8, draft-int4 (independent)"
    assert "was exported with none" in err and "pard-export" in err
    assert main([*drafts, *short, "--draft-mode", "target-independent"]) == 0
    assert "was exported with none" not in capsys.readouterr().err  # nobody asked for them
    assert main([*drafts, *short, "--draft-mode", "target-dependent"]) == 2
    assert "was exported with none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        (["a/x", "b/y"], ["x", "y"]),
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["q/a/x", "b/x", "a/x"], ["q/a/x", "b/x", "a/x"]),
        (["lookup"], ["draft lookup"]),
        (["a/lookup"], ["a/lookup"]),
    ],
)
def test_labels_tell_drafts_apart(drafts: list[str], expected: list[str]) -> None:
    assert labels(drafts) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "t"], "--target t: has no draft to measure; add --draft DRAFT"),
        (["--draft", "d"], "--draft d: has no target; add --target TARGET"),
        (["--target", "t", "--draft", "a/d", "--draft", "a/./d"], "--draft a/./d: is given twice; name each draft"),
        (["--target", "t", "--draft", "d", "--peers", "all"], "--peers all: other libraries are measured beside a p"),
        (["--target", "nowhere", "--draft", "d"], "nowhere"),
    ],
)
def test_bad_comparisons(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err


def test_costs_of_a_lone_folder(demo_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cost", str(demo_folder("demo-draft", "int8")), "--contexts", "16,64", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["pairs"] == []
    assert [curve["context"] for curve in out["curves"]] == [16, 64]
    assert all(seconds > 0 for curve in out["curves"] for _, seconds in curve["costs"]["points"])


def test_costs_are_measured_where_load_would_run_the_folder(
    demo_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = ["--cost", str(demo_folder("demo-draft", "int8")), "--contexts", "16"]
    for more in (["--provider", "auto"], ["--provider", "rocm", "--fallback"], ["--draft-provider", "cpu"]):
        assert main([*cost, *more, "--json"]) == 0
        (curve,) = json.loads(capsys.readouterr().out)["curves"]
        assert curve["provider"] == "cpu"
    for wrong in (["--draft-provider", "rocm"], ["--provider", "rocm:1"]):
        assert main([*cost, *wrong]) == 2
        assert "provider 'rocm' is not in the installed onnxruntime" in capsys.readouterr().err
    assert main([*cost, "--provider", "cpu", "--provider-option", "device_id=1"]) == 2
    assert "'cpu' has no option 'device_id'" in capsys.readouterr().err


def test_own_prompts_in_either_field(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('\ufeff{"data": "def f(x):"}\n\n{"prompt": "import os\\n", "id": 7}\n', encoding="utf-8")
    assert main([*pair, "--prompts", str(file), "--max-new-tokens", "8", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["pairs"]
    assert (one["prompts"], one["prompt_count"]) == ("mine", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"data": "a"', "line 2: is not JSON"),
        ('["a"]', 'line 2: needs an object with a text under "data" or "prompt"'),
        ('{"text": "a"}', 'line 2: needs an object with a text under "data" or "prompt"'),
        ('{"data": ""}', "line 2: needs an object with a text"),
        ('{"prompt": 3}', "line 2: needs an object with a text"),
    ],
)
def test_a_broken_prompt_line_is_named(
    pair: list[str], tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(f'{{"data": "fine"}}\n{line}\n', encoding="utf-8")
    # The line is refused even where the limit would leave it out.
    assert main([*pair, "--prompts", str(file), "--limit", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err and str(file) in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep-k", "5"], "--sweep-k '5': draft lengths are from 1 to 32, a sweep is written as 1..12"),
        (["--sweep-k", "9..3"], "--sweep-k '9..3': draft lengths"),
        (["--sweep-k", "1..40"], "--sweep-k '1..40': draft lengths"),
        (["--draft-length", "0"], "--draft-length 0: draft lengths"),
        (["--max-new-tokens", "1"], "--max-new-tokens must be at least 2"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: the prompts cannot be read"),
        (["--plot", "picture.bmp"], "--plot picture.bmp: the name ends in one of .png, .svg, .pdf"),
        (["--plot", "no/such/folder/p.png"], "there is no folder"),
        (["--cost", "--contexts", "many"], "--contexts takes numbers of tokens as 256,1024, not 'many'"),
        (["--cost", "--contexts", "-1"], "--contexts cannot be negative"),
        (
            ["--peers", "llamacpp"],
            "there is no peer 'llamacpp'; did you mean llama.cpp? known: transformers, onnxruntime",
        ),
        (["--peers", "all"], "--peers needs --peer-target CHECKPOINT"),
        (["--peers", "all", "--peer-target", "nowhere"], "nowhere: is no checkpoint folder"),
        (["--peers", "all", "--peer-target", ".", "--temperature", "1"], "--peers decode greedily"),
    ],
)
def test_bad_options(pair: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err


def test_neither_pair_nor_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "name a pair: --pair TARGET DRAFT, drafts of one target: --target" in capsys.readouterr().err


def test_a_context_that_does_not_fit(demo_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cost", str(demo_folder("demo-draft", "int8")), "--contexts", "99999"]) == 2
    assert "--contexts 99999 is more than its KV cache can hold" in capsys.readouterr().err


def test_tokens_that_differ_are_a_failure(
    short: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pard_onnx.benchmarks.trial.disagreements", lambda trial, way: [0])
    assert main([*short, "--draft-length", "4"]) == 1
    out, err = capsys.readouterr()
    assert "PARD K=4" in out and "differ on 33 % of the prompts" in err
