"""Helper processes of frozen applications, which are the application itself (tests/end_to_end has a real one)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pard_onnx.models import demo, helper_process
from pard_onnx.models.checkpoints import module_patterns, tokenizer_check
from pard_onnx.models.helper_process import FLAG, HELPERS, NoHelper, freeze_support, helper_command

APP = """import sys
sys.frozen = True
from pard_onnx.models.helper_process import freeze_support
freeze_support()
print("the application")
"""


def run(*arguments: str, given: object = None) -> tuple[int, str]:
    command = [sys.executable, "-c", APP, *arguments]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_the_application_does_a_helpers_work_and_nothing_else() -> None:
    request = {"packages": "", "file": str(demo.TARGET / "tokenizer.json"), "added": []}
    assert run(FLAG, "tokenizer_check", given=request) == (0, '{"problem": null}')
    for other in ([], ["--pard-onnx"], [FLAG], ["x", FLAG, "tokenizer_check"], [FLAG, "tokenizer_check", "x"]):
        assert run(*other) == (0, "the application\n")


@pytest.mark.parametrize("name", ["os", "tokenizer", "", "../tokenizer_check"])
def test_nothing_else_can_be_run_by_the_flag(name: str) -> None:
    assert run(FLAG, name) == (1, "")


def test_a_helper_that_fails_shows_nothing() -> None:
    assert run(FLAG, "tokenizer_check", given={}) == (1, "")


def test_frozen_applications_start_themselves_if_they_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_process, "_is_supported", False)
    script = Path(tokenizer_check.__file__)
    freeze_support()  # in an interpreter
    assert helper_command(script) == [sys.executable, "-I", "-S", str(script)]
    assert not helper_process._is_supported
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "argv", ["app"])
    with pytest.raises(NoHelper):  # it would be a second window
        helper_command(script)
    freeze_support()
    assert helper_command(script) == [sys.executable, FLAG, "tokenizer_check"]
    with pytest.raises(NoHelper):
        helper_command(Path("other.py"))


def test_all_helpers_are_known() -> None:
    assert {module.__name__ for module in (tokenizer_check, module_patterns)} == set(HELPERS.values())
    assert {Path(str(module.__file__)).stem for module in (tokenizer_check, module_patterns)} == set(HELPERS)
