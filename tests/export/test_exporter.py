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
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, BadInput, Failure
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.precision import DYNAMIC_INT8, FLOAT16, FLOAT32, INT4, INT8, Recipe
from pard_onnx.quantize.packing.pack import format_for_width

Tiny = Callable[..., Path]
Left = Callable[[Job], list[str]]


def test_the_folder_is_what_the_manifest_says(job: Job, left: Left) -> None:
    manifest = export(job)
    assert Manifest.read(job.output) == manifest
    manifest.verify(job.output)
    assert {f.name for f in manifest.files} >= {"model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"}
    assert manifest.capacity == 512 and manifest.kv_rows == 576
    assert manifest.parity is None
    assert all(t.error < 0.2 for t in manifest.tensors)
    assert left(job) == [job.output.name]


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_values_that_are_not_finite_are_refused_by_tensor(job: Job, bad: float, left: Left) -> None:
    folder = job.checkpoint.folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = weights(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export(replace(job, checkpoint=Checkpoint.open(folder)))
    assert left(job) == []


def test_values_beyond_half_precision_are_refused_by_tensor(job: Job, left: Left) -> None:
    folder = job.checkpoint.folder
    tensors = weights(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        export(replace(job, checkpoint=Checkpoint.open(folder), precision="fp16"))
    assert left(job) == []


def test_logits_that_are_not_finite_are_a_failure(job: Job, left: Left) -> None:
    folder = job.checkpoint.folder
    tensors = weights(json.loads((folder / "config.json").read_text(encoding="utf-8")), std=1e12)
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(Failure, match="logits are not finite"):
        export(replace(job, checkpoint=Checkpoint.open(folder), precision="fp32", verify=True))
    assert left(job) == []


@pytest.mark.parametrize("capacity", (0, -1, 513))
def test_a_context_length_that_the_model_does_not_have_is_refused(job: Job, capacity: int, left: Left) -> None:
    with pytest.raises(BadInput, match=f"context length {capacity} "):
        export(replace(job, capacity=capacity))
    assert left(job) == []


def test_a_full_disk_is_told_before_writing(job: Job, monkeypatch: pytest.MonkeyPatch, left: Left) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(Failure, match="1 MiB free, the export needs about"):
        export(job)
    assert left(job) == []


def test_a_graph_that_is_not_the_model_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch, left: Left) -> None:
    from pard_onnx.export import exporter

    monkeypatch.setattr(exporter, "vocabulary_bias", lambda spec: np.linspace(0, 50, 320, dtype=np.float32))
    with pytest.raises(Failure, match="not the model"):
        export(replace(job, precision="fp32", verify=True))
    assert left(job) == []


MIXED = Recipe(
    INT4, INT8, INT8, (("model.layers.0.*", INT8), ("*.1.self_attn.v_proj", FLOAT32), ("*.down_proj", FLOAT32))
)


@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
def test_a_mixed_recipe(tmp_path: Path, tiny: Tiny, family: str) -> None:
    """Formats by name; q, k and v stay apart where theirs differ. Less rounding than all int4, more than none."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", family))
    mixed, plain = (
        export(Job(checkpoint, Source("tiny"), tmp_path / name, "int4", recipe=recipe))
        for name, recipe in (("mixed", MIXED), ("plain", None))
    )
    formats = {t.name: t.format for t in mixed.tensors}
    assert formats["model.layers.0.self_attn.q_proj+k_proj+v_proj"] == "int8-b64"
    assert formats["model.layers.1.self_attn.q_proj"] == "int4-b64"
    assert formats["model.layers.1.self_attn.v_proj"] == "float32"
    assert formats["lm_head"] == "int8-b64"
    assert mixed.recipe == Manifest.read(tmp_path / "mixed").recipe
    for name, shape in shapes(checkpoint.spec):  # what was done: blocks of 64, the widths' largest, instead of 128
        if len(shape) == 2:
            stem = name.removesuffix(".weight")
            assert mixed.recipe.of(stem) == format_for_width(MIXED.of(stem), shape[1], stem), name
    assert mixed.parity is not None and plain.parity is not None
    assert 1e-4 < mixed.parity.mean_error < plain.parity.mean_error


@pytest.mark.parametrize(
    ("recipe", "reason"),
    (
        (Recipe(DYNAMIC_INT8, INT8, INT8), "neighbours"),
        (Recipe(INT4, INT4, INT4, (("*.up_proj", DYNAMIC_INT8),)), "neighbours"),
        (Recipe(INT4, FLOAT16, INT4), "float16 beside"),
    ),
)
def test_recipes_that_a_target_cannot_take(job: Job, recipe: Recipe, reason: str, left: Left) -> None:
    with pytest.raises(BadInput, match=reason):
        export(replace(job, recipe=recipe))
    assert left(job) == []
