"""`Checkpoint`: a Hugging Face folder or a GGUF file whose config, tokenizer and tensors have been checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import Family, shapes
from pard_onnx.models.spec import ModelSpec, Vocabulary

from . import config as configs
from .config import MASK_KEYS, Config
from .gguf.checkpoint import GGUF, GgufCheckpoint
from .gguf.types import GgufMatrix
from .layer_attention import attention_of, ropes_of
from .quantization import KEY, PackedMatrix, QuantizationConfig, is_required, packed_matrix, quantization_of
from .tensors import (
    DTYPES,
    HEAD,
    Tensor,
    TensorEntry,
    equal_tensors,
    find_tensors,
    read_tensor,
    require_finite,
    rounded,
)
from .vocabulary import chat_template, tokenizer_size

__all__ = ["Checkpoint", "TensorEntry", "read_tensor", "require_finite"]

EMBEDDING = "model.embed_tokens.weight"
Packed = PackedMatrix | GgufMatrix


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face folder. Its tensors are those that `spec` needs; other tensors of its files are ignored.

    Or a GGUF file: all its tensors are needed.
    """

    folder: Path  # of config.json and the tokenizer; a GGUF file's is in this package's cache
    spec: ModelSpec
    tensors: Mapping[str, Tensor]  # by name, with the shapes that `spec` demands
    quantization: QuantizationConfig | None = None  # None: all weights are floats
    packed: Mapping[str, Packed] = field(default_factory=dict)  # matrices in integers, by name without `.weight`
    file: Path | None = None  # the GGUF file

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read configs, tokenizer and headers of a Hugging Face folder, or of a GGUF file. Raises BadCheckpoint.

        Weights are read only where config.json ties the head to the embedding and the files hold both.
        """
        if folder.is_file():
            return cls._open_gguf(folder)
        config = configs.read_config(folder)
        family = configs.family_of(config)
        found = find_tensors(folder)
        if EMBEDDING not in found and HEAD in found and config.flag("tie_word_embeddings", family.tied):
            found[EMBEDDING] = found[HEAD]  # transformers ties in both directions
        stored = found[EMBEDDING].dtype if EMBEDDING in found else "F32"
        spec = _spec(config, family, tokenizer_size(folder), configs.dtype_of(config, stored))
        if spec.tied and _holds_another_head(spec, found):
            spec = replace(spec, tied=False)
        quantization = quantization_of(config)
        tensors, packed = _needed(folder, spec, found, quantization)
        if not packed and not is_required(config):
            quantization = None
        if quantization and not packed:
            raise config.fault(KEY, f"says {quantization.method}, but no matrix is stored in integers")
        return cls(folder, spec, tensors, quantization, packed)

    @classmethod
    def _open_gguf(cls, file: Path) -> Checkpoint:
        found = GgufCheckpoint.open(file)
        config = configs.read_config(found.folder)
        spec = _spec(config, configs.family_of(config), tokenizer_size(found.folder), configs.dtype_of(config, "F32"))
        tensors, packed = found.needed(spec)
        return cls(found.folder, spec, tensors, GGUF if packed else None, packed, file)

    @property
    def path(self) -> Path:
        """What the user named: the folder or the GGUF file."""
        return self.file or self.folder

    @property
    def bits(self) -> int | None:
        """The bits of most matrices of a quantized checkpoint; None for one in floats."""
        counts = Counter(matrix.bits for matrix in self.packed.values())
        return counts.most_common(1)[0][0] if counts else None

    def as_role(self, role: Literal["auto", "target", "draft"]) -> Checkpoint:
        """The same checkpoint with this role; "auto": a draft if its config has a mask id. Raises BadCheckpoint."""
        if role == "draft" and self.spec.pard is None:
            where = self.file or self.folder / configs.FILE
            raise BadCheckpoint(
                f"{where}: a draft without a mask id: none of {', '.join(MASK_KEYS)} is there; "
                "take a PARD draft, or --role target"
            )
        return replace(self, spec=replace(self.spec, pard=None)) if role == "target" else self


def _spec(config: Config, family: Family, size: int, dtype: str) -> ModelSpec:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = configs.kv_heads_of(config, family, heads)
    head_dim = config.integer("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise config.fault("head_dim", f"is {head_dim}; rotary embedding needs an even one")
    rows = config.integer("vocab_size")
    if size > rows + family.foreign_ids:
        raise config.fault("vocab_size", f"is {rows}, but the tokenizer has {size} ids; they are not of one model")
    eos_ids, bos_id = configs.eos_and_bos(config, family, rows)
    rope, window_rope = ropes_of(config, family)
    return ModelSpec(
        family=family.name,
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tied=config.flag("tie_word_embeddings", family.tied),
        max_positions=configs.max_positions_of(config, rope),
        dtype=dtype,
        vocabulary=Vocabulary(rows, min(size, rows), eos_ids, bos_id),
        chat_template=chat_template(config.path.parent),
        pard=configs.pard_of(config, rows),
        attention=attention_of(config, family),
        window_rope=window_rope,
        embedding_scale=rounded(hidden**0.5, dtype) if family.embedding else None,
        norm_offset=family.norm.offset,
        norms=family.norms,
        mlp_norm=family.mlp_norm,
    )


def _holds_another_head(spec: ModelSpec, found: Mapping[str, TensorEntry]) -> bool:
    """Whether the files hold a head whose values are not the embedding's.

    transformers does not tie such a head, whatever config.json says (`PreTrainedModel.tie_weights` compares the values
    of two matrices that are both stored); it ties equal copies. In the other direction, where config.json says that
    the head is untied and no file holds it, transformers fills it with random numbers: that is refused here.
    """
    head, embedding = found.get(HEAD), found.get(EMBEDDING)
    if head is None or embedding is None or not {head.dtype, embedding.dtype} <= set(DTYPES):
        return False
    matrix = (spec.vocabulary.rows, spec.hidden)  # a tensor of another shape cannot be this model's head
    return head.shape == embedding.shape == matrix and not equal_tensors(head, embedding)


def _needed(
    folder: Path, spec: ModelSpec, found: Mapping[str, TensorEntry], quantization: QuantizationConfig | None
) -> tuple[dict[str, Tensor], dict[str, PackedMatrix]]:
    """The tensors in floats, and the matrices in integers, that a model of `spec` needs. Raises BadCheckpoint."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, PackedMatrix] = {}
    for name, shape in shapes(spec):
        matrix = name.removesuffix(".weight")
        # The embedding is always in floats: its rows are looked up
        if quantization and len(shape) == 2 and name != EMBEDDING:
            held = packed_matrix(quantization, matrix, (shape[0], shape[1]), found)
            if held:
                packed[matrix] = held
                continue
        entry = found.get(name)
        if entry is None:
            raise BadCheckpoint(f"{folder}: no tensor {name} in its safetensors; a {spec.family} checkpoint needs it")
        if entry.dtype not in DTYPES:
            raise BadCheckpoint(
                f"{entry.file}: tensor {name} is stored as {entry.dtype}; supported: {', '.join(DTYPES)} "
                "(export the unquantized checkpoint)"
            )
        if entry.shape != shape:
            raise BadCheckpoint(f"{entry.file}: tensor {name} is {list(entry.shape)}; config.json says {list(shape)}")
        tensors[name] = entry
    return tensors, packed
