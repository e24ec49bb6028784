"""A checkpoint as one GGUF file, tensor by tensor: what llama.cpp and OpenVINO GenAI read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import Tensor, read_tensor, row_blocks
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadCheckpoint, BadInput
from pard_onnx.models.json_files import read_json
from pard_onnx.models.spec import Llama3Scaling, ModelSpec

GgufFormat = Literal["q4_0", "q8_0", "f32"]
BLOCK = 32  # values that share a scale in Q4_0 and Q8_0
PRE_TOKENIZERS = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}  # llama.cpp's names of the split patterns
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
# Checkpoint name to GGUF name, the layer's prefix apart
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    checkpoint: Checkpoint,
    output: Path,
    form: GgufFormat,
    *,
    native: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write `output`; matrices in `form`, head and embedding too, everything else float32.

    native: under the family's own name and in its own order even where llama.cpp wants another (`architecture`).
    Holds one packed matrix at a time. Raises BadInput where the gguf package is missing, BadCheckpoint where
    the tokenizer has no GGUF form here.
    """
    gguf = _library()
    spec = checkpoint.spec
    name = spec.family if native else architecture(spec)
    tokenizer = _tokenizer(checkpoint)
    writer = gguf.GGUFWriter(output, name)
    try:
        _write_facts(writer, spec, form)
        _write_tokenizer(writer, spec, *tokenizer)
        _write_tensors(gguf, writer, checkpoint, Plan(form, spec.head_dim if name == "llama" else 0), progress)
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class Plan:
    """pairs: the head_dim where rotary pairs become neighbours, as llama.cpp's llama wants them; else 0."""

    form: GgufFormat
    pairs: int

    def blocks(self, name: str, entry: Tensor) -> list[slice]:
        """Slices of rows that can be read one by one; the whole tensor where rows change places."""
        return [slice(None)] if self._paired(name) else list(row_blocks(entry.shape))

    def read(self, name: str, entry: Tensor, rows: slice) -> NDArray[np.float32]:
        found = read_tensor(entry, rows)
        if not self._paired(name):
            return found
        # transformers turns row i with i + head_dim / 2, llama.cpp 2i with 2i + 1
        halves = found.reshape(-1, 2, self.pairs // 2, *found.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(found.shape)

    def _paired(self, name: str) -> bool:
        return bool(self.pairs) and name.split(".")[-2] in ("q_proj", "k_proj")


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise BadInput("gguf is not installed; run: pip install gguf") from None
    return gguf


def architecture(spec: ModelSpec) -> str:
    """llama.cpp's name of the model.

    Its qwen2 has no head_dim of its own; its llama has, takes biases too, and differs in the order of rotary pairs.
    """
    plain = spec.heads * spec.head_dim == spec.hidden
    return "llama" if spec.family == "qwen2" and not plain else spec.family


def _write_facts(writer: Any, spec: ModelSpec, form: GgufFormat) -> None:
    writer.add_name("checkpoint")
    writer.add_file_type({"f32": 0, "q4_0": 2, "q8_0": 7}[form])  # llama.cpp's numbers
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocabulary.rows)


def _tokenizer(checkpoint: Checkpoint) -> tuple[list[str], list[int], list[str]]:
    """Tokens and their types, one a vocabulary row, and merges. Padding rows are marked unused."""
    path = checkpoint.folder / "tokenizer.json"
    value = read_json(path, BadCheckpoint)
    model = value["model"]
    if model.get("type") != "BPE" or "merges" not in model or model.get("byte_fallback"):
        raise BadCheckpoint(f"{path}: is no byte-level BPE tokenizer, the only kind that is written to GGUF here")
    rows = checkpoint.spec.vocabulary.rows
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in value.get("added_tokens") or ():
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens, types, merges


def _write_tokenizer(writer: Any, spec: ModelSpec, tokens: list[str], types: list[int], merges: list[str]) -> None:
    vocabulary = spec.vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[spec.family])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)  # prompts come as ids
    eos = vocabulary.eos_ids[0] if vocabulary.eos_ids else 0
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_bos_token_id(vocabulary.bos_id if vocabulary.bos_id is not None else eos)
    if spec.chat_template:
        writer.add_chat_template(spec.chat_template)


def _write_tensors(gguf: Any, writer: Any, checkpoint: Checkpoint, plan: Plan, progress: Progress) -> None:
    """All infos, which the format wants first, then the data."""
    factors = rope_factors(checkpoint.spec)
    kinds = {name: _kind(gguf, entry, plan.form) for name, entry in checkpoint.tensors.items()}
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, entry in checkpoint.tensors.items():
        shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, kinds[name])
        # The writer takes the shape of packed tensors in bytes
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.uint8), math.prod(shape), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for done, (name, entry) in enumerate(checkpoint.tensors.items()):
        progress("gguf", done, len(checkpoint.tensors))
        blocks = (plan.read(name, entry, rows) for rows in plan.blocks(name, entry))
        writer.write_tensor_data(np.concatenate([gguf.quants.quantize(block, kinds[name]) for block in blocks]))
    progress("gguf", len(checkpoint.tensors), len(checkpoint.tensors))


def _kind(gguf: Any, entry: Tensor, form: GgufFormat) -> Any:
    matrix = len(entry.shape) > 1 and entry.shape[-1] % BLOCK == 0
    return gguf.GGMLQuantizationType[form.upper() if matrix else "F32"]


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def rope_factors(spec: ModelSpec) -> NDArray[np.float32] | None:
    """What Llama 3's scaling divides each rotary frequency by; None without it."""
    scaling = spec.rope.llama3
    if scaling is None:
        return None
    frequencies = spec.rope.theta ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    return np.array([_rope_factor(scaling, 2 * math.pi / f) for f in frequencies], np.float32)


def _rope_factor(scaling: Llama3Scaling, wavelength: float) -> float:
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return scaling.factor
    smooth = (original / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / scaling.factor + smooth)
