"""What config.json says of each layer's attention: which tokens it sees, and which rotary rule it has."""

from __future__ import annotations

from pard_onnx.models.families.family import Family, Unrotated, Windows
from pard_onnx.models.spec import LayerAttention, Rope

from .config import MOST_LAYERS, Config, rope_in, rope_of

KINDS = ("full_attention", "sliding_attention")  # transformers' names, in `layer_types` and `rope_parameters`


def attention_of(config: Config, family: Family) -> tuple[LayerAttention, ...]:
    """One a layer; () where all are alike, full and rotated."""
    layers = config.integer("num_hidden_layers", most=MOST_LAYERS)
    if family.windows:
        window = config.integer("sliding_window", family.windows.size)
        own = LayerAttention(window, "window_rope")
        found = tuple(LayerAttention() if kind == KINDS[0] else own for kind in _kinds(config, family.windows, layers))
    elif family.unrotated:
        turned = _turned(config, family.unrotated, layers)
        found = tuple(LayerAttention(rotary="rope" if is_turned else None) for is_turned in turned)
    else:
        return ()
    return found if set(found) != {LayerAttention()} else ()


def ropes_of(config: Config, family: Family) -> tuple[Rope, Rope | None]:
    """The rotary rule of full layers, and that of window layers where the family has one for them."""
    windows = family.windows
    if windows is None:
        return rope_of(config, family.theta), None
    nested = config.inside("rope_parameters")
    for kind in nested.values:
        if kind not in KINDS:
            raise nested.fault(kind, f"is not a kind of layer; {family.name} has {', '.join(KINDS)}")
    full, local = (nested.inside(kind) for kind in KINDS)
    if config.values.get("rope_scaling"):  # the older form, of full layers alone
        scaling = config.inside("rope_scaling")
        full = Config(config.path, {**full.values, **scaling.values}, scaling.prefix)
    return (
        rope_in(config, full, config.number("rope_theta", family.theta)),
        rope_in(config, local, config.number(windows.theta_key, windows.theta)),
    )


def _kinds(config: Config, windows: Windows, layers: int) -> list[str]:
    kinds = config.values.get("layer_types")
    if kinds is None:
        pattern = config.integer(windows.pattern_key, windows.pattern)
        return [KINDS[bool((index + 1) % pattern)] for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise config.fault("layer_types", f"is {kinds!r}; it must be a list of {layers}, one a layer")
    for kind in kinds:
        if kind not in KINDS:
            raise config.fault("layer_types", f"has {kind!r}; supported: {', '.join(KINDS)}")
    return kinds


def _turned(config: Config, unrotated: Unrotated, layers: int) -> list[bool]:
    listed = config.values.get(unrotated.key)
    if listed is None:
        interval = config.integer(unrotated.interval_key, unrotated.interval)
        return [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or any(item not in (0, 1) for item in listed):
        raise config.fault(
            unrotated.key, f"is {listed!r}; it must be a list of 0 and 1, one of the {layers} layers each"
        )
    return [bool(item) for item in listed[:layers]]
