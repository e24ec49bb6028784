"""The folder of a finished draft, which pard-export takes: configs, weights, and the tokenizer's files as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pard_onnx.models.atomic import atomic_folder
from pard_onnx.models.checkpoints.config import FILE as CONFIG
from pard_onnx.models.checkpoints.config import GENERATION_FILE, MASK_KEYS
from pard_onnx.models.checkpoints.projection import BIAS_KEYS, FOUR_LAYERS_KEY, LAYER_KEYS, SCALE_KEYS, WIDTH_KEYS
from pard_onnx.models.checkpoints.projection import FOLDER as PROJECTION_FOLDER
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.folder_files import has_file, read_file

from .start import Start

WEIGHTS, CARD, PLOT = "model.safetensors", "README.md", "training.svg"
PROJECTION_KEYS = ("pard2", *LAYER_KEYS, *WIDTH_KEYS, *BIAS_KEYS, *SCALE_KEYS, FOUR_LAYERS_KEY)
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
WRITTEN = frozenset((CONFIG, WEIGHTS, PROJECTION_FOLDER, CARD, PLOT, *COPIED))  # by pard-adapt, to a draft's folder
MOST_COPIED = 1 << 26  # bytes of a file
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_draft(
    start: Start,
    folder: Path,
    projection: Path | None = None,
    write_card: Callable[[Path], None] = lambda folder: None,
    *,
    replace: bool = False,
) -> None:
    """Write the adapted model as a PARD draft, whole or not at all. Raises OSError.

    projection: the file of a PARD-2 draft's projection, whose facts the model's config has. write_card: writes further
    files to the folder before it gets its place.
    """
    model, dtype = start.model, DTYPES[start.dtype]
    with atomic_folder(folder, replace=replace) as partial:
        draft_config(model, start, is_pard2=projection is not None).save_pretrained(partial)
        copy_tokenizer(start.source, partial)
        mode = (partial / CONFIG).stat().st_mode
        _save({name: value.detach() for name, value in model.named_parameters()}, partial / WEIGHTS, dtype, mode)
        if projection is not None:
            (partial / PROJECTION_FOLDER).mkdir()
            _save(load_file(projection), partial / PROJECTION_FOLDER / WEIGHTS, dtype, mode)
        write_card(partial)


def _save(tensors: Mapping[str, torch.Tensor], file: Path, dtype: torch.dtype, mode: int) -> None:
    save_file({name: value.to("cpu", dtype).contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    file.chmod(mode)  # safetensors lets the owner alone read its files


def draft_config(model: PreTrainedModel, start: Start, *, is_pard2: bool) -> Any:
    """The model's config with the facts of a PARD draft."""
    config: Any = deepcopy(model.config)
    # Another toolkit's name of the mask would disagree; a projection that is not there would be missed
    for key in (*MASK_KEYS, *(() if is_pard2 else PROJECTION_KEYS)):
        config.__dict__.pop(key, None)
    config.update({"pard_token": start.mask_id, "spd_type": "pard2" if is_pard2 else "pard"})
    config.dtype, config.architectures = DTYPES[start.dtype], [type(model).__name__]
    return config


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer and of generation, byte for byte. Raises BadCheckpoint."""
    for name in COPIED:
        if has_file(source / name, BadCheckpoint):
            (folder / name).write_bytes(read_file(source / name, MOST_COPIED, BadCheckpoint))
