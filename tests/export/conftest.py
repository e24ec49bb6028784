"""Exports of tiny checkpoints, each made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_pard2, make_peagle

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEVICES, form_for
from pard_onnx.models.manifest import Source

FORM = frozenset(("attention", "floats", "opset", "static", "draft_length"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """exported(family, role, precision, device=..., **options) -> (checkpoint, artifact folder).

    options: form's and tiny's; feature_layers: of a target; pard2, peagle: make_pard2's and make_peagle's
    options, of a draft.
    """
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str, role: str, precision: str, **options: object) -> tuple[Path, Path]:
        key = repr((family, role, precision, sorted(options.items())))
        if key not in made:
            root = tmp_path_factory.mktemp("export")
            device = DEVICES[str(options.pop("device", "cpu"))]
            wanted = form_for(device, **{name: options.pop(name) for name in FORM & options.keys()})  # type: ignore[arg-type]
            verify = bool(options.pop("verify", True))
            layers = tuple(options.pop("feature_layers", ()))  # type: ignore[call-overload]
            projection = options.pop("pard2", None)
            eagle = options.pop("peagle", None)
            checkpoint = tiny(root / "checkpoint", family, role, **options)
            if projection is not None:
                make_pard2(checkpoint, **projection)  # type: ignore[arg-type]
            if eagle is not None:
                make_peagle(checkpoint, **eagle)  # type: ignore[arg-type]
            export(
                Job(
                    Checkpoint.open(checkpoint),
                    Source("tiny"),
                    root / "artifact",
                    precision,
                    form=wanted,
                    feature_layers=layers,
                    verify=verify,
                )
            )
            made[key] = checkpoint, root / "artifact"
        return made[key]

    return make


@pytest.fixture
def job(tmp_path: Path, tiny: Callable[..., Path]) -> Job:
    """An export of a tiny target, in a folder whose names have spaces and letters beyond ASCII."""
    checkpoint = tiny(tmp_path / "a checkpoint é", "qwen2", "target")
    return Job(Checkpoint.open(checkpoint), Source("tiny"), tmp_path / "out put ü", "int4", verify=False)


@pytest.fixture
def left() -> Callable[[Job], list[str]]:
    """The names that an export left beside its checkpoint."""
    return lambda job: sorted(path.name for path in job.output.parent.iterdir() if path.name != "a checkpoint é")
