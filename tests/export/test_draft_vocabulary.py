"""Drafts whose head keeps some ids alone: the head's rows bit for bit, and true ids in every variant of the graph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quantized
from onnx import numpy_helper
from tiny import weights

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEVICES, form_for
from pard_onnx.models.json_files import read_json
from pard_onnx.models.manifest import Manifest, Source, read_draft_ids
from pard_onnx.models.precision import INT4, INT8, Format
from pard_onnx.quantize.draft_vocabulary import select_vocabulary
from pard_onnx.quantize.packing.pack import format_for_width, pack
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import named_recipe
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers import table as providers
from pard_onnx.runtime.providers.threads import Threads

Tiny = Callable[..., Path]
SIZE = 100
IDS = [5, 17, 250, 3, 99, 299, 41]


def made(tmp_path: Path, folder: Path, precision: str = "fp32", **options: Any) -> tuple[Path, Manifest]:
    checkpoint = Checkpoint.open(folder)
    job = Job(checkpoint, Source("tiny"), tmp_path / "out", vocabulary=select_vocabulary(checkpoint, SIZE))
    return tmp_path / "out", export(replace(job, precision=precision, **options))


def require_true_ids(folder: Path, manifest: Manifest) -> None:
    """The ids and probabilities that a session gives are those of its logits' columns."""
    ids = read_draft_ids(folder)
    assert manifest.columns == len(ids) == SIZE and manifest == Manifest.read(folder)
    draft = session_class(manifest)(folder, manifest, providers.provider_named("cpu"), Threads(1))
    logits = draft.logits(IDS, 3).copy()
    draft.rollback(0)
    found, probabilities = draft.step(IDS, 3)
    assert logits.shape == (3, SIZE)
    np.testing.assert_array_equal(found, ids[logits.argmax(axis=1)])
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, 1 / expected.sum(axis=1), rtol=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "portable": {"device": "webgpu"},
    "static": {"device": "npu", "draft_length": 3},
}


@pytest.mark.parametrize(("variant", "tied"), (("gqa", False), ("gqa", True), ("portable", True), ("static", False)))
def test_logits_are_torchs_of_the_chosen_ids(tmp_path: Path, tiny: Tiny, variant: str, tied: bool) -> None:
    options = dict(VARIANTS[variant])
    wanted = form_for(DEVICES[options.pop("device", "cpu")], **options)
    folder, manifest = made(tmp_path, tiny(tmp_path / "model", role="draft", tied=tied), form=wanted)
    parity = manifest.parity
    assert parity is not None and parity.top1_agreement == 1
    assert parity.max_error < 1e-4 and parity.rollback_error < 1e-4
    require_true_ids(folder, manifest)
    head = {tensor.name: tensor.bytes for tensor in manifest.tensors}["lm_head"]
    assert head == SIZE * manifest.spec.hidden * 4


def head_of(folder: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / "model.onnx").graph
    parts = {t.name.rsplit(".", 1)[-1]: numpy_helper.to_array(t) for t in graph.initializer if "lm_head" in t.name}
    assert "padding" not in parts
    return parts


@pytest.mark.parametrize(("precision", "fmt", "tied"), (("int4", INT4, True), ("int8", INT8, False)))
def test_the_head_is_packed_from_the_chosen_rows(
    tmp_path: Path, tiny: Tiny, precision: str, fmt: Format, tied: bool
) -> None:
    model = tiny(tmp_path / "model", role="draft", tied=tied)
    folder, manifest = made(tmp_path, model, precision, verify=False)
    floats = weights(read_json(model / "config.json"))
    matrix = floats["model.embed_tokens.weight" if tied else "lm_head.weight"]
    expected = pack(matrix[read_draft_ids(folder)], format_for_width(fmt, matrix.shape[1], "lm_head"))
    found = head_of(folder)
    np.testing.assert_array_equal(found["weight"], expected.weight)
    np.testing.assert_array_equal(found["scale"], expected.scale)
    require_true_ids(folder, manifest)
    sizes = {tensor.name: tensor.bytes for tensor in manifest.tensors}
    assert sizes["lm_head"] * manifest.spec.vocabulary.rows == sizes["model.embed_tokens"] * SIZE  # which keeps all


@pytest.mark.parametrize("recipe", ("int4-gptq-asym", "int8-dynamic"))
def test_recipes_keep_the_chosen_rows_of_what_they_rounded(tmp_path: Path, tiny: Tiny, recipe: str) -> None:
    """The head is the packed embedding's rows, zero points included."""
    named = named_recipe(recipe)
    text = tmp_path / "text.txt"
    text.write_text("def the quick brown fox " * 50)
    order = QuantizationRequest(named, text if named.needs_text else None)
    model = tiny(tmp_path / "model", role="draft", tied=True)
    folder, manifest = made(tmp_path, model, named.precision, order=order)
    graph = onnx.load(folder / "model.onnx").graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    head = head_of(folder)
    assert ("zero_point" in head) == (recipe == "int4-gptq-asym")
    for part, array in head.items():
        whole = stored[f"model.embed_tokens.{'rows' if part == 'weight' else part}"]
        np.testing.assert_array_equal(array.reshape(SIZE, -1), whole[read_draft_ids(folder)])
    require_true_ids(folder, manifest)
    assert manifest.parity is not None and manifest.parity.mean_error < 0.5


def test_integers_of_quantized_checkpoints(tmp_path: Path) -> None:
    """Columns in the order of importance, zero points, and a head that is among the integers."""
    model, truth = quantized.write(
        tmp_path / "model", "gptq", role="draft", sorted_columns=True, quantized_head=True, layers=1
    )
    folder, manifest = made(tmp_path, model, "int4")
    packed, ids = head_of(folder), read_draft_ids(folder)
    levels = np.stack([packed["weight"] & 15, packed["weight"] >> 4], axis=-1).reshape(SIZE, -1)
    head = truth["lm_head"]
    np.testing.assert_array_equal(levels, head.levels[ids][:, np.argsort(head.group_of, kind="stable")])
    require_true_ids(folder, manifest)
    assert manifest.parity is not None and manifest.parity.mean_error < 0.1


def test_the_manifest_tells(tmp_path: Path, tiny: Tiny) -> None:
    _, manifest = made(tmp_path, tiny(tmp_path / "model", role="draft"), "int4", verify=False)
    told = manifest.draft_vocabulary
    assert told is not None and (told.size, told.text) == (SIZE, "calibration.jsonl") and 0 < told.coverage < 1
    assert "draft_vocabulary.json" in {file.name for file in manifest.files}
