"""A PARD-2 draft's projection of its target's hidden states: what config.json says of it, and its tensors.

The published checkpoints have it in `warp_model.bin`, and PARD-2's training leaves it in
`pard_warp_model/model.safetensors`. A PARD-2 draft without either reads tokens alone, as any PARD draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadCheckpoint, shown
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.spec import PROJECTION, TargetFeatures

from .config import Config
from .tensors import DTYPES, ONE_FILE, Tensor, equal_tensors, read_header
from .torch_file import read_torch_file

TORCH_FILE, FOLDER = "warp_model.bin", "pard_warp_model"
WEIGHT, BIAS = f"{PROJECTION}.weight", f"{PROJECTION}.bias"
FOUR_LAYERS, LAST_LAYER = (-1, -8, -16, -24), (-1,)
SCALE = 0.02
MOST_LAYERS = 64  # of one feature
# Names of the same fact, the published one first; the others are of earlier checkpoints
LAYER_KEYS = ("pard2_target_layers", "target_layers")
WIDTH_KEYS = ("pard2_target_dim", "pard_target_dim")
BIAS_KEYS = ("pard2_proj_bias", "proj_bias")
SCALE_KEYS = ("pard2_scale", "pard_scale", "feat_scale")
FOUR_LAYERS_KEY = "ml"  # of earlier checkpoints, true: FOUR_LAYERS, false: LAST_LAYER


@dataclass(frozen=True, slots=True)
class Projection:
    features: TargetFeatures
    tensors: Mapping[str, Tensor]  # WEIGHT and, with a bias, BIAS


def read_projection(config: Config) -> Projection | None:
    """The projection of the PARD-2 draft whose config.json this is; None for a model that reads tokens alone.

    Raises BadCheckpoint where config.json names a projection that is not there, or another one than is there.
    """
    folder = config.path.parent
    stored = _stored(folder)
    if not _is_pard2(config, stored is not None):
        return None
    if stored is None:
        named = next((key for key in (*LAYER_KEYS[:1], *WIDTH_KEYS) if config.values.get(key) is not None), None)
        if named:
            raise config.fault(
                named,
                f"is there, but neither {TORCH_FILE} nor {FOLDER}/{ONE_FILE}: download it, or remove the key to run "
                "this draft without its target's hidden states",
            )
        return None
    file, tensors = stored
    weight = tensors.get(WEIGHT)
    if weight is None:
        raise BadCheckpoint(f"{file}: has no tensor {WEIGHT}; a PARD-2 draft needs it")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise BadCheckpoint(f"{file}: tensor {name} is stored as {tensor.dtype}; supported: {', '.join(DTYPES)}")
    key, bias = _first(BIAS_KEYS, config)
    used = config.flag(key, default=BIAS in tensors) if bias is not None else BIAS in tensors
    if used and BIAS not in tensors:
        raise config.fault(key, f"is true, but {file} has no {BIAS}; download it again")
    features = _features(config, weight.shape, used)
    return Projection(features, {name: tensor for name, tensor in tensors.items() if used or name != BIAS})


def _is_pard2(config: Config, has_projection: bool) -> bool:
    """Whether the config says so; earlier ones do not, so that a projection says it too."""
    kind = config.values.get("spd_type") == "pard2"
    return config.flag("pard2", default=kind or has_projection) or kind


def _features(config: Config, shape: tuple[int, ...], bias: bool) -> TargetFeatures:
    hidden, layers = config.integer("hidden_size"), _layers(config)
    if len(shape) != 2 or shape[0] != hidden:
        raise config.fault("hidden_size", f"is {hidden}, but {WEIGHT} is {list(shape)}; they are not of one draft")
    key, value = _first(WIDTH_KEYS, config)
    width = shape[1] if value is None else config.integer(key)
    if width != shape[1]:
        raise config.fault(key, f"is {width}, but {WEIGHT} is {list(shape)}; they are not of one draft")
    if width % len(layers):
        raise config.fault(
            key, f"is {width}, which {len(layers)} target layers of one size do not give; correct {LAYER_KEYS[0]}"
        )
    key, _ = _first(SCALE_KEYS, config)
    return TargetFeatures(layers, width, config.number(key, SCALE), bias)


def _layers(config: Config) -> tuple[int, ...]:
    key, value = _first(LAYER_KEYS, config)
    if value is None:
        if config.values.get(FOUR_LAYERS_KEY) is None:
            raise config.fault(
                key, f"is missing: whose hidden states does the draft read? The published drafts have {[*FOUR_LAYERS]}"
            )
        return FOUR_LAYERS if config.flag(FOUR_LAYERS_KEY) else LAST_LAYER
    found = tuple(value) if isinstance(value, list) else (value,)
    if problem := layers_fault(found):
        raise config.fault(key, problem)
    return found


def layers_fault(layers: tuple[Any, ...]) -> str | None:
    """What is wrong with the layers of a feature, as the end of a sentence; None for nothing."""
    if not 0 < len(layers) <= MOST_LAYERS:
        return f"has {len(layers)} layers; it must have 1 to {MOST_LAYERS}"
    wrong = next((layer for layer in layers if type(layer) is not int or layer >= 0), None)
    if wrong is not None:
        return f"has {shown(wrong)}; layers are counted from the last one, which is -1"
    if len(set(layers)) < len(layers):
        return f"is {shown(list(layers))}; each layer may be there once"
    return None


def _first(keys: tuple[str, ...], config: Config) -> tuple[str, Any]:
    """The first of the keys that has a value, and the value; the first key and None if none has."""
    return next(((key, config.values[key]) for key in keys if config.values.get(key) is not None), (keys[0], None))


def _stored(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """The file that holds the projection, and its tensors; None if there is none. Two files must hold the same."""
    found: list[tuple[Path, dict[str, Tensor]]] = []
    if has_file(folder / TORCH_FILE, BadCheckpoint):
        found.append((folder / TORCH_FILE, _of_projection(read_torch_file(folder / TORCH_FILE))))
    inner = folder / FOLDER
    if inner.is_symlink():
        raise BadCheckpoint(f"{inner}: is a link; put the folder itself in its place (cp -rL)")
    if inner.is_dir() and has_file(inner / ONE_FILE, BadCheckpoint):
        found.append((inner / ONE_FILE, _of_projection(read_header(inner / ONE_FILE))))
    if len(found) == 2 and not _same(found[0][1], found[1][1]):
        raise BadCheckpoint(
            f"{folder}: {TORCH_FILE} and {FOLDER}/{ONE_FILE} hold different projections; remove the one that does not "
            "belong to this draft"
        )
    return found[0] if found else None


def _of_projection(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in (WEIGHT, BIAS) if name in tensors}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same values, of whatever type."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    return all(a.shape == b.shape and {a.dtype, b.dtype} <= set(DTYPES) and equal_tensors(a, b) for a, b in pairs)
