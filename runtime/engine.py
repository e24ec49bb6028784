"""`Engine`: the opened models, what their generations share, and the generations themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens
from contextlib import closing
from dataclasses import replace
from threading import get_ident
from time import perf_counter
from typing import Protocol
from weakref import proxy

from pard_onnx.models.checks import AUTO, DRAFT_LIMIT
from pard_onnx.models.errors import BadInput, Failure, PardWarning, TooLong
from pard_onnx.models.spec import TargetFeatures

from . import kernels
from .decoding.auto import DrafterFactory
from .decoding.draft_mode import DEPENDENT, INDEPENDENT, columns_to_read
from .decoding.drafter import Drafter, DraftMemory, PardDrafter
from .decoding.guided import GuidedDrafter
from .decoding.loop import Halted, Settings, Step, TargetModel, decode
from .decoding.pard2 import READERS, RECOMPUTED, WAITING_BYTES, Pard2Drafter
from .decoding.shared_ids import SharedIds
from .embedding import Embedder, Pooling, Vector, last_layer
from .forks import Process
from .guided.matcher import Grammars, Matcher
from .model import LoadedModel, longer_context
from .options import GREEDY, Options, checked_ids
from .prefixes import CACHE_BYTES, PrefixCache
from .providers.choice import on_separate_devices
from .providers.table import CPU
from .result import Chunk, Facts, Result
from .run import DraftSeat, Opened, OwnSequence, Run, Source, TargetSeat
from .sampling.edits import RowEdit
from .sampling.generation_config import read_sampling
from .sampling.logprobs import LogprobChooser, RowLogprobs
from .sampling.processor import Processor
from .sampling.sampler import chooser, require_known
from .sampling.settings import Sampling
from .scoring import Passage, Score, Scorer, score_of, step_form, with_logprobs, with_prompt
from .sequence import Sequence
from .sessions.device_cache import cache_bytes
from .sessions.kv_cache import KvCache
from .sessions.session import BeforeStep, DraftSession, TargetSession, do_nothing
from .stream import Stream, chunks
from .text.overflow import ERROR
from .text.prompt import require_ids
from .text.reply import Reply, ReplyForm
from .text.tokenizer import Bounds, Text
from .text.writer import Writer, stop_strings
from .tuning.steps import ANY, Widths
from .turns import Abandoned, Ticket, Turns

ORT_KERNEL = "onnxruntime"  # whose matmuls run where this package's own do not
WIDEST = DRAFT_LIMIT + 2  # a step of all drafts, padded
Models = tuple[LoadedModel[TargetSession], LoadedModel[DraftSession] | None]
MAX_LIVE = 4  # sequences that take turns: more of them make no text faster, as steps are not shared
MakeDrafter = Callable[[Sequence, Options, Settings], Drafter]


class Reader(Protocol):
    """What reads given tokens with the target, and generates none: a `Scorer`, an `Embedder`."""

    def run(self, target: TargetModel, between_steps: Callable[[], None]) -> None: ...


class Engine:
    """A target, with or without a draft. Any number of sequences may be alive, and their runs may take turns."""

    def __init__(
        self,
        target: LoadedModel[TargetSession],
        draft: LoadedModel[DraftSession] | None = None,
        shared: SharedIds | None = None,
        features: TargetFeatures | None = None,
        *,
        queue: int | None = None,
        max_live: int = MAX_LIVE,
        kept_bytes: int = CACHE_BYTES,
    ) -> None:
        """shared: see `model.shared_ids`; features: what the draft reads of the target, see `features_to_read`; queue,
        max_live: see `load`; kept_bytes: its cache_bytes. Warns with PardWarning where a model runs token by token."""
        for model in (target, draft):
            if model and model.warning:
                warnings.warn(model.warning, PardWarning, stacklevel=3)
        self.target_manifest = target.manifest
        self.draft_manifest = draft.manifest if draft else None
        self.text: Text = target.artifact.text()
        vocabulary = target.manifest.spec.vocabulary
        self._grammars = Grammars(self.text.tokenizer_json, target.name, vocabulary.size, vocabulary.eos_ids)
        self.kernel = kernels.isa() or ORT_KERNEL if target.provider.key == CPU.key else ORT_KERNEL
        self._models: Models | None = (target, draft)
        self._shared = shared
        self._features = features
        self._columns = columns_to_read(features, target.manifest) if features else None
        self._target = target.artifact
        self._drafters = DrafterFactory(
            target.tuning.costs,
            draft.tuning.costs if draft else None,
            draft is not None and on_separate_devices(target.provider, draft.provider),
            frozenset(vocabulary.eos_ids),
        )
        self._turns = Turns(max_live, queue)  # rounds of different sequences must not mix
        # Of each model's steps: a draft that runs ahead has its own thread, and other engines may have the same models.
        # Reentrant: a run that nobody reads any more may be closed by garbage collection, in the middle of a step.
        self._session_locks = target.lock, draft.lock if draft else target.lock
        # The caches that the sessions were opened with serve the first request. No cycle of references: weights are
        # freed with the last reference to a pair.
        own, engine = Sequence(own_cache(target), own_cache(draft) if draft else None), proxy(self)
        exact = self._rows_are_exact = target.tuning.widths is not None and target.tuning.chunks
        self.prefixes = PrefixCache(kept_bytes, target.tuning.chunk, lambda: engine.new_sequence(), own, exact=exact)
        self.process = Process()

    @property
    def models(self) -> Models:
        """The target and the draft; Failure once the engine is closed."""
        if self._models is None:
            raise Failure("this pair is closed; load it again")
        return self._models

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may hold, prompt included."""
        return min(manifest.capacity for manifest in (self.target_manifest, self.draft_manifest) if manifest)

    @property
    def longer_context(self) -> str:
        """How to get a larger capacity, as part of a sentence."""
        return longer_context(self.target_manifest, self.draft_manifest)

    def bounds(self, options: Options, start: float, shorter: str = "shorten it") -> Bounds:
        """What the encoding of a prompt is bounded by. start: as of `stream`; shorter: how to shorten the prompt."""
        deadline = options.timeout and start + options.timeout
        capacity = self.capacity if options.overflow == ERROR else None  # turns that are too many may be dropped
        return Bounds(capacity, f"{shorter}, or {self.longer_context}", deadline)

    @property
    def exact_widths(self) -> Widths | None:
        """The widths of steps whose rows are bitwise equal on this machine; None if no set of them is known."""
        return self._models[0].tuning.widths if self._models else None

    @property
    def own_sampling(self) -> Sampling | None:
        """The settings of the target's generation_config.json; None if it has no such file. Raises BadArtifact."""
        return read_sampling(self._target.folder, self.target_manifest.sizes)

    def model_sampling(self) -> Sampling:
        """As `own_sampling`; where there is no file, PardWarning says so, and decoding is greedy."""
        found = self.own_sampling
        if found is None:
            problem = "has no generation_config.json, so its own sampling is greedy; leave sampling out"
            warnings.warn(f"{self._target.name}: {problem}", PardWarning, stacklevel=4)
        return found or GREEDY

    @property
    def occupancy(self) -> tuple[int, int]:
        """How many generations have a place, and how many wait for one."""
        return self._turns.occupancy

    def new_sequence(self) -> Sequence:
        """An empty sequence with memory of its own."""
        target, draft = self.models
        return Sequence(target.session.new_cache(), draft.session.new_cache() if draft else None)

    @property
    def sequence_bytes(self) -> int:
        """The memory of a sequence whose KV caches are full, with the features that may wait for the draft."""
        waiting = 0
        if self._features:
            waiting = min(2 * WAITING_BYTES, self.capacity * 4 * self._features.width)
        return waiting + sum(cache_bytes(model.manifest, model.provider) for model in self.models if model)

    @property
    def draft_mode(self) -> str | None:
        """Whether the draft reads the target's hidden states; None for a draft that cannot, and without one."""
        pard = self.draft_manifest.spec.pard if self.draft_manifest else None
        if pard is None or pard.features is None:
            return None
        return DEPENDENT if self._features else INDEPENDENT

    def _pard(self, seat: DraftSeat, memory: DraftMemory, between_chunks: Callable[[], None]) -> PardDrafter:
        """What runs the draft model on one sequence, whose memory this is."""
        shared = self._shared
        if self._features:
            recomputed = RECOMPUTED if self._rows_are_exact else 0
            return Pard2Drafter(
                seat, self._features, memory=memory, shared=shared, between_chunks=between_chunks, recomputed=recomputed
            )
        pard = self.draft_manifest.spec.pard if self.draft_manifest else None
        source = f"{READERS[pard.features.join]}-independent" if pard and pard.features else "pard"
        return PardDrafter(seat, memory=memory, shared=shared, between_chunks=between_chunks, source=source)

    def settings(self, options: Options) -> Settings:
        """The loop's settings for these options; BadInput for a stop token that the model does not have."""
        tuning, vocabulary = self.models[0].tuning, self.target_manifest.spec.vocabulary
        stop_ids = checked_ids(options.stop_token_ids)
        for token in stop_ids:
            if token >= vocabulary.size:
                raise BadInput(
                    f"stop_token_ids: id {token} does not exist; the model's ids are 0 to {vocabulary.size - 1}"
                )
        return Settings(
            max_new_tokens=options.max_new_tokens,
            draft_length=DRAFT_LIMIT if options.draft_length == AUTO else options.draft_length,
            capacity=self.capacity,
            eos_ids=frozenset((*vocabulary.eos_ids, *stop_ids)),
            widths=(options.exact and tuning.widths) or ANY,
            chunk=tuning.chunk,
            longer=self.longer_context,
        )

    def reasoning_budget(self, options: Options, form: ReplyForm | None, prompt: Tokens[int]) -> tuple[RowEdit, ...]:
        """What ends the thinking of a reply with this form; nothing without a budget."""
        if form is None or form.thinking is None or options.max_reasoning_tokens is None:
            return ()
        cut = self.text.encode_plain(form.thinking.cut)
        push = self.text.stream(prompt).push
        tags = stop_strings((), self.text.special_ids(), form.tags)
        return (form.budget(form.thinking, options.max_reasoning_tokens, cut, tags, push, len(prompt)),)

    def row_edits(self, options: Options, matcher: Matcher | None) -> tuple[RowEdit, ...]:
        """What changes rows of logits in one generation with these options, in the order in which it is applied.

        matcher: of the grammar that the options ask for.
        """
        own = (Processor(options.logits_processor),) if options.logits_processor else ()
        return (*own, matcher) if matcher else own  # the user's first: it cannot undo a grammar

    def run(
        self,
        sequence: Sequence,
        options: Options,
        *,
        before_step: BeforeStep = do_nothing,
        seed: int = 0,
        make_drafter: MakeDrafter | None = None,
        form: ReplyForm | None = None,
    ) -> Generator[Step, None, None]:
        """Continue the sequence: a generator of rounds, which appends to `sequence.tokens`.

        Runs of different sequences may be read in turns, in one thread or several: each round runs by itself. The
        same sequence must not be in two runs. However a run ends, its sequence can be continued.

        before_step: is called before every step of a model; it raises `Halted` to end the run. seed: of drawn tokens.
        make_drafter: makes another drafter than the options ask for. form: of a chat's reply.
        """
        ticket, most = Ticket(), options.max_new_tokens
        opened = self._opening(options, sequence.tokens, before_step, seed, ticket, make_drafter, form)
        require_ids(sequence.tokens, self.target_manifest.spec.vocabulary.size)
        run = Run(self._turns, ticket, OwnSequence(sequence), sequence.tokens, most, opened, places=False)
        with closing(run):
            run.begin()
            yield from run.rounds()

    def _opening(
        self,
        options: Options,
        prompt: Tokens[int],
        before_step: BeforeStep,
        seed: int,
        ticket: Ticket,
        make_drafter: MakeDrafter | None = None,
        form: ReplyForm | None = None,
    ) -> Callable[[Sequence, int], Opened]:
        """What begins to decode a sequence; arguments as of `run`. The chooser is one for the whole generation."""
        settings, (target, draft) = self.settings(options), self.models
        vocabulary = self.target_manifest.spec.vocabulary.size
        guide, length = options.guide, len(prompt)
        matcher = self._grammars.matcher(guide, length, settings.eos_ids) if guide else None
        edits = (*self.row_edits(options, matcher), *self.reasoning_budget(options, form, prompt))
        choose = chooser(options.sampling, vocabulary, length, seed, edits)
        is_complete = matcher.is_complete if matcher else None
        logged = None
        if options.logprobs is not None:
            choose = logged = LogprobChooser(choose, self._row_logprobs(options.logprobs))
        scorer = None
        if options.prompt_logprobs is not None:
            scorer = self._scorer(Passage(tuple(prompt), 1), settings.widths, options.prompt_logprobs)

        def pass_on() -> None:
            self._turns.pass_on(ticket)

        def opened(sequence: Sequence, most: int) -> Opened:
            draft_seat = None
            if draft and sequence.draft:
                draft_seat = DraftSeat(draft.session, sequence.draft, before_step, self._session_locks[1])
            if make_drafter:
                drafter = make_drafter(sequence, options, settings)
            else:
                pard = self._pard(draft_seat, sequence.memory, pass_on) if draft_seat else None
                drafter = self._drafters.drafter(options, settings.widths, pard)
            if matcher:
                drafter = GuidedDrafter(drafter, matcher)
            reads = drafter.seen is not None
            lock, columns = self._session_locks[0], self._columns if reads else None
            seat = TargetSeat(target.session, sequence.target, before_step, lock, features=reads, columns=columns)
            limited = replace(settings, max_new_tokens=most)
            rounds = decode(seat, drafter, sequence.tokens, limited, choose, is_complete, pass_on)
            if logged:
                rounds = with_logprobs(rounds, logged)
            if scorer:
                rounds = with_prompt(rounds, seat, scorer, pass_on, drafter if reads else None)
            return Opened(sequence, rounds, (seat, draft_seat) if draft_seat else (seat,))

        return opened

    def _row_logprobs(self, top: int) -> RowLogprobs:
        return RowLogprobs(self.target_manifest.spec.vocabulary.size, top, self.text.token_bytes)

    def _scorer(self, passage: Passage, widths: Widths, top: int) -> Scorer:
        form = step_form(self.models[0].tuning.chunk, self.target_manifest.spec.vocabulary.rows, widths)
        return Scorer(passage, form, self._row_logprobs(top))

    def score(self, sequence: Sequence, passage: Passage, top: int = 0) -> Score:
        """How likely the passage's tokens are, with the `top` most likely ones for each place.

        sequence: may hold the beginning of the passage already, which is then not computed again. Waits for its place
        and its turns as a stream does. Raises as `Passage.require_room`, and Busy.
        """
        passage.require_room(self.capacity, self.longer_context)
        require_ids(passage.ids, self.target_manifest.spec.vocabulary.size)
        scorer = self._scorer(passage, self.models[0].tuning.widths or ANY, max(top, 1))
        self._read(sequence, passage.ids, scorer)
        return score_of(scorer.found, passage.first, top)

    def embed(self, sequence: Sequence, ids: Tokens[int], pooling: Pooling) -> Vector:
        """The vector of these tokens, [hidden]; see `Pair.embed`. sequence: is overwritten."""
        self.require_room(ids)
        manifest, tuning = self.target_manifest, self.models[0].tuning
        columns = last_layer(manifest, self._target.name)
        embedder = Embedder(ids, pooling, columns, tuning.chunk, tuning.widths or ANY)
        self._read(sequence, ids, embedder, features=True)
        return embedder.vector

    def require_last_layer(self) -> None:
        """BadInput for a target whose graph does not give what embeddings are made of."""
        last_layer(self.target_manifest, self._target.name)

    def require_room(self, ids: Tokens[int]) -> None:
        """TooLong for more tokens than a sequence may hold."""
        if len(ids) > self.capacity:
            problem = f"the text has {len(ids)} tokens, but the capacity is {self.capacity}"
            raise TooLong(f"{problem}; shorten it, or {self.longer_context}")

    def _read(self, sequence: Sequence, ids: Tokens[int], reader: Reader, *, features: bool = False) -> None:
        """Let the reader read these tokens, in its place and its turns. features: whether it reads hidden states."""
        (target, _), ticket = self.models, Ticket()
        ticket.check = stopwatch(ticket)
        ticket.reader = get_ident()

        def opened(sequence: Sequence, _: int) -> Opened:
            seat = TargetSeat(target.session, sequence.target, ticket.check, self._session_locks[0], features=features)

            def rounds() -> Generator[Step, None, None]:
                reader.run(seat, lambda: self._turns.pass_on(ticket))
                yield from ()

            return Opened(sequence, rounds(), (seat,))

        with closing(Run(self._turns, ticket, OwnSequence(sequence), ids, 0, opened)) as run:
            run.begin()
            for _ in run.rounds():
                pass

    def stream(
        self,
        sequence: Sequence | None,
        ids: Tokens[int],
        options: Options,
        start: float,
        form: ReplyForm | None = None,
    ) -> Stream:
        """The text that follows these ids, in chunks. It begins to run, or to wait, when its first chunk is read.

        sequence: of a conversation, which goes on; None to start from what requests that have ended left.
        start: perf_counter() when the request came. form: how the reply to a chat is read; None: all of it is text.
        Raises BadInput (TooLong) at once, Busy on the first chunk if too many generations run and wait.
        """
        require_ids(ids, self.target_manifest.spec.vocabulary.size)
        options = options.for_reply(form, self.text) if form else options
        special = self.text.special_ids() if options.stop or form else {}
        stops = stop_strings(options.stop, special, form.tags if form else ())
        settings, sampling = self.settings(options), options.sampling
        settings.room(len(ids))
        if guide := options.guide:
            self._grammars.compiled(guide)  # for its errors
        seed = None if sampling.certain else sampling.chosen_seed()
        require_known(sampling, self.target_manifest.spec.vocabulary.size)
        ticket = Ticket(start + options.timeout if options.timeout else None)
        ticket.check = stopwatch(ticket)
        facts = self._facts(options, settings, len(ids), seed)

        def generation() -> Generator[Chunk, None, Result]:
            opened = self._opening(options, ids, ticket.check, seed or 0, ticket, form=form)
            source: Source = self.prefixes
            if sequence is not None or options.prompt_logprobs is not None:
                source = OwnSequence(sequence or self.new_sequence())
            if sequence is not None and options.prompt_logprobs is not None:
                sequence.truncate(0)  # all rows of the prompt must be computed
            run = Run(self._turns, ticket, source, ids, options.max_new_tokens, opened)
            with closing(run):
                cached, waited = run.begin()
                reply: Reply | None = form.reader(ids, stops) if form else None
                writer = Writer(self.text.stream(ids), stops, reply, options.stop_when)
                known = replace(facts, cached_tokens=cached, queued=waited)
                return (yield from chunks(run.rounds(), writer, known, start, logprobs=options.logprobs is not None))

        return Stream(generation(), ticket)

    def _facts(self, options: Options, settings: Settings, prompt_tokens: int, seed: int | None) -> Facts:
        target, draft = self.models
        return Facts(
            prompt_tokens=prompt_tokens,
            exact=options.exact and target.tuning.widths is not None,
            widths=(1,) if target.warning else settings.widths.up_to(WIDEST),
            provider=target.provider.title,
            draft_provider=draft.provider.title if draft else None,
            provider_reason=self.provider_reason,
            kernel=self.kernel,
            seed=seed,
        )

    @property
    def provider_reason(self) -> str:
        """Why the models run where they do."""
        target, draft = self.models
        if draft and draft.provider != target.provider:
            return f"{target.reason}; draft: {draft.reason}"
        return target.reason

    def close(self) -> None:
        """Free the sessions; Failure while a stream runs or waits. In a forked child it does nothing."""
        if not self.process.is_current:
            return
        self._turns.wait_for_abandoned()
        if not self._turns.idle:
            raise Failure("this pair is generating; close its stream first")
        self._models = None
        self.prefixes.close()


def own_cache(model: LoadedModel[TargetSession] | LoadedModel[DraftSession]) -> KvCache:
    """The cache that the model's session was opened with, unless another pair has it."""
    return model.session.new_cache() if model.borrowed else model.session.cache


def stopwatch(ticket: Ticket) -> BeforeStep:
    """Ends a run before its next step once its ticket is cancelled or abandoned, or past the deadline."""

    def before_step() -> None:
        if ticket.abandoned:
            raise Abandoned
        if ticket.cancelled:
            raise Halted("cancelled")
        if ticket.deadline is not None and perf_counter() > ticket.deadline:
            raise Halted("timeout")

    return before_step
