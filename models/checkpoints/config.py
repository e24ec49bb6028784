"""A checkpoint's config.json and generation_config.json: plain values to ModelSpec's parts, faults named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models import checks
from pard_onnx.models.errors import BadCheckpoint, shown
from pard_onnx.models.families import FAMILIES, Family
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.json_files import read_json
from pard_onnx.models.spec import Llama3Scaling, Pard, Rope, Yarn
from pard_onnx.models.system_errors import is_out_of_memory, out_of_memory

from .tensors import unread_weights

FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names to the config's
MOST_LAYERS = 1 << 16  # a list of so many takes no time
LARGEST = 1 << 40  # of whole numbers: far above what models have, and products of some are still exact as floats
NO_TOKEN = -1  # what some tools write where a model has no such token
MASK_KEYS = ("pard_token", "mask_token_id", "ptd_token_id")  # PARD's own, and other toolkits' names for it
SPD_TYPES = ("pard", "pard2")
MOST_LABELS = 1 << 16  # of classifiers; language models have none


@dataclass(frozen=True, slots=True)
class Config:
    """The values of one JSON object and where they stand, for errors."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def fault(self, key: str, problem: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.path}: {self.prefix}{key} {problem}")

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fault(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fault(key, f"is {shown(value)}; it must be a whole number, at least {least}")
        if value > most:
            raise self.fault(key, f"is {shown(value)}; it must be at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fault(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= checks.LARGEST:
            raise self.fault(key, f"is {shown(value)}; it must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fault(key, f"is {shown(value)}; it must be true or false")
        return value

    def inside(self, key: str) -> Config:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fault(key, f"is {shown(value)}; it must be an object")
        return Config(self.path, value or {}, f"{self.prefix}{key}.")

    def ids(self, key: str, rows: int, none: int | None = None) -> tuple[int, ...]:
        """One token id or a list of them, in order, each once; () if absent.

        rows: of the vocabulary. none: a number that stands for no token. An id outside the vocabulary, which the model
        can never generate, is left out where another one is inside.
        """
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        for item in found:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.fault(key, f"holds {shown(item)}; it must be a token id or a list of them")
        known = tuple(dict.fromkeys(item for item in found if 0 <= item < rows))
        outside = next((item for item in found if item != none and item not in known), None)
        if outside is not None and not known:
            raise self.fault(key, f"is {shown(outside)}, outside the vocabulary of {rows} rows")
        return known


def read_config(folder: Path) -> Config:
    """config.json of a checkpoint folder. Raises BadCheckpoint."""
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder}: no such folder; --model takes a checkpoint folder or a hub id")
    if not has_file(folder / FILE, BadCheckpoint):
        raise BadCheckpoint(f"{folder}: no {FILE}, so not a Hugging Face checkpoint folder{unread_weights(folder)}")
    return Config(folder / FILE, read_json(folder / FILE, BadCheckpoint))


def family_of(config: Config) -> Family:
    """The config's family, once everything that this package could not export faithfully is ruled out."""
    name = config.values.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise config.fault("model_type", f"is {shown(name)}; supported families: {', '.join(FAMILIES)}")
    if isinstance(labels := config.values.get("num_labels"), int) and labels > MOST_LABELS:
        raise config.fault("num_labels", f"is {shown(labels)}; transformers would make a name for each: remove it")
    for switch in family.off:
        if config.flag(switch):
            raise config.fault(switch, f"is true; {family.name} checkpoints are supported without it only")
    for key in family.null:
        if (value := config.values.get(key)) is not None:
            raise config.fault(key, f"is {shown(value)}; {family.name} checkpoints are supported without it only")
    key = family.activation_key
    if (activation := config.values.get(key, family.activation)) != family.activation:
        raise config.fault(key, f"is {shown(activation)}; only {shown(family.activation)} is supported")
    if family.windows is None:
        _refuse_sliding_window(config, family)
    return family


def kv_heads_of(config: Config, family: Family, heads: int) -> int:
    """`num_key_value_heads`; left out, it is the default of the family's config class in transformers."""
    key = "num_key_value_heads"
    if key in config.values and config.values[key] is None and not family.null_kv_heads:
        raise config.fault(key, f"is None, which transformers refuses for {family.name}; write a number")
    default = heads if key in config.values or family.kv_heads is None else family.kv_heads
    count = config.integer(key, default)
    if heads % count:
        missing = "" if key in config.values else f"missing, and {family.name}'s default is "
        raise config.fault(key, f"is {missing}{count}, which does not divide {heads} heads")
    return count


def _refuse_sliding_window(config: Config, family: Family) -> None:
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list):
        other = next((kind for kind in kinds if kind != "full_attention"), None)
        if other is not None:
            raise config.fault("layer_types", f"has {shown(other)}; only full attention is supported")
        return
    window = config.values.get("sliding_window", family.window)
    # Qwen2's configs name a window and switch it off, or let it begin past the last layer
    first = config.integer("max_window_layers", default=0, least=0)
    used = config.flag("use_sliding_window", family.window_used) and first < config.integer("num_hidden_layers")
    # One that no two positions lie outside of changes nothing
    wide = isinstance(window, int) and window >= max_positions_of(config, rope_of(config, family.theta))
    if window is not None and used and not wide:
        raise config.fault("sliding_window", f"is {window}; only full attention is supported")


def rope_of(config: Config, theta: float = 10_000.0) -> Rope:
    """Rotary facts, in transformers 5's form (`rope_parameters`) or the older one (`rope_scaling`)."""
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    return rope_in(config, config.inside(key), config.number("rope_theta", theta))


def rope_in(config: Config, part: Config, theta: float) -> Rope:
    """The rotary facts of one object in a config; theta: where it names none."""
    theta = part.number("rope_theta", theta)
    partial = part.values.get("partial_rotary_factor", config.values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise config.fault("partial_rotary_factor", f"is {partial}; only whole-head rotation is supported")
    kind = part.values.get("rope_type", part.values.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        return Rope(theta, llama3=_llama3(config, part))
    if kind == "yarn":
        return Rope(theta, yarn=_yarn(config, part))
    raise part.fault("rope_type", f"is {shown(kind)}; supported: default, llama3, yarn")


def _llama3(config: Config, part: Config) -> Llama3Scaling:
    return Llama3Scaling(
        factor=part.number("factor"),
        low_freq_factor=part.number("low_freq_factor"),
        high_freq_factor=part.number("high_freq_factor"),
        original_max_position_embeddings=part.integer(
            "original_max_position_embeddings", config.integer("max_position_embeddings")
        ),
    )


def _yarn(config: Config, part: Config) -> Yarn:
    """transformers' defaults; a 0 among the betas means the default to it too."""
    original = "original_max_position_embeddings"
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    attention_factor, mscale, all_dim = (part.number(k) if part.values.get(k) is not None else None for k in optional)
    factor = part.number("factor")
    if factor < 1:
        raise part.fault("factor", f"is {factor:g}; YaRN stretches by at least 1")
    return Yarn(
        factor=factor,
        # Where both have it, transformers takes the outer one
        original_max_position_embeddings=config.integer(
            original, part.integer(original, config.integer("max_position_embeddings"))
        ),
        beta_fast=part.number("beta_fast", 32.0),
        beta_slow=part.number("beta_slow", 1.0),
        attention_factor=attention_factor,
        mscale=mscale,
        mscale_all_dim=all_dim,
        truncate=part.flag("truncate", True),
    )


def max_positions_of(config: Config, rope: Rope) -> int:
    """`max_position_embeddings`, or what YaRN stretches the original length to where that is more.

    Qwen2.5's and Qwen3's cards leave `max_position_embeddings` as it is and add the factor: vLLM takes
    original * factor then, and transformers computes its tables for any position.
    """
    stated = config.integer("max_position_embeddings")
    return max(stated, rope.yarn.positions) if rope.yarn else stated


def dtype_of(config: Config, stored: str) -> str:
    """The precision of the checkpoint; `stored` is safetensors' name of its embedding's, used if config has none.

    Some tools write torch's name (`torch.bfloat16`), or `auto`, which is the stored precision.
    """
    key = "dtype" if config.values.get("dtype") is not None else "torch_dtype"
    value = config.values.get(key)
    name = DTYPES.get(stored, stored) if value in (None, "auto") else str(value).removeprefix("torch.")
    if name not in DTYPES.values():
        raise config.fault(
            key, f"is {shown(name if value is None else value)}; supported: {', '.join(DTYPES.values())}"
        )
    return name


def eos_and_bos(config: Config, family: Family, rows: int) -> tuple[tuple[int, ...], int | None]:
    """End-of-sequence ids (generation_config.json's list wins over config.json's) and the first token's id."""
    path = config.path.with_name(GENERATION_FILE)
    generation = Config(path, read_json(path, BadCheckpoint) if has_file(path, BadCheckpoint) else {})
    # null means none, absent means the family's default
    default = family.eos_ids if "eos_token_id" not in config.values else ()
    eos, bos = (
        generation.ids(key, rows, NO_TOKEN) or config.ids(key, rows, NO_TOKEN)
        for key in ("eos_token_id", "bos_token_id")
    )
    default_bos = family.bos_id if "bos_token_id" not in config.values else None
    return eos or default, bos[0] if bos else default_bos


def pard_of(config: Config, rows: int) -> Pard | None:
    """The facts of a PARD draft, or None for an ordinary model. rows: of the vocabulary."""
    kind = config.values.get("spd_type")
    if kind not in (None, *SPD_TYPES):
        raise config.fault("spd_type", f"is {shown(kind)}; only {' and '.join(map(repr, SPD_TYPES))} are supported")
    named = {key: config.ids(key, rows) for key in MASK_KEYS}
    masks = {key: ids[0] for key, ids in named.items() if ids}
    if len(set(masks.values())) > 1:
        raise config.fault(" and ".join(masks), f"disagree: {sorted(set(masks.values()))}")
    if not masks:
        if kind:
            raise config.fault("spd_type", f"is {kind!r} but the draft has no mask id; add {MASK_KEYS[0]}")
        return None
    return Pard(next(iter(masks.values())), kind or "pard")


@contextmanager
def transformers_refusals(folder: Path) -> Iterator[None]:
    """What transformers cannot read or build of a checkpoint is the checkpoint's fault: BadCheckpoint."""
    try:
        yield
    except Exception as error:  # of every kind: its own, huggingface_hub's, torch's
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise BadCheckpoint(f"{folder / FILE}: transformers refuses it: {error}") from error
