"""Peers on a bench's prompts: what each of them decodes, beside what our pair did in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pard_onnx.benchmarks.statistics import Ratio, Work, decode_work, rate, speed_up
from pard_onnx.benchmarks.trial import REFERENCE, TUNED, PromptSet, Trial
from pard_onnx.models.cache_folder import cache_folder
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.pair import Pair

from .run import Models, PeerRun, Sample, Task, run
from .table import PEERS, Peer, named

ALL = "all"
# What a peer's formats are called that hold as many bits as ours.
ALIKE = {"int4": ("int4", "q4_0"), "int8": ("int8", "q8_0"), "fp32": ("fp32", "float32", "f32")}


@dataclass(frozen=True, slots=True)
class Rivals:
    """Who is to be measured, and with what; pythons: of peers that live in environments of their own."""

    peers: tuple[Peer, ...]
    models: Models
    pythons: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    max_new_tokens: int
    threads: int
    chat: bool


@dataclass(frozen=True, slots=True)
class Rival:
    """One peer in one mode. ratio: our self-tuned decoding over it; agreement: the share of prompts on which it gave
    our tokens (other formats round otherwise); reason: why there are no numbers."""

    name: str
    mode: str
    format: str
    decode_tokens_per_second: float = 0.0
    overall_tokens_per_second: float = 0.0
    time_to_first_token: float = 0.0
    ratio: Ratio | None = None
    agreement: float = 0.0
    peak_bytes: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    reason: str | None = None


def rivals(names: str, target: Path | None, draft: Path | None, cache: Path | None, pythons: Sequence[str]) -> Rivals:
    """From the command's options; BadInput for an unknown peer, and where the checkpoint is missing."""
    peers = tuple(PEERS.values()) if names == ALL else tuple(named(name.strip()) for name in names.split(","))
    if target is None:
        raise BadInput("--peers needs --peer-target CHECKPOINT, the folder that the pair's target was exported from")
    for folder in filter(None, (target, draft)):
        if not (folder / "config.json").is_file():
            raise BadInput(f"{folder}: is no checkpoint folder (it has no config.json)")
    models = Models(target, cache or cache_folder() / "peers", draft)
    return Rivals(peers, models, dict(python(text) for text in pythons))


def python(text: str) -> tuple[str, Path]:
    """'optimum=/opt/venv/bin/python' to its parts."""
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise BadInput(f"--peer-python takes NAME=PATH of a Python, not {text!r}")
    return named(name).name, Path(path)


def compare(
    rivals: Rivals, pair: Pair, prompts: PromptSet, trial: Trial, options: TaskOptions, progress: Progress
) -> Iterator[Rival]:
    """Every peer in each of its modes, greedily."""
    ids = tuple(tuple(pair.encode(prompt, chat=options.chat)) for prompt in prompts.prompts)
    task = Task(ids, options.max_new_tokens, pair.target_manifest.spec.vocabulary.eos_ids, options.threads)
    for peer in rivals.peers:
        wanted = ALIKE.get(pair.target_manifest.precision, ())
        format = next((name for name in peer.formats if name in wanted), None)
        own = rivals.pythons.get(peer.name)
        for mode in peer.modes:
            found = run(peer, mode.name, rivals.models, task, format=format, python=own, progress=progress)
            yield rival(found, trial)


def rival(found: PeerRun, trial: Trial) -> Rival:
    reason = (found.skipped and f"skipped: {found.skipped}") or (found.failed and f"failed: {found.failed}")
    if reason:
        return Rival(found.peer, found.mode, found.format, versions=found.versions, reason=reason)
    decoded = [work(sample) for sample in found.samples]
    same = [one.tokens == ours.tokens for one, ours in zip(found.samples, trial.results[REFERENCE], strict=True)]
    return Rival(
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
    """The tokens after the first."""
    return Work(max(0, len(sample.tokens) - 1), sample.total_seconds - sample.first_seconds)
