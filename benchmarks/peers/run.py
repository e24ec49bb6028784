"""One peer on a set of prompts: its model made, its worker run, its events gathered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput, PardError
from pard_onnx.models.records import from_json

from .forms import FORMS, Workshop
from .process import HERE, Event, events
from .table import Mode, Peer

SILENCE = 900.0  # seconds that a worker may take to load, or for one prompt
PROBE = "import sys, importlib.util as u; print([m for m in sys.argv[1:] if not u.find_spec(m)][0:1])"


@dataclass(frozen=True, slots=True)
class Models:
    """Checkpoint folders, and where forms made of them are kept. draft: an autoregressive one.

    artifact, draft_artifact: exported folders of role target that exist already; taken by peers that read such, in
    whatever format they are.
    """

    target: Path
    cache: Path
    draft: Path | None = None
    artifact: Path | None = None
    draft_artifact: Path | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """prompts: token ids, the same that our runtime gets; eos_ids end a generation and are not counted."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    threads: int
    warm_up: int = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt's generation; seconds from the prompt's arrival to the first and to the last token."""

    tokens: tuple[int, ...]
    first_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class PeerRun:
    """samples: in the order of the prompts, fewer if it failed on the way. skipped, failed: why, in one line.

    versions: of the framework's distributions; peak_bytes: of its process, the model's load included;
    draft_length: the one taken, 0 in plain decoding.
    """

    peer: str
    mode: str
    format: str
    samples: tuple[Sample, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    load_seconds: float = 0.0
    peak_bytes: int | None = None
    draft_length: int = 0
    skipped: str | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class _Ready:
    versions: tuple[tuple[str, str], ...]
    load_seconds: float


@dataclass(frozen=True, slots=True)
class _End:
    peak_bytes: int | None
    draft_length: int


def run(
    peer: Peer,
    mode: str,
    models: Models,
    task: Task,
    *,
    format: str | None = None,
    python: Path | None = None,
    draft_lengths: Sequence[int] | None = None,
    silence: float = SILENCE,
    progress: Progress = lambda *_: None,
) -> PeerRun:
    """Let `peer` decode the prompts in `mode`, in the environment of `python` (None: this one).

    What is missing or goes wrong on the peer's side is in the result, by name; BadInput only for an unknown mode or
    format, and for a Python that is none. draft_lengths: instead of the mode's own, of which the fastest on the first
    prompts is taken. Models are converted if need be.
    """
    chosen, used = peer.mode(mode), peer.format(format)
    interpreter = python or Path(sys.executable)
    out = PeerRun(peer.name, mode, used)
    if reason := _unfit(peer, chosen, models, interpreter):
        return replace(out, skipped=reason)
    shop = Workshop(models.cache, interpreter, progress)
    try:
        paths = _paths(peer, chosen, models, used, shop)
    except PardError as error:
        return replace(out, failed=str(error))
    if draft_lengths is not None:
        chosen = replace(chosen, draft_lengths=tuple(draft_lengths))
    request = _request(chosen, paths, task, used)
    return _gather(out, events(interpreter, HERE / peer.worker, request, silence), len(task.prompts), progress)


def missing(peer: Peer, python: Path | None = None) -> str | None:
    """What the environment lacks that the peer needs, and how to get it; None if nothing."""
    interpreter = python or Path(sys.executable)
    try:
        probe = subprocess.run([interpreter, "-c", PROBE, *peer.modules], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"{interpreter}: is no Python that can be run: {error}") from error
    return None if probe.stdout.strip() == "[]" else f"{peer.modules[-1]} is not installed; run: {peer.install}"


def _unfit(peer: Peer, mode: Mode, models: Models, python: Path) -> str | None:
    if mode.draft and models.draft is None:
        return f"{mode.name} decoding needs an autoregressive draft, and none was given"
    return missing(peer, python)


def _paths(peer: Peer, mode: Mode, models: Models, format: str, shop: Workshop) -> dict[str, str]:
    make = FORMS[peer.form]
    given = (models.artifact, models.draft_artifact) if peer.form == "artifact" else (None, None)
    paths = {"target": given[0] or make(models.target, format, shop)}
    if mode.draft and models.draft:
        paths["draft"] = given[1] or make(models.draft, format, shop)
    return {part: str(path.resolve()) for part, path in paths.items()}


def _request(mode: Mode, paths: dict[str, str], task: Task, format: str) -> dict[str, Any]:
    return {
        "mode": mode.name,
        "models": paths,
        "threads": task.threads,
        "prompts": task.prompts,
        "max_new_tokens": task.max_new_tokens,
        "eos_ids": task.eos_ids,
        "warm_up": task.warm_up,
        "draft_lengths": mode.draft_lengths,
        "format": format,
        "settings": dict(mode.settings),
    }


def _gather(out: PeerRun, told: Iterator[Event], prompts: int, progress: Progress) -> PeerRun:
    try:
        for event in told:
            out = _added(out, event)
            progress("prompts", len(out.samples), prompts)
    except BadInput as error:  # an event that is none of this protocol's
        return replace(out, failed=f"its worker talks nonsense: {error}")
    if not out.skipped and not out.failed and len(out.samples) != prompts:
        return replace(out, failed=f"ended after {len(out.samples)} of {prompts} prompts")
    return out


def _added(out: PeerRun, event: Event) -> PeerRun:
    kind = event["event"]
    facts = {name: value for name, value in event.items() if name not in ("event", "prompt")}
    if kind == "sample":
        return replace(out, samples=(*out.samples, from_json(Sample, facts)))
    if kind == "ready":
        ready = from_json(_Ready, facts)
        return replace(out, versions=ready.versions, load_seconds=ready.load_seconds)
    if kind == "end":
        end = from_json(_End, facts)
        return replace(out, peak_bytes=end.peak_bytes, draft_length=end.draft_length)
    if kind == "skipped":
        return replace(out, skipped=str(facts.get("reason")))
    if kind == "failed":
        return replace(out, failed=str(facts.get("reason")))
    raise BadInput(f"an event {kind!r}")
