"""The reference of the parity check and of quality reports: a checkpoint's logits, computed by torch in float32.

The weights are those that transformers' own loading puts into its model. This package's reader has no part in it, so
whatever it misreads (a dropped head, a wrong tie, exchanged matrices) makes the graphs differ from the reference.
This package itself reads five things: P-EAGLE drafts; the integers of a quantized checkpoint, since transformers needs
a GPU or further packages for them; an exported folder, which has no checkpoint; what an adapter adds to the loaded
weights; and GGUF files that transformers does not read, or not within the memory of an export (`_reads_gguf`).

transformers maps safetensors files into memory. Every module computes in float32 from blocks of rows of its weights, so
neither a whole model nor a whole matrix in float32 is ever in memory, but for small GGUF files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.utils import logging
from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.config import transformers_refusals
from pard_onnx.models.checkpoints.gguf.config import architecture_of
from pard_onnx.models.checkpoints.gguf.file import GgufFile
from pard_onnx.models.checkpoints.layer_attention import KINDS
from pard_onnx.models.checkpoints.merged import ChangedTensor, ReplacedTensor
from pard_onnx.models.checkpoints.quantization import PackedMatrix
from pard_onnx.models.checkpoints.tensors import HEAD, read_tensor, row_blocks, weight_files
from pard_onnx.models.checkpoints.tensors import Tensor as Stored
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import FILE_NAME
from pard_onnx.models.spec import MASK_FEATURE, PROJECTION, ModelSpec, TargetFeatures
from pard_onnx.quantize.calibration.layers import joins_features, model_without_weights
from pard_onnx.quantize.packing.imported import imported_matrices

# Without types of their own
GENERATION_CONFIG: Any = GenerationConfig
LOGGING: Any = logging
GGUF_LOADING: Any = modeling_gguf_pytorch_utils
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_WIDENED = 1 << 28  # weights; transformers widens all of a GGUF file to float32, which takes up to 1.6 GB
Rows = Callable[[slice], Tensor]  # rows of a parameter in float32


class Reference(Protocol):
    """A loaded checkpoint, as a function."""

    def __call__(self, ids: Tensor, features: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Logits of ids [batch, sequence]: float32 [batch, sequence, vocabulary rows].

        features: what a PARD-2 draft reads of its target with each token, [batch, sequence, columns]; None: nothing.
        inputs: for sequences that are not plain text, the model's `position_ids` [batch, sequence] and `attention_mask`
        [batch, 1, sequence, sequence], added to the scores.
        """
        ...

    def hidden_states(self, ids: Tensor, layers: Sequence[int]) -> Tensor:
        """The hidden states of some layers side by side, by transformers' own list: [batch, sequence, columns]."""
        ...


def load_reference(checkpoint: Checkpoint) -> Reference:
    """The checkpoint in torch. Raises BadCheckpoint."""
    model = _loaded_model(checkpoint)
    for name, module in model.named_modules():
        parts = {part: _part(checkpoint, name, part, p) for part, p in module._parameters.items() if p is not None}
        if parts:
            _compute_in_float32(module, parts)

    return _Loaded(checkpoint, model)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A `Reference` whose modules compute in float32."""

    checkpoint: Checkpoint
    model: Any

    def __call__(self, ids: Tensor, features: Tensor | None = None, **inputs: Tensor) -> Tensor:
        if features is None and joins_features(self.checkpoint.spec):
            features = torch.zeros(*ids.shape, self._features.columns)
        with torch.inference_mode():
            read = {"input_ids": ids} if features is None else {"inputs_embeds": self._embedded(ids, features)}
            found: Tensor = self.model(**read, use_cache=False, **_by_kind(self.checkpoint.spec, inputs)).logits
        return found.float()

    def hidden_states(self, ids: Tensor, layers: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            states = self.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1).float()

    def _embedded(self, ids: Tensor, features: Tensor) -> Tensor:
        """embed(token) + scale * projection(feature), the published rule; the last column multiplies the bias.

        Of a draft that joins them otherwise, both side by side, with the learned feature at its masks.
        """
        used, tensors, pard = self._features, self.checkpoint.tensors, self.checkpoint.spec.pard
        if pard is not None and used.join == "concat":
            masks = (ids == pard.mask_id)[..., None]
            features = torch.where(masks, torch.from_numpy(read_tensor(tensors[MASK_FEATURE])), features)
        weight = torch.from_numpy(read_tensor(tensors[f"{PROJECTION}.weight"]))
        projected = functional.linear(features[..., : used.width], weight)
        if used.bias:
            projected += features[..., used.width :] * torch.from_numpy(read_tensor(tensors[f"{PROJECTION}.bias"]))
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        if used.join == "concat":
            return torch.cat([embedded, projected], dim=-1)
        return embedded + used.scale * projected

    @property
    def _features(self) -> TargetFeatures:
        pard = self.checkpoint.spec.pard
        assert pard is not None and pard.features is not None
        return pard.features


def reference_logits(checkpoint: Checkpoint, ids: Tensor, **inputs: Tensor) -> Tensor:
    """The logits of one batch; `load_reference` reads the checkpoint once for many."""
    return load_reference(checkpoint)(ids, **inputs)


def _by_kind(spec: ModelSpec, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A mask of one's own reaches every layer as it is: window layers get one that leaves out what is far behind."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    window = next((window for window in spec.windows if window is not None), None)
    if mask is None or positions is None or window is None:
        return dict(inputs)
    far = (positions[:, :, None] - positions[:, None] >= window)[:, None]
    return {**inputs, "attention_mask": dict(zip(KINDS, (mask, mask.masked_fill(far, float("-inf"))), strict=True))}


# Loading


def _loaded_model(checkpoint: Checkpoint) -> Any:
    """transformers' model, or that of a P-EAGLE draft, which transformers does not have.

    Parameters on the meta device, and integers beside safetensors, are read by this package.
    """
    unread = checkpoint.file and not _reads_gguf(checkpoint.file, checkpoint)
    if unread or (checkpoint.folder / FILE_NAME).is_file() or joins_features(checkpoint.spec):
        return model_without_weights(checkpoint, "eager", torch.float32)
    load = _load_around_integers if checkpoint.quantization and checkpoint.file is None else _load_floats
    with transformers_refusals(checkpoint.path), _quietly():
        model, info = load(checkpoint, attn_implementation="eager", output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadCheckpoint(
            f"{checkpoint.path}: transformers finds no tensor {missing[0]} in it, and would make up random numbers"
        )
    return model


def _reads_gguf(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether transformers reads this GGUF file, all of it, in the memory that an export may take."""
    file = GgufFile.read(path)
    name, _ = architecture_of(file)
    whole = all(tensor.file == path for tensor in file.tensors.values())  # transformers reads one file
    # Without this entry, which means as many heads, transformers leaves rotary pairs in llama.cpp's order
    plain = f"{name}.attention.head_count_kv" in file.metadata.values
    weights = sum(prod(shape) for _, shape in shapes(checkpoint.spec))
    installed = is_accelerate_available() and is_gguf_available()
    return installed and name in GGUF_SUPPORTED_ARCHITECTURES and whole and plain and weights <= MOST_WIDENED


def _load_floats(checkpoint: Checkpoint, **options: Any) -> Any:
    if checkpoint.file:
        options["gguf_file"] = str(checkpoint.file.resolve())
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=_config(checkpoint),
        dtype=_dtype(checkpoint),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        generation_config=GENERATION_CONFIG(),  # the folder's own is not needed, and may be refused
        **options,
    )


def _load_around_integers(checkpoint: Checkpoint, **options: Any) -> Any:
    """The tensors in floats, by transformers; one number stands for an integer matrix, which takes no memory."""
    from safetensors import safe_open

    dtype, config = _dtype(checkpoint), _config(checkpoint)
    for key in ("quantization_config", "compression_config"):
        config.__dict__.pop(key, None)
    packed = {name: matrix for name, matrix in checkpoint.packed.items() if isinstance(matrix, PackedMatrix)}
    parts = {f"{name}.{end}" for name, matrix in packed.items() for end in matrix.parts}
    tensors: dict[str, Tensor] = {}
    for file in weight_files(checkpoint.folder):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if name not in parts}  # noqa: SIM118
    for name, matrix in packed.items():
        tensors[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(matrix.shape)
    build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return build.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)


def _config(checkpoint: Checkpoint) -> Any:
    # The dtype that was understood: transformers refuses some names that tools write
    return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, dtype=checkpoint.spec.dtype)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type in which most weights are stored: these stay mapped, and transformers rounds copies of the others.

    Of a GGUF file nothing stays mapped, and its integers stand for values in float32.
    """
    if checkpoint.file:
        return torch.float32
    counts: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] += tensor.nbytes
    return TYPES[counts.most_common(1)[0][0]]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars, and its report about the checkpoint: the reader has warned already."""
    level, bars, gguf_bar = LOGGING.get_verbosity(), LOGGING.is_progress_bar_enabled(), GGUF_LOADING.tqdm
    GGUF_LOADING.tqdm = lambda tensors, **_: tensors  # the other bars' switch is not this one's
    LOGGING.set_verbosity_error()
    LOGGING.disable_progress_bar()
    try:
        yield
    finally:
        GGUF_LOADING.tqdm = gguf_bar
        LOGGING.set_verbosity(level)
        if bars:
            LOGGING.enable_progress_bar()


# Computing


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter, read by rows in float32."""

    count: int  # of its rows
    read: Rows

    def whole(self) -> Tensor:
        return self.read(slice(0, self.count))


def _part(checkpoint: Checkpoint, module: str, name: str, parameter: Tensor) -> _Part:
    """A parameter as transformers loaded it, with an adapter's changes; or as this package reads it (_loaded_model)."""
    matrices = imported_matrices(checkpoint) if checkpoint.file is None or parameter.is_meta else None
    full = EMBEDDING if f"{module}.{name}" == HEAD and checkpoint.spec.tied else f"{module}.{name}"
    matrix = full.removesuffix(".weight")
    if matrices and name == "weight" and matrix in checkpoint.packed:
        return _Part(len(parameter), lambda rows: torch.from_numpy(matrices.dequantized(matrix, rows)))
    tensor = checkpoint.tensors.get(full)
    if parameter.is_meta and tensor is not None:
        return _Part(tensor.shape[0], lambda rows: torch.from_numpy(read_tensor(tensor, rows)))
    loaded: Rows = lambda rows: parameter.detach()[rows].float()  # noqa: E731
    if checkpoint.adapter is None or tensor is None:
        return _Part(len(parameter), loaded)
    return _Part(tensor.shape[0], _changed(tensor, loaded))


def _changed(tensor: Stored, loaded: Rows) -> Rows:
    """The rows of a tensor, given those of the tensor that the adapter changes."""
    if isinstance(tensor, ReplacedTensor):
        return lambda rows: torch.from_numpy(read_tensor(tensor, rows))
    if not isinstance(tensor, ChangedTensor):
        return loaded
    before = _changed(tensor.base, loaded)
    return lambda rows: torch.from_numpy(tensor.changed(before(rows).numpy(), rows.start))


def _compute_in_float32(module: nn.Module, parts: dict[str, _Part]) -> None:
    """Make a module compute in float32 from `parts`, its parameters by name."""
    if isinstance(module, nn.Linear):
        module.forward = partial(_product, module.in_features, parts)  # type: ignore[method-assign]
    elif isinstance(module, nn.Embedding):
        module.padding_idx = None  # it changes gradients alone, and is no id of the rows that are used
        module.forward = partial(_looked_up, module, module.forward, parts["weight"])  # type: ignore[method-assign]
    else:
        module.forward = partial(_with_whole, module, module.forward, parts)


def _product(width: int, parts: dict[str, _Part], x: Tensor) -> Tensor:
    """A linear layer's output, some of its columns after the other."""
    weight = parts["weight"]
    found = torch.empty(*x.shape[:-1], weight.count)
    for rows in row_blocks((weight.count, width)):
        found[..., rows] = functional.linear(x, weight.read(rows))
    return found + parts["bias"].whole() if "bias" in parts else found


def _looked_up(module: nn.Embedding, forward: Callable[[Tensor], Tensor], weight: _Part, ids: Tensor) -> Tensor:
    """An embedding's output, computed from the rows that are used."""
    used, places = torch.unique(ids, return_inverse=True)
    table = torch.cat([weight.read(slice(row, row + 1)) for row in used.tolist()])
    with _parameters(module, {"weight": table}):
        return forward(places)


def _with_whole(
    module: nn.Module, forward: Callable[..., Tensor], parts: dict[str, _Part], *inputs: Tensor, **named: Any
) -> Tensor:
    with _parameters(module, {name: part.whole() for name, part in parts.items()}):
        return forward(*inputs, **named)


@contextmanager
def _parameters(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The module with these parameters; it gets its own ones back at the end."""
    before = dict(module._parameters)
    module._parameters.update({part: nn.Parameter(tensor, requires_grad=False) for part, tensor in tensors.items()})
    try:
        yield
    finally:
        module._parameters.update(before)
