"""The good folders that attacks begin with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import TARGET
from pard_onnx.models.manifest import Source


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported target."""
    folder = tmp_path_factory.mktemp("good") / "target"
    export(Job(Checkpoint.open(TARGET), Source("demo"), folder, "int4", verify=False))
    return folder


@pytest.fixture(scope="session")
def good_floats(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A tiny target that is exported in floats, as `pard-quantize` takes it."""
    folder = tmp_path_factory.mktemp("floats")
    export(Job(Checkpoint.open(tiny(folder / "model")), Source("tiny"), folder / "target", "fp32", verify=False))
    return folder / "target"
