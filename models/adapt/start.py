"""`Start`: the model that a training run begins with, an autoregressive sibling or some of the target's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import logging

from pard_onnx.models.checkpoints.added_tokens import read_added_tokens
from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.config import transformers_refusals
from pard_onnx.models.checkpoints.tensors import HEAD, read_tensor, require_finite
from pard_onnx.models.errors import BadCheckpoint, BadInput
from pard_onnx.models.families import shapes
from pard_onnx.models.spec import ModelSpec

from .mask_token import MaskToken, Vocabulary, find_mask

Choice = Literal["first", "last", "even"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
LAYER = "model.layers."
LOGGING: Any = logging  # without types of its own


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A model to adapt, in float32, whose embedding has a row for its masks."""

    model: PreTrainedModel
    source: Path  # the folder of the tokenizer files
    mask_id: int
    note: str  # what it is made of, for people
    dtype: str = "float32"  # in which the finished draft is stored


def start_from(draft_folder: Path, mask_id: int | None = None) -> Start:
    """An autoregressive checkpoint, or a PARD draft that is trained on. Raises BadInput.

    draft_folder: a checkpoint folder or a GGUF file. mask_id: the id of the masks; None: an unused one is found.
    """
    checkpoint = trainable(draft_folder)
    return _started(checkpoint, range(checkpoint.spec.layers), mask_id, f"{draft_folder.name}")


def shallow(target_folder: Path, layers: int, choose: Choice = "even", mask_id: int | None = None) -> Start:
    """A draft of some of the target's layers, with its embedding, last norm and head. Arguments, errors: `start_from`.

    choose: the first or the last `layers` layers, or some at even distances, with the first one and the last one.
    """
    checkpoint = trainable(target_folder)
    chosen = chosen_layers(checkpoint.spec.layers, layers, choose)
    names = ", ".join(map(str, chosen))
    note = f"layers {names} of the {checkpoint.spec.layers} of {target_folder.name}"
    return _started(checkpoint, chosen, mask_id, note)


def chosen_layers(total: int, count: int, choose: Choice) -> list[int]:
    """The numbers of the layers that a draft of `count` layers takes from `total`. Raises BadInput."""
    if not 1 <= count <= total:
        raise BadInput(f"--shallow {count}: the target has {total} layers; take from 1 to {total} of them")
    if choose == "even":
        return [round(place) for place in np.linspace(0, total - 1, count)]
    return list(range(count) if choose == "first" else range(total - count, total))


def trainable(folder: Path) -> Checkpoint:
    """A checkpoint that can be trained: its weights are floats, or integers of a GGUF file, read as floats.

    Raises BadCheckpoint.
    """
    return with_float_weights(Checkpoint.open(folder), "cannot be trained")


def with_float_weights(checkpoint: Checkpoint, refusal: str) -> Checkpoint:
    """The checkpoint with weights that torch computes with: floats, or integers of a GGUF file, read as floats.

    refusal: what integers of other kinds cannot be. Raises BadCheckpoint for them.
    """
    checkpoint = checkpoint.in_floats()
    if checkpoint.quantization is not None:
        raise BadCheckpoint(
            f"{checkpoint.path}: its weights are integers ({checkpoint.quantization.method}), which {refusal}; "
            "name the unquantized checkpoint"
        )
    return checkpoint


def mask_of(checkpoint: Checkpoint, given: int | None = None) -> MaskToken:
    """The mask token of a draft made of this checkpoint: that of a PARD draft, `given`, or an unused one."""
    spec = checkpoint.spec
    if spec.pard and given in (None, spec.pard.mask_id):
        note = "the id that this PARD draft was trained with"
        return MaskToken(spec.pard.mask_id, spec.vocabulary.rows, note, is_new=False)
    return find_mask(vocabulary_of(checkpoint), given)


def vocabulary_of(checkpoint: Checkpoint) -> Vocabulary:
    """The ids of a checkpoint, and which of them have a meaning."""
    tokenizer, spec = checkpoint.tokenizer(), checkpoint.spec
    tokens: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    named = read_added_tokens(checkpoint.tokenizer_folder, BadCheckpoint, checkpoint.names).texts.values()
    used = {tokens[text] for text in named if text in tokens} | set(spec.vocabulary.eos_ids)
    used |= {spec.vocabulary.bos_id} if spec.vocabulary.bos_id is not None else set()
    added = tokenizer.get_added_tokens_decoder()
    return Vocabulary(spec.vocabulary.rows, tokens, added, used, spec.chat_template or "")


def _started(checkpoint: Checkpoint, layers: Sequence[int], mask_id: int | None, note: str) -> Start:
    mask = mask_of(checkpoint, mask_id)
    model = loaded_model(checkpoint, layers)
    _give_row(model, mask, checkpoint.spec.vocabulary.size)
    dtype = "bfloat16" if checkpoint.file else checkpoint.spec.dtype
    return Start(model, checkpoint.tokenizer_folder, mask.id, note, dtype)


def loaded_model(checkpoint: Checkpoint, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """transformers' model of these layers (None: all) of a checkpoint, in float32. Raises BadCheckpoint.

    Only the tensors that it needs are read, so that a shallow draft of a large target takes little memory.
    """
    spec = checkpoint.spec
    layers = range(spec.layers) if layers is None else layers
    with transformers_refusals(checkpoint.folder):
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, dtype=spec.dtype)
    _take_layers(config, layers)
    config.tie_word_embeddings, config.vocab_size = spec.tied, spec.vocabulary.rows
    tensors = dict(_tensors(checkpoint, replace(spec, pard=None), layers))
    build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    bars, level = LOGGING.is_progress_bar_enabled(), LOGGING.get_verbosity()
    LOGGING.disable_progress_bar()
    LOGGING.set_verbosity_error()
    try:
        with transformers_refusals(checkpoint.folder):
            model, info = build.from_pretrained(
                None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
            )
    finally:
        LOGGING.set_verbosity(level)
        if bars:
            LOGGING.enable_progress_bar()
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise BadCheckpoint(f"{checkpoint.path}: transformers' model has other tensors; the first is {wrong[0]}")
    out: PreTrainedModel = model
    return out


def _take_layers(config: Any, layers: Sequence[int]) -> None:
    """Make the config that of some layers: every list with an entry for each layer keeps theirs."""
    total = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and name.endswith(("layer_types", "layers")):
            setattr(config, name, [value[index] for index in layers])
    config.num_hidden_layers = len(layers)


def _tensors(checkpoint: Checkpoint, spec: ModelSpec, layers: Sequence[int]) -> list[tuple[str, Tensor]]:
    """The tensors of the chosen layers by their new names, and those beside the layers, in float32."""
    number = {str(old): str(new) for new, old in enumerate(layers)}
    out = []
    for name, _ in shapes(spec):
        new = name
        if name.startswith(LAYER):
            old, _, rest = name.removeprefix(LAYER).partition(".")
            if old not in number:
                continue
            new = f"{LAYER}{number[old]}.{rest}"
        values = read_tensor(checkpoint.tensors[name])
        require_finite(name, values)
        out.append((new, torch.from_numpy(values)))
        if name == EMBEDDING and spec.tied:
            out.append((HEAD, out[-1][1]))
    return out


def _give_row(model: PreTrainedModel, mask: MaskToken, size: int) -> None:
    """Add the rows that the mask token needs, and let a new mask begin as the mean of the tokens.

    size: ids that have a token. A row that was never trained may be of any length.
    """
    net: Any = model  # whose methods have no types
    embedding = net.get_input_embeddings()
    before = embedding.weight.shape[0]
    if mask.rows > before:
        net.resize_token_embeddings(mask.rows, mean_resizing=False)
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    matrices: dict[int, Any] = {id(matrix): matrix for matrix in (embedding.weight, head.weight)}
    with torch.no_grad():
        for matrix in matrices.values():
            matrix[before:] = matrix[:size].mean(0)
        if mask.is_new:
            embedding.weight[mask.id] = embedding.weight[:size].mean(0)
