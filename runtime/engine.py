"""`Engine`: the opened models, what their generations share, and the generations themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Lock, RLock
from time import perf_counter
from typing import Generic

from pard_onnx.models.checks import DRAFT_LIMIT
from pard_onnx.models.errors import BadInput, Failure, PardWarning

from . import kernels
from .decoding.auto import DrafterFactory
from .decoding.drafter import Drafter, PardDrafter
from .decoding.loop import Halted, Settings, Step, decode
from .decoding.shared_ids import SharedIds
from .forks import Process
from .model import LoadedModel, SessionLock, longer_context
from .options import AUTO, GREEDY, Options, checked_ids
from .providers.choice import on_separate_devices
from .providers.table import CPU
from .result import Chunk, Facts, Result
from .sampling.edits import RowEdit
from .sampling.generation_config import read_sampling
from .sampling.processor import Processor
from .sampling.sampler import chooser, require_known
from .sampling.settings import Sampling
from .sequence import Sequence
from .sessions.kv_cache import KvCache
from .sessions.session import AnySession, BeforeStep, DraftSession, Floats, Ids, Rows, TargetSession, do_nothing
from .stream import Stream, chunks
from .text.prompt import require_ids
from .text.tokenizer import Text
from .text.writer import Writer, stop_strings
from .tuning.steps import ANY, Widths

ORT_KERNEL = "onnxruntime"  # whose matmuls run where this package's own do not
WIDEST = DRAFT_LIMIT + 2  # a step of all drafts, padded
Models = tuple[LoadedModel[TargetSession], LoadedModel[DraftSession] | None]
MakeDrafter = Callable[[Sequence, Options, Settings], Drafter]


class Engine:
    """A target, with or without a draft. Any number of sequences may be alive, and their runs may take turns."""

    def __init__(
        self,
        target: LoadedModel[TargetSession],
        draft: LoadedModel[DraftSession] | None = None,
        shared: SharedIds | None = None,
    ) -> None:
        """shared: see `model.shared_ids`. Warns with PardWarning where a model runs token by token."""
        for model in (target, draft):
            if model and model.warning:
                warnings.warn(model.warning, PardWarning, stacklevel=3)
        self.target_manifest = target.manifest
        self.draft_manifest = draft.manifest if draft else None
        self.text: Text = target.artifact.text()
        self.kernel = kernels.isa() or ORT_KERNEL if target.provider.key == CPU.key else ORT_KERNEL
        self._models: Models | None = (target, draft)
        self._shared = shared
        self._target = target.artifact
        self._drafters = DrafterFactory(
            target.tuning.costs,
            draft.tuning.costs if draft else None,
            draft is not None and on_separate_devices(target.provider, draft.provider),
            frozenset(target.manifest.spec.vocabulary.eos_ids),
        )
        # Reentrant: a run that nobody reads any more may be closed by garbage collection, in the middle of a round.
        self._round_lock = RLock()  # rounds of different sequences must not mix
        # Of each model's steps: a draft that runs ahead has its own thread, and other engines may have the same models
        self._session_locks = target.lock, draft.lock if draft else target.lock
        self._busy = Lock()  # of one stream
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

    def new_sequence(self) -> Sequence:
        """An empty sequence with memory of its own."""
        target, draft = self.models
        return Sequence(target.session.new_cache(), draft.session.new_cache() if draft else None)

    def shared_sequence(self) -> Sequence:
        """The sequence for texts that nothing follows, on the caches that the sessions were opened with, where another
        pair does not have them."""
        target, draft = self.models

        def cache(model: LoadedModel[TargetSession] | LoadedModel[DraftSession]) -> KvCache:
            return model.session.new_cache() if model.borrowed else model.session.cache

        return Sequence(cache(target), cache(draft) if draft else None)

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

    def row_edits(self, options: Options) -> tuple[RowEdit, ...]:
        """What changes rows of logits in one generation with these options, in the order in which it is applied."""
        return (Processor(options.logits_processor),) if options.logits_processor else ()

    def run(
        self,
        sequence: Sequence,
        options: Options,
        *,
        before_step: BeforeStep = do_nothing,
        seed: int = 0,
        make_drafter: MakeDrafter | None = None,
    ) -> Generator[Step, None, None]:
        """Continue the sequence: a generator of rounds, which appends to `sequence.tokens`.

        Runs of different sequences may be read in turns, in one thread or several: each round runs by itself. The
        same sequence must not be in two runs. However a run ends, its sequence can be continued.

        before_step: is called before every step of a model; it raises `Halted` to end the run. seed: of drawn tokens.
        make_drafter: makes another drafter than the options ask for.
        """
        settings, (target, draft) = self.settings(options), self.models
        vocabulary = self.target_manifest.spec.vocabulary.size
        require_ids(sequence.tokens, vocabulary)
        choose = chooser(options.sampling, vocabulary, len(sequence.tokens), seed, self.row_edits(options))
        seat = TargetSeat(target.session, sequence.target, before_step, self._session_locks[0])
        draft_seat = None
        if draft and sequence.draft:
            draft_seat = DraftSeat(draft.session, sequence.draft, before_step, self._session_locks[1])
        if make_drafter:
            drafter = make_drafter(sequence, options, settings)
        else:
            pard = PardDrafter(draft_seat, memory=sequence.memory, shared=self._shared) if draft_seat else None
            drafter = self._drafters.drafter(options, settings.widths, pard)
        rounds = decode(seat, drafter, sequence.tokens, settings, choose)
        try:
            while True:
                with self._round_lock:
                    step = next(rounds, None)
                if step is None:
                    return
                yield step
        finally:
            with self._round_lock:
                rounds.close()
                seat.leave()
                if draft_seat:
                    draft_seat.leave()

    def stream(
        self, sequence: Sequence, ids: Tokens[int], options: Options, start: float, *, reuse: bool = True
    ) -> Stream:
        """The text that follows these ids, in chunks; one stream at a time.

        sequence: may hold the beginning of ids already, which is then not computed again unless `reuse` is False.
        start: perf_counter() when the request came.
        Raises BadInput (TooLong) at once, Failure on the first chunk if another stream runs.
        """
        require_ids(ids, self.target_manifest.spec.vocabulary.size)
        stops = stop_strings(options.stop, self.text.special_ids() if options.stop else {})
        settings, sampling = self.settings(options), options.sampling
        settings.room(len(ids))
        seed = None if sampling.certain else sampling.chosen_seed()
        require_known(sampling, self.target_manifest.spec.vocabulary.size)
        cancelled = Event()
        before_step = stopwatch(cancelled, options.timeout and start + options.timeout)
        facts = self._facts(options, settings, len(ids), seed)

        def generation() -> Generator[Chunk, None, Result]:
            with self._exclusive():
                if not reuse:
                    sequence.truncate(0)
                # One row is computed even if all are there: the first token is chosen from it.
                cached = min(sequence.continue_with(ids), len(ids) - 1)
                rounds = self.run(sequence, options, before_step=before_step, seed=seed or 0)
                writer = Writer(self.text.stream(ids), stops, options.stop_when)
                return (yield from chunks(rounds, writer, replace(facts, cached_tokens=cached), start))

        return Stream(generation(), cancelled)

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

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """While one stream runs. Failure if another one does, or the engine is closed."""
        if not self._busy.acquire(blocking=False):
            raise Failure("this pair is generating already; read that stream to its end, close it, or load another")
        try:
            _ = self.models
            yield
        finally:
            self._busy.release()

    def close(self) -> None:
        """Free the sessions; Failure while a stream runs. In a forked child it does nothing."""
        if not self.process.is_current:
            return
        if not self._busy.acquire(blocking=False):
            raise Failure("this pair is generating; close its stream first")
        self._models = None
        self._busy.release()


class Seat(Generic[AnySession]):
    """One sequence's place in a session: before each step the session is given this sequence's cache."""

    def __init__(self, session: AnySession, cache: KvCache, before_step: BeforeStep, lock: SessionLock) -> None:
        self._session, self._cache = session, cache
        self._before_step, self._lock = before_step, lock

    @property
    def length(self) -> int:
        return self._cache.length

    def rollback(self, length: int) -> None:
        self._cache.rollback(length)

    def leave(self) -> None:
        """Take the cache out of the session, so that it is freed with its sequence."""
        with self._lock:
            if self._session.cache is self._cache:
                self._session.detach()


class TargetSeat(Seat[TargetSession]):
    """A `TargetModel` of the decoding loop."""

    def step(self, ids: Tokens[int], keep: int) -> Rows:
        with self._lock:
            self._session.attach(self._cache, self._before_step)
            rows = self._session.step(ids, keep)
            return rows.copy() if self._lock.lent else rows  # another engine's step may follow at once


class DraftSeat(Seat[DraftSession]):
    """A `DraftModel` of a `PardDrafter`."""

    def step(self, ids: Tokens[int], draft_length: int) -> tuple[Ids, Floats]:
        with self._lock:
            self._session.attach(self._cache, self._before_step)
            drafts, probabilities = self._session.step(ids, draft_length)
            return drafts.copy(), probabilities.copy()  # another sequence's step may follow at once


def stopwatch(cancelled: Event, deadline: float | None) -> BeforeStep:
    """Ends a run before its next step once it is cancelled, or past the deadline (of perf_counter())."""

    def before_step() -> None:
        if cancelled.is_set():
            raise Halted("cancelled")
        if deadline is not None and perf_counter() > deadline:
            raise Halted("timeout")

    return before_step
