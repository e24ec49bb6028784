"""Checkpoint folders: what is read from them, and each way in which they can be unfit."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import LLAMA3, QK_NORM, QKV_BIAS, STORED, edit_json, save_json, save_safetensors, weights

from pard_onnx.models.checkpoints.checkpoint import Checkpoint, read_tensor, require_finite
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import FAMILIES, shapes
from pard_onnx.models.spec import Llama3Scaling, Pard, Rope

LLAMA3_ROPE = Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
OLD_LLAMA3 = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.fixture
def folder(tiny, tmp_path):
    return tiny(tmp_path / "ein Modell, größer")


def refusal(folder):
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value).replace(str(folder), "FOLDER")


# --- what is read


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tiny, tmp_path, family):
    checkpoint = Checkpoint.open(tiny(tmp_path, family, head_dim=32))
    spec = checkpoint.spec
    facts = (spec.family, spec.layers, spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim)
    assert (family, 2, 64, 96, 4, 2, 32) == facts
    assert (family in QKV_BIAS, family in QK_NORM) == (spec.qkv_bias, spec.qk_norm)
    assert (spec.tied, spec.max_positions, spec.norm_eps, spec.dtype) == (False, 512, 1e-6, "float32")
    assert (
        spec.vocabulary.rows,
        spec.vocabulary.size,
        spec.vocabulary.eos_ids,
        spec.vocabulary.bos_id,
    ) == (320, 300, (299,), None)
    tensors = weights(json.loads((tmp_path / "config.json").read_text()))
    assert {name: array.shape for name, array in tensors.items()} == dict(shapes(spec))
    assert set(tensors) == set(checkpoint.tensors)


def test_defaults_are_those_of_transformers(folder, tiny, tmp_path):
    edit_json(folder / "config.json", head_dim=..., num_key_value_heads=2, tie_word_embeddings=..., rope_parameters=...)
    spec = Checkpoint.open(folder).spec
    assert (16, False, Rope(10000.0)) == (spec.head_dim, spec.tied, spec.rope)
    qwen3 = tiny(tmp_path / "qwen3", "qwen3", head_dim=128)
    edit_json(qwen3 / "config.json", head_dim=...)
    assert Checkpoint.open(qwen3).spec.head_dim == 128
    llama = tiny(tmp_path / "llama", "llama")
    edit_json(llama / "config.json", eos_token_id=..., bos_token_id=...)
    (llama / "generation_config.json").unlink()
    vocabulary = Checkpoint.open(llama).spec.vocabulary
    assert (vocabulary.eos_ids, vocabulary.bos_id) == ((2,), 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": LLAMA3}, LLAMA3_ROPE),
        ({"rope_parameters": ..., "rope_theta": 500000, "rope_scaling": LLAMA3}, LLAMA3_ROPE),
        ({"rope_parameters": ..., "rope_theta": 500000.0, "rope_scaling": OLD_LLAMA3}, LLAMA3_ROPE),
        ({"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": None}, Rope(1e6)),
        ({"rope_parameters": {"rope_theta": 1e6}}, Rope(1e6)),
    ],
)
def test_rope(folder, changes, expected):
    edit_json(folder / "config.json", **changes)
    assert expected == Checkpoint.open(folder).spec.rope


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 7, 5]}, 9, (5, 7)),
        ({"eos_token_id": 5}, 9, (5,)),
        ({}, [9, 8], (9, 8)),
        (None, 9, (9,)),
        ({}, None, ()),
    ],
)
def test_eos(folder, generation, config, expected):
    edit_json(folder / "config.json", eos_token_id=config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        save_json(folder / "generation_config.json", generation)
    assert expected == Checkpoint.open(folder).spec.vocabulary.eos_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
    ],
)
def test_sliding_window_that_is_off(folder, changes):
    edit_json(folder / "config.json", **changes)
    Checkpoint.open(folder)


def test_dtype_of_older_configs_and_of_none(tiny, tmp_path):
    folder = tiny(tmp_path, dtype="bfloat16")
    edit_json(folder / "config.json", dtype=..., torch_dtype="float16")
    assert Checkpoint.open(folder).spec.dtype == "float16"
    edit_json(folder / "config.json", torch_dtype=...)
    assert Checkpoint.open(folder).spec.dtype == "bfloat16"


def test_chat_templates(folder):
    tokenizer = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for value, expected in ((named, "D"), (named[:1], None), ("S", "S"), (..., None)):
        edit_json(tokenizer, chat_template=value)
        assert expected == Checkpoint.open(folder).spec.chat_template
    (folder / "chat_template.jinja").write_text("{{ 'né' }}", encoding="utf-8")
    assert Checkpoint.open(folder).spec.chat_template == "{{ 'né' }}"
    tokenizer.unlink()
    assert Checkpoint.open(folder).spec.chat_template == "{{ 'né' }}"


def test_tokenizer_size_counts_added_tokens(folder):
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    value["added_tokens"].append(value["added_tokens"][0] | {"id": 310, "content": "<extra>"})
    save_json(folder / "tokenizer.json", value)
    assert Checkpoint.open(folder).spec.vocabulary.size == 311
    value["added_tokens"] = []
    save_json(folder / "tokenizer.json", value)
    edit_json(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    edit_json(folder / "generation_config.json", eos_token_id=0)
    assert Checkpoint.open(folder).spec.vocabulary.size == 297


@pytest.mark.parametrize("key", ["pard_token", "mask_token_id", "ptd_token_id"])
def test_drafts(folder, key):
    edit_json(folder / "config.json", **{key: 300})
    checkpoint = Checkpoint.open(folder)
    assert (Pard(300), "draft") == (checkpoint.spec.pard, checkpoint.spec.role)
    assert checkpoint == checkpoint.as_role("auto") == checkpoint.as_role("draft")
    target = checkpoint.as_role("target")
    assert (replace(checkpoint.spec, pard=None), "target") == (target.spec, target.spec.role)
    assert checkpoint.tensors == target.tensors


def test_a_target_is_no_draft(folder):
    checkpoint = Checkpoint.open(folder)
    assert checkpoint == checkpoint.as_role("auto") == checkpoint.as_role("target")
    with pytest.raises(BadCheckpoint, match=r"config\.json: a draft without a mask id.*pard_token"):
        checkpoint.as_role("draft")


def test_pard2_without_its_target(tiny, tmp_path):
    folder = tiny(tmp_path, role="draft", pard2=True)
    assert Checkpoint.open(folder).spec.pard == Pard(300)
    (folder / "warp_model.bin").write_bytes(b"")
    assert "warp_model.bin: is not a file of tensors that is read here: it is no zip archive" in refusal(folder)
    (folder / "warp_model.bin").unlink()
    edit_json(folder / "config.json", pard2_target_dim=64)
    assert "pard2_target_dim is there, but neither warp_model.bin" in refusal(folder)


def test_shards_and_leftovers(tiny, tmp_path):
    folder = tiny(tmp_path, "llama", tied=True, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    index = folder / "model.safetensors.index.json"
    tensors = {name: read_tensor(e) for name, e in Checkpoint.open(folder).tensors.items() if e.file == shard}
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)}
    save_safetensors(shard, tensors | extra)
    names = json.loads(index.read_text())["weight_map"] | dict.fromkeys(extra, shard.name)
    edit_json(index, weight_map=names)
    checkpoint = Checkpoint.open(folder)
    assert not set(extra) & set(checkpoint.tensors)
    assert {path.name for path in folder.glob("*.safetensors")} == {e.file.name for e in checkpoint.tensors.values()}


@pytest.mark.parametrize("dtype", STORED)
def test_reading_tensors(tiny, tmp_path, dtype):
    checkpoint = Checkpoint.open(tiny(tmp_path, dtype=dtype, shards=2))
    config = json.loads((tmp_path / "config.json").read_text())
    step = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for name, expected in weights(config).items():
        found = read_tensor(checkpoint.tensors[name])
        assert (np.float32, expected.shape) == (found.dtype, found.shape)
        np.testing.assert_allclose(found, expected, rtol=step, atol=1e-7)
        for rows in (slice(3, 9), slice(None, 5), slice(-2, None), slice(4, 4)):
            np.testing.assert_array_equal(found[rows], read_tensor(checkpoint.tensors[name], rows))
    with pytest.raises(ValueError, match="step 2"):
        read_tensor(checkpoint.tensors[name], slice(0, 4, 2))


def test_a_file_cut_after_opening(folder):
    entry = Checkpoint.open(folder).tensors["lm_head.weight"]
    with entry.file.open("r+b") as stream:
        stream.truncate(entry.offset + 8)
    with pytest.raises(BadCheckpoint, match="ends within a tensor"):
        read_tensor(entry)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_require_finite(value):
    array = np.ones((3, 4), np.float32)
    require_finite("a", array)
    array[1, 2] = value
    with pytest.raises(BadCheckpoint, match=r"tensor lm_head\.weight holds values that are not finite"):
        require_finite("lm_head.weight", array)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; supported families: llama, qwen2, qwen3"),
        ({"model_type": ...}, "model_type is None; supported families"),
        ({"model_type": ["llama"]}, "model_type is ['llama']; supported families"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is true; llama checkpoints"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is true; llama checkpoints"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true; qwen3 checkpoints"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method is None; supported: awq, gptq"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window is 64; only full"),
        ({"sliding_window": 64, "use_sliding_window": True}, "sliding_window is 64; only full"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'; only full"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_parameters.rope_type is 'dynamic'; supported:",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type is 'linear'; supported:"),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number, at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number, at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4 heads"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even one"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"dtype": "float64"}, "dtype is 'float64'; supported: float32, float16, bfloat16"),
        ({"vocab_size": 296, "eos_token_id": 0}, "vocab_size is 296, but the tokenizer has 300 ids"),
        ({"bos_token_id": 320}, "bos_token_id is 320, outside the vocabulary of 320 rows"),
        ({"spd_type": "pard"}, "spd_type is 'pard' but the draft has no mask id; add pard_token"),
        ({"spd_type": "eagle"}, "spd_type is 'eagle'; only 'pard' and 'pard2' are supported"),
        ({"pard_token": 320}, "pard_token is 320, outside the vocabulary of 320 rows"),
        ({"pard_token": -1}, "pard_token is -1, outside the vocabulary of 320 rows"),
        ({"pard_token": "<mask>"}, "pard_token holds '<mask>'; it must be a token id"),
        ({"pard_token": 300, "mask_token_id": 301}, "pard_token and mask_token_id disagree: [300, 301]"),
    ],
)
def test_configs(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    assert f"FOLDER/config.json: {message}" in refusal(folder).replace("\\", "/")


@pytest.mark.parametrize("value", [320, [320, 321], "<|im_end|>", True])
def test_eos_outside_the_vocabulary(folder, value):
    edit_json(folder / "generation_config.json", eos_token_id=value)
    assert "generation_config.json: eos_token_id" in refusal(folder)


def test_eos_outside_the_vocabulary_beside_one_inside(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[320, 299, 10**30, 299])
    assert Checkpoint.open(folder).spec.vocabulary.eos_ids == (299,)


def test_no_folder(tmp_path):
    assert "FOLDER: no such folder" in refusal(tmp_path / "absent")


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "FOLDER: no config.json" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b"[" * 100_000])
def test_config_that_is_no_json(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json: not valid JSON" in refusal(folder)


def test_config_that_is_no_object(folder):
    (folder / "config.json").write_text("[]")
    assert "config.json: holds a JSON list, not an object" in refusal(folder)


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert "FOLDER: no tokenizer.json" in refusal(folder)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"model": {"vocab": {}}},
        {"model": 5},
    ],
)
def test_tokenizer_without_a_vocabulary(folder, value):
    save_json(folder / "tokenizer.json", value)
    assert "tokenizer.json: not a tokenizer" in refusal(folder)


@pytest.mark.parametrize("value", ["b", float("inf"), -1, 2**32, True])
def test_tokens_without_an_id(folder, value):
    save_json(folder / "tokenizer.json", {"model": {"vocab": {"a": value}}})
    assert "tokenizer.json: the id of the token 'a' is" in refusal(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "FOLDER: no weights" in refusal(folder)


def test_pickles_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = refusal(folder)
    assert "pytorch_model.bin" in text
    assert "never loaded" in text
    assert "convert them to safetensors" in text


def test_truncated_weights(folder):
    entry = Checkpoint.open(folder).tensors["model.layers.1.mlp.gate_proj.weight"]
    with entry.file.open("r+b") as stream:
        stream.truncate(entry.offset + entry.nbytes - 1)
    assert (
        f"model.safetensors: truncated: tensor model.layers.1.mlp.gate_proj.weight ends at byte "
        f"{entry.offset + entry.nbytes} but the file has {entry.offset + entry.nbytes - 1}"
    ) in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, (200).to_bytes(8, "little") + b"{}"])
def test_weights_without_a_header(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors: truncated or not safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        "[1]",
        "{{{}",
        '{"a": {}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_broken_headers(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    assert "model.safetensors: not a safetensors file (broken header)" in refusal(folder)


def test_absent_shards_are_named(tiny, tmp_path):
    folder = tiny(tmp_path, shards=3)
    for shard in (1, 3):
        (folder / f"model-0000{shard}-of-00003.safetensors").unlink()
    text = refusal(folder)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors; download them" in text


def test_index_that_names_what_a_shard_has_not(tiny, tmp_path):
    folder = tiny(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=names | {"ghost": "model-00001-of-00002.safetensors"})
    assert "model-00001-of-00002.safetensors: has no tensor ghost" in refusal(folder)
    edit_json(index, weight_map=names | {"ghost": "../elsewhere.safetensors"})
    assert "'../elsewhere.safetensors' is not the name of a file beside it" in refusal(folder)
    edit_json(index, weight_map=...)
    assert "no weight_map" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_missing_and_misshapen_tensors(tiny, tmp_path, family, name):
    folder = tiny(tmp_path, family)
    tensors = weights(json.loads((folder / "config.json").read_text()))
    array = tensors.pop(name)
    save_safetensors(folder / "model.safetensors", tensors)
    assert f"FOLDER: no tensor {name} in its safetensors; a {family} checkpoint needs it" in refusal(folder)
    save_safetensors(folder / "model.safetensors", tensors | {name: array[1:]})
    found, expected = [array.shape[0] - 1, *array.shape[1:]], list(array.shape)
    assert f"model.safetensors: tensor {name} is {found}; config.json says {expected}" in refusal(folder)


def test_quantized_tensors(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'{"dtype": "F32"', b'{"dtype": "I32"'))
    assert "is stored as I32; supported: F32, F16, BF16 (export the unquantized" in refusal(folder)


@pytest.mark.parametrize("spoiled", [{"type": "Nope"}, {"merges": [["zz", "yy"]]}])
def test_tokenizer_that_the_library_refuses(folder, spoiled):
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    value["model"] |= spoiled
    save_json(folder / "tokenizer.json", value)
    assert "tokenizer.json: the tokenizers library cannot read it" in refusal(folder)


def test_tokenizer_config_is_read_beside_a_template_file(folder):
    (folder / "chat_template.jinja").write_text("T")
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json: holds a JSON list" in refusal(folder)


def test_layers_beyond_number(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**15)
    assert "num_hidden_layers is 1000000000000000; it must be at most 65536" in refusal(folder)


@pytest.mark.parametrize("name", ["s" * 300, "\ud800", "a\0b"])
def test_shard_names_that_no_file_can_have(folder, name):
    (folder / "model.safetensors").unlink()
    save_json(folder / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": name}})
    assert "is not the name of a file beside it" in refusal(folder)


@pytest.mark.parametrize("fact", [{"shape": [math.inf, 1]}, {"data_offsets": [0, math.inf]}])
def test_infinite_sizes_in_a_header(folder, fact):
    header = {"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fact}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    assert "broken header" in refusal(folder)
