"""GGUF files, read back by the gguf package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import YARN

from pard_onnx.benchmarks.peers.forms import NAMES, PRE_TOKENIZERS, UNUSED, gguf_name, rope_factors, write_gguf
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.errors import BadCheckpoint, BadInput
from pard_onnx.models.families import FAMILIES, shapes

gguf = pytest.importorskip("gguf")
SHAPES = {"hidden": 64, "heads": 4, "head_dim": 16, "intermediate": 96}


def written(folder: Path, form: str, **options: Any) -> Any:
    path = folder.with_suffix(".gguf")
    write_gguf(Checkpoint.open(folder), path, form, **options)  # type: ignore[arg-type]
    return gguf.GGUFReader(path)


def tensors(reader: Any) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize(("form", "error"), (("f32", 0.0), ("q8_0", 0.01), ("q4_0", 0.15)))
@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
def test_tensors_are_the_checkpoints(
    tmp_path: Path, tiny: Callable[..., Path], family: str, form: str, error: float
) -> None:
    folder = tiny(tmp_path / "model", family, **SHAPES)
    found = tensors(written(folder, form))
    checkpoint = Checkpoint.open(folder)
    assert set(found) == {gguf_name(name) for name in checkpoint.tensors}
    for name, entry in checkpoint.tensors.items():
        expected = read_tensor(entry)
        allowed = error * np.abs(expected).max() if expected.ndim > 1 else 0.0
        assert np.abs(found[gguf_name(name)] - expected).max() <= allowed, name


def test_every_tensor_of_every_family_has_a_name(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    for family in PRE_TOKENIZERS:
        spec = Checkpoint.open(tiny(tmp_path / family, family)).spec
        names = [gguf_name(name) for name, _ in shapes(spec)]
        assert len(set(names)) == len(names)
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert len(set(NAMES.values())) == len(NAMES)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PRE_TOKENIZERS)))
def test_other_families_are_refused(tmp_path: Path, tiny: Callable[..., Path], family: str) -> None:
    with pytest.raises(BadInput, match=f"{family} is not written to GGUF here; only qwen2, qwen3, llama are"):
        written(tiny(tmp_path / "model", family), "f32")


def test_yarn_is_refused(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="YaRN is not written to GGUF here"):
        written(tiny(tmp_path / "model", "qwen2", rope=YARN), "f32")


def test_llama_rows_become_rotary_neighbours(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = tiny(tmp_path / "model", "llama", **SHAPES)
    expected = read_tensor(Checkpoint.open(folder).tensors["model.layers.0.self_attn.q_proj.weight"])
    found = tensors(written(folder, "f32"))["blk.0.attn_q.weight"]
    for head in range(4):
        for i in range(8):
            assert np.array_equal(found[16 * head + 2 * i], expected[16 * head + i])
            assert np.array_equal(found[16 * head + 2 * i + 1], expected[16 * head + 8 + i])


def test_a_head_dim_of_its_own_makes_qwen2_a_llama_unless_native(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = tiny(tmp_path / "model", "qwen2", **SHAPES | {"head_dim": 32})
    assert written(folder, "f32").fields["general.architecture"].contents() == "llama"
    assert written(folder, "f32", native=True).fields["general.architecture"].contents() == "qwen2"


def test_tokens_fill_the_padded_vocabulary(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    reader = written(tiny(tmp_path / "model", "qwen2", vocab_rows=320, tokenizer_size=300), "f32")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(types) == 320 == len(set(tokens))
    assert [i for i, kind in enumerate(types) if kind == UNUSED] == list(range(300, 320))
    assert tokens[299] == "<|im_end|>"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 299


def test_llama3_factors_are_transformers(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny import LLAMA3

    folder = tiny(tmp_path / "model", "llama", rope=LLAMA3, **SHAPES)
    spec = Checkpoint.open(folder).spec
    config = transformers.AutoConfig.from_pretrained(folder)
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    plain = spec.rope.theta ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    factors = rope_factors(spec)
    assert factors is not None
    assert np.allclose(plain / factors, scaled, rtol=1e-5)
    assert np.array_equal(tensors(written(folder, "f32"))["rope_freqs.weight"], factors)


def test_other_tokenizers_are_refused(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = tiny(tmp_path / "model", "qwen2")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"byte_fallback":false', '"byte_fallback":true'))
    if '"byte_fallback":true' not in file.read_text():
        file.write_text(file.read_text().replace('"byte_fallback": false', '"byte_fallback": true'))
    with pytest.raises(BadCheckpoint, match="byte-level BPE"):
        write_gguf(Checkpoint.open(folder), tmp_path / "out.gguf", "f32")
