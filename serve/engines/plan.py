"""`Plan`: a target and a draft for another engine, checked to fit, and how many tokens a round are drafted."""

from __future__ import annotations

from dataclasses import dataclass

from pard_onnx.models.checks import DRAFT_LIMIT, require_whole
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.hub import own_draft
from pard_onnx.models.published_drafts import PUBLISHED, drafts_by_name

from .served_model import ServedModel, served_model

USUAL_LENGTH, REASON = 8, "published results of PARD use 8 to 12; measure your own"
LEAST, MOST = 2, 16  # drafts a round
WORTH = 0.1  # the least probability with which the last draft of a round is right


@dataclass(frozen=True, slots=True)
class Plan:
    """What to serve: a target, its draft, and how many tokens a round are drafted."""

    target: ServedModel
    draft: ServedModel | None
    length: int
    reason: str  # for that length


def planned(
    target: str,
    draft: str | None = None,
    length: int | None = None,
    *,
    revision: str | None = None,
    draft_revision: str | None = None,
) -> Plan:
    """What to serve: the models, which are checked to fit, and the number of drafts.

    draft: None for the one that belongs to the target in the library, or else the published one, if there is one.
    Raises BadInput for models that do not fit.
    """
    model = served_model(target, revision)
    if model.is_draft:
        raise BadInput(f"{target}: is a PARD draft; name it with --draft, and its target with --target")
    if draft is None and revision is None and (own := own_draft(target)):
        draft = str(own)
    if draft is None:
        published = next(iter(drafts_by_name(model.known_as, model.family)), None)
        draft = published.model if published else None
    if draft is None and draft_revision is not None:
        raise BadInput(f"--draft-revision {draft_revision}: of which draft? name it with --draft")
    partner = None if draft is None else served_model(draft, draft_revision)
    if partner is not None:
        require_pair(model, partner)
    known, reason = draft_length(partner)
    if length is not None:
        known, reason = require_whole("--draft-length", length, 1, 2 * MOST), "as asked for"
    return Plan(model, partner, known, reason)


def require_pair(target: ServedModel, draft: ServedModel) -> None:
    """BadInput for a draft that is none, or that is not for the target's kind of model."""
    if draft.is_draft is False:
        known = ", ".join(one.model for one in drafts_by_name(target.known_as, target.family))
        raise BadInput(f"{draft.name}: is no PARD draft{f'; {known} is the published one' if known else ''}")
    if target.exported and draft.exported:
        from pard_onnx.runtime.model import open_artifact, shared_ids  # which pard-deploy --help does not need

        artifact = open_artifact(target.exported, "target")
        manifest = open_artifact(draft.exported, "draft").manifest
        shared_ids(artifact, str(draft.exported), draft.exported, manifest.spec, manifest.sizes)
    if target.family is None or draft.family is None:
        return
    published = next((one for one in PUBLISHED if one.model == draft.name), None)
    families = published.families if published else (draft.family,)
    if not {_base(target.family)} & {_base(family) for family in families}:
        raise BadInput(
            f"{draft.name}: is a draft for models of the family {' or '.join(map(shown, families))}, and {target.name} "
            f"is of {shown(target.family)}; take a draft that was made for it"
        )


def _base(family: str) -> str:
    """The family without the kind of its layers: mixtures of experts share the tokenizer of their dense models."""
    return family.removesuffix("_text").removesuffix("_moe")


def draft_length(draft: ServedModel | None) -> tuple[int, str]:
    """How many tokens to draft a round, and why.

    A draft whose format was chosen by measurement (pard-quantize --optimize-for) has its acceptance in its manifest. On
    a server, verifying a few tokens more costs little, so tokens are drafted as long as they are right now and then.
    """
    if draft is None or draft.throughput is None or not draft.throughput.tried:
        return USUAL_LENGTH, REASON
    best = max(draft.throughput.tried, key=lambda one: one.tokens_per_second)
    share = acceptance(best.accepted, min(max(best.draft_length, 1), DRAFT_LIMIT))
    length = next((k for k in range(LEAST, MOST) if share ** (k + 1) < WORTH), MOST)
    measured = f"{best.accepted:.3g} tokens a round with {best.draft_length} drafts, beside {draft.throughput.target}"
    return length, f"measured: {measured}, so a draft is right with probability {share:.2f} after a right one"


def acceptance(accepted: float, length: int) -> float:
    """The probability p of a draft to be right after right ones, where 1 + p + ... + p^length is `accepted`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(length + 1)) < accepted else (low, middle)
    return low
