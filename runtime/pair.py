"""`load()` and `Pair`: a target and its draft, ready to generate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from time import perf_counter
from typing import Any, Unpack, overload

from pard_onnx.models.checks import Progress, function, no_progress, path_text, require_whole, true_or_false
from pard_onnx.models.errors import BadInput, PardWarning, shown
from pard_onnx.models.hub import own_draft
from pard_onnx.models.library import OWN_DRAFT
from pard_onnx.models.logs import logger
from pard_onnx.models.spec import Role

from . import snapshot
from .asynchronous import in_worker
from .chat import Chat
from .decoding.draft_mode import AUTO_MODE, DraftMode, checked_mode
from .engine import MAX_LIVE, Engine
from .info import PairInfo, in_one_line, pair_info
from .loading import DEFAULT_PROVIDER, Source, Wanted, open_pair
from .options import OptionArguments, Options
from .pair_embedding import PairEmbedding
from .pair_scoring import PairScoring
from .prefixes import CACHE_BYTES
from .providers.choice import ProviderChoice
from .providers.threads import Threads
from .result import Result
from .sampling.settings import Sampling
from .speed import Placed, slow_reasons
from .stream import Stream
from .text.control_tokens import ENCODE, TEXT
from .text.overflow import ERROR, Fitted, checked_overflow, fit, require_messages, room_for_reply
from .text.prompt import (
    OnePrompt,
    Prompt,
    as_list,
    encode,
    is_chat,
    is_several,
    naming,
    opening_messages,
    require_ids,
    token_id,
)
from .text.reply import ReplyForm, reply_form, with_tools
from .text.template import Message, checked_arguments, text_of
from .text.tokenizer import UNBOUNDED, Bounds, Text
from .tuning.steps import Widths
from .warm_up import WARM_UP_TEXT, warm_up_runs

LOG = logger(__name__)
A_MODEL = "the folder, the name in the library or the hub id of an exported model"
TO_DETOKENIZE = "what is detokenized is a list of token ids"


def load(
    target: str | PathLike[str] | Pair,
    draft: str | PathLike[str] | Pair | None = OWN_DRAFT,
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
    draft_mode: DraftMode = AUTO_MODE,
    queue: int | None = None,
    max_live: int = MAX_LIVE,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress = no_progress,
) -> Pair:
    """Open a pair, or a target alone.

    target, draft: a folder that pard-export has written, a name that `pard-models list` shows, or the hub id of such a
        folder; or a `Pair`, whose open target or draft is then shared: its weights are in memory once, until all pairs
        that use it are closed, in any order.
    draft: "auto" is the draft that belongs to a target of the library, and none for others; None: plain decoding.
    provider: "cpu", "cuda", "directml", "rocm", "migraphx", "amdgpu", "webgpu", "npu"; `cuda:1` for a second device; or
        "auto" for the first that is installed, computes both models correctly and is not far slower than the CPU.
    threads: of each step; None for one per physical core.
    share_threads: one thread pool for the process; ONNX Runtime then refuses every other session with its own pool.
    draft_provider: another provider for the draft, which then works while the target does where that pays; None: the
        target's.
    provider_options, draft_provider_options: by the provider's own names.
    fallback: use the CPU if the provider is not installed, does not start or computes wrongly.
    revision, draft_revision: a branch, tag or commit of a hub id. Only a commit is the same files for ever.
    draft_mode: of a PARD-2 draft. "target-dependent": it reads the target's hidden states, which the target's export
        must give (pard-export --features); "target-independent": it reads tokens alone, as other drafts do; "auto":
        it reads the hidden states if the target gives them.
    queue: how many generations may wait while others run; 0 refuses them at once with Busy, None is any number.
    max_live: generations that run at the same time, round by round in turns. Each has KV caches of its own, of at most
        `Pair.sequence_bytes`.
    cache_bytes: memory for the KV rows of generations that have ended, from which later prompts with the same beginning
        start; 0 keeps none. Conversations of `Pair.chat` have their own memory.
    progress: is called with a stage ("download target", "verify target", "open target", "measure target", and those of
        the draft), what is done, and the total: bytes in the first two. "download" calls it in other threads. What it
        raises ends the loading.

    The first time on a machine it takes about a second longer: step costs and exact widths are measured, and off the
    CPU the model's steps are checked against single steps and the CPU's.

    Raises BadArtifact (missing, damaged, wrong role, other tokenizer, not for this provider), BadProvider, BadInput.
    Warns with PardWarning where a provider computes only steps of one token correctly, and runs so; where one of
    the tokenizers has tokens that the other lacks, which the draft then neither reads nor proposes; where a PARD-2
    draft cannot read the target's hidden states; and where models
    run slower than they could: without this package's CPU kernels, on the CPU though exported for another device, or
    on another provider than was asked for.
    """
    start = perf_counter()
    progress = function("progress", progress, "a stage", "what is done", "the total")
    of_open_target = (
        isinstance(target, Pair) and isinstance(provider, str) and provider == DEFAULT_PROVIDER
    )  # the default says nothing of it
    max_live = require_whole("max_live", max_live, 1)
    cache_bytes = require_whole("cache_bytes", cache_bytes, 0)
    queue = None if queue is None else require_whole("queue", queue, 0)
    mode = checked_mode(draft_mode)
    wanted = source("target", target)
    if isinstance(draft, str) and draft == OWN_DRAFT:
        found = own_draft(wanted) if isinstance(wanted, str) and revision is None else None
        draft = str(found) if found else None
    opened = open_pair(
        Wanted("target", wanted, None if of_open_target else provider, provider_options, revision),
        Wanted("draft", None if draft is None else source("draft", draft), draft_provider, draft_provider_options,
               draft_revision),
        Threads(threads, share_threads),
        mode=mode,
        fallback=true_or_false("fallback", fallback),
        progress=progress,
    )  # fmt: skip
    models = opened.target, opened.draft, opened.shared, opened.features
    pair = Pair(Engine(*models, queue=queue, max_live=max_live, kept_bytes=cache_bytes))
    new = [model for model in (opened.target, opened.draft) if model and not model.borrowed]
    for line in slow_reasons([Placed(one.name, one.manifest, one.provider, one.reason) for one in new]):
        warnings.warn(line, PardWarning, stacklevel=2)
    LOG.info("loaded in %.2f s: %s", perf_counter() - start, in_one_line(pair.info()))
    return pair


def source(role: Role, given: str | PathLike[str] | Pair) -> Source:
    """The name of a model, or the open model of a pair. BadInput if that has no draft, Failure if it is closed."""
    if not isinstance(given, Pair):
        return path_text(role, given, A_MODEL)
    target, draft = given.engine.models
    if role == "target":
        return target
    if draft is None:
        raise BadInput(f"draft: the pair of {given.target_name} has no draft to share; name the folder of one")
    return draft


class Pair(PairScoring, PairEmbedding):
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

    @overload
    async def agenerate(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Result: ...

    @overload
    async def agenerate(
        self, prompt: list[OnePrompt] | tuple[OnePrompt, ...], **options: Unpack[OptionArguments]
    ) -> list[Result]: ...

    async def agenerate(self, prompt: Any, **options: Unpack[OptionArguments]) -> Result | list[Result]:
        """As `generate`, for asyncio: the event loop stays free. A task that is cancelled ends the generation before
        its next step."""
        streams = await in_worker(lambda: self._streams(prompt, options))
        if isinstance(streams, Stream):
            return await streams.aread()
        results: list[Result] = []
        for number, make in enumerate(streams):
            with naming("prompt", number):
                stream = await in_worker(make)
                results.append(await stream.aread())
        return results

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
        streams = self._streams(prompt, options)
        if isinstance(streams, Stream):
            return streams.read()
        results: list[Result] = []
        for number, make in enumerate(streams):
            with naming("prompt", number):
                results.append(make().read())
        return results

    def _streams(self, prompt: Any, options: OptionArguments) -> Stream | list[Callable[[], Stream]]:
        """The stream of one prompt, or what makes the stream of each of several, which are all checked here."""
        prompt = as_list(prompt, "prompt")
        if not is_several(prompt):
            return self.stream(prompt, **options)
        chosen = Options.from_keywords(options, self.engine.model_sampling)
        encoded: list[tuple[Fitted, ReplyForm | None]] = []
        for number, one in enumerate(prompt):
            with naming("prompt", number):
                encoded.append(self._encode(one, chosen, self.engine.bounds(chosen, perf_counter())))
                self.engine.settings(chosen).room(len(encoded[-1][0].ids))

        def opener(fitted: Fitted, form: ReplyForm | None) -> Callable[[], Stream]:
            return lambda: self._stream(fitted, form, chosen, perf_counter())

        return [opener(*one) for one in encoded]

    def stream(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> Stream:
        """Generate, a chunk a round; `Stream.result` once it is read to its end.

        prompt: text, token ids, or chat messages; options: see `Options` and `Sampling`.

        Several may run, in threads and tasks of asyncio; see `load` for how many of them, and docs/applications.md.

        Raises BadInput (TooLong: for a prompt that fills the capacity) at once, Busy on the first chunk if as many
        generations run and wait as the pair was loaded for.
        """
        start = perf_counter()
        chosen = Options.from_keywords(options, self.engine.model_sampling)
        return self._stream(*self._encode(prompt, chosen, self.engine.bounds(chosen, start)), chosen, start)

    def _stream(self, fitted: Fitted, form: ReplyForm | None, options: Options, start: float) -> Stream:
        return self.engine.stream(None, fitted.ids, options, start, form).telling_dropped(fitted.dropped)

    def chat(
        self,
        system: str | None = None,
        messages: Iterable[Message] = (),
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
        overflow: str = ERROR,
    ) -> Chat:
        """A conversation whose turns go on in one KV cache; several may be open. Ends with its last reference.

        system: the system message; messages: what was said before; template_arguments, special_tokens, overflow: of
        every turn, see `Options`.
        Raises BadInput if the chat template has no use for the messages, or there is no template.
        """
        opening = opening_messages(self.text, system, messages, template_arguments)
        return Chat(self.engine, opening, None, template_arguments, special_tokens, overflow)

    def restore(
        self,
        path: str | PathLike[str],
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
        overflow: str = ERROR,
    ) -> Chat:
        """The conversation that `Chat.save` wrote; KV rows of another draft are left out.

        template_arguments, special_tokens, overflow: as of `chat`; the file has none.

        Raises BadArtifact (another file, damaged, another version, another target), TooLong.
        """
        path = path_text("path", path)
        checked_arguments(template_arguments)  # refused before a large file is read
        checked_overflow(overflow)
        saved = snapshot.read(path, self.target_manifest, self.draft_manifest, self.engine.new_sequence)
        return Chat(self.engine, *saved, template_arguments, special_tokens, overflow)

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

    def _encode(self, prompt: Prompt, options: Options, bounds: Bounds = UNBOUNDED) -> tuple[Fitted, ReplyForm | None]:
        """The prompt's token ids, and how the reply to a chat is read; None for a plain prompt."""
        prompt, size = as_list(prompt, "prompt"), self.target_manifest.spec.vocabulary.size
        conversation = is_chat(prompt, options.chat)
        if not conversation:
            options.require_plain()
        arguments = with_tools(self.text, options.template_arguments, options.tool_use)

        def encoded(prompt: Prompt) -> list[int]:
            handling, continued = options.special_tokens, options.continue_final_message
            return encode(
                prompt, self.text, size, options.chat, arguments, handling, bounds, continued=continued
            )  # fmt: skip

        if options.overflow == ERROR or (options.chat and isinstance(prompt, str)):
            fitted = Fitted(encoded(prompt))
        else:
            engine, messages = self.engine, require_messages(prompt, options.overflow)
            room = room_for_reply(engine.capacity, options.max_new_tokens)
            fitted = fit(messages, options.overflow, encoded, engine.capacity, room, engine.longer_context)
        if not conversation:
            return fitted, None
        opening = text_of(prompt[-1]) if options.continue_final_message else ""
        return fitted, reply_form(self.text, fitted.ids, options.tool_use, arguments, opening)

    def count_tokens(self, prompt: Prompt, **options: Unpack[OptionArguments]) -> int:
        """The number of tokens that the model reads before it answers: `stats.prompt_tokens` of `generate` with the
        same arguments. Errors as of `stream`; a prompt may be longer than the capacity."""
        fitted, _ = self._encode(prompt, Options.from_keywords(options, self.engine.model_sampling))
        return len(fitted.ids)

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

    def info(self) -> PairInfo:
        """What there is to know of this pair: models, versions, precision, where it runs, memory. Facts only, which
        `json.dumps(dataclasses.asdict(pair.info()))` writes."""
        return pair_info(self.engine.models, self.engine.kernel, self.capacity, self.engine.draft_mode)

    def warm_up(self) -> float:
        """Do what the first generation would otherwise wait for; the seconds that it took.

        Tokenizer and chat template are used once, and both models take their first steps of the usual widths: a full
        chunk of a prompt, one token, a draft and its verification. What later generations give does not depend on it.
        It waits for its turn as a generation does.
        """
        start = perf_counter()
        engine = self.engine
        if engine.text.has_template:
            with suppress(BadInput):  # a template that refuses these messages would refuse them later, too
                engine.text.encode_chat([{"role": "user", "content": WARM_UP_TEXT}])
        for options, prompt in warm_up_runs(engine):
            engine.stream(engine.new_sequence(), prompt, options, perf_counter()).read()
        seconds = perf_counter() - start
        LOG.info("warmed up in %.2f s", seconds)
        return seconds

    def close(self) -> None:
        """Free the sessions; Failure while a generation runs or waits. In a forked child it does nothing."""
        self._engine.close()

    def __enter__(self) -> Pair:
        self._engine.process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
