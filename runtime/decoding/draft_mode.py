"""What a draft reads beside tokens: the target's hidden states, or nothing. Decided once, when a pair is loaded.

The two modes leave different rows in the draft's KV cache, so a pair does not change between them. Nor is the mode
learned: features cost one matmul of the draft's step and a copy of some hundred kilobytes a round, and the draft was
trained to propose better with them. "auto" therefore reads them wherever the target gives them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadArtifact, BadInput, PardWarning, shown
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.spec import TargetFeatures

if TYPE_CHECKING:  # a command's options import this module, and numpy takes longer than their help
    import numpy as np
    from numpy.typing import NDArray

    Columns = slice | NDArray[np.intp]  # of an array, as an index

DraftMode = Literal["auto", "target-dependent", "target-independent"]
AUTO_MODE: DraftMode = "auto"
DEPENDENT: DraftMode = "target-dependent"
INDEPENDENT: DraftMode = "target-independent"
DRAFT_MODES = (AUTO_MODE, DEPENDENT, INDEPENDENT)


def checked_mode(mode: object) -> DraftMode:
    """The mode; BadInput for what is none."""
    if isinstance(mode, str) and mode in DRAFT_MODES:
        return mode
    nearest = nearest_name(mode, DRAFT_MODES) if isinstance(mode, str) else None
    hint = f"did you mean {nearest!r}?" if nearest else f"it is one of {', '.join(DRAFT_MODES)}"
    raise BadInput(f"draft_mode {shown(mode)} is not known; {hint}")


def features_to_read(
    mode: DraftMode, target: Manifest, draft: Manifest | None, names: tuple[str, str]
) -> TargetFeatures | None:
    """What the draft reads of the target in this mode; None for a draft that reads nothing of it.

    names: of the target and the draft, as the user gave them. Raises BadInput for "target-dependent" without a draft
    that can, BadArtifact where the target does not give what the draft reads. In "auto" that is a PardWarning, and the
    draft reads nothing.
    """
    pard = draft.spec.pard if draft else None
    wanted = pard.features if pard else None
    if draft is None or wanted is None:
        if mode == DEPENDENT:
            problem = f"{names[1]} reads no hidden states of its target" if draft else "there is no draft"
            raise BadInput(f"draft_mode {mode!r}, but {problem}; take a PARD-2 draft, or leave the mode out")
        return None
    if mode == INDEPENDENT:
        return None
    found = mismatch(target, draft, wanted, names)
    if found is None:
        return wanted
    if mode == DEPENDENT:
        raise BadArtifact(f"{found}, or take draft_mode {INDEPENDENT!r}")
    warnings.warn(
        f"{found}; until then the draft proposes without them, and fewer of its tokens may be accepted",
        PardWarning,
        stacklevel=3,
    )
    return None


def columns_to_read(features: TargetFeatures, target: Manifest) -> Columns | None:
    """The columns of the target's `hidden_states` that hold these features; None for all of them as they are.

    A target may give more layers than the draft reads, and in another order: it may serve several drafts.
    """
    import numpy as np

    given, hidden = target.feature_layers, target.spec.hidden
    layers = features.layers_of(target.spec.layers)
    if layers == given:
        return None
    places = [given.index(layer) for layer in layers]
    if places == list(range(places[0], places[0] + len(places))):
        return slice(places[0] * hidden, (places[-1] + 1) * hidden)
    return np.concatenate([np.arange(place * hidden, (place + 1) * hidden) for place in places])


def mismatch(target: Manifest, draft: Manifest, wanted: TargetFeatures, names: tuple[str, str]) -> str | None:
    """Why the target does not give what the draft reads, and what to do; None if it does."""
    ours, theirs = names
    another = "take a draft that was trained for this target"
    if wanted.join == "add" and target.spec.family != draft.spec.family:
        families = f"a {draft.spec.family}, but {ours} is a {target.spec.family}"
        return f"{theirs}: reads the hidden states of {families}; {another}"
    width = len(wanted.layers) * target.spec.hidden
    if wanted.width != width:
        return (
            f"{theirs}: reads {wanted.width} numbers a token, but {len(wanted.layers)} layers of {ours} have {width}; "
            f"{another}"
        )
    if max(wanted.layers) >= target.spec.layers:
        return f"{theirs}: reads layer {max(wanted.layers)}, but {ours} has {target.spec.layers} layers; {another}"
    wanted_layers = wanted.layers_of(target.spec.layers)
    if set(wanted_layers) <= set(target.feature_layers):
        return None
    layers = ",".join(map(str, wanted_layers))
    given = "none" if not target.feature_layers else ",".join(map(str, target.feature_layers))
    both = ",".join(map(str, dict.fromkeys((*wanted_layers, *target.feature_layers))))
    return (
        f"{theirs}: reads the target's hidden states of layers {layers}, but {ours} was exported with {given}; export "
        f"it again: pard-export --model {target.source.model} --features={both}"
    )
