"""pard-bench on the shipped pair: what it reports, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.bench_command import main

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
    assert set(out) == {"machine", "versions", "provider", "max_new_tokens", "pairs", "curves"}
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
    assert "name a pair: --pair TARGET DRAFT" in capsys.readouterr().err


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
