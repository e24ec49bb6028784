"""P-EAGLE drafts: EAGLE-3 heads that propose several tokens in one pass, in the two layouts that vLLM loads.

`architectures: ["LlamaForCausalLMEagle3"]` with the facts of a Llama or Qwen3 at the top level, or speculators' layout,
with `speculators_model_type: "peagle"` and these facts in `transformer_layer_config`. Tensors have the names of such a
model without `model.`; older ones call the first layer `midlayer`. `fc.weight` projects the target's hidden states.
Read beside speculators 0.9 (`PEagleSpeculatorConfig`, `PEagleDraftModel`) and vLLM (`update_peagle`, `llama_eagle3`),
whose defaults are the same: `norm_before_residual`, `norm_before_fc` and `fc_norm` are false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pard_onnx.models.errors import BadCheckpoint, shown
from pard_onnx.models.spec import MASK_FEATURE, PROJECTION, ModelSpec, Pard, TargetFeatures

from .config import MASK_KEYS, Config
from .tensors import HEAD, Tensor, TensorEntry

NAME = "p-eagle"
ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Qwen3ForCausalLM",
    "PeagleLlamaForCausalLM",
    "PeagleQwen3ForCausalLM",
    "PEagleSpeculator",
    "PEagleDraftModel",
)
FAMILIES = ("llama", "qwen3")  # whose layers a draft may have, in both toolkits
TYPE, INNER = "speculators_model_type", "transformer_layer_config"
LAYER_KEYS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
RESIDUAL, VOCABULARY, TARGET_WIDTH = "norm_before_residual", "draft_vocab_size", "target_hidden_size"
NORMS = ("norm_before_fc", "fc_norm")  # switches of norms before the projection
MOST_LAYERS = 16  # of a feature; published drafts have 3
MAPS = ("d2t", "t2d")  # between a draft's own smaller vocabulary and its target's


def eagle_config(config: Config) -> tuple[Config, bool]:
    """The config with a Llama's facts at its top level, and whether it is a P-EAGLE draft's.

    Raises BadCheckpoint for other drafts that read their target's hidden states.
    """
    values, kind = config.values, config.values.get(TYPE)
    if values.get("dflash_config") is not None or kind == "dflash":
        raise config.fault("dflash_config" if kind is None else TYPE, "says DFlash, which is not supported yet; "
            "take a PARD, PARD-2 or P-EAGLE draft")  # fmt: skip
    if kind not in (None, "peagle"):
        raise config.fault(TYPE, f"is {shown(kind)}; only 'peagle' is supported")
    names = values.get("architectures")
    named = isinstance(names, list) and any(name in ARCHITECTURES for name in names)
    if kind is None and not named:
        return config, False
    inner = config.inside(INNER).values if kind else {}
    if kind and not inner:
        raise config.fault(INNER, "is missing")
    own = {key: value for key, value in values.items() if value is not None and key not in ("model_type", INNER)}
    joined = {**inner, **own}
    joined["model_type"] = inner.get("model_type") if kind else values.get("model_type")
    if all(joined.get(key) is None for key in MASK_KEYS):
        raise config.fault(
            MASK_KEYS[1], "is missing: an EAGLE-3 draft without it proposes token by token; take a P-EAGLE draft"
        )
    if joined["model_type"] not in FAMILIES:
        where = f"{INNER}.model_type" if kind else "model_type"
        raise config.fault(where, f"is {shown(joined['model_type'])}; P-EAGLE drafts are {' or '.join(FAMILIES)}")
    found = replace(config, values=joined)
    for key in NORMS:
        if found.flag(key):
            raise config.fault(key, "is true; only drafts without a norm before the projection are supported")
    return found, True


def eagle_tensors(folder: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that this package gives them. Raises BadCheckpoint."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        plain = name.removeprefix("model.").replace("midlayer.", "layers.0.")
        if plain in MAPS:
            raise BadCheckpoint(
                f"{folder}: tensor {plain}: a P-EAGLE draft with a vocabulary of its own is not supported yet; take "
                "one with its target's"
            )
        if plain == "fc.weight":
            plain = f"{PROJECTION}.weight"
        elif plain == MASK_FEATURE and isinstance(tensor, TensorEntry):
            tensor = replace(tensor, shape=tuple(size for size in tensor.shape if size != 1))
        elif plain not in (HEAD, MASK_FEATURE):
            plain = f"model.{plain}"
        renamed[plain] = tensor
    if "model.embed_tokens.weight" not in renamed:
        raise BadCheckpoint(
            f"{folder}: no tensor embed_tokens.weight in its safetensors; copy the target's into it under this name"
        )
    return renamed


def eagle_facts(config: Config, spec: ModelSpec) -> Pard:
    """What the draft reads of its target. Raises BadCheckpoint."""
    assert spec.pard is not None
    rows = config.integer(VOCABULARY, spec.vocabulary.rows)
    if rows != spec.vocabulary.rows:
        raise config.fault(
            VOCABULARY,
            f"is {rows}, and vocab_size {spec.vocabulary.rows}; a vocabulary of the draft's own is not supported yet",
        )
    nested = config.inside("eagle_config")
    if not nested.flag("use_aux_hidden_state", default=True):
        raise nested.fault(
            "use_aux_hidden_state", "is false; only drafts that read layers before the last are supported"
        )
    layers = _layers(config, nested)
    width = len(layers) * config.integer(TARGET_WIDTH, spec.hidden)
    features = TargetFeatures(layers, width, scale=1.0, join="concat", norm_before_residual=config.flag(RESIDUAL))
    return Pard(spec.pard.mask_id, NAME, features)


def _layers(config: Config, nested: Config) -> tuple[int, ...]:
    """The layers that vLLM names: j is what enters layer j, the same number as in transformers' list.

    In rising order, whatever the order of the list: vLLM collects them while it runs from layer to layer, and
    speculators trains on what vLLM collects.
    """
    places = ((part, key) for part in (config, nested) for key in LAYER_KEYS)
    part, key = next(((p, k) for p, k in places if p.values.get(k) is not None), (config, LAYER_KEYS[0]))
    value = part.values.get(key)
    if value is None:
        raise part.fault(
            key, "is missing: whose hidden states does the draft read? With L layers of the target, vLLM's default is "
            "[2, L // 2, L - 3]"
        )  # fmt: skip
    good = isinstance(value, list) and 0 < len(value) == len(set(map(repr, value))) <= MOST_LAYERS
    if not good or any(type(layer) is not int or not 0 <= layer < 1 << 16 for layer in value):
        raise part.fault(key, f"is {shown(value)}; it must be a list of different layers, counted from 0")
    return tuple(sorted(value))
