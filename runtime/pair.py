"""`load()` and `Pair`: a target and its draft, ready to generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from time import perf_counter
from typing import Any, Unpack

from pard_onnx.models.checks import path_text, true_or_false
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.hub import own_draft
from pard_onnx.models.library import OWN_DRAFT

from . import snapshot
from .chat import Chat
from .engine import Engine
from .model import Artifact, LoadedModel, open_artifact, open_model, shared_ids
from .options import OptionArguments, Options
from .providers.choice import ProviderCandidates, ProviderChoice, draft_candidates, open_first, provider_candidates
from .providers.threads import Threads
from .result import Result
from .sampling.settings import Sampling
from .stream import Stream
from .text.control_tokens import TEXT
from .text.prompt import Prompt, encode, opening_messages
from .text.template import Message, checked_arguments
from .text.tokenizer import Text
from .tuning.steps import Widths

A_MODEL = "the folder, the name in the library or the hub id of an exported model"


def load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None = OWN_DRAFT,
    provider: str = "cpu",
    threads: int | None = None,
    share_threads: bool = False,
    *,
    draft_provider: str | None = None,
    provider_options: Mapping[str, object] | None = None,
    draft_provider_options: Mapping[str, object] | None = None,
    fallback: bool = False,
    revision: str | None = None,
    draft_revision: str | None = None,
) -> Pair:
    """Open a pair, or a target alone.

    target, draft: a folder that pard-export has written, a name that `pard-models list` shows, or the hub id of such a
        folder.
    draft: "auto" is the draft that belongs to a target of the library, and none for others; None: plain decoding.
    provider: "cpu", "cuda", "directml", "rocm", "migraphx", "webgpu", "npu"; `cuda:1` for a second device; or "auto"
        for the first that is installed, computes both models correctly and is not far slower than the CPU.
    threads: of each step; None for one per physical core.
    share_threads: one thread pool for the process; ONNX Runtime then refuses every other session with its own pool.
    draft_provider: another provider for the draft, which then works while the target does where that pays; None: the
        target's.
    provider_options, draft_provider_options: by the provider's own names.
    fallback: use the CPU if the provider is not installed, does not start or computes wrongly.
    revision, draft_revision: a branch, tag or commit of a hub id. Only a commit is the same files for ever.

    The first time on a machine it takes about a second longer: step costs and exact widths are measured, and off the
    CPU the model's steps are checked against single steps and the CPU's.

    Raises BadArtifact (missing, damaged, wrong role, other tokenizer, not for this provider), BadProvider, BadInput.
    Warns with PardWarning where a provider computes only steps of one token correctly, and runs so; and where one of
    the tokenizers has tokens that the other lacks, which the draft then neither reads nor proposes.
    """
    target = path_text("target", target, A_MODEL)
    draft = None if draft is None else path_text("draft", draft, A_MODEL)
    if draft == OWN_DRAFT:
        found = own_draft(target) if revision is None else None
        draft = str(found) if found else None
    fallback = true_or_false("fallback", fallback)
    pool = Threads(threads, share_threads)
    for name, options in (("provider_options", provider_options), ("draft_provider_options", draft_provider_options)):
        if not isinstance(options, Mapping | None):
            raise BadInput(f"{name} must be a mapping of option names to values, not {shown(options)}")
    if draft is None and (draft_provider is not None or draft_provider_options):
        raise BadInput(f"a provider for the draft ({shown(draft_provider)}), but no draft; name one, or leave it out")
    if draft is None and draft_revision is not None:
        raise BadInput(f"a revision of the draft ({shown(draft_revision)}), but no draft; name one, or leave it out")
    for_target = provider_candidates(provider, provider_options, fallback=fallback)
    for_draft = None
    if draft_provider is not None:
        for_draft = provider_candidates(draft_provider, draft_provider_options, fallback=fallback)
    target_artifact = open_artifact(target, "target", checked_revision("revision", revision))
    draft_artifact = None
    if draft is not None:
        draft_artifact = open_artifact(draft, "draft", checked_revision("draft_revision", draft_revision))
    shared = None
    if draft_artifact:
        facts = draft_artifact.manifest
        shared = shared_ids(target_artifact, draft_artifact.name, draft_artifact.folder, facts.spec, facts.sizes)
    target_model = open_on_first(target_artifact, for_target, pool)
    draft_model = None
    if draft_artifact:
        for_draft = for_draft or draft_candidates(for_target, target_model.provider, draft_provider_options)
        draft_model = open_on_first(draft_artifact, for_draft, pool)
    return Pair(Engine(target_model, draft_model, shared))


def checked_revision(name: str, value: object) -> str | None:
    """The user's revision of a hub id; BadInput for what is no name of one."""
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise BadInput(f"{name} must be a branch, tag or commit of a hub id, not {shown(value)}")
    return value


def open_on_first(artifact: Artifact, candidates: ProviderCandidates, threads: Threads) -> LoadedModel[Any]:
    """The artifact on the first of these providers that runs it."""
    model, choice = open_first(candidates, lambda provider: open_model(artifact, provider, threads))
    return replace(model, reason=choice.reason)


class Pair:
    """A target, with or without a draft. Each `generate` starts afresh, a `chat` goes on; one at a time."""

    def __init__(self, engine: Engine) -> None:
        """See `load`."""
        self._engine = engine
        target, draft = engine.models
        self.target_name, self.draft_name = target.name, draft.name if draft else None
        # The commits of the hub's repositories that they were fetched from; None for local folders
        self.target_commit, self.draft_commit = target.artifact.commit, draft.artifact.commit if draft else None
        self.target_manifest, self.draft_manifest = engine.target_manifest, engine.draft_manifest
        self.choice = ProviderChoice(target.provider, target.reason)
        self.draft_choice = ProviderChoice(draft.provider, draft.reason) if draft else None
        self.kernel = engine.kernel  # of quantized matmuls: an instruction set of this package's, or "onnxruntime"
        self._sequence = engine.shared_sequence()

    @property
    def engine(self) -> Engine:
        """The models and their generations; Failure in a forked child, where the models cannot run."""
        self._engine.process.require()
        return self._engine

    @property
    def text(self) -> Text:
        """The target's tokenizer and chat template, which serve both models."""
        return self.engine.text

    @property
    def capacity(self) -> int:
        """Tokens that a conversation may hold, prompt included."""
        return self.engine.capacity

    @property
    def exact_widths(self) -> Widths | None:
        """The widths of steps whose rows are bitwise equal on this machine; None if no set of them is known."""
        return self.engine.exact_widths

    @property
    def own_sampling(self) -> Sampling | None:
        """The sampling settings of the target's makers, which sampling="model" starts from; None if it names none.

        Raises BadArtifact, naming file and key, for a value that is not valid.
        """
        return self.engine.own_sampling

    def generate(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Result:
        """Generate to the end; arguments and errors as of `stream`."""
        return self.stream(prompt, **options).read()

    def stream(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Stream:
        """Generate, a chunk a round; `Stream.result` once it is read to its end.

        prompt: text, token ids, or chat messages; options: see `Options` and `Sampling`.

        Raises BadInput (TooLong: for a prompt that fills the capacity) at once, Failure on the first chunk
        if another generation runs.
        """
        start = perf_counter()
        chosen = Options.from_keywords(options, self.engine.model_sampling)
        ids = self.encode(
            prompt,
            chat=chosen.chat,
            template_arguments=chosen.template_arguments,
            special_tokens=chosen.special_tokens,
        )
        return self.engine.stream(self._sequence, ids, chosen, start, reuse=False)

    def chat(
        self,
        system: str | None = None,
        messages: Iterable[Message] = (),
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> Chat:
        """A conversation whose turns go on in one KV cache; several may be open. Ends with its last reference.

        system: the system message; messages: what was said before; template_arguments, special_tokens: of every
        turn, see `Options`.
        Raises BadInput if the chat template has no use for the messages, or there is no template.
        """
        opening = opening_messages(self.text, system, messages, template_arguments)
        return Chat(self.engine, opening, None, template_arguments, special_tokens)

    def restore(
        self,
        path: str | PathLike[str],
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> Chat:
        """The conversation that `Chat.save` wrote; KV rows of another draft are left out.

        template_arguments, special_tokens: as of `chat`; the file has none.

        Raises BadArtifact (another file, damaged, another version, another target), TooLong.
        """
        path = path_text("path", path)
        checked_arguments(template_arguments)  # refused before a large file is read
        saved = snapshot.read(path, self.target_manifest, self.draft_manifest, self.engine.new_sequence)
        return Chat(self.engine, *saved, template_arguments, special_tokens)

    def encode(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> list[int]:
        """The prompt's token ids; BadInput for anything that is not a prompt.

        chat: a text is a user's message; template_arguments, special_tokens: see `Options`.
        """
        size = self.target_manifest.spec.vocabulary.size
        return encode(
            prompt, self.text, size, chat=chat, template_arguments=template_arguments, special_tokens=special_tokens
        )

    def close(self) -> None:
        """Free the sessions; Failure while one of them runs. In a forked child it does nothing."""
        self._engine.close()

    def __enter__(self) -> Pair:
        self._engine.process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
