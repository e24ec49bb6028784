"""A target and a draft, checked for another engine, and the files of a deployment."""

from __future__ import annotations

from pathlib import Path

from pard_onnx.models.atomic import atomic_folder
from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.hub import own_draft
from pard_onnx.models.published_drafts import PUBLISHED, drafts_by_name
from pard_onnx.models.system_errors import write_error
from pard_onnx.runtime.model import open_artifact, shared_ids

from .engines import MOST, Deployment, Plan, draft_length
from .served_model import ServedModel, served_model

ELSEWHERE = "choose another --output"


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


def write_deployment(found: Deployment, output: Path) -> None:
    """Write configuration files, serve.sh and serve.ps1 to a new folder, all or nothing. Raises BadInput or Failure."""
    first = found.commands[0]
    files = dict(found.files)
    files["serve.sh"] = f'#!/bin/sh\n# {first.purpose}\ncd "$(dirname "$0")" || exit\nexec {first.posix}\n'
    # The mark at the beginning is how Windows PowerShell knows UTF-8
    files["serve.ps1"] = f"\ufeff# {first.purpose}\nSet-Location -LiteralPath $PSScriptRoot\n{first.powershell}\n"
    try:
        with atomic_folder(output) as partial:
            for name, text in files.items():
                path = partial / name
                path.write_text(text, encoding="utf-8", newline="\n")
                path.chmod(0o755 if name == "serve.sh" else 0o644)
    except FileExistsError as error:
        raise BadInput(f"{output}: is there already; {ELSEWHERE}") from error
    except OSError as error:
        raise write_error(output, error, ELSEWHERE) from error
