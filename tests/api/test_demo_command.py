"""pard-demo: both ways of decoding, and bad options."""

import json
from pathlib import Path

import pytest

from pard_onnx.demo_command import main as demo_main
from pard_onnx.models import demo


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


@pytest.mark.parametrize("options", (["--draft-length", "0"], ["--draft-length", "33"], ["--max-new-tokens", "1"]))
def test_bad_options_of_the_demo(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(options) == 2
    assert capsys.readouterr().err.startswith(f"error: {options[0]} must be ")
