"""Fixtures that several folders of tests share, and the profiles of property tests.

Helper modules are in tests/support, which is on pytest's `pythonpath`.
"""

import os
import shutil
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

import pard_onnx.models
from pard_onnx.export_command import main as export_main

DEMO_FEATURES = (-1, -3, -5)  # layers of the shipped target

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


@pytest.fixture(scope="session")
def pard2_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """pard2_folder(role, precision): the shipped target with features, or the draft with a projection of them."""
    root, demo = tmp_path_factory.mktemp("pard2"), Path(pard_onnx.models.__path__[0]) / "demo"

    def make(role: str, precision: str) -> Path:
        out = root / f"{role}-{precision}"
        if out.exists():
            return out
        model = ["--model", "demo-target", f"--features={','.join(map(str, DEMO_FEATURES))}"]
        if role == "draft":
            copy = root / "checkpoint"
            if not copy.exists():
                shutil.copytree(demo / "draft", copy)
                checkpoints.make_pard2(copy, layers=DEMO_FEATURES, target_hidden=256, scale=0.02, bias=True)
            model = ["--model", str(copy)]
        fast = ["--quality", "fast"] if precision != "fp32" else []
        assert export_main([*model, "--precision", precision, *fast, "--no-verify", "--output", str(out)]) == 0
        return out

    return make
