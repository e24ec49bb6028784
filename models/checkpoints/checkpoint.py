"""`Checkpoint`: a Hugging Face folder or a GGUF file whose config, tokenizer and tensors have been checked."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pard_onnx.models.errors import BadCheckpoint, PardWarning
from pard_onnx.models.families import Family, shapes
from pard_onnx.models.folder_files import require_files
from pard_onnx.models.spec import ModelSpec, Vocabulary

from . import adapter as adapters
from . import config as configs
from .adapter import Adapter
from .config import MASK_KEYS, Config
from .eagle import eagle_config, eagle_facts, eagle_tensors
from .gguf.checkpoint import GGUF, GgufCheckpoint
from .gguf.types import GgufMatrix
from .layer_attention import attention_of, ropes_of
from .projection import read_projection
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
from .tokenizer import GuardedTokenizer
from .vocabulary import FILE as TOKENIZER_FILE
from .vocabulary import chat_template, load_tokenizer, token_ids

__all__ = ["Checkpoint", "TensorEntry", "read_tensor", "require_finite"]

EMBEDDING = "model.embed_tokens.weight"
ROTARY_BUFFER = re.compile(r"rotary_emb\.inv_freq")  # old checkpoints hold it; transformers passes over it silently
UNMERGED = re.compile(r"\.lora_|\.(qweight|weight_packed)$")  # parts of a matrix that is then not what `.weight` says
NAMED = 3  # tensors in a warning
Packed = PackedMatrix | GgufMatrix


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face folder. Its tensors are those that `spec` needs; a warning names others that its files hold.

    Or a GGUF file: all its tensors are needed.
    """

    folder: Path  # of config.json and the tokenizer; a GGUF file's is in this package's cache
    spec: ModelSpec
    tensors: Mapping[str, Tensor]  # by name, with the shapes that `spec` demands; with the changes of `adapter`
    quantization: QuantizationConfig | None = None  # None: all weights are floats
    packed: Mapping[str, Packed] = field(default_factory=dict)  # matrices in integers, by name without `.weight`
    adapter: Adapter | None = None  # whose changes are merged
    file: Path | None = None  # the GGUF file
    names: Collection[str] | None = None  # of the files in `folder` that may be read; None: all

    @classmethod
    def open(cls, folder: Path, adapter: Path | None = None) -> Checkpoint:
        """Read configs, tokenizer and headers of a Hugging Face folder, or of a GGUF file. Raises BadCheckpoint.

        Weights are read only where config.json ties the head to the embedding and the files hold both. adapter: the
        folder of a LoRA adapter, whose changes are merged; if it has a tokenizer.json, its tokenizer files are taken.
        """
        if folder.is_file():
            return cls._open_gguf(folder, adapter)
        if folder.is_dir():
            require_files(folder, BadCheckpoint)
        _refuse_adapter_as_model(folder)
        config, parallel_eagle = eagle_config(configs.read_config(folder))
        family = configs.family_of(config)
        found: dict[str, Tensor] = dict(find_tensors(folder))
        if parallel_eagle:
            found = eagle_tensors(folder, found)
        tied = config.flag("tie_word_embeddings", family.tied)
        if EMBEDDING not in found and HEAD in found and tied:
            found[EMBEDDING] = found[HEAD]  # transformers ties in both directions
        quantization = quantization_of(config)
        merging = None if adapter is None else Adapter.open(adapter)
        if merging:
            config, found = _with_adapter(config, found, merging, quantization, tied=tied)
        stored = found[EMBEDDING].dtype if EMBEDDING in found else "F32"
        spec = _spec(config, family, _tokenizer_folder(folder, merging), configs.dtype_of(config, stored))
        if parallel_eagle:
            spec = replace(spec, pard=eagle_facts(config, spec))
        elif spec.pard and (projection := read_projection(config)):
            spec = replace(spec, pard=replace(spec.pard, spd_type="pard2", features=projection.features))
            found |= projection.tensors
        if spec.tied and _holds_another_head(folder, spec, found, quantization):
            spec = replace(spec, tied=False)
        tensors, packed = _needed(folder, spec, found, quantization)
        if not packed and not is_required(config):
            quantization = None
        if quantization and not packed:
            raise config.fault(KEY, f"says {quantization.method}, but no matrix is stored in integers")
        if spec.window_rope is None:  # transformers names it otherwise where there are two
            found = {name: entry for name, entry in found.items() if not ROTARY_BUFFER.search(name)}
        _tell_of_unread(folder, found, tensors, packed)
        return cls(folder, spec, tensors, quantization, packed, merging)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer files lie: the adapter's folder if they are there, or the checkpoint's."""
        return _tokenizer_folder(self.folder, self.adapter)

    def tokenizer(self) -> GuardedTokenizer:
        """The tokenizer, which encodes whole texts. Raises BadCheckpoint."""
        return load_tokenizer(self.tokenizer_folder / TOKENIZER_FILE, BadCheckpoint, self.names)

    @classmethod
    def _open_gguf(cls, file: Path, adapter: Path | None) -> Checkpoint:
        if adapter is not None:
            raise BadCheckpoint(
                f"{file}: is a GGUF file, and {adapter} can be merged into safetensors only; name the base that the "
                "adapter was trained on with --model"
            )
        found = GgufCheckpoint.open(file)
        config = configs.read_config(found.folder)
        spec = _spec(config, configs.family_of(config), found.folder, configs.dtype_of(config, "F32"))
        tensors, packed = found.needed(spec)
        return cls(found.folder, spec, tensors, GGUF if packed else None, packed, file=file)

    @property
    def path(self) -> Path:
        """What the user named: the folder or the GGUF file."""
        return self.file or self.folder

    @property
    def bits(self) -> int | None:
        """The bits of most matrices of a quantized checkpoint; None for one in floats."""
        counts = Counter(matrix.bits for matrix in self.packed.values())
        return counts.most_common(1)[0][0] if counts else None

    def in_floats(self) -> Checkpoint:
        """The same checkpoint with the integers of a GGUF file read as the floats that they stand for."""
        held = {f"{n}.weight": matrix.tensor for n, matrix in self.packed.items() if isinstance(matrix, GgufMatrix)}
        if not held:
            return self
        return replace(self, tensors={**self.tensors, **held}, quantization=None, packed={})

    def as_role(self, role: Literal["auto", "target", "draft"]) -> Checkpoint:
        """The same checkpoint with this role; "auto": a draft if its config has a mask id. Raises BadCheckpoint."""
        if role == "draft" and self.spec.pard is None:
            where = self.file or self.folder / configs.FILE
            raise BadCheckpoint(
                f"{where}: a draft without a mask id: none of {', '.join(MASK_KEYS)} is there; "
                "take a PARD draft, or --role target"
            )
        return replace(self, spec=replace(self.spec, pard=None)) if role == "target" else self


def _refuse_adapter_as_model(folder: Path) -> None:
    """BadCheckpoint for the folder of an adapter, and for one that holds an adapter beside whole weights.

    transformers with peft would merge the latter unasked, and without peft ignore the adapter.
    """
    if not (folder / adapters.FILE).is_file():
        return
    if (folder / configs.FILE).is_file():
        raise BadCheckpoint(
            f"{folder}: holds an adapter ({adapters.FILE}) beside {configs.FILE}; move {adapters.FILE} and "
            f"{adapters.WEIGHTS} to a folder of their own, and name it with --adapter to merge it"
        )
    base = adapters.base_of(folder)
    raise BadCheckpoint(f"{folder}: is a LoRA adapter, not a whole model; take --model {base} --adapter {folder}")


def _with_adapter(
    config: Config,
    found: Mapping[str, Tensor],
    adapter: Adapter,
    quantization: QuantizationConfig | None,
    *,
    tied: bool,
) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors with the adapter's changes; resized embeddings change the vocabulary's rows."""
    if quantization and is_required(config):
        raise config.fault(
            KEY,
            f"says {quantization.method}, and {adapter.folder} can be merged into floats only; name the unquantized "
            "base with --model, also for an adapter that was trained on a quantized one",
        )
    embedding, head = found.get(EMBEDDING), found.get(HEAD)
    if embedding is None:
        return config, dict(found)  # refused below, by the tensor's name
    rows, width = config.integer("vocab_size"), config.integer("hidden_size")
    shared = tied and (head is None or not _differ(embedding, head, (rows, width)))
    merged = adapter.merged(found, tied=shared)
    if merged[EMBEDDING].shape[0] != embedding.shape[0]:
        config = replace(config, values={**config.values, "vocab_size": merged[EMBEDDING].shape[0]})
    return config, merged


def _tokenizer_folder(folder: Path, adapter: Adapter | None) -> Path:
    return adapter.folder if adapter and (adapter.folder / TOKENIZER_FILE).is_file() else folder


def _spec(config: Config, family: Family, tokenizer: Path, dtype: str) -> ModelSpec:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = configs.kv_heads_of(config, family, heads)
    head_dim = config.integer("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise config.fault("head_dim", f"is {head_dim}; rotary embedding needs an even one")
    rows, ids = config.integer("vocab_size"), token_ids(tokenizer)
    if ids.ordinary > rows:
        raise config.fault("vocab_size", f"is {rows}, but the tokenizer has {ids.all} ids; they are not of one model")
    eos_ids, bos_id = configs.eos_and_bos(config, family, rows)
    # A token that ends texts must be possible even where no file of the tokenizer names it
    size = min(rows, max(ids.all, *(token + 1 for token in eos_ids), 0))
    rope, window_rope = ropes_of(config, family)
    return ModelSpec(
        family=family.name,
        layers=config.integer("num_hidden_layers", most=configs.MOST_LAYERS),
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
        vocabulary=Vocabulary(rows, size, eos_ids, bos_id),
        chat_template=chat_template(tokenizer),
        pard=configs.pard_of(config, rows),
        attention=attention_of(config, family),
        window_rope=window_rope,
        embedding_scale=rounded(hidden**0.5, dtype) if family.embedding else None,
        norm_offset=family.norm.offset,
        norms=family.norms,
        mlp_norm=family.mlp_norm,
    )


def _holds_another_head(
    folder: Path, spec: ModelSpec, found: Mapping[str, Tensor], quantization: QuantizationConfig | None
) -> bool:
    """Whether the files hold a head whose values are not the embedding's, in floats or in integers.

    transformers does not tie such a head, whatever config.json says (`PreTrainedModel.tie_weights` compares the values
    of two matrices that are both stored); it ties equal copies. In the other direction, where config.json says that
    the head is untied and no file holds it, transformers fills it with random numbers: that is refused here. So is a
    head of another shape, as by transformers.
    """
    head, embedding, shape = found.get(HEAD), found.get(EMBEDDING), (spec.vocabulary.rows, spec.hidden)
    if head is not None and head.dtype in DTYPES and head.shape != shape:
        raise BadCheckpoint(
            f"{folder}: tensor {HEAD} is {list(head.shape)}; config.json says {list(shape)} for it and the embedding"
        )
    if quantization and packed_matrix(quantization, HEAD.removesuffix(".weight"), shape, _in_files(found)):
        return True
    return head is not None and embedding is not None and _differ(embedding, head, shape)


def _in_files(found: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """The tensors that no adapter changes; a quantized checkpoint, whose parts are among them, has none."""
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, TensorEntry)}


def _differ(embedding: Tensor, head: Tensor, shape: tuple[int, int]) -> bool:
    """Whether the head holds other values. A tensor of another type or shape cannot be this model's head."""
    if not {head.dtype, embedding.dtype} <= set(DTYPES) or head is embedding:
        return False
    return head.shape == embedding.shape == shape and not equal_tensors(head, embedding)


def _needed(
    folder: Path, spec: ModelSpec, found: Mapping[str, Tensor], quantization: QuantizationConfig | None
) -> tuple[dict[str, Tensor], dict[str, PackedMatrix]]:
    """The tensors in floats, and the matrices in integers, that a model of `spec` needs. Raises BadCheckpoint."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, PackedMatrix] = {}
    stored = _in_files(found)
    for name, shape in shapes(spec):
        matrix = name.removesuffix(".weight")
        # The embedding is always in floats: its rows are looked up
        if quantization and len(shape) == 2 and name != EMBEDDING:
            held = packed_matrix(quantization, matrix, (shape[0], shape[1]), stored)
            if held:
                packed[matrix] = held
                continue
        entry = found.get(name)
        if entry is None:
            raise BadCheckpoint(f"{folder}: no tensor {name} in its safetensors; a {spec.family} checkpoint needs it")
        where = stored[name].file if name in stored else folder
        if entry.dtype not in DTYPES:
            raise BadCheckpoint(
                f"{where}: tensor {name} is stored as {entry.dtype}; supported: {', '.join(DTYPES)} "
                "(export the unquantized checkpoint)"
            )
        if entry.shape != shape:
            raise BadCheckpoint(f"{where}: tensor {name} is {list(entry.shape)}; config.json says {list(shape)}")
        tensors[name] = entry
    return tensors, packed


def _tell_of_unread(
    folder: Path, found: Mapping[str, Tensor], tensors: Mapping[str, Tensor], packed: Mapping[str, PackedMatrix]
) -> None:
    """Warn of tensors that are no part of the model, as transformers does, which leaves them out too.

    Raises BadCheckpoint for weights of an adapter that is not merged, and for integers of a matrix that is read in
    floats: the model is then another one than its floats say.
    """
    read = {f"{matrix}.{end}" for matrix, held in packed.items() for end in (*held.parts, "weight_shape")}
    unread = sorted(name for name in found if name not in tensors and name not in read and name != HEAD)
    unread = [name for name in unread if not _is_zero_bias(name, found[name])]
    for name in unread:
        if UNMERGED.search(name):
            raise BadCheckpoint(
                f"{folder}: tensor {name} would be left out, and the model would be another one; export a checkpoint "
                "whose adapter is merged, and whose config.json says how it is quantized"
            )
    if unread:
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        warnings.warn(
            f"{folder}: tensors that the model of its config.json does not have are left out, as in transformers: "
            f"{', '.join(unread[:NAMED])}{more}; if they belong to the model, correct config.json",
            PardWarning,
            stacklevel=3,
        )


def _is_zero_bias(name: str, tensor: Tensor) -> bool:
    """Whether the tensor is a bias of zeros, which some tools write for layers that have none."""
    vector = name.endswith(".bias") and len(tensor.shape) == 1 and tensor.dtype in DTYPES
    return vector and not read_tensor(tensor).any()
