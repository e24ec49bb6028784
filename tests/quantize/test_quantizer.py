"""Recipes from end to end on tiny checkpoints: every recipe, family and role; what is told, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pard_onnx.export.exporter import Job, export
from pard_onnx.export.verify.reference import reference_logits
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, BadInput
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.precision import INT4, INT8, Format
from pard_onnx.quantize.algorithms.column_scales import awq_scale, fold_scales, smooth_scale
from pard_onnx.quantize.calibration.layers import GROUPS, Layers
from pard_onnx.quantize.calibration.rounding_pass import RoundingPass
from pard_onnx.quantize.calibration.text import CalibrationRow, calibration_rows, read_text_file
from pard_onnx.quantize.packing.pack import PackedRows, RoundingError, pack, unpack
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD, Formats, Spool
from pard_onnx.quantize.quantizer import QuantizationRequest, quantize
from pard_onnx.quantize.recipes import QUALITIES, RECIPES, SMALL_HIDDEN, named_recipe, recipe_of_quality

Tiny = Callable[..., Path]


def rows_of(checkpoint: Checkpoint, text: Path) -> list[CalibrationRow]:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    return calibration_rows(read_text_file(text), tokenizer, checkpoint.spec)


def silent(*_: object) -> None: ...


@pytest.mark.parametrize("role", ("target", "draft"))
@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_the_layers_compute_what_the_model_does(tmp_path: Path, tiny: Tiny, text: Path, family: str, role: str) -> None:
    """Streamed layer by layer, a draft's masks included, against the whole model at once."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", family, role))
    row = rows_of(checkpoint, text)[0]
    with torch.inference_mode():
        layers = Layers(checkpoint, [row])
        for index in range(2):
            with layers.loaded(index) as layer:
                layers.advance(layer)
        streamed = layers.head_inputs(layers.hidden[0]) @ torch.from_numpy(_head(checkpoint)).T
    inputs = {"position_ids": torch.from_numpy(row.positions)[None]}
    if row.mask is not None:
        hidden = torch.from_numpy(~row.mask)
        inputs["attention_mask"] = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[None, None]
    expected = reference_logits(checkpoint, torch.from_numpy(row.ids)[None], **inputs)
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=1e-4)


def _head(checkpoint: Checkpoint) -> np.ndarray:
    from pard_onnx.models.checkpoints.tensors import read_tensor

    return read_tensor(checkpoint.tensors["lm_head.weight"])


@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 2), (4, 4), (4, 1)))
def test_awqs_scales_change_no_output(tmp_path: Path, tiny: Tiny, text: Path, heads: int, kv_heads: int) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", heads=heads, kv_heads=kv_heads))
    with torch.inference_mode(), TemporaryFile() as file:
        layers, spool = Layers(checkpoint, rows_of(checkpoint, text)), Spool(file)
        with layers.loaded(0) as layer:
            before = next(layers.run(layer))
            weights = {name: layer.get_parameter(f"{name}.weight").clone() for group in GROUPS for name in group}
            fold_scales(layer, "model.layers.0", checkpoint.spec, awq_scale(INT4), layers.grams(layer), spool)
            changed = [not torch.equal(layer.get_parameter(f"{name}.weight"), w) for name, w in weights.items()]
            torch.testing.assert_close(next(layers.run(layer)), before, atol=1e-4, rtol=1e-4)
            norm = spool.vector("model.layers.0.input_layernorm.weight")
            np.testing.assert_array_equal(norm, layer.get_parameter("input_layernorm.weight").numpy())
            assert spool.vector("model.layers.0.self_attn.v_proj.bias") is not None
    assert sum(changed) >= 4


@pytest.mark.parametrize("tied", (True, False))
def test_the_pass_prepares_every_matrix_that_is_multiplied_by(
    tmp_path: Path, tiny: Tiny, text: Path, tied: bool
) -> None:
    """In float32's place what was packed: the next layer's inputs come from it."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", tied=tied))
    named = named_recipe("int4-gptq")
    formats = Formats(named.formats(checkpoint.spec), tied)
    done: list[int] = []
    with TemporaryFile() as file:
        spool = Spool(file)
        RoundingPass(checkpoint, named, formats, spool).run(rows_of(checkpoint, text), done.append)
        names = [f"model.layers.{index}.{name}" for index in range(2) for group in GROUPS for name in group]
        for name in (*names, EMBEDDING if tied else HEAD):
            shape = checkpoint.tensors[f"{name}.weight"].shape
            fmt = spool.format(name)
            assert fmt is not None and unpack(spool.rows(name, slice(0, shape[0])), fmt).shape == shape
            assert 0 < spool.error(name).relative < 0.3
            output = spool.error(name).relative_output
            assert output is not None and output < spool.error(name).relative  # what GPTQ is for
        assert spool.format(HEAD if tied else EMBEDDING) is None
    assert done == [1, 2]


def test_a_spool_gives_rows_across_its_blocks() -> None:
    weight = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    fmt = Format("nbits", 4, 32, symmetric=False)
    with TemporaryFile() as file:
        spool = Spool(file)
        spool.add("a", fmt, (pack(weight[i : i + 3].copy(), fmt) for i in range(0, 10, 3)), RoundingError())
        whole = pack(weight, fmt)
        for rows in (slice(0, 10), slice(2, 4), slice(3, 6), slice(9, 10), slice(1, 8)):
            found = spool.rows("a", rows)
            for part in ("weight", "scale", "zero_point"):
                np.testing.assert_array_equal(getattr(found, part), getattr(whole, part)[rows])
        spool.add(
            "b", INT4, [PackedRows(np.zeros((1, 1, 64), np.uint8), np.zeros((1, 1), np.float32))], RoundingError()
        )
        assert spool.rows("b", slice(0, 1)).zero_point is None


@pytest.mark.parametrize(
    ("name", "family", "role", "options"),
    (
        ("int4-good", "llama", "target", {}),
        ("int8-smooth", "qwen3", "target", {"tied": True}),
        ("int4-gptq-asym", "qwen3", "draft", {"tied": True}),
        pytest.param("int4-awq-gptq", "qwen2", "target", {}, marks=pytest.mark.slow),
        ("int4-mixed", "llama", "target", {}),
    ),
)
def test_recipes_export(
    tmp_path: Path, tiny: Tiny, text: Path, name: str, family: str, role: str, options: dict[str, bool]
) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", family, role, **options))
    named = named_recipe(name)
    order = QuantizationRequest(named, text if named.needs_text else None, "0.8" if named.mixed else None)
    job = Job(checkpoint, Source("tiny"), tmp_path / "out", named.precision, order=order)
    manifest = export(job)
    assert manifest == Manifest.read(tmp_path / "out") and manifest.parity is not None
    assert manifest.parity.mean_error < 0.5
    told = manifest.quantization
    assert told is not None and told.recipe == name
    assert (told.calibration is not None) is named.needs_text
    assert {f.name for f in manifest.files} == {p.name for p in (tmp_path / "out").iterdir()} - {"pard_onnx.json"}
    if named.mixed:
        formats = {tensor.name: tensor.format for tensor in manifest.tensors}
        eight = [name for choice in told.choices if choice.bits == 8 for name in choice.names]
        assert eight and all(formats[name].startswith("int8") for name in eight if name in formats)
        assert sum(tensor.bytes for tensor in manifest.tensors) <= (told.budget or 0)


@pytest.mark.parametrize("name", ("int4-gptq", "int4-rtn"))
def test_weights_that_are_not_finite_are_refused_by_tensor(tmp_path: Path, tiny: Tiny, text: Path, name: str) -> None:
    from tiny import save_safetensors, weights

    from pard_onnx.models.json_files import read_json

    folder = tiny(tmp_path / "model")
    tensors = weights(read_json(folder / "config.json"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_safetensors(folder / "model.safetensors", tensors)
    named = named_recipe(name)
    order = QuantizationRequest(named, text if named.needs_text else None)
    job = Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "out", order=order, verify=False)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj"):
        export(job)
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_are_refused(tmp_path: Path, tiny: Tiny, text: Path) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", intermediate=104))
    with pytest.raises(BadInput, match=r"down_proj: input width 104 is no multiple of 16"):
        export(
            Job(
                checkpoint, Source("tiny"), tmp_path / "out", order=QuantizationRequest(named_recipe("int4-gptq"), text)
            )
        )


def test_names(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(BadInput, match="the nearest is int4-gptq "):
        named_recipe("int4_gptq")
    assert named_recipe("int4-gptq", 32).format == replace(INT4, block=32)
    assert named_recipe("int4-gptq", 128) is RECIPES["int4-gptq"]
    for name, block in (("int4-gptq", 48), ("int8-dynamic", 32)):
        with pytest.raises(BadInput, match=f"--block-size {block}"):
            named_recipe(name, block)
    with pytest.raises(BadInput, match="neighbours"):
        named_recipe("int8-dynamic").formats(Checkpoint.open(tiny(tmp_path / "model")).spec)
    with pytest.raises(BadInput, match="--budget"):
        QuantizationRequest(named_recipe("int4-gptq"), budget="0.6")
    with pytest.raises(BadInput, match="--calibration"):
        QuantizationRequest(named_recipe("int4-rtn"), calibration=Path("a.txt"))


def test_the_model_decides_what_the_recipe_leaves_open(tmp_path: Path, tiny: Tiny) -> None:
    """Small models get small blocks, 8 bits for keys, values and the last layers; all for head and embedding."""
    spec = Checkpoint.open(tiny(tmp_path / "model")).spec
    good = named_recipe("int4-good")
    small, large = (good.formats(replace(spec, hidden=hidden)) for hidden in (SMALL_HIDDEN - 64, SMALL_HIDDEN))
    assert (small.matrices.block, large.matrices.block) == (32, 128)
    deep = good.formats(replace(spec, layers=30))
    bits = [deep.of(f"model.layers.{layer}.mlp.up_proj").bits for layer in range(30)]
    assert bits == [4] * 28 + [8] * 2
    assert named_recipe("int4-good", 64).formats(spec).matrices.block == 64
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"):
        assert small.of(name) == INT8 and large.of(name) == large.matrices
    for name in ("lm_head", "model.embed_tokens"):
        assert small.of(name) == large.of(name) == INT8
    assert large.of("model.layers.0.self_attn.q_proj") == replace(INT4, symmetric=False)


def test_every_quality_has_a_recipe_of_its_precision() -> None:
    for quality, found in QUALITIES.items():
        for (precision, role), name in found.items():
            recipe = recipe_of_quality(quality, precision, role)
            assert recipe is RECIPES[name] and recipe.precision == precision
            assert recipe.needs_text is (quality != "fast")
    with pytest.raises(BadInput, match=r"--quality good beside fp32: .*leave it out"):
        recipe_of_quality("good", "fp32", "target")


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("draft", (True, False))
def test_squares_are_the_diagonal_of_x_x(tmp_path: Path, tiny: Tiny, text: Path, tied: bool, draft: bool) -> None:
    """Of every group's input and of the head's; the layer's outputs are those of a plain run."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", role="draft" if draft else "target", tied=tied))
    with torch.inference_mode():
        layers = Layers(checkpoint, rows_of(checkpoint, text)[:2])
        with layers.loaded(0) as layer:
            grams, outputs = layers.grams(layer), list(layers.run(layer))
            squares = layers.advance_with_squares(layer)
        assert squares.keys() == grams.keys()
        for group, gram in grams.items():
            torch.testing.assert_close(squares[group], gram.diagonal(), rtol=1e-4, atol=1e-5)
        for found, wanted in zip(layers.hidden, outputs, strict=True):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(layers.head_squares(), layers.head_gram().diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 2), (4, 4), (4, 1)))
def test_smoothing_changes_no_output_and_evens_the_inputs(
    tmp_path: Path, tiny: Tiny, text: Path, heads: int, kv_heads: int
) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", heads=heads, kv_heads=kv_heads))
    with torch.inference_mode(), TemporaryFile() as file:
        layers, spool = Layers(checkpoint, rows_of(checkpoint, text)), Spool(file)
        with layers.loaded(0) as layer:
            layer.get_parameter("input_layernorm.weight").data[3] *= 30  # a column with large activations
            before, squares = next(layers.run(layer)), {g: x.diagonal().clone() for g, x in layers.grams(layer).items()}
            fold_scales(layer, "model.layers.0", checkpoint.spec, smooth_scale, squares, spool)
            torch.testing.assert_close(next(layers.run(layer)), before, atol=1e-4, rtol=1e-4)
            after = {group: gram.diagonal() for group, gram in layers.grams(layer).items()}
    for group, found in after.items():
        torch.testing.assert_close(squares[group], found, rtol=1e-3, atol=1e-5)  # they follow the scales
    assert after[GROUPS[0]].max() / after[GROUPS[0]].median() < 100


def test_the_work_folder_is_empty_again(tmp_path: Path, tiny: Tiny, text: Path) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model"))
    (tmp_path / "work").mkdir()
    with quantize(
        checkpoint, QuantizationRequest(named_recipe("int4-gptq"), text), tmp_path / "work", silent
    ) as result:
        assert result.prepared is not None
    assert list((tmp_path / "work").iterdir()) == []
