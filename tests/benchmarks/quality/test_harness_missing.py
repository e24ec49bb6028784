"""Without lm-evaluation-harness the command says what to install."""

import sys

import pytest

from pard_onnx.benchmarks.quality.harness import main
from pard_onnx.models.extras import install_command


def test_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--target", "nowhere", "--tasks", "hellaswag"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: lm_eval is not installed; run: {install_command('eval')}\n")
