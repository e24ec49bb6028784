"""Fixtures that several folders of tests share, and the profiles of property tests.

Helper modules are in tests/support, which is on pytest's `pythonpath`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny as checkpoints
from hypothesis import settings
from stand_in_hub import online  # noqa: F401 a fixture, which pytest finds here
from toy_artifacts import (  # noqa: F401 fixtures, which pytest finds here
    device,
    fakes,
    make_tokenizer,
    pair_folders,
    toy,
    write_artifact,
)

from pard_onnx.export_command import main as export_main

# Every run of the default profile tries the same examples, so that no result depends on luck; `explore` looks for new
# ones. A profile is chosen by --hypothesis-profile or the environment variable HYPOTHESIS_PROFILE.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=2000, database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test finds out about this machine stays in its user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARD_ONNX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PARD_ONNX_MODELS", str(tmp_path_factory.mktemp("library")))
        yield


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Path]:
    """Writes a tiny random checkpoint and returns its folder: tests/tiny.py's `write`."""
    return checkpoints.write


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file to calibrate on."""
    path = tmp_path / "text.txt"
    path.write_text("def the quick brown fox: return self\n" * 60)
    return path


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """demo_folder(name, precision): the shipped model exported by the command, once."""
    root = tmp_path_factory.mktemp("demo pair ü")

    def make(name: str, precision: str) -> Path:
        out = root / f"{name}-{precision}"
        if not out.exists():
            assert export_main(["--model", name, "--precision", precision, "--output", str(out)]) == 0
        return out

    return make
