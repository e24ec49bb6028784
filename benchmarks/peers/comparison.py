"""Peers on the prompts of a bench, compared with our pair's decoding in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pard_onnx.benchmarks.trial import (
    REFERENCE,
    TUNED,
    PromptSet,
    Ratio,
    Trial,
    Work,
    decode_work,
    rate,
    speed_up,
)
from pard_onnx.models.cache_folder import made_cache_folder
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.pair import Pair

from .peer import PEERS, Models, Peer, PeerRun, Sample, Task, peer_by_name, run_peer

ALL = "all"
# The peers' names of formats with as many bits as ours.
SAME_BITS = {"int4": ("int4", "q4_0"), "int8": ("int8", "q8_0"), "fp32": ("fp32", "float32", "f32")}


@dataclass(frozen=True, slots=True)
class PeerSelection:
    """The peers to measure."""

    peers: tuple[Peer, ...]
    models: Models
    pythons: Mapping[str, Path]  # by name, of peers in environments of their own


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of a bench that apply to peers too."""

    max_new_tokens: int
    threads: int
    chat: bool


@dataclass(frozen=True, slots=True)
class PeerResult:
    """One peer in one mode, compared with our pair."""

    name: str
    mode: str
    format: str
    decode_tokens_per_second: float = 0.0
    overall_tokens_per_second: float = 0.0
    time_to_first_token: float = 0.0
    ratio: Ratio | None = None  # the decode rate of our self-tuned decoding, divided by the peer's
    agreement: float = 0.0  # share of prompts with our tokens; other formats round weights differently
    peak_bytes: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    reason: str | None = None  # why there are no numbers


def select_peers(
    names: str, target: Path | None, draft: Path | None, cache: Path | None, pythons: Sequence[str]
) -> PeerSelection:
    """The selection by the command's options. Raises BadInput for an unknown peer or a missing checkpoint."""
    peers = tuple(PEERS.values()) if names == ALL else tuple(peer_by_name(name.strip()) for name in names.split(","))
    if target is None:
        raise BadInput("--peers needs --peer-target CHECKPOINT, the folder that the pair's target was exported from")
    for folder in filter(None, (target, draft)):
        if not (folder / "config.json").is_file():
            raise BadInput(f"{folder}: is no checkpoint folder (it has no config.json)")
    models = Models(target, cache or made_cache_folder() / "peers", draft)
    return PeerSelection(peers, models, dict(parse_python(text) for text in pythons))


def parse_python(text: str) -> tuple[str, Path]:
    """Split 'optimum=/opt/venv/bin/python' into the peer's name and the path."""
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise BadInput(f"--peer-python takes NAME=PATH of a Python, not {text!r}")
    return peer_by_name(name).name, Path(path)


def compare(
    selection: PeerSelection, pair: Pair, prompts: PromptSet, trial: Trial, options: TaskOptions, progress: Progress
) -> Iterator[PeerResult]:
    """Run every peer in each of its modes, with greedy decoding."""
    ids = tuple(tuple(pair.encode(prompt, chat=options.chat)) for prompt in prompts.prompts)
    task = Task(ids, options.max_new_tokens, pair.target_manifest.spec.vocabulary.eos_ids, options.threads)
    for peer in selection.peers:
        wanted = SAME_BITS.get(pair.target_manifest.precision, ())
        format = next((name for name in peer.formats if name in wanted), None)
        own = selection.pythons.get(peer.name)
        for mode in peer.modes:
            found = run_peer(peer, mode.name, selection.models, task, format=format, python=own, progress=progress)
            yield peer_result(found, trial)


def peer_result(found: PeerRun, trial: Trial) -> PeerResult:
    reason = (found.skipped and f"skipped: {found.skipped}") or (found.failed and f"failed: {found.failed}")
    if reason:
        return PeerResult(found.peer, found.mode, found.format, versions=found.versions, reason=reason)
    decoded = [work(sample) for sample in found.samples]
    same = [one.tokens == ours.tokens for one, ours in zip(found.samples, trial.results[REFERENCE], strict=True)]
    return PeerResult(
        found.peer,
        found.mode,
        found.format,
        decode_tokens_per_second=rate(decoded),
        overall_tokens_per_second=rate([Work(len(one.tokens), one.total_seconds) for one in found.samples]),
        time_to_first_token=median(one.first_seconds for one in found.samples),
        ratio=speed_up([decode_work(result) for result in trial.results[TUNED]], decoded),
        agreement=sum(same) / len(same),
        peak_bytes=found.peak_bytes,
        versions=found.versions,
    )


def work(sample: Sample) -> Work:
    """The tokens after the first, as `decode_work` counts them for our results."""
    return Work(max(0, len(sample.tokens) - 1), sample.total_seconds - sample.first_seconds)
