"""The drafts that PARD's authors have published, and the targets that each is for.

Names are those of the table in AMD-AGI/PARD's README. A name says which draft to try first, and for a fine-tune under
a name of its own the family says it. Whether a draft fits is decided by the tokens of both, which are compared before
the draft is exported: the drafts of Qwen2.5 and of DeepSeek-R1-Distill-Qwen are for the same family, but end texts with
other tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

AGAIN = r"(?![\d.])"  # the digits before it are the whole version


@dataclass(frozen=True, slots=True)
class PublishedDraft:
    model: str  # hub id
    families: tuple[str, ...]  # of its targets: model_type in their config.json
    names: re.Pattern[str]  # found in the last part of the names of its targets
    kind: Literal["pard", "pard2"] = "pard"  # pard2: reads hidden states of its target


def _draft(
    model: str, families: tuple[str, ...], names: str, kind: Literal["pard", "pard2"] = "pard"
) -> PublishedDraft:
    return PublishedDraft(model, families, re.compile(names, re.IGNORECASE), kind)


PUBLISHED = (
    _draft("amd/PARD-DeepSeek-R1-Distill-Qwen-1.5B", ("qwen2",), r"R1-Distill-Qwen"),
    _draft("amd/PARD-Qwen2.5-0.5B", ("qwen2",), r"Qwen-?2\.5(?!-VL|-Omni)"),
    _draft("amd/PARD-Qwen3-0.6B", ("qwen3", "qwen3_moe"), rf"Qwen-?3{AGAIN}(?!-VL|-Omni|-Next|-Embedding|-Reranker)"),
    _draft("amd/PARD-Llama-3.2-1B", ("llama",), r"Llama-?3(\.[1-9])?(?![\d.]|.*Vision)"),
    _draft("amd/PARD-Llama-4-1B", ("llama4", "llama4_text"), rf"Llama-?4{AGAIN}"),
    _draft("amd/PARD2-Llama-3.1-8B", ("llama",), r"Llama-?3\.1-8B", "pard2"),
    _draft("amd/PARD2-Qwen3-8B", ("qwen3",), r"Qwen-?3-8B", "pard2"),
    _draft("amd/PARD2-Qwen3-14B", ("qwen3",), r"Qwen-?3-14B", "pard2"),
)
SHIPPED = {"demo-target": "demo-draft"}  # the pair that comes with this package


def drafts_by_name(
    target: str, family: str | None = None, kind: Literal["pard", "pard2"] = "pard"
) -> list[PublishedDraft]:
    """The drafts whose targets have such a name, and the family, where it is known.

    target: a hub id, or the name of a folder; family: model_type in its config.json.
    """
    if target in SHIPPED and kind == "pard":
        return [_draft(SHIPPED[target], (family or "",), re.escape(target))]
    last = target.rsplit("/", 1)[-1]
    fits = (one for one in PUBLISHED if one.kind == kind and one.names.search(last))
    return [one for one in fits if family is None or family in one.families]


def draft_candidates(target: str, family: str) -> list[PublishedDraft]:
    """The drafts to compare a target with, the most likely first: those for its name, then others for its family."""
    named = drafts_by_name(target, family)
    if target in SHIPPED:
        return named
    return named + [one for one in PUBLISHED if one.kind == "pard" and family in one.families and one not in named]
