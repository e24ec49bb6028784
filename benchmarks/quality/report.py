"""A report on exported models: what each loses against the unquantized one, and what it saves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pard_onnx.benchmarks import trial
from pard_onnx.benchmarks.measures.step_costs import CONTEXT, measure_folder
from pard_onnx.benchmarks.trial import SHIPPED, read
from pard_onnx.models import hub
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import Progress, no_progress, require_whole
from pard_onnx.models.demo import corpus
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import FILE_NAME
from pard_onnx.models.spec import ModelSpec, Role
from pard_onnx.runtime.model import Artifact, open_artifact, require_same_tokenizer
from pard_onnx.runtime.pair import load
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.text.tokenizer import Text

from .perplexity import Quality, Report, score
from .reading import DRAFTS, LEAST, Rows, Windows, by_artifact, by_checkpoint, count, windows

WINDOW = 512  # tokens that are read in one piece
PROMPTS, NEW_TOKENS = 8, 64  # that the mean accepted length is of
HELD_OUT = "held-out modules of Python's library"
SAME = ("family", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "pard")
Source = Artifact | Checkpoint


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to report on. models: exported folders of one role; reference: the unquantized model, an exported folder
    or a checkpoint; text: a file, None for HELD_OUT; tokens: of it, at most; draft: of a pair with each target, target:
    with each draft."""

    models: tuple[str, ...]
    reference: str | None = None
    text: Path | None = None
    tokens: int = 2048
    draft: str | None = None
    target: str | None = None
    provider: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        require_whole("--tokens", self.tokens, LEAST)

    def partner(self, role: Role) -> str | None:
        """Who makes a pair with models of this role; BadInput if one for the other role is given."""
        fitting, other = (self.target, self.draft) if role == "draft" else (self.draft, self.target)
        if other is not None:
            partner = "target" if role == "draft" else "draft"
            raise BadInput(f"{other}: the models to report on are {role}s; their partner is a --{partner} DIR")
        return fitting


def report(wanted: Wanted, progress: Progress = no_progress) -> Report:
    """Read the text with every model, the reference first. Everything is checked before the first model runs.

    Raises BadInput for what cannot be compared (roles, tokenizers, models) and for a text that is too short.
    """
    models = [open_artifact(name) for name in wanted.models]
    role = models[0].manifest.role
    for other in models[1:]:
        require_role(other, role)
        require_same_tokenizer(models[0], other)
    reference = None if wanted.reference is None else opened(wanted.reference, role)
    if reference is not None:
        for one in models:
            require_same_model(one, reference, wanted.reference)
        require_whole_vocabulary(reference)
    partner = wanted.partner(role)
    if partner is not None:
        require_same_tokenizer(models[0], open_artifact(partner, "target" if role == "draft" else "draft"))
    artifacts = [one for one in (*models, reference) if isinstance(one, Artifact)]
    capacity = min(one.manifest.capacity for one in artifacts)
    text = cut(text_of(wanted.text), models[0].text(), min(WINDOW, capacity), wanted.tokens)
    base, found = qualities(models, reference, text, wanted, progress)
    drafts = DRAFTS if partner is not None or role == "draft" else None
    title = HELD_OUT if wanted.text is None else wanted.text.name
    return Report(role, title, text.size, base, tuple(found), partner, drafts)


def qualities(
    models: list[Artifact], reference: Source | None, text: Windows, wanted: Wanted, progress: Progress
) -> tuple[Quality | None, list[Quality]]:
    """Of the reference, whose log probabilities wait in a file meanwhile, and of the models."""
    with tempfile.TemporaryFile() as file:
        base = None
        if reference is not None:
            rows = counted(reference, rows_of(reference, text, wanted), text, progress)
            base = replace(quality(reference), fidelity=score(rows, vocabulary(reference), keep=file))
        found = []
        for one in models:
            file.seek(0)
            rows = counted(one, rows_of(one, text, wanted), text, progress)
            scored = score(rows, vocabulary(one), against=file if base else None)
            found.append(replace(quality(one), fidelity=scored))
    for i, one in enumerate(models):
        progress("steps", i, len(models))
        context = min(CONTEXT, one.manifest.capacity)
        (curve,) = measure_folder(one.name, (context,), provider=wanted.provider, threads=wanted.threads)
        partner = wanted.partner(one.manifest.role)
        accepted = None if partner is None else accepted_length(one, partner, wanted)
        found[i] = replace(found[i], accepted=accepted, costs=curve.costs)
    progress("steps", len(models), len(models))
    return base, found


def rows_of(source: Source, text: Windows, wanted: Wanted) -> Iterator[Rows]:
    if isinstance(source, Checkpoint):
        return by_checkpoint(source, text)
    return by_artifact(
        source.folder, source.manifest, text, require_installed(wanted.provider), Threads(wanted.threads)
    )


def counted(source: Source, rows: Iterable[Rows], text: Windows, progress: Progress) -> Iterator[Rows]:
    done, total = 0, count(spec_of(source), text)
    progress(name_of(source), done, total)
    for part in rows:
        yield part
        done += len(part.wanted)
        progress(name_of(source), done, total)


def quality(source: Source) -> Quality:
    """What is known before anything runs."""
    if isinstance(source, Checkpoint):
        size = sum(entry.nbytes for entry in source.tensors.values())
        return Quality(name_of(source), source.spec.dtype, size, ())
    return Quality(source.name, source.manifest.precision, source.manifest.bytes, ())


def accepted_length(one: Artifact, partner: str, wanted: Wanted) -> float:
    """Of the pair, on shipped prompts."""
    target, draft = (partner, one.name) if one.manifest.role == "draft" else (one.name, partner)
    with load(target, draft, provider=wanted.provider, threads=wanted.threads) as pair:
        return trial.accepted_length(pair, read(SHIPPED, PROMPTS).prompts, NEW_TOKENS, DRAFTS)


def text_of(path: Path | None) -> str:
    """The file's text, or HELD_OUT; BadInput for what is none."""
    if path is None:
        return "\n".join(module.source for module in corpus.modules() if module.held_out)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the text cannot be read: {error}") from error
    if not text.strip():
        raise BadInput(f"{path}: is empty; name a file of text that the models were not trained on")
    return text


def cut(text: str, tokenizer: Text, length: int, tokens: int) -> Windows:
    before = tokenizer.encode("")
    return windows(tokenizer.encode(text)[len(before) :], length, tokens, before)


def opened(name: str, role: Role) -> Source:
    """An exported folder, or else a checkpoint."""
    if (Path(name).expanduser() / FILE_NAME).is_file():
        artifact = open_artifact(name)
        require_role(artifact, role)
        return artifact
    folder, _ = hub.resolve_checkpoint(name)
    return Checkpoint.open(folder).as_role(role)


def require_role(one: Artifact, role: Role) -> None:
    if one.manifest.role != role:
        raise BadInput(f"{one.name}: is a {one.manifest.role}; a report is on {role}s alone, ask for another one")


def require_same_model(one: Artifact, reference: Source, name: str | None) -> None:
    for field in SAME:
        ours, theirs = getattr(one.manifest.spec, field), getattr(spec_of(reference), field)
        if ours != theirs:
            raise BadInput(f"{name}: is not the model of {one.name}: {field} is {theirs} there and {ours} here")


def require_whole_vocabulary(reference: Source) -> None:
    if isinstance(reference, Artifact) and reference.manifest.draft_vocabulary:
        size = reference.manifest.draft_vocabulary.size
        raise BadInput(f"--reference {reference.name}: proposes {size} ids alone; name one exported with all of them")


def spec_of(source: Source) -> ModelSpec:
    return source.spec if isinstance(source, Checkpoint) else source.manifest.spec


def vocabulary(source: Source) -> int:
    return spec_of(source).vocabulary.size


def name_of(source: Source) -> str:
    return source.folder.resolve().name if isinstance(source, Checkpoint) else Path(source.name).name
