"""What an export leaves behind, and what it leaves nothing behind of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import save_safetensors, weights

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, BadInput, Failure
from pard_onnx.models.manifest import Manifest, Source

Tiny = Callable[..., Path]


@pytest.fixture
def job(tmp_path: Path, tiny: Tiny) -> Job:
    checkpoint = tiny(tmp_path / "a checkpoint é", "qwen2", "target")
    return Job(Checkpoint.open(checkpoint), Source("tiny"), tmp_path / "out put ü", "int4", verify=False)


def left(job: Job) -> list[str]:
    return sorted(p.name for p in job.output.parent.iterdir() if p.name != "a checkpoint é")


def test_the_folder_is_what_the_manifest_says(job: Job) -> None:
    manifest = export(job)
    assert Manifest.read(job.output) == manifest
    manifest.verify(job.output)
    assert {f.name for f in manifest.files} >= {"model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"}
    assert manifest.capacity == 512 and manifest.kv_rows == 576
    assert manifest.parity is None
    assert all(t.error < 0.2 for t in manifest.tensors)
    assert left(job) == [job.output.name]


def test_an_existing_folder_is_replaced_only_by_force(job: Job) -> None:
    job.output.mkdir()
    (job.output / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        export(job)
    assert (job.output / "mine.txt").exists()
    export(replace(job, force=True))
    assert not (job.output / "mine.txt").exists()
    assert left(job) == [job.output.name]


@pytest.mark.parametrize("stage", ("trace", "weights", "verify"))
def test_an_interrupted_export_leaves_nothing(job: Job, stage: str) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage and (done > 0 or name == "verify"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(replace(job, verify=True), interrupt)
    assert left(job) == []


def test_a_forced_export_that_fails_keeps_the_old_folder(job: Job) -> None:
    export(job)
    before = {p.name: p.read_bytes() for p in job.output.iterdir()}

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "weights" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(replace(job, force=True, precision="fp32"), interrupt)
    assert {p.name: p.read_bytes() for p in job.output.iterdir()} == before
    assert left(job) == [job.output.name]


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_values_that_are_not_finite_are_refused_by_tensor(job: Job, bad: float) -> None:
    folder = job.checkpoint.folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = weights(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export(replace(job, checkpoint=Checkpoint.open(folder)))
    assert left(job) == []


def test_values_beyond_half_precision_are_refused_by_tensor(job: Job) -> None:
    folder = job.checkpoint.folder
    tensors = weights(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        export(replace(job, checkpoint=Checkpoint.open(folder), precision="fp16"))
    assert left(job) == []


@pytest.mark.parametrize("capacity", (0, -1, 513))
def test_a_context_length_that_the_model_does_not_have_is_refused(job: Job, capacity: int) -> None:
    with pytest.raises(BadInput, match=f"context length {capacity} "):
        export(replace(job, capacity=capacity))
    assert left(job) == []


def test_a_full_disk_is_told_before_writing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(Failure, match="1 MiB free, the export needs about"):
        export(job)
    assert left(job) == []


def test_a_graph_that_is_not_the_model_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from pard_onnx.export import exporter

    monkeypatch.setattr(exporter, "vocabulary_bias", lambda spec: np.linspace(0, 50, 320, dtype=np.float32))
    with pytest.raises(Failure, match="not the model"):
        export(replace(job, precision="fp32", verify=True))
    assert left(job) == []
