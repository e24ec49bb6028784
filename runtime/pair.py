"""`load()` and `Pair`: a target and its draft, ready to generate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from os import PathLike
from time import perf_counter
from typing import Unpack

from pard_onnx.models.checks import Progress, function, no_progress, path_text, true_or_false
from pard_onnx.models.errors import BadInput, PardWarning
from pard_onnx.models.logs import logger
from pard_onnx.models.spec import Role

from . import snapshot
from .chat import Chat
from .engine import Engine
from .info import PairInfo, in_one_line, pair_info
from .loading import DEFAULT_PROVIDER, Source, Wanted, open_pair
from .options import OptionArguments, Options
from .providers.choice import ProviderChoice
from .providers.threads import Threads
from .result import Result
from .sampling.settings import Sampling
from .speed import Placed, slow_reasons
from .stream import Stream, telling_dropped
from .text.control_tokens import TEXT
from .text.overflow import ERROR, Fitted, checked_overflow, fit, require_messages, room_for_reply
from .text.prompt import Prompt, encode, opening_messages
from .text.template import Message, checked_arguments
from .text.tokenizer import Text
from .tuning.steps import Widths
from .warm_up import WARM_UP_TEXT, warm_up_runs

LOG = logger(__name__)
A_MODEL = "the folder or the hub id of an exported model"


def load(
    target: str | PathLike[str] | Pair,
    draft: str | PathLike[str] | Pair | None = None,
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
    progress: Progress = no_progress,
) -> Pair:
    """Open a pair, or a target alone.

    target, draft: a folder that pard-export has written, or the hub id of one; or a `Pair`, whose open target or draft
        is then shared: its weights are in memory once, until all pairs that use it are closed, in any order.
    provider: "cpu", "cuda", "directml", "rocm", "migraphx", "webgpu", "npu"; `cuda:1` for a second device; or "auto"
        for the first that is installed, computes both models correctly and is not far slower than the CPU.
    threads: of each step; None for one per physical core.
    share_threads: one thread pool for the process; ONNX Runtime then refuses every other session with its own pool.
    draft_provider: another provider for the draft, which then works while the target does where that pays; None: the
        target's.
    provider_options, draft_provider_options: by the provider's own names.
    fallback: use the CPU if the provider is not installed, does not start or computes wrongly.
    revision, draft_revision: a branch, tag or commit of a hub id. Only a commit is the same files for ever.
    progress: is called with a stage ("download target", "verify target", "open target", "measure target", and those of
        the draft), what is done, and the total: bytes in the first two. "download" calls it in other threads. What it
        raises ends the loading.

    The first time on a machine it takes about a second longer: step costs and exact widths are measured, and off the
    CPU the model's steps are checked against single steps and the CPU's.

    Raises BadArtifact (missing, damaged, wrong role, other tokenizer, not for this provider), BadProvider, BadInput.
    Warns with PardWarning where a provider computes only steps of one token correctly, and runs so; where one of
    the tokenizers has tokens that the other lacks, which the draft then neither reads nor proposes; and where models
    run slower than they could: without this package's CPU kernels, on the CPU though exported for another device, or
    on another provider than was asked for.
    """
    start = perf_counter()
    progress = function("progress", progress, "a stage", "what is done", "the total")
    of_open_target = (
        isinstance(target, Pair) and isinstance(provider, str) and provider == DEFAULT_PROVIDER
    )  # the default says nothing of it
    opened = open_pair(
        Wanted("target", source("target", target), None if of_open_target else provider, provider_options, revision),
        Wanted("draft", None if draft is None else source("draft", draft), draft_provider, draft_provider_options,
               draft_revision),
        Threads(threads, share_threads),
        fallback=true_or_false("fallback", fallback),
        progress=progress,
    )  # fmt: skip
    pair = Pair(Engine(opened.target, opened.draft, opened.shared))
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
        fitted = self._fitted(prompt, chosen)
        stream = self.engine.stream(self._sequence, fitted.ids, chosen, start, reuse=False)
        if fitted.dropped:
            return stream.within(lambda generation: telling_dropped(generation, fitted.dropped))
        return stream

    def _fitted(self, prompt: Prompt, options: Options) -> Fitted:
        """The prompt's ids; of a list of messages, some may be left out."""

        def encode(prompt: Prompt) -> list[int]:
            return self.encode(
                prompt,
                chat=options.chat,
                template_arguments=options.template_arguments,
                special_tokens=options.special_tokens,
            )

        if options.overflow == ERROR or (options.chat and isinstance(prompt, str)):
            return Fitted(encode(prompt))
        engine, messages = self.engine, require_messages(prompt, options.overflow)
        room = room_for_reply(engine.capacity, options.max_new_tokens)
        return fit(messages, options.overflow, encode, engine.capacity, room, engine.longer_context)

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

    def info(self) -> PairInfo:
        """What there is to know of this pair: models, versions, precision, where it runs, memory. Facts only, which
        `json.dumps(dataclasses.asdict(pair.info()))` writes."""
        return pair_info(self.engine.models, self.engine.kernel, self.capacity)

    def warm_up(self) -> float:
        """Do what the first generation would otherwise wait for; the seconds that it took.

        Tokenizer and chat template are used once, and both models take their first steps of the usual widths: a full
        chunk of a prompt, one token, a draft and its verification. What later generations give does not depend on it.
        Failure if another generation runs.
        """
        start = perf_counter()
        engine = self.engine
        if engine.text.has_template:
            with suppress(BadInput):  # a template that refuses these messages would refuse them later, too
                engine.text.encode_chat([{"role": "user", "content": WARM_UP_TEXT}])
        for options, prompt in warm_up_runs(engine):
            engine.stream(self._sequence, prompt, options, perf_counter(), reuse=False).read()
        seconds = perf_counter() - start
        LOG.info("warmed up in %.2f s", seconds)
        return seconds

    def close(self) -> None:
        """Free the sessions; Failure while one of them runs. In a forked child it does nothing."""
        self._engine.close()

    def __enter__(self) -> Pair:
        self._engine.process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
