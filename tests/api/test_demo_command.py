"""pard-demo: both ways of decoding, and bad options."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pard_onnx.demo_command import Run, explanation
from pard_onnx.demo_command import main as demo_main
from pard_onnx.models import demo
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.manifest import DATA, Manifest


def test_demo_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        demo_main(["--json", "--max-new-tokens", "24", "--draft-length", "6", "--output", str(tmp_path / "out")]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert len(found["prompts"]) == len(demo.prompts())
    assert found["all"]["mean_accepted"] > 1.5
    assert demo_main(["--max-new-tokens", "24", "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "speed-up" in text and "accepted" in text


def test_the_exported_pair_runs_without_what_exports_need() -> None:
    """In 80 columns, and the command itself compares the tokens of both ways."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'safetensors')));"
    run = "sys.argv = ['pard', 'demo', '--max-new-tokens', '16']; from pard_onnx.__main__ import main; main()"
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", block + run], capture_output=True, encoding="utf-8", env=environment, check=True
    )
    assert not done.stderr and "speed-up" in done.stdout and "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("folder", "checkpoint", "role"),
    [(demo.EXPORTED_TARGET, demo.TARGET, "target"), (demo.EXPORTED_DRAFT, demo.DRAFT, "draft")],
)
def test_the_exported_pair_is_whole_and_of_the_checkpoints_that_ship(folder: Path, checkpoint: Path, role: str) -> None:
    """Only .ci/demo-pair writes these folders."""
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    spec = Checkpoint.open(checkpoint).spec
    assert (manifest.spec.role, manifest.precision, manifest.spec) == (role, "int4", spec)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shipped"), [("demo-target", demo.EXPORTED_TARGET), ("demo-draft", demo.EXPORTED_DRAFT)]
)
def test_the_exported_pair_is_what_an_export_writes_today(
    name: str, shipped: Path, demo_folder: Callable[[str, str], Path]
) -> None:
    """Where it is not, .ci/demo-pair exports it anew. Sums of floats in another order may move a few weights."""
    fresh = demo_folder(name, "int4")
    ours, theirs = Manifest.read(shipped), Manifest.read(fresh)
    assert [file.name for file in ours.files] == [file.name for file in theirs.files]
    for file in ours.files:
        found, expected = ((folder / file.name).read_bytes() for folder in (shipped, fresh))
        if file.name != DATA:
            assert found == expected, file.name
            continue
        assert len(found) == len(expected)
        assert np.mean(np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8)) < 0.001
    assert (ours.recipe, ours.quantization) == (theirs.recipe, theirs.quantization)


def test_a_prompt_without_a_gain_is_explained() -> None:
    def result(tokens: int, seconds: float, accepted: tuple[int, ...]) -> Any:
        times = SimpleNamespace(total=seconds)
        stats = SimpleNamespace(seconds=times, time_to_first_token=0.0, new_tokens=tokens, accepted=accepted)
        return SimpleNamespace(stats=stats)

    fast = Run("a", result(11, 1.0, ()), result(11, 0.5, (5, 5)), ())
    slow = Run("b", result(11, 1.0, ()), result(11, 2.0, (2,) * 5), ())
    assert "Below 1x" not in explanation([fast])
    assert "Below 1x (1 of 2 prompts): a round took as long as 4.0 plain steps and gave 2.0 tokens" in explanation(
        [fast, slow]
    )


@pytest.mark.parametrize("options", (["--draft-length", "0"], ["--draft-length", "33"], ["--max-new-tokens", "1"]))
def test_bad_options_of_the_demo(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(options) == 2
    assert capsys.readouterr().err.startswith(f"error: {options[0]} must be ")
