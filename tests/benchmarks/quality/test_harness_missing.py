"""Without lm-evaluation-harness the command says what to install."""

import sys

import pytest

from pard_onnx.benchmarks.quality.harness import main


def test_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--target", "nowhere", "--tasks", "hellaswag"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: lm_eval is not installed; run: pip install 'pard-onnx[eval]'\n")
