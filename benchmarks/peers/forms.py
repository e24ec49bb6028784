"""The forms of a checkpoint that peers read. They are made when they are first needed and kept in a cache folder.

GGUF files, which llama.cpp and OpenVINO GenAI read, are written here, tensor by tensor, with the gguf package.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.gguf.parts import CONTROL, NORMAL, UNUSED, USER_DEFINED
from pard_onnx.models.checkpoints.tensors import Tensor, read_tensor, row_blocks
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadCheckpoint, BadInput, Failure
from pard_onnx.models.extras import needs
from pard_onnx.models.families import shapes
from pard_onnx.models.json_files import read_json
from pard_onnx.models.manifest import Source
from pard_onnx.models.precision import Precision
from pard_onnx.models.spec import Llama3Scaling, ModelSpec

from .process import events

SILENCE = 3600.0  # seconds; a framework's own export sends no event until it is done


@dataclass(frozen=True, slots=True)
class Converter:
    """What the conversion of a checkpoint needs."""

    cache: Path  # where forms are kept
    worker: Path  # the peer's script
    python: Path  # of the peer's environment
    progress: Progress


def checkpoint(folder: Path, _: str, __: Converter) -> Path:
    """The checkpoint itself."""
    return folder


def artifact(folder: Path, name: str, converter: Converter) -> Path:
    """A folder exported by this package with the role of a target; an autoregressive draft decodes like a target."""
    return _cached(
        converter.cache / f"{cache_name(folder)}-{name}", lambda output: _export(folder, name, output, converter)
    )


def _export(folder: Path, name: str, output: Path, converter: Converter) -> None:
    with needs("export"):
        from pard_onnx.export.exporter import Job, export
    opened = Checkpoint.open(folder).as_role("target")
    export(Job(opened, Source(folder.name), output, cast(Precision, name), verify=False), converter.progress)


def gguf(folder: Path, name: str, converter: Converter) -> Path:
    """A GGUF file, written by `write_gguf`."""
    return _cached(
        converter.cache / f"{cache_name(folder)}-{name}.gguf", lambda output: _gguf(folder, name, output, converter)
    )


def _gguf(folder: Path, name: str, output: Path, converter: Converter, *, native: bool = False) -> None:
    if name not in get_args(GgufFormat):
        raise BadInput(f"GGUF files are not written in {name}")
    opened = Checkpoint.open(folder).as_role("target")  # a PARD-2 draft is autoregressive too, without its projection
    write_gguf(opened, output, cast(GgufFormat, name), native=native, progress=converter.progress)


def openvino(folder: Path, name: str, converter: Converter) -> Path:
    """A folder of OpenVINO's own files, made by OpenVINO GenAI from a GGUF file, which it does not take as a draft."""

    def make(output: Path) -> None:
        output.mkdir()
        _gguf(folder, name, output / "model.gguf", converter, native=True)
        _run_worker({"gguf": str(output / "model.gguf")}, converter)
        (output / "model.gguf").unlink()

    return _cached(converter.cache / f"{cache_name(folder)}-openvino-{name}", make)


def optimum(folder: Path, name: str, converter: Converter) -> Path:
    """A folder exported by optimum, in the peer's environment."""

    def make(output: Path) -> None:
        _run_worker({"checkpoint": str(folder), "output": str(output), "format": name}, converter)

    return _cached(converter.cache / f"{cache_name(folder)}-optimum-{name}", make)


FORMS: dict[str, Callable[[Path, str, Converter], Path]] = {
    "checkpoint": checkpoint,
    "artifact": artifact,
    "gguf": gguf,
    "openvino": openvino,
    "optimum": optimum,
}


def cache_name(folder: Path) -> str:
    """The checkpoint's name, and a digest of the folder and of the sizes and times of its files."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    facts: list[Any] = [str(folder.resolve())]
    facts += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{folder.resolve().name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"


def _cached(place: Path, make: Callable[[Path], None]) -> Path:
    """`place`, which `make` writes if it does not exist: first under another name, so that it is never incomplete."""
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f".{uuid4().hex[:8]}-{place.name}")
    try:
        make(scratch)
        if not place.exists():  # another process may have made it meanwhile
            scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.unlink(missing_ok=True)
    return place


def _run_worker(form: dict[str, str], converter: Converter) -> None:
    """Make a form with the peer's worker, in the peer's environment. Raises Failure with the worker's reason."""
    converter.progress("convert", 0, 1)
    for event in events(converter.python, converter.worker, {"form": form}, SILENCE):
        if event["event"] != "end":
            raise Failure(str(event.get("reason")))
    converter.progress("convert", 1, 1)


GgufFormat = Literal["q4_0", "q8_0", "f32"]
BLOCK = 32  # values that share a scale in Q4_0 and Q8_0
PRE_TOKENIZERS = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}  # llama.cpp's names of split patterns
# The GGUF names of a checkpoint's tensors, without the layer's prefix
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
    """Write a checkpoint as one GGUF file: all matrices in `form`, with head and embedding, the rest in float32.

    native: use the family's own name and order of rows, even if llama.cpp needs others (`architecture`). One packed
    matrix is in memory at a time. Raises BadInput if the gguf package is missing, BadCheckpoint for a tokenizer of a
    kind that is not written here.
    """
    gguf = _library()
    spec = checkpoint.spec
    if spec.family not in PRE_TOKENIZERS or spec.rope.yarn:
        what = "YaRN" if spec.rope.yarn else spec.family
        raise BadInput(f"{checkpoint.path}: {what} is not written to GGUF here; only {', '.join(PRE_TOKENIZERS)} are")
    name = spec.family if native else architecture(spec)
    tokenizer = _tokenizer(checkpoint)
    writer = gguf.GGUFWriter(output, name)
    try:
        _write_facts(writer, spec, form)
        _write_tokenizer(writer, spec, *tokenizer)
        _write_tensors(gguf, writer, checkpoint, GgufLayout(form, spec.head_dim if name == "llama" else 0), progress)
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How tensors are written to a GGUF file."""

    form: GgufFormat
    head_dim: int  # if rotary pairs have to become neighbours, as in llama.cpp's llama; else 0

    def blocks(self, name: str, entry: Tensor) -> list[slice]:
        """Slices of rows that can be read one by one; the whole tensor if its rows are permuted."""
        return [slice(None)] if self._is_permuted(name) else list(row_blocks(entry.shape))

    def read(self, name: str, entry: Tensor, rows: slice) -> NDArray[np.float32]:
        values = read_tensor(entry, rows)
        if not self._is_permuted(name):
            return values
        # A rotary pair is rows i and i + head_dim / 2 in transformers, rows 2i and 2i + 1 in llama.cpp
        pairs = values.reshape(-1, 2, self.head_dim // 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

    def _is_permuted(self, name: str) -> bool:
        return bool(self.head_dim) and name.split(".")[-2] in ("q_proj", "k_proj")


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise BadInput("gguf is not installed; run: pip install gguf") from None
    return gguf


def architecture(spec: ModelSpec) -> str:
    """llama.cpp's name of the model.

    llama.cpp's qwen2 requires hidden size / heads as head_dim. Its llama takes any head_dim, and biases too, but with
    another order of rotary pairs.
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
    """The token and its type for each vocabulary row, and the merges. Padding rows get the type UNUSED."""
    path = checkpoint.tokenizer_folder / "tokenizer.json"
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
    writer.add_add_bos_token(False)  # prompts are given as ids
    eos = vocabulary.eos_ids[0] if vocabulary.eos_ids else 0
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_bos_token_id(vocabulary.bos_id if vocabulary.bos_id is not None else eos)
    if spec.chat_template:
        writer.add_chat_template(spec.chat_template)


def _write_tensors(gguf: Any, writer: Any, checkpoint: Checkpoint, layout: GgufLayout, progress: Progress) -> None:
    """Write the descriptions of all tensors, which the format has first, then their data."""
    factors = rope_factors(checkpoint.spec)
    tensors = {name: checkpoint.tensors[name] for name, _ in shapes(checkpoint.spec)}
    kinds = {name: _kind(gguf, entry, layout.form) for name, entry in tensors.items()}
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, entry in tensors.items():
        shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, kinds[name])
        # The writer takes the shapes of packed tensors in bytes
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.uint8), math.prod(shape), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for done, (name, entry) in enumerate(tensors.items()):
        progress("gguf", done, len(tensors))
        blocks = (layout.read(name, entry, rows) for rows in layout.blocks(name, entry))
        writer.write_tensor_data(np.concatenate([gguf.quants.quantize(block, kinds[name]) for block in blocks]))
    progress("gguf", len(tensors), len(tensors))


def _kind(gguf: Any, entry: Tensor, form: GgufFormat) -> Any:
    matrix = len(entry.shape) > 1 and entry.shape[-1] % BLOCK == 0
    return gguf.GGMLQuantizationType[form.upper() if matrix else "F32"]


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor: `blk.3.ffn_up.weight` for `model.layers.3.mlp.up_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def rope_factors(spec: ModelSpec) -> NDArray[np.float32] | None:
    """The divisor of each rotary frequency by Llama 3's scaling; None without such scaling."""
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
