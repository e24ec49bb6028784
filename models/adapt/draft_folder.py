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
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.folder_files import has_file, read_file

from .start import Start

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


def write_draft(start: Start, folder: Path, *, replace: bool = False) -> None:
    """Write the adapted model as a PARD draft, whole or not at all. Raises OSError."""
    model, dtype = start.model, DTYPES[start.dtype]
    with atomic_folder(folder, replace=replace) as partial:
        draft_config(model, start).save_pretrained(partial)
        copy_tokenizer(start.source, partial)
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.named_parameters()}
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        # safetensors lets the owner alone read its files
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)


def draft_config(model: PreTrainedModel, start: Start) -> Any:
    """The model's config with the facts of a PARD draft."""
    config: Any = deepcopy(model.config)
    for key in MASK_KEYS:
        config.__dict__.pop(key, None)  # another toolkit's name of the mask, which would disagree
    config.update({"pard_token": start.mask_id, "spd_type": "pard"})
    config.dtype, config.architectures = DTYPES[start.dtype], [type(model).__name__]
    return config


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer and of generation, byte for byte. Raises BadCheckpoint."""
    for name in COPIED:
        if has_file(source / name, BadCheckpoint):
            (folder / name).write_bytes(read_file(source / name, MOST_COPIED, BadCheckpoint))
