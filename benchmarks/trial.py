"""One pair on one set of prompts: every way of decoding in turn, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import text_lines
from pard_onnx.runtime.options import AUTO
from pard_onnx.runtime.pair import Pair
from pard_onnx.runtime.result import Result

WARM_UP_TOKENS = 16
SEED = 0  # of drawn tokens, unless one is given
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, slots=True)
class Way:
    """How to decode; draft_length 0 is plain decoding."""

    name: str
    draft_length: int | Literal["auto"]
    exact: bool


PLAIN = Way("plain", 0, exact=False)  # the fastest that the target alone can do: one token a step
REFERENCE = Way("plain, exact", 0, exact=True)  # what PARD's tokens must equal

TUNED = Way("auto", AUTO, exact=True)


def pard(draft_length: int) -> Way:
    return Way(f"PARD K={draft_length}", draft_length, exact=True)


@dataclass(frozen=True, slots=True)
class Trial:
    """results: by way, in the order of the prompts."""

    prompts: tuple[str, ...]
    results: dict[Way, tuple[Result, ...]]


@dataclass(frozen=True, slots=True)
class Request:
    """sampling: keyword arguments of `Pair.generate`; greedy without. With a seed, plain decoding and PARD draw the
    same tokens, so outputs are compared all the same."""

    max_new_tokens: int
    chat: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def accepted_length(pair: Pair, prompts: Sequence[str], max_new_tokens: int, draft_length: int) -> float:
    """The mean over all rounds of all prompts, the bonus token counted."""
    accepted: list[int] = []
    for prompt in prompts:
        result = pair.generate(prompt, max_new_tokens=max_new_tokens, draft_length=draft_length)
        accepted += result.stats.accepted
    return sum(accepted) / len(accepted)


def run(
    pair: Pair, prompts: Sequence[str], ways: Sequence[Way], request: Request, progress: Progress | None = None
) -> Trial:
    """Warm up, then let every way decode a prompt before the next prompt: a slow minute hits all ways alike."""
    for way in ways:
        decode(pair, prompts[0], way, replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens)))
    results: dict[Way, list[Result]] = {way: [] for way in ways}
    turns = list(in_turn(prompts, ways))
    for done, (prompt, way) in enumerate(turns, 1):
        results[way].append(decode(pair, prompt, way, request))
        if progress:
            progress(done, len(turns))
    return Trial(tuple(prompts), {way: tuple(found) for way, found in results.items()})


def in_turn(prompts: Sequence[str], ways: Sequence[Way]) -> Iterator[tuple[str, Way]]:
    """Each prompt's ways, begun by another one each time: who runs after whom evens out."""
    for i, prompt in enumerate(prompts):
        first = i % len(ways)
        for way in (*ways[first:], *ways[:first]):
            yield prompt, way


def decode(pair: Pair, prompt: str, way: Way, request: Request) -> Result:
    try:
        return pair.generate(
            prompt,
            max_new_tokens=request.max_new_tokens,
            draft_length=way.draft_length,
            exact=way.exact,
            chat=request.chat,
            **({"seed": SEED} | dict(request.sampling)),
        )
    except BadInput as error:
        raise BadInput(f"prompt {prompt[:40]!r}: {error}") from error


def disagreements(trial: Trial, way: Way) -> list[int]:
    """The prompts (by index) on which a way's tokens are not those of plain decoding."""
    pairs = zip(trial.results[REFERENCE], trial.results[way], strict=True)
    return [i for i, (expected, actual) in enumerate(pairs) if expected.tokens != actual.tokens]


SHIPPED = Path(__file__).parent / "prompts.jsonl"
FIELDS = ("data", "prompt")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """name: the file's, without its ending."""

    name: str
    prompts: tuple[str, ...]


def read(path: Path, limit: int | None = None) -> PromptSet:
    """The first `limit` prompts of a file; BadInput names the line that is broken, whether it is used or not."""
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the prompts cannot be read: {error}") from error
    prompts = tuple(text_lines(whole, str(path), FIELDS, empty=False))
    if not prompts:
        raise BadInput(f'{path}: has no prompts; one JSON object a line, the text under "data" or "prompt"')
    return PromptSet(path.stem, prompts[:limit])
