"""Exports of tiny checkpoints, each made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.manifest import Source


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """exported(family, role, precision, **tiny's options) -> (checkpoint folder, artifact folder)."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str, role: str, precision: str, **options: object) -> tuple[Path, Path]:
        key = repr((family, role, precision, sorted(options.items())))
        if key not in made:
            root = tmp_path_factory.mktemp("export")
            checkpoint = tiny(root / "checkpoint", family, role, **options)
            export(Job(Checkpoint.open(checkpoint), Source("tiny"), root / "artifact", precision))
            made[key] = checkpoint, root / "artifact"
        return made[key]

    return make
