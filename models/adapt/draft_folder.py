"""The folder of a finished draft, which pard-export takes: configs, weights, and the tokenizer's files as they are."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pard_onnx.models.atomic import atomic_folder
from pard_onnx.models.checkpoints.config import GENERATION_FILE, MASK_KEYS
from pard_onnx.models.checkpoints.projection import BIAS_KEYS, FOUR_LAYERS_KEY, LAYER_KEYS, SCALE_KEYS, WIDTH_KEYS
from pard_onnx.models.checkpoints.projection import FOLDER as PROJECTION_FOLDER
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.folder_files import has_file, read_file

from .start import Start

PROJECTION_KEYS = ("pard2", *LAYER_KEYS, *WIDTH_KEYS, *BIAS_KEYS, *SCALE_KEYS, FOUR_LAYERS_KEY)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    GENERATION_FILE,
)
MOST_COPIED = 1 << 26  # bytes of a file
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_draft(start: Start, folder: Path, *, replace: bool = False, projection: Path | None = None) -> None:
    """Write the adapted model as a PARD draft, whole or not at all. Raises OSError.

    projection: the file of a PARD-2 draft's projection, whose facts the model's config has.
    """
    model, dtype = start.model, DTYPES[start.dtype]
    with atomic_folder(folder, replace=replace) as partial:
        draft_config(model, start, pard2=projection is not None).save_pretrained(partial)
        if projection is not None:
            (partial / PROJECTION_FOLDER).mkdir()
            (partial / PROJECTION_FOLDER / WEIGHTS).write_bytes(projection.read_bytes())
        copy_tokenizer(start.source, partial)
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.named_parameters()}
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        # safetensors lets the owner alone read its files
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)


def draft_config(model: PreTrainedModel, start: Start, *, pard2: bool = False) -> Any:
    """The model's config with the facts of a PARD draft. pard2: it has a projection, whose facts stay."""
    config: Any = deepcopy(model.config)
    # Another toolkit's name of the mask would disagree; a draft that was trained without its projection has none
    for key in (*MASK_KEYS, *(() if pard2 else PROJECTION_KEYS)):
        config.__dict__.pop(key, None)
    config.update({"pard_token": start.mask_id, "spd_type": "pard2" if pard2 else "pard"})
    config.dtype, config.architectures = DTYPES[start.dtype], [type(model).__name__]
    return config


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer and of generation, byte for byte. Raises BadCheckpoint."""
    for name in COPIED:
        if has_file(source / name, BadCheckpoint):
            (folder / name).write_bytes(read_file(source / name, MOST_COPIED, BadCheckpoint))
