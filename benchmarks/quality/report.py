"""A report on exported models: the quality of each compared with the unquantized model, its size and its speed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pard_onnx.benchmarks import trial
from pard_onnx.benchmarks.measures import CONTEXT
from pard_onnx.benchmarks.measures.step_costs import measure_folder
from pard_onnx.benchmarks.trial import SHIPPED, read_prompts
from pard_onnx.models import hub
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import Progress, no_progress, require_whole
from pard_onnx.models.demo import corpus
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import FILE_NAME
from pard_onnx.models.spec import ModelSpec, Role
from pard_onnx.runtime.model import Artifact, open_artifact, require_same_tokenizer, shared_ids
from pard_onnx.runtime.pair import load
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.text.tokenizer import Text

from .perplexity import (
    DRAFTS,
    LEAST_TOKENS,
    Quality,
    Report,
    TextRows,
    Windows,
    artifact_rows,
    checkpoint_rows,
    cut_windows,
    row_count,
    score_rows,
)

WINDOW = 512  # tokens
PROMPTS, NEW_TOKENS = 8, 64  # from which the mean accepted length is measured
HELD_OUT = "held-out modules of Python's library"
# Fields of ModelSpec that are equal in a model and its reference.
SAME_FACTS = ("family", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "pard")
Model = Artifact | Checkpoint


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """The models to report on, with the options of the report."""

    models: tuple[str, ...]  # exported folders of one role
    reference: str | None = None  # the unquantized model: an exported folder or a checkpoint
    text: Path | None = None  # a file; None: HELD_OUT
    tokens: int = 2048  # the most that are read of the text
    draft: str | None = None  # forms a pair with each target
    target: str | None = None  # forms a pair with each draft
    provider: str = "cpu"
    threads: int | None = None
    adapter: str | None = None  # a LoRA adapter, merged into a reference that is a checkpoint

    def __post_init__(self) -> None:
        if self.adapter is not None and self.reference is None:
            raise BadInput(f"--adapter {self.adapter}: is merged into the --reference; name its checkpoint")
        require_whole("--tokens", self.tokens, LEAST_TOKENS)

    def partner(self, role: Role) -> str | None:
        """The model that forms a pair with models of this role. Raises BadInput for a model of the same role."""
        partner_name, other = (self.target, self.draft) if role == "draft" else (self.draft, self.target)
        if other is not None:
            partner = "target" if role == "draft" else "draft"
            raise BadInput(f"{other}: the models to report on are {role}s; their partner is a --{partner} DIR")
        return partner_name


def make_report(request: ReportRequest, progress: Progress = no_progress) -> Report:
    """Read the text with every model, the reference first. Everything is checked before the first model runs.

    Raises BadInput for models that cannot be compared (by role, tokenizer or shape) and for a text that is too short.
    """
    models = [open_artifact(name) for name in request.models]
    role = models[0].manifest.role
    for other in models[1:]:
        require_role(other, role)
        require_same_tokenizer(models[0], other)
    reference = None if request.reference is None else open_model(request.reference, role, request.adapter)
    if reference is not None:
        for one in models:
            require_same_model(one, reference, request.reference)
        require_whole_vocabulary(reference)
    partner = request.partner(role)
    if partner is not None:
        other = open_artifact(partner, "target" if role == "draft" else "draft")
        target, draft = (other, models[0]) if role == "draft" else (models[0], other)
        shared_ids(target, draft.name, draft.folder, draft.manifest.spec, draft.manifest.sizes)
    artifacts = [one for one in (*models, reference) if isinstance(one, Artifact)]
    capacity = min(one.manifest.capacity for one in artifacts)
    text = tokenized_windows(read_text(request.text), models[0].text(), min(WINDOW, capacity), request.tokens)
    base, found = measure_models(models, reference, text, request, progress)
    drafts = DRAFTS if partner is not None or role == "draft" else None
    title = HELD_OUT if request.text is None else request.text.name
    return Report(role, title, text.size, base, tuple(found), partner, drafts)


def measure_models(
    models: list[Artifact], reference: Model | None, text: Windows, request: ReportRequest, progress: Progress
) -> tuple[Quality | None, list[Quality]]:
    """The quality of the reference, whose log probabilities are kept in a temporary file, and of the models."""
    with tempfile.TemporaryFile() as file:
        base = None
        if reference is not None:
            rows = with_progress(reference, model_rows(reference, text, request), text, progress)
            base = replace(describe(reference), fidelity=score_rows(rows, vocabulary_size(reference), keep=file))
        found = []
        for one in models:
            file.seek(0)
            rows = with_progress(one, model_rows(one, text, request), text, progress)
            scored = score_rows(rows, vocabulary_size(one), against=file if base else None)
            found.append(replace(describe(one), fidelity=scored))
    for i, one in enumerate(models):
        progress("steps", i, len(models))
        context = min(CONTEXT, one.manifest.capacity)
        (curve,) = measure_folder(one.name, (context,), provider=request.provider, threads=request.threads)
        partner = request.partner(one.manifest.role)
        accepted = None if partner is None else accepted_length(one, partner, request)
        found[i] = replace(found[i], accepted=accepted, costs=curve.costs)
    progress("steps", len(models), len(models))
    return base, found


def model_rows(model: Model, text: Windows, request: ReportRequest) -> Iterator[TextRows]:
    if isinstance(model, Checkpoint):
        return checkpoint_rows(model, text)
    return artifact_rows(
        model.folder, model.manifest, text, require_installed(request.provider), Threads(request.threads)
    )


def with_progress(model: Model, rows: Iterable[TextRows], text: Windows, progress: Progress) -> Iterator[TextRows]:
    done, total = 0, row_count(model_spec(model), text)
    progress(model_name(model), done, total)
    for part in rows:
        yield part
        done += len(part.wanted)
        progress(model_name(model), done, total)


def describe(model: Model) -> Quality:
    """The facts about a model that are known before it runs."""
    if isinstance(model, Checkpoint):
        size = sum(entry.nbytes for entry in model.tensors.values())
        return Quality(model_name(model), model.spec.dtype, size, ())
    return Quality(model.name, model.manifest.precision, model.manifest.bytes, ())


def accepted_length(one: Artifact, partner: str, request: ReportRequest) -> float:
    """Mean accepted length of the pair, on the shipped prompts."""
    target, draft = (partner, one.name) if one.manifest.role == "draft" else (one.name, partner)
    with load(target, draft, provider=request.provider, threads=request.threads, cache_bytes=0) as pair:
        return trial.accepted_length(pair, read_prompts(SHIPPED, PROMPTS).prompts, NEW_TOKENS, DRAFTS)


def read_text(path: Path | None) -> str:
    """The file's text, or HELD_OUT. Raises BadInput for a file that cannot be read or is empty."""
    if path is None:
        return "\n".join(module.source for module in corpus.modules() if module.held_out)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the text cannot be read: {error}") from error
    if not text.strip():
        raise BadInput(f"{path}: is empty; name a file of text that the models were not trained on")
    return text


def tokenized_windows(text: str, tokenizer: Text, length: int, tokens: int) -> Windows:
    before = tokenizer.encode("")
    return cut_windows(tokenizer.encode(text)[len(before) :], length, tokens, before)


def open_model(name: str, role: Role, adapter: str | None = None) -> Model:
    """The model of an exported folder or of a checkpoint, with an adapter. Raises BadInput for another role."""
    if (Path(name).expanduser() / FILE_NAME).is_file():
        if adapter is not None:
            raise BadInput(f"--adapter {adapter}: {name} is exported already; name the checkpoint as the --reference")
        artifact = open_artifact(name)
        require_role(artifact, role)
        return artifact
    folder, _ = hub.resolve_checkpoint(name)
    merged = None if adapter is None else hub.resolve_adapter(adapter)[0]
    return Checkpoint.open(folder, merged).as_role(role)


def require_role(one: Artifact, role: Role) -> None:
    if one.manifest.role != role:
        raise BadInput(f"{one.name}: is a {one.manifest.role}; a report is on {role}s alone, ask for another one")


def require_same_model(one: Artifact, reference: Model, name: str | None) -> None:
    for field in SAME_FACTS:
        ours, theirs = getattr(one.manifest.spec, field), getattr(model_spec(reference), field)
        if ours != theirs:
            raise BadInput(f"{name}: is not the model of {one.name}: {field} is {theirs} there and {ours} here")


def require_whole_vocabulary(reference: Model) -> None:
    if isinstance(reference, Artifact) and reference.manifest.draft_vocabulary:
        size = reference.manifest.draft_vocabulary.size
        raise BadInput(f"--reference {reference.name}: proposes {size} ids alone; name one exported with all of them")


def model_spec(model: Model) -> ModelSpec:
    return model.spec if isinstance(model, Checkpoint) else model.manifest.spec


def vocabulary_size(model: Model) -> int:
    return model_spec(model).vocabulary.size


def model_name(model: Model) -> str:
    return model.path.resolve().name if isinstance(model, Checkpoint) else Path(model.name).name
