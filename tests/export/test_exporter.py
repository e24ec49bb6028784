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
from pard_onnx.export.output import checked_output_folder, replacing
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, BadInput, Failure
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.precision import DYNAMIC_INT8, FLOAT16, FLOAT32, INT4, INT8, Recipe

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


def test_an_export_is_replaced_only_by_force(job: Job) -> None:
    export(job)
    before = (job.output / "pard_onnx.json").read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        export(job)
    export(replace(job, force=True, precision="fp32"))
    assert (job.output / "pard_onnx.json").read_bytes() != before
    assert left(job) == [job.output.name]


@pytest.mark.parametrize(
    "files", (["mine.txt"], ["config.json"], ["pard_onnx.json", "mine.txt"], ["pard_onnx.json", "a/b"])
)
def test_force_replaces_nothing_but_exports(job: Job, files: list[str]) -> None:
    for name in files:
        (job.output / name).parent.mkdir(parents=True, exist_ok=True)
        (job.output / name).write_text("mine")
    with pytest.raises(BadInput, match=f"holds {Path(files[-1]).parts[0]}, which is not an export's"):
        export(replace(job, force=True))
    assert [(job.output / name).read_text() for name in files] == ["mine"] * len(files)
    assert left(job) == [job.output.name]


@pytest.mark.parametrize("output", (".", "..", "nested/.."))
@pytest.mark.parametrize("force", (True, False))
def test_the_checkpoint_is_never_replaced(job: Job, output: str, force: bool) -> None:
    folder = job.checkpoint.folder
    before = sorted(folder.iterdir())
    with pytest.raises(BadInput, match="holds the checkpoint itself"):
        export(replace(job, output=folder / output, force=force))
    assert sorted(folder.iterdir()) == before


def test_a_file_is_not_replaced(job: Job) -> None:
    job.output.write_text("mine")
    with pytest.raises(BadInput, match="is a file"):
        export(replace(job, force=True))
    assert job.output.read_text() == "mine" and left(job) == [job.output.name]


def test_an_output_that_cannot_be_made_is_bad_input(job: Job) -> None:
    job.output.write_text("a file, so no folder to put anything in")
    with pytest.raises(BadInput, match="choose another --output"):
        export(replace(job, output=job.output / "deep" / "out"))
    with pytest.raises(BadInput, match="choose another --output"):
        export(replace(job, output=job.output.with_name("x" * 5000)))
    assert left(job) == [job.output.name]


def test_the_longest_name_there_is(job: Job) -> None:
    output = job.output.with_name("o" * 255)
    with replacing(output, force=False) as folder:
        (folder / "made").touch()
    assert left(job) == [output.name]


def test_a_home_folder_is_understood(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert checked_output_folder(Path("~/out"), job.checkpoint.folder, force=False) == (tmp_path / "out").resolve()


def test_a_folder_made_meanwhile_is_kept(job: Job) -> None:
    """Two exports to one place: the second to finish fails, and neither is mixed with the other."""
    with pytest.raises(Failure, match="was made by someone else"), replacing(job.output, force=False):
        job.output.mkdir()
        (job.output / "theirs").touch()
    assert [path.name for path in job.output.iterdir()] == ["theirs"] and left(job) == [job.output.name]


def test_a_swap_that_fails_puts_the_old_folder_back(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.output.mkdir()
    (job.output / "old").touch()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError("a virus scanner has a file of it open")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError), replacing(job.output, force=True):
        pass
    assert [path.name for path in job.output.iterdir()] == ["old"] and left(job) == [job.output.name]


def test_parents_made_for_an_export_that_fails_go_with_it(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(job.output / "a" / "b", force=False):
        raise KeyboardInterrupt
    assert left(job) == []


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


def test_logits_that_are_not_finite_are_a_failure(job: Job) -> None:
    folder = job.checkpoint.folder
    tensors = weights(json.loads((folder / "config.json").read_text(encoding="utf-8")), std=1e12)
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(Failure, match="logits are not finite"):
        export(replace(job, checkpoint=Checkpoint.open(folder), precision="fp32", verify=True))
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
    assert mixed.recipe == MIXED == Manifest.read(tmp_path / "mixed").recipe
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
def test_recipes_that_a_target_cannot_take(job: Job, recipe: Recipe, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        export(replace(job, recipe=recipe))
    assert left(job) == []
