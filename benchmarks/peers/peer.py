"""Peers: other libraries that decode the same prompts. The table of them, and the run of one of them.

A run converts the models to a form that the peer reads (forms.py), starts the peer's worker script in the peer's
environment (process.py) and collects the events that the worker sends.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pard_onnx.models.checks import Progress, nearest_name
from pard_onnx.models.errors import BadInput, PardError
from pard_onnx.models.records import from_json

from .process import FOLDER, Event, events

if TYPE_CHECKING:  # converts checkpoints; pard-bench --help names the peers
    from .forms import Converter

Form = Literal["checkpoint", "artifact", "gguf", "openvino", "optimum"]
PLAIN = "plain"
LENGTHS = (2, 4, 8)  # draft lengths to choose from
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Mode:
    """A way of decoding that a peer has."""

    name: str
    draft: bool = False  # whether it needs an autoregressive draft model
    draft_lengths: tuple[int, ...] = ()  # the fastest of them on the first prompts is used
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)  # for the worker alone


@dataclass(frozen=True, slots=True)
class Peer:
    """A library that decodes the same prompts."""

    name: str
    worker: str  # a script in this folder
    modules: tuple[str, ...]  # that the worker imports
    install: str  # the command that installs them
    form: Form  # of models, a key of FORMS
    formats: tuple[str, ...]  # of weights, the default first
    modes: tuple[Mode, ...]

    def mode(self, name: str) -> Mode:
        """The mode of that name. Raises BadInput for an unknown one."""
        return _look_up(f"{self.name} has no mode", name, {mode.name: mode for mode in self.modes})

    def format(self, name: str | None) -> str:
        """The format `name`, or the default one. Raises BadInput for an unknown one."""
        return (
            self.formats[0]
            if name is None
            else _look_up(f"{self.name} has no format", name, dict.fromkeys(self.formats, name))
        )


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="transformers",
            worker="transformers_worker.py",
            modules=("torch", "transformers"),
            install="pip install transformers torch",
            form="checkpoint",
            formats=("bfloat16", "float32"),
            modes=(
                Mode(PLAIN),
                Mode("assisted", draft=True, draft_lengths=(4, 10)),
                Mode("prompt-lookup", draft_lengths=(4, 10)),
            ),
        ),
        Peer(
            name="onnxruntime-genai",
            worker="genai_worker.py",
            modules=("onnxruntime_genai",),
            install="pip install onnxruntime-genai",
            form="artifact",
            formats=("int4", "int8", "fp32"),
            modes=(
                Mode(PLAIN),
                Mode("speculative", draft=True, draft_lengths=LENGTHS),
                Mode("prompt-lookup", draft_lengths=LENGTHS, settings={"ngram_size": 3, "ngram_chained_lookup": True}),
            ),
        ),
        Peer(
            name="optimum",
            worker="optimum_worker.py",
            modules=("optimum.onnxruntime",),
            install='pip install "optimum-onnx[onnxruntime]" torch, in an environment of its own',
            form="optimum",
            formats=("int8", "fp32"),
            modes=(Mode(PLAIN),),
        ),
        Peer(
            name="llama.cpp",
            worker="llama_cpp_worker.py",
            modules=("llama_cpp",),
            install="pip install llama-cpp-python",
            form="gguf",
            formats=("q4_0", "q8_0", "f32"),
            modes=(
                Mode(PLAIN),
                # a proposal ends before a token of lower probability
                Mode("speculative", draft=True, draft_lengths=LENGTHS, settings={"min_probability": 0.5}),
                Mode("prompt-lookup", draft_lengths=LENGTHS),
            ),
        ),
        Peer(
            name="openvino",
            worker="openvino_worker.py",
            modules=("openvino_genai",),
            install="pip install openvino-genai",
            form="openvino",
            formats=("q4_0", "q8_0"),
            modes=(
                Mode(PLAIN),
                Mode("speculative", draft=True, draft_lengths=LENGTHS),
                Mode("prompt-lookup", draft_lengths=LENGTHS),
            ),
        ),
    )
}


def peer_by_name(name: str) -> Peer:
    """The peer of that name. Raises BadInput for an unknown one, with the known ones."""
    return _look_up("there is no peer", name, PEERS)


def _look_up(problem: str, name: str, known: Mapping[str, Value]) -> Value:
    if name in known:
        return known[name]
    nearest = nearest_name(name, known)
    hint = f"did you mean {nearest}? " if nearest else ""
    raise BadInput(f"{problem} {name!r}; {hint}known: {', '.join(known)}")


SILENCE = 900.0  # seconds that a worker may take to load, or for one prompt
PROBE = "import sys, importlib.util as u; print([m for m in sys.argv[1:] if not u.find_spec(m)][0:1])"


@dataclass(frozen=True, slots=True)
class Models:
    """Models for peers."""

    target: Path  # a checkpoint folder
    cache: Path  # a folder for converted models
    draft: Path | None = None  # the checkpoint folder of an autoregressive draft
    # Folders that were exported with the role of a target. Peers that read such folders take them as they are.
    artifact: Path | None = None
    draft_artifact: Path | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What peers have to decode."""

    prompts: tuple[tuple[int, ...], ...]  # token ids, the same as our runtime's
    max_new_tokens: int
    eos_ids: tuple[int, ...]  # end a generation and are not counted
    threads: int
    warm_up: int = 1  # generations before the first that is timed


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt's generation; seconds from the prompt's arrival to the first and to the last token."""

    tokens: tuple[int, ...]
    first_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One peer's run in one mode."""

    peer: str
    mode: str
    format: str
    samples: tuple[Sample, ...] = ()  # in the order of the prompts; fewer if the run failed
    versions: tuple[tuple[str, str], ...] = ()  # of the framework's distributions
    load_seconds: float = 0.0
    peak_bytes: int | None = None  # of its process, with loading the model
    draft_length: int = 0  # the one that was used; 0 in plain decoding
    skipped: str | None = None  # why it was not run, in one line
    failed: str | None = None  # why it failed, in one line


@dataclass(frozen=True, slots=True)
class _Ready:
    versions: tuple[tuple[str, str], ...]
    load_seconds: float


@dataclass(frozen=True, slots=True)
class _End:
    peak_bytes: int | None
    draft_length: int


def run_peer(
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
    """Decode the prompts with a peer in `mode`, in the environment of `python` (None: this one).

    Models are converted if necessary. draft_lengths: replace the mode's own. A missing package and an error of the peer
    are part of the result. Raises BadInput for an unknown mode or format, and for a Python that cannot be run.
    """
    from .forms import Converter

    chosen, used = peer.mode(mode), peer.format(format)
    interpreter = python or Path(sys.executable)
    out = PeerRun(peer.name, mode, used)
    if reason := _reason_to_skip(peer, chosen, models, interpreter):
        return replace(out, skipped=reason)
    converter = Converter(models.cache, FOLDER / peer.worker, interpreter, progress)
    try:
        paths = _paths(peer, chosen, models, used, converter)
    except PardError as error:
        return replace(out, failed=str(error))
    if draft_lengths is not None:
        chosen = replace(chosen, draft_lengths=tuple(draft_lengths))
    request = _request(chosen, paths, task, used)
    return _gather(out, events(interpreter, FOLDER / peer.worker, request, silence), len(task.prompts), progress)


def missing(peer: Peer, python: Path | None = None) -> str | None:
    """What the peer needs and its environment lacks, with the command that installs it; None if nothing is missing."""
    interpreter = python or Path(sys.executable)
    try:
        probe = subprocess.run(
            [interpreter, "-c", PROBE, *peer.modules], capture_output=True, encoding="utf-8", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"{interpreter}: is no Python that can be run: {error}") from error
    return None if probe.stdout.strip() == "[]" else f"{peer.modules[-1]} is not installed; run: {peer.install}"


def _reason_to_skip(peer: Peer, mode: Mode, models: Models, python: Path) -> str | None:
    if mode.draft and models.draft is None:
        return f"{mode.name} decoding needs an autoregressive draft, and none was given"
    return missing(peer, python)


def _paths(peer: Peer, mode: Mode, models: Models, format: str, converter: Converter) -> dict[str, str]:
    from .forms import FORMS

    make = FORMS[peer.form]
    existing = (models.artifact, models.draft_artifact) if peer.form == "artifact" else (None, None)
    paths = {"target": existing[0] or make(models.target, format, converter)}
    if mode.draft and models.draft:
        paths["draft"] = existing[1] or make(models.draft, format, converter)
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


def _gather(out: PeerRun, worker_events: Iterator[Event], prompts: int, progress: Progress) -> PeerRun:
    try:
        for event in worker_events:
            out = _added(out, event)
            progress("prompts", len(out.samples), prompts)
    except BadInput as error:  # an event that the protocol does not have
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
