"""`--features` and `--for-draft`: the hidden states that an exported target gives, for a draft that reads them."""

from __future__ import annotations

import argparse
import re

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.projection import layers_fault
from pard_onnx.models.errors import BadInput
from pard_onnx.models.hub import resolve_checkpoint
from pard_onnx.models.manifest import FILE_NAME, Manifest
from pard_onnx.models.spec import ModelSpec

LAYERS = re.compile(r"\s*[-+]?[0-9]{1,9}(\s*,\s*[-+]?[0-9]{1,9})*\s*", re.ASCII)
Layers = tuple[int, ...]


def add_features(out: argparse.ArgumentParser) -> None:
    group = out.add_argument_group("target of a draft that reads its hidden states (PARD-2, P-EAGLE)")
    layers = (
        "an extra output with hidden states of these layers, as --features=-1,-8,-16,-24 (-1: after the last norm), "
        "or of those that a draft reads: its checkpoint, exported folder or hub id"
    )
    group.add_argument("--features", metavar="LAYERS|DRAFT", help=layers)
    group.add_argument("--for-draft", metavar="DRAFT", help="the same, where the draft reads any; others need nothing")


def feature_layers_from_options(options: argparse.Namespace, checkpoint: Checkpoint) -> Layers:
    """The layers of a target's output `hidden_states`, () for none.

    Raises BadInput for layers that it does not have, and for a draft of another target.
    """
    features, draft = options.features, options.for_draft
    for option, value in (("--features", features), ("--for-draft", draft)):
        if value is not None and checkpoint.spec.role != "target":
            raise BadInput(f"{option} {value}: {checkpoint.path} is a draft, and features are a target's; leave it out")
    found: Layers = ()
    if draft is not None:
        found = layers_of_draft(draft, checkpoint.spec) or ()
    if features is None:
        return found
    if LAYERS.fullmatch(features):
        layers = tuple(int(part) for part in features.split(","))
        _require_layers(f"--features={features}", layers, checkpoint.spec)
    else:
        read = layers_of_draft(features, checkpoint.spec)
        if read is None:
            raise BadInput(f"--features {features}: this draft reads no hidden states of its target; leave it out")
        layers = read
    if not set(found) <= set(layers):
        raise BadInput(f"--features={features} beside --for-draft {draft}, which reads {text_of(found)}; name one")
    return layers


def layers_of_draft(name: str, target: ModelSpec) -> Layers | None:
    """The layers whose hidden states a draft reads, None for none. Raises BadInput for a draft of another target."""
    folder, _ = resolve_checkpoint(name)
    spec = Manifest.read(folder).spec if (folder / FILE_NAME).is_file() else Checkpoint.open(folder).spec
    if spec.pard is None:
        raise BadInput(f"{name}: is not a draft: it has no mask id; name the draft that is to run with this target")
    features = spec.pard.features
    if features is None:
        return None
    if features.join == "add" and spec.family != target.family:
        raise BadInput(f"{name}: is a draft for {spec.family} targets; this one is {target.family}")
    if features.width != len(features.layers) * target.hidden:
        size = features.width // len(features.layers)
        raise BadInput(
            f"{name}: reads {len(features.layers)} hidden states of {size} numbers; this target's have "
            f"{target.hidden}: it is the draft of another target"
        )
    if max(features.layers) >= target.layers:
        raise BadInput(f"{name}: reads layer {max(features.layers)} of its target; this one has {target.layers} layers")
    if features.join == "concat" and spec.vocabulary.rows != target.vocabulary.rows:
        raise BadInput(
            f"{name}: its vocabulary has {spec.vocabulary.rows} rows, this target's has {target.vocabulary.rows}: it "
            "is the draft of another target"
        )
    layers = features.layers_of(target.layers)
    _require_layers(name, layers, target)
    return layers


def _require_layers(source: str, layers: Layers, target: ModelSpec) -> None:
    if problem := layers_fault(layers):
        raise BadInput(f"{source}: {problem}")
    if -min(layers) > target.layers + 1:
        raise BadInput(
            f"{source}: the target has no hidden state {min(layers)}; with {target.layers} layers it has -1 to "
            f"-{target.layers + 1}"
        )


def text_of(layers: Layers) -> str:
    return ",".join(map(str, layers)) or "none"
