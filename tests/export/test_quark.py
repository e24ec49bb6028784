"""`--device npu-oga`: the written folder against level-by-level packing, this package's own reader and the floats."""

import json
import subprocess
import sys
from pathlib import Path

import gguf_files
import numpy as np
import onnx
import pytest
import quantized
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors import safe_open
from tiny import LLAMA3

from pard_onnx.export import quark, quark_layout, shards
from pard_onnx.export.output import QUARK_RECORD
from pard_onnx.export.quark import QuarkJob, export_quark
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Source
from pard_onnx.quantize.packing.imported import imported_matrices
from pard_onnx.quantize.packing.pack import PackedRows, pack, pack_levels, unpack
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import INT4_ZERO, named_recipe

WIDTHS = {"hidden": 128, "heads": 4, "head_dim": 32, "kv_heads": 2, "intermediate": 256}
RTN = QuantizationRequest(named_recipe("int4-rtn-asym"))


def export(folder: Path, output: Path, order: QuantizationRequest | None = RTN, **changes) -> quark.QuarkExport:
    return export_quark(QuarkJob(Checkpoint.open(folder), Source("model"), output, order, **changes))


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """The matrices that this package's reader finds in a quantized folder."""
    checkpoint = Checkpoint.open(folder)
    imported = imported_matrices(checkpoint)
    return {name: imported.dequantized(name, slice(0, held.shape[0])) for name, held in checkpoint.packed.items()}


def refused(folder: Path, output: Path, order: QuantizationRequest | None = RTN) -> str:
    with pytest.raises(BadInput) as error:
        export(folder, output, order)
    assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == [folder.name]  # nothing half-written
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen2", True), ("qwen3", False), ("mistral", False), ("smollm3", True), ("gemma3_text", True)],
)
def test_every_matrix_is_the_rounded_one_and_floats_are_the_checkpoints(tmp_path, tiny, family, tied, dtype):
    folder = tiny(tmp_path / "model", family, tied=tied, dtype=dtype, vocab_rows=323, **WIDTHS)
    done = export(folder, tmp_path / "out")
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    found = dequantized(tmp_path / "out")
    assert done.matrices == len(found) == 7 * before.spec.layers + 1
    assert not after.spec.tied
    for name, values in found.items():
        stored = "model.embed_tokens.weight" if name == "lm_head" and tied else f"{name}.weight"
        packed = pack(read_tensor(before.tensors[stored]), INT4_ZERO)
        if dtype == "float32":  # whose scales are in half precision already
            np.testing.assert_array_equal(values, unpack(packed, INT4_ZERO))
        else:  # bfloat16 rounds a scale by 2 ** -9 at most
            np.testing.assert_allclose(values, unpack(packed, INT4_ZERO), rtol=2**-8, atol=0)
    for name, tensor in after.tensors.items():
        kept = read_tensor(before.tensors[name])
        wanted = kept if dtype == "bfloat16" else kept.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(read_tensor(tensor), wanted)
    assert 0 < done.error < 0.2


def test_words_are_those_of_quark_packed_level_by_level(tmp_path, tiny):
    folder = tiny(tmp_path / "model", "llama", vocab_rows=323, layers=1, **WIDTHS)
    export(folder, tmp_path / "out")
    before = Checkpoint.open(folder)
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name in ("model.layers.0.self_attn.k_proj", "lm_head"):
            packed = pack(read_tensor(before.tensors[f"{name}.weight"]), INT4_ZERO)
            nibble = np.stack([packed.weight & 15, packed.weight >> 4], -1).reshape(len(packed.weight), -1)
            zero = np.stack([packed.zero_point & 15, packed.zero_point >> 4], -1).reshape(len(packed.weight), -1)
            zeros = zero[:, : packed.scale.shape[1]].astype(np.int64)
            truth = quantized.Truth(4, nibble.astype(np.int64), zeros, packed.scale.astype(np.float16), np.zeros(0))
            for end, wanted in quantized.quark(truth).items():
                np.testing.assert_array_equal(file.get_tensor(f"{name}.{end}"), wanted)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_positive_scales_mean_the_same_weights(rows, groups, seed, with_zeros):
    random = np.random.default_rng(seed)
    levels = random.integers(0, 16, (rows, groups * 128), dtype=np.uint8)
    zeros = random.integers(0, 16, (rows, groups), dtype=np.uint8) if with_zeros else None
    scale = (random.choice([-1, 1], (rows, groups)) * 2.0 ** random.integers(-30, 9, (rows, groups))).astype(np.float32)
    fmt = named_recipe("int4-rtn-asym").format
    packed = pack_levels(levels, scale, zeros, fmt)
    got, zero, size = quark_layout.quark_levels("m", packed)
    assert (size > 0).all() and (got < 16).all() and (zero < 16).all()
    values = (got.reshape(rows, groups, 128).astype(np.float32) - zero[..., None]) * size[..., None]
    wanted = unpack(packed, fmt).reshape(rows, groups, 128)
    tiny = np.abs(scale) < 2.0**-24
    np.testing.assert_array_equal(values[~tiny], wanted[~tiny])
    assert not values[tiny].any()
    words = quark_layout.words_of(got)
    assert words.shape == (groups * 128, -(-rows // 8))
    unpacked = np.stack([words >> np.uint32(4 * quark_layout.ORDER.index(place)) & 15 for place in range(8)], -1)
    np.testing.assert_array_equal(unpacked.reshape(len(words), -1)[:, :rows].T, got)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("awq", {}),
        ("gptq", {"symmetric": True}),
        pytest.param("gptq_v2", {}, marks=pytest.mark.slow),
        ("compressed-tensors", {}),
        ("compressed-tensors", {"group": -1}),
        ("quark", {}),
        pytest.param("quark in order", {}, marks=pytest.mark.slow),
        ("quark int4", {}),
        ("auto-round", {"quantized_head": True}),
    ],
)
def test_integers_of_quantized_checkpoints_are_kept(tmp_path, layout, options):
    settings = {"group": 128, "layers": 1} | options
    folder, truth = quantized.write(tmp_path / "model", layout, family="llama", **settings, **WIDTHS)
    done = export(folder, tmp_path / "out", None)
    assert done.error == 0
    found = dequantized(tmp_path / "out")
    assert set(found) == set(truth)
    for name, values in found.items():
        np.testing.assert_array_equal(values, truth[name].floats)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quark"
    assert config["exclude"] == ([] if "lm_head" in truth else ["lm_head"])
    # What was written is itself a checkpoint in the layout: exporting it again changes nothing
    export(tmp_path / "out", tmp_path / "again", None)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_a_gguf_file_is_read_as_floats(tmp_path, tiny, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    floats = tiny(tmp_path / "tiny", "llama", layers=1, vocab_rows=300, **WIDTHS)
    truth = gguf_files.write(tmp_path / "model.gguf", floats, kind)
    assert main(["model.gguf", "--device", "npu-oga", "--quality", "fast", "--output", "out"]) == 0, capsys.readouterr()
    before, found = Checkpoint.open(truth), dequantized(tmp_path / "out")
    assert len(found) == 8
    for name, values in found.items():
        packed = pack(read_tensor(before.tensors[f"{name}.weight"]), INT4_ZERO)
        np.testing.assert_array_equal(values, unpack(packed, INT4_ZERO))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rope_theta"] == 10000.0
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("layout", "options", "reason"),
    [
        ("gptq", {"group": 32}, "int4-b32"),
        ("gptq", {"group": 128, "bits": 8}, "int8-b128"),
        ("gptq", {"group": 64, "sorted_columns": True}, "act-order"),
    ],
)
def test_integers_of_another_form_are_refused(tmp_path, layout, options, reason):
    folder, _ = quantized.write(tmp_path / "model", layout, family="llama", layers=1, **options, **WIDTHS)
    message = refused(folder, tmp_path / "out", None)
    assert reason in message and "model.layers.0." in message and "name the checkpoint in floats" in message


def test_widths_drafts_and_recipes_that_do_not_fit_are_refused(tmp_path, tiny):
    folder = tiny(tmp_path / "model", "llama", **WIDTHS | {"intermediate": 192})
    assert "model.layers.0.mlp.down_proj has 192 columns" in refused(folder, tmp_path / "out")
    folder = tiny(tmp_path / "model", "llama", **WIDTHS | {"head_dim": 16})
    assert "self_attn.o_proj has 64 columns" in refused(folder, tmp_path / "out")
    folder = tiny(tmp_path / "model", "qwen2", "draft", **WIDTHS)
    assert "is a draft" in refused(folder, tmp_path / "out")
    folder = tiny(tmp_path / "model", "llama", **WIDTHS)
    for recipe in ("int4-rtn", "int4-good", "int8-rtn"):
        refused(folder, tmp_path / "out", QuantizationRequest(named_recipe(recipe)))


def test_values_that_float16_cannot_hold_are_refused(tmp_path, tiny, monkeypatch):
    folder = tiny(tmp_path / "model", "llama", std=1e5, **WIDTHS)
    assert "float16" in refused(folder, tmp_path / "out")
    with pytest.raises(BadInput, match=r"m has weights of 7.86e.06, too large"):
        quark_layout.quark_levels("m", PackedRows(np.zeros((1, 1, 64), np.uint8), np.full((1, 1), 2.0**19, np.float32)))


def test_shards_hold_the_same_tensors(tmp_path, tiny, monkeypatch):
    folder = tiny(tmp_path / "model", "llama", **WIDTHS)
    export(folder, tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    export(folder, tmp_path / "several")
    names = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(names) > 2 and names[0].endswith(f"-of-{len(names):05}.safetensors")
    one, several = dequantized(tmp_path / "one"), dequantized(tmp_path / "several")
    assert one.keys() == several.keys() and all((one[name] == several[name]).all() for name in one)
    export(folder, tmp_path / "several", force=True)  # its own files may be replaced


def test_rotary_rules_are_in_the_form_that_older_transformers_read(tmp_path, tiny):
    folder = tiny(tmp_path / "model", "llama", rope=LLAMA3, **WIDTHS)
    export(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_parameters" not in config
    assert Checkpoint.open(tmp_path / "out").spec.rope == Checkpoint.open(folder).spec.rope


def test_an_export_is_replaced_with_force_and_nothing_else_is(tmp_path, tiny):
    folder = tiny(tmp_path / "model", "llama", layers=1, **WIDTHS)
    export(folder, tmp_path / "out")
    with pytest.raises(BadInput, match="exists already; choose another --output, or --force"):
        export(folder, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("")
    with pytest.raises(BadInput, match=r"stale\.txt"):
        export(folder, tmp_path / "out", force=True)
    (tmp_path / "out" / "stale.txt").unlink()
    export(folder, tmp_path / "out", force=True)
    # A checkpoint that others have written has no record, even in the same layout
    (tmp_path / "out" / QUARK_RECORD).unlink()
    with pytest.raises(BadInput, match="is not an export's"):
        export(folder, tmp_path / "out", force=True)


def test_the_command_writes_and_says_what_it_wrote(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "model", "llama", layers=1, **WIDTHS)
    assert main(["model", "--device", "npu-oga", "--quality", "fast", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == "model-npu-oga-int4" and said["matrices"] == 8 and said["recipe"] == "int4-rtn-asym"
    assert (tmp_path / said["output"] / QUARK_RECORD).exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--opset", "17"], "--opset 17 with --device npu-oga"),
        (["--static"], "--static with"),
        (["--no-verify"], "--no-verify with"),
        (["--kv-cache", "int8"], "--kv-cache int8 with"),
        (["--features=-1"], "--features -1 with"),
        (["--precision", "int8"], "it has int4 only"),
        (["--recipe", "int4-gptq"], "recipe int4-gptq with"),
        (["--recipe", "int4-rtn-asym", "--block-size", "32"], "blocks of 128"),
        (["--recipe", "int4-rtn-asym", "--quality", "fast"], "leave one of them out"),
        (["--quality", "fast", "--calibration", "x.txt"], "looks at no text"),
    ],
)
def test_options_that_mean_nothing_there_are_refused(tmp_path, tiny, capsys, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "model", "llama", layers=1, **WIDTHS)
    assert main(["model", "--device", "npu-oga", *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and reason in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_commands_name_pard_export(capsys, tmp_path, tiny):
    from pard_onnx.quantize_command import main as quantize_main

    folder = tiny(tmp_path / "model", "llama", layers=1, **WIDTHS)
    assert quantize_main([str(folder), "--quality", "fast", "--device", "npu-oga"]) == 2
    assert "only pard-export writes" in capsys.readouterr().err


def test_awq_gives_the_same_model_in_fewer_bits(tmp_path, tiny, text):
    """Norms and matrices are scaled against one another, so products of both are near the checkpoint's."""
    folder = tiny(tmp_path / "model", "llama", layers=1, **WIDTHS)
    done = export(folder, tmp_path / "out", QuantizationRequest(named_recipe("int4-awq-asym"), text))
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    found, norm, matrix = dequantized(tmp_path / "out"), "model.layers.0.input_layernorm", "self_attn.q_proj"
    weights, norms = (
        (read_tensor(before.tensors[f"model.layers.0.{matrix}.weight"]), found[f"model.layers.0.{matrix}"]),
        [read_tensor(model.tensors[f"{norm}.weight"]) for model in (before, after)],
    )
    assert not np.allclose(*norms, rtol=1e-2)  # they were scaled
    one, other = weights[0] * norms[0], weights[1] * norms[1]
    assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(one)
    assert done.quantization.calibration.name == text.name


@pytest.mark.slow  # the builder imports torch and transformers, and runs for half a minute
@pytest.mark.parametrize(("family", "tied", "dtype"), [("llama", False, "float32"), ("qwen2", True, "bfloat16")])
def test_the_model_builder_of_onnxruntime_genai_reads_the_same_weights(tmp_path, tiny, family, tied, dtype):
    """It is the first step of AMD's model_generate; what it writes is an OGA folder, which is run here on the CPU."""
    genai = pytest.importorskip("onnxruntime_genai")
    folder = tiny(tmp_path / "model", family, layers=1, tied=tied, dtype=dtype, vocab_rows=323, **WIDTHS)
    export(folder, tmp_path / "out")
    command = "-m onnxruntime_genai.models.builder -m model -i out -o oga -p int4 -e cpu -c cache"
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True)
    graph = onnx.load(tmp_path / "oga" / "model.onnx").graph
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    imported = imported_matrices(Checkpoint.open(tmp_path / "out"))
    layer = "model.layers.0"
    joined = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    for name, parts in {
        f"{layer}.attn.qkv_proj": joined,
        f"{layer}.attn.o_proj": [f"{layer}.self_attn.o_proj"],
        f"{layer}.mlp.down_proj": [f"{layer}.mlp.down_proj"],
        "lm_head": ["lm_head"],
    }.items():
        rows = [imported.rows(part, slice(0, imported.checkpoint.packed[part].shape[0])) for part in parts]
        for end, attribute in (("qweight", "weight"), ("scales", "scale"), ("qzeros", "zero_point")):
            wanted = np.concatenate([getattr(part, attribute) for part in rows])
            np.testing.assert_array_equal(held[f"{name}.MatMulNBits.{end}"].reshape(wanted.shape), wanted)
    model = genai.Model(str(tmp_path / "oga"))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=12)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([5, 17, 250, 3], np.int32))
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 5
