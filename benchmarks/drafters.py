"""Drafts of one target side by side: which drafters take part in a trial, and their ways of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pard_onnx.models.checks import AUTO
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.decoding.draft_mode import AUTO_MODE, DEPENDENT, INDEPENDENT, DraftMode
from pard_onnx.runtime.pair import Pair, load

from .trial import OWN, PLAIN, REFERENCE, Way, pard_way

LOOKUP = "lookup"  # the label of the target alone, which proposes repetitions of earlier text
SUFFIXES = {DEPENDENT: " (dependent)", INDEPENDENT: " (independent)"}  # of the labels of PARD-2 drafts
OF_DRAFTS = ("draft_provider", "draft_provider_options", "fallback", "threads")  # arguments of `load`
Pairs = Mapping[str, Pair]  # by the label of their drafter; OWN and LOOKUP are the target alone


@contextmanager
def drafters(target: str, drafts: Sequence[str], mode: DraftMode, arguments: Mapping[str, Any]) -> Iterator[Pairs]:
    """Open the drafts beside one target, which is in memory once.

    mode: "auto" opens a PARD-2 draft in both modes where the target gives what it reads; other drafts read tokens alone
    in any mode.
    arguments: of `load`. Raises BadInput for a draft that is named twice, and what `load` raises.
    """
    with ExitStack() as stack:
        of_target = {name: value for name, value in arguments.items() if not name.startswith("draft_")}
        of_drafts = {name: arguments[name] for name in OF_DRAFTS if name in arguments}
        opened = stack.enter_context(load(target, None, cache_bytes=0, **of_target))  # each way reads whole prompts
        pairs = {OWN: opened, LOOKUP: opened}
        start = INDEPENDENT if mode == INDEPENDENT else AUTO_MODE
        for name, label in zip(drafts, labels(drafts), strict=True):
            first = stack.enter_context(load(opened, name, draft_mode=start, cache_bytes=0, **of_drafts))
            if first.draft_name is None:
                raise BadInput(f"--draft {name}: no draft belongs to {target}; name a draft's folder")

            def other(wanted: DraftMode, first: Pair = first) -> Pair:
                return stack.enter_context(load(opened, first, draft_mode=wanted, cache_bytes=0))

            pairs |= {label + suffix: pair for suffix, pair in modes(first, mode, other)}
        yield pairs


def modes(first: Pair, mode: DraftMode, other: Callable[[DraftMode], Pair]) -> Iterator[tuple[str, Pair]]:
    """The modes in which a draft takes part: what follows its label, and its pair.

    first: the draft, open in a mode that it has; other: opens it in another mode.
    """
    own = first.info().draft_mode
    if own is None:  # it reads tokens alone, whatever the mode
        yield "", first
        return
    both: tuple[DraftMode, ...] = (DEPENDENT, INDEPENDENT) if own == DEPENDENT else (INDEPENDENT,)
    for one in both if mode == AUTO_MODE else (mode,):
        yield SUFFIXES[one], first if one == own else other(one)


def labels(drafts: Sequence[str]) -> list[str]:
    """The drafts' names in tables: the last parts of their paths, as many as it takes to tell them apart.

    Raises BadInput for a draft that is named twice.
    """
    parts = [Path(name).parts or (name,) for name in drafts]
    twice = next((name for i, name in enumerate(drafts) if parts[i] in parts[:i]), None)
    if twice is not None:
        raise BadInput(f"--draft {twice}: is given twice; name each draft once")
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(one[-count:]) for one in parts]
        if len({LOOKUP, *found}) == len(found) + 1:
            return found
    return [f"draft {name}" for name in drafts]


def ways_of(pairs: Pairs, lengths: Sequence[int]) -> list[Way]:
    """Plain decoding, exact plain decoding, lookup, and each draft with these lengths and self-tuned."""
    found = [PLAIN, REFERENCE, Way(LOOKUP, AUTO, exact=True, drafter=LOOKUP)]
    for label in pairs:
        if label not in (OWN, LOOKUP):
            found += [pard_way(length, label) for length in lengths]
            found.append(Way(f"{label} auto", AUTO, exact=True, drafter=label))
    return found
