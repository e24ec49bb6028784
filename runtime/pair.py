"""`load()` and `Pair`: a target and its draft, ready to generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from time import perf_counter
from typing import Any, Unpack, overload

from pard_onnx.models.checks import path_text, require_whole, true_or_false
from pard_onnx.models.errors import BadInput, shown

from . import snapshot
from .asynchronous import in_worker
from .chat import Chat
from .engine import MAX_LIVE, Engine
from .model import Artifact, LoadedModel, open_artifact, open_model, shared_ids
from .options import OptionArguments, Options
from .prefixes import CACHE_BYTES
from .providers.choice import ProviderCandidates, ProviderChoice, draft_candidates, open_first, provider_candidates
from .providers.threads import Threads
from .result import Result
from .sampling.logprobs import checked_top
from .sampling.settings import Sampling
from .scoring import Passage, Score
from .stream import Stream
from .text.control_tokens import ENCODE, TEXT
from .text.prompt import (
    Continuation,
    OneContinuation,
    OnePrompt,
    Prompt,
    as_list,
    encode,
    encode_continued,
    is_chat,
    is_several,
    naming,
    opening_messages,
    paired,
    require_ids,
    token_id,
)
from .text.reply import ReplyForm, reply_form, with_tools
from .text.template import Message, checked_arguments
from .text.tokenizer import UNBOUNDED, Bounds, Text
from .tuning.steps import Widths

A_MODEL = "the folder or the hub id of an exported model"
TO_DETOKENIZE = "what is detokenized is a list of token ids"


def load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None = None,
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
    queue: int | None = None,
    max_live: int = MAX_LIVE,
    cache_bytes: int = CACHE_BYTES,
) -> Pair:
    """Open a pair, or a target alone.

    target, draft: a folder that pard-export has written, or the hub id of one.
    provider: "cpu", "cuda", "directml", "rocm", "migraphx", "webgpu", "npu"; `cuda:1` for a second device; or "auto"
        for the first that is installed, computes both models correctly and is not far slower than the CPU.
    threads: of each step; None for one per physical core.
    share_threads: one thread pool for the process; ONNX Runtime then refuses every other session with its own pool.
    draft_provider: another provider for the draft, which then works while the target does where that pays; None: the
        target's.
    provider_options, draft_provider_options: by the provider's own names.
    fallback: use the CPU if the provider is not installed, does not start or computes wrongly.
    revision, draft_revision: a branch, tag or commit of a hub id. Only a commit is the same files for ever.
    queue: how many generations may wait while others run; 0 refuses them at once with Busy, None is any number.
    max_live: generations that run at the same time, round by round in turns. Each has KV caches of its own, of at most
        `Pair.sequence_bytes`.
    cache_bytes: memory for the KV rows of generations that have ended, from which later prompts with the same beginning
        start; 0 keeps none. Conversations of `Pair.chat` have their own memory.

    The first time on a machine it takes about a second longer: step costs and exact widths are measured, and off the
    CPU the model's steps are checked against single steps and the CPU's.

    Raises BadArtifact (missing, damaged, wrong role, other tokenizer, not for this provider), BadProvider, BadInput.
    Warns with PardWarning where a provider computes only steps of one token correctly, and runs so; and where one of
    the tokenizers has tokens that the other lacks, which the draft then neither reads nor proposes.
    """
    target = path_text("target", target, A_MODEL)
    draft = None if draft is None else path_text("draft", draft, A_MODEL)
    fallback = true_or_false("fallback", fallback)
    pool = Threads(threads, share_threads)
    max_live = require_whole("max_live", max_live, 1)
    cache_bytes = require_whole("cache_bytes", cache_bytes, 0)
    queue = None if queue is None else require_whole("queue", queue, 0)
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
    engine = Engine(target_model, draft_model, shared, queue=queue, max_live=max_live, kept_bytes=cache_bytes)
    return Pair(engine)


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
    """A target, with or without a draft. Each `generate` starts afresh, a `chat` goes on; several may run at a time."""

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

    @property
    def sequence_bytes(self) -> int:
        """The memory of one generation's KV caches if it fills the capacity; a shorter one takes its share of it."""
        return self.engine.sequence_bytes

    async def agenerate(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Result:
        """As `generate`, for asyncio: the event loop stays free. A task that is cancelled ends the generation before
        its next step."""
        stream = await in_worker(lambda: self.stream(prompt, **options))
        return await stream.aread()

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Result: ...

    @overload
    def generate(
        self, prompt: list[OnePrompt] | tuple[OnePrompt, ...], **options: Unpack[OptionArguments]
    ) -> list[Result]: ...

    def generate(self, prompt: Any, **options: Unpack[OptionArguments]) -> Result | list[Result]:
        """Generate to the end; arguments and errors as of `stream`.

        prompt: one prompt, or a list of several: of texts, of lists of token ids, or of lists of messages. Several are
        answered in order, each as in a call of its own: the seed and the timeout are those of each. An error names the
        index; one of a prompt or an option is raised before the first is answered.
        """
        prompt = as_list(prompt, "prompt")
        if not is_several(prompt):
            return self.stream(prompt, **options).read()
        chosen = Options.from_keywords(options, self.engine.model_sampling)
        encoded: list[tuple[list[int], ReplyForm | None]] = []
        for number, one in enumerate(prompt):
            with naming("prompt", number):
                encoded.append(self._encode(one, chosen, self.engine.bounds(chosen, perf_counter())))
                self.engine.settings(chosen).room(len(encoded[-1][0]))
        results: list[Result] = []
        for number, (ids, form) in enumerate(encoded):
            with naming("prompt", number):
                results.append(self.engine.stream(None, ids, chosen, perf_counter(), form).read())
        return results

    def stream(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Stream:
        """Generate, a chunk a round; `Stream.result` once it is read to its end.

        prompt: text, token ids, or chat messages; options: see `Options` and `Sampling`.

        Several may run, in threads and tasks of asyncio; see `load` for how many of them, and docs/applications.md.

        Raises BadInput (TooLong: for a prompt that fills the capacity) at once, Busy on the first chunk if as many
        generations run and wait as the pair was loaded for.
        """
        start = perf_counter()
        chosen = Options.from_keywords(options, self.engine.model_sampling)
        ids, form = self._encode(prompt, chosen, self.engine.bounds(chosen, start))
        return self.engine.stream(None, ids, chosen, start, form)

    @overload
    def score(
        self,
        prompt: Prompt,
        continuation: Continuation,
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> Score: ...

    @overload
    def score(
        self,
        prompt: Prompt | list[OnePrompt] | tuple[OnePrompt, ...],
        continuation: list[OneContinuation] | tuple[OneContinuation, ...],
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        prompt: list[OnePrompt] | tuple[OnePrompt, ...],
        continuation: Continuation,
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> list[Score]: ...

    def score(
        self,
        prompt: Any,
        continuation: Any,
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> Score | list[Score]:
        """How likely the target is to write the continuation (text or token ids) after the prompt.

        The texts are encoded together: a token across their border, such as a space and the word after it, belongs to
        the continuation. The continuation of messages, and with `chat` of a text, is the beginning of the answer.

        Either may be a list of several: of as many prompts as continuations, of continuations of one prompt, or of
        prompts before one continuation. The result is then a list. What consecutive ones have in common is computed
        once.

        logprobs: the number of most likely tokens to name for each place, 0 to 20; chat, template_arguments,
        special_tokens: of the prompt, see `Options`.
        Raises BadInput (TooLong: for more tokens than the capacity), which names the index in a list, before anything
        is computed; Busy if as many generations run and wait as the pair was loaded for.
        """
        top = checked_top("logprobs", logprobs) or 0
        keywords = {"chat": chat, "template_arguments": template_arguments, "special_tokens": special_tokens}
        pairs, several = paired(prompt, continuation)
        if not several:
            return self.engine.score(self.engine.new_sequence(), self._passage(*pairs[0], keywords), top)
        passages: list[Passage] = []
        for number, (one, other) in enumerate(pairs):
            with naming("pair", number):
                passages.append(self._passage(one, other, keywords))
        scores: list[Score] = []
        sequence = self.engine.new_sequence()
        for number, passage in enumerate(passages):
            with naming("pair", number):
                scores.append(self.engine.score(sequence, passage, top))
        return scores

    def _passage(self, prompt: Any, continuation: Any, keywords: dict[str, Any]) -> Passage:
        size = self.target_manifest.spec.vocabulary.size
        ids, first = encode_continued(prompt, continuation, self.text, size, **keywords)
        passage = Passage(tuple(ids), first)
        passage.require_room(self.capacity, self.engine.longer_context)
        return passage

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

    def _encode(
        self, prompt: Prompt, options: Options, bounds: Bounds = UNBOUNDED
    ) -> tuple[list[int], ReplyForm | None]:
        """The prompt's token ids, and how the reply to a chat is read; None for a plain prompt."""
        prompt, size = as_list(prompt, "prompt"), self.target_manifest.spec.vocabulary.size
        conversation = is_chat(prompt, options.chat)
        if not conversation:
            options.require_plain()
        arguments = with_tools(self.text, options.template_arguments, options.tool_use)
        ids = encode(prompt, self.text, size, options.chat, arguments, options.special_tokens, bounds)
        return ids, reply_form(self.text, ids, options.tool_use, arguments) if conversation else None

    def count_tokens(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> int:
        """The number of tokens that the model reads before it answers: `stats.prompt_tokens` of `generate` with the
        same arguments. Errors as of `stream`; a prompt may be longer than the capacity."""
        ids, _ = self._encode(prompt, Options.from_keywords(options, self.engine.model_sampling))
        return len(ids)

    def tokenize(self, text: str, *, add_special_tokens: bool = True, special_tokens: str = ENCODE) -> list[int]:
        """The token ids of a text, which may be empty; those of a plain prompt with the defaults.

        add_special_tokens: whether with the tokens that the tokenizer adds to a text, such as BOS. special_tokens: what
        becomes of those in the text, such as <|im_end|>: they are encoded, "text" keeps them text, and "refuse" raises
        BadInput.
        """
        if not isinstance(text, str):
            raise BadInput(f"the text to tokenize must be text, not {shown(text)}")
        add = true_or_false("add_special_tokens", add_special_tokens)
        return self.text.tokenize(text, add_special_tokens=add, special_tokens=special_tokens)

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Parts of a character that are not whole become the replacement character.

        skip_special_tokens: whether special tokens, such as EOS, are left out.
        """
        items = as_list(ids, "the list of ids")
        if not isinstance(items, list):
            raise BadInput(f"{TO_DETOKENIZE}, not {shown(ids)}")
        tokens = [token_id(item, TO_DETOKENIZE) for item in items]
        require_ids(tokens, self.target_manifest.spec.vocabulary.size, "list")
        return self.text.decode(tokens, skip_special_tokens=true_or_false("skip_special_tokens", skip_special_tokens))

    def close(self) -> None:
        """Free the sessions; Failure while a generation runs or waits. In a forked child it does nothing."""
        self._engine.close()

    def __enter__(self) -> Pair:
        self._engine.process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
