"""`load()` and `Pair`: a target and its draft, ready to generate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from threading import Event, Lock
from time import perf_counter
from typing import Any, Unpack

from pard_onnx.models.errors import BadInput, Failure, PardWarning
from pard_onnx.runtime.decoding.ahead import apart
from pard_onnx.runtime.decoding.drafter import PardDrafter
from pard_onnx.runtime.decoding.drafters import Drafters
from pard_onnx.runtime.decoding.loop import DRAFT_LIMIT, Halted, Settings, decode
from pard_onnx.runtime.providers.choice import Choice, beside, candidates, choose
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sampling.sampler import chooser
from pard_onnx.runtime.sessions.session import Session
from pard_onnx.runtime.sessions.single_step import OneByOne, OneByOneTarget
from pard_onnx.runtime.sessions.table import Target
from pard_onnx.runtime.text.prompt import Prompt, encode, opening
from pard_onnx.runtime.text.stop import stop_strings
from pard_onnx.runtime.text.tokenizer import Message
from pard_onnx.runtime.tuning.widths import ANY, Widths

from . import kernels, snapshot
from .chat import Chat
from .model import Artifact, OpenDraft, OpenTarget, open_artifact, open_draft, open_target, require_same_tokenizer
from .options import AUTO, Given, Options
from .result import Chunk, Facts, Result
from .sequence import Caches
from .stream import Stream, Writer, chunks

ORT_KERNEL = "onnxruntime"  # whose matmuls run where this package's own do not
WIDEST = DRAFT_LIMIT + 2  # a step of all drafts, padded


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
) -> Pair:
    """Open a pair, or a target alone.

    target, draft: a folder that pard-export has written, or the hub id of one. provider: a key of
    `providers.PROVIDERS`, `key:1` for its second device, or "auto" for the first of `providers.AUTO_ORDER` that is
    here, computes both models right and is not far slower than the CPU. draft_provider: another one for the draft,
    which then works while the target does where that pays; without it the draft runs where the target does.
    provider_options, draft_provider_options: by names of the provider's own. fallback: go on on the CPU if the
    provider is not here, does not start or computes wrongly. threads: of each step, None for one per
    physical core. share_threads: one pool for the process; ONNX Runtime then refuses all other sessions that have a
    pool of their own.

    The first time on a machine it takes about a second longer: step costs and exact widths are measured, and off the
    CPU the model's steps are checked (see `self_check`).

    Raises BadArtifact (missing, damaged, wrong role, other tokenizer, no fit for the provider), BadProvider, BadInput.
    Warns with PardWarning where a provider computes only steps of one token right, and runs so.
    """
    wanted = Threads(threads, share_threads)
    if draft is None and (draft_provider is not None or draft_provider_options):
        raise BadInput(f"a provider for the draft ({draft_provider}), but no draft; name one, or leave it out")
    on = candidates(provider, provider_options, fallback=fallback)
    draft_on = None
    if draft_provider is not None:
        draft_on = candidates(draft_provider, draft_provider_options, fallback=fallback)
    target_artifact = open_artifact(target, "target")
    draft_artifact = None if draft is None else open_artifact(draft, "draft")
    if draft_artifact:
        require_same_tokenizer(target_artifact, draft_artifact)
    opened, choice = choose(on, lambda provider: open_target(target_artifact, provider, wanted))
    if draft_artifact is None:
        return Pair(target_artifact, opened, choice)
    artifact = draft_artifact
    draft_on = draft_on or beside(on, choice.provider, draft_provider_options)
    draft_opened, draft_choice = choose(draft_on, lambda provider: open_draft(artifact, provider, wanted))
    return Pair(target_artifact, opened, choice, artifact, draft_opened, draft_choice)


class Pair:
    """A target, with or without a draft. Each `generate` starts afresh, a `chat` goes on; one at a time."""

    def __init__(
        self,
        target: Artifact,
        opened: OpenTarget,
        choice: Choice,
        draft: Artifact | None = None,
        draft_opened: OpenDraft | None = None,
        draft_choice: Choice | None = None,
    ) -> None:
        for model in (opened, draft_opened):
            if model and model.wrong:
                warnings.warn(model.wrong, PardWarning, stacklevel=3)
        self.target = target.manifest
        self.draft = draft.manifest if draft else None
        self.target_name, self.draft_name = target.name, draft.name if draft else None
        self.text = target.text()
        self.choice, self.draft_choice = choice, draft_choice
        self.kernel = kernels.isa() or ORT_KERNEL if choice.provider.key == CPU.key else ORT_KERNEL
        self._target: OpenTarget | None = opened
        self._draft: OpenDraft | None = draft_opened
        self._caches = Caches(self._target.session.cache, self._draft.session.cache if self._draft else None)
        self._drafters = Drafters(
            opened.calibration.costs,
            draft_opened.costs if draft_opened else None,
            draft_choice is not None and apart(choice.provider, draft_choice.provider),
            frozenset(self.target.spec.vocabulary.eos_ids),
        )
        self._lock = Lock()

    @property
    def capacity(self) -> int:
        """Tokens that a conversation may hold, prompt included."""
        return min(manifest.capacity for manifest in (self.target, self.draft) if manifest)

    @property
    def exact_widths(self) -> Widths | None:
        """The widths of steps whose rows are bitwise equal on this machine; None if no set of them is known."""
        return self._target.calibration.widths if self._target else None

    def generate(self, prompt: Prompt, **options: Unpack[Given]) -> Result:
        """Generate to the end; arguments and errors as of `stream`."""
        stream = self.stream(prompt, **options)
        with stream:  # an interruption between rounds must not leave it running as long as its traceback lives
            for _ in stream:
                pass
        return stream.result

    def stream(self, prompt: Prompt, **options: Unpack[Given]) -> Stream:
        """Generate, a chunk a round; `Stream.result` once it is read to its end.

        prompt: text, token ids, or chat messages; options: see `Options` and `Sampling`.

        Raises BadInput (TooLong: for a prompt that fills the capacity) at once, Failure on the first chunk
        if another generation runs.
        """
        start = perf_counter()
        wanted = Options.of(options)
        return self.run(self.encode(prompt, chat=wanted.chat), wanted, start)

    def run(self, ids: list[int], options: Options, start: float, caches: Caches | None = None) -> Stream:
        """A stream that follows these ids; start: perf_counter() when the request came. caches: of a conversation
        that may hold their beginning already; without, everything is computed."""
        stops = stop_strings(options.stop)
        settings, exact = self._settings(options)
        settings.room(len(ids))
        sampling = options.sampling
        seed = None if sampling.certain else sampling.chosen_seed()
        choose = chooser(sampling, self.target.spec.vocabulary.size, len(ids), seed or 0)
        cancelled = Event()
        watch = watcher(cancelled, options.timeout and start + options.timeout)
        facts = Facts(len(ids), start, exact, self._widths(settings), *self._where(), self.kernel, seed)

        def generation() -> Generator[Chunk, None, Result]:
            with self._attached(caches, watch) as (target, mine):
                # One row is computed even if all are there: the first token is chosen from it.
                known = replace(facts, cached_tokens=min(mine.keep(ids), len(ids) - 1))
                pard = PardDrafter(self._draft.session, start=mine.draft_start) if self._draft else None
                drafter = self._drafters.choose(options, settings.widths, pard)
                writer = Writer(self.text.stream(ids), stops)
                try:
                    rounds = decode(target, drafter, mine.tokens, settings, choose)
                    return (yield from chunks(rounds, writer, known))
                finally:
                    mine.draft_start = pard.start if pard else 0

        return Stream(generation(), cancelled)

    def _widths(self, settings: Settings) -> tuple[int, ...]:
        wrong = self._target is not None and self._target.wrong
        return (1,) if wrong else settings.widths.upto(WIDEST)

    def _where(self) -> tuple[str, str | None, str]:
        """The target's provider, the draft's, and why."""
        draft = self.draft_choice
        reason = self.choice.reason
        if draft and draft.provider != self.choice.provider:
            reason += f"; draft: {draft.reason}"
        return self.choice.provider.title, draft.provider.title if draft else None, reason

    @contextmanager
    def _attached(
        self, caches: Caches | None, watch: Callable[[], None]
    ) -> Iterator[tuple[Target | OneByOneTarget, Caches]]:
        """The sessions, for one generation, on its conversation's caches. Failure if they are in use, or closed."""
        if not self._lock.acquire(blocking=False):
            raise Failure("this pair is generating already; read that stream to its end, close it, or load another")
        try:
            if self._target is None:
                raise Failure("this pair is closed; load it again")
            if caches is None:
                caches = self._caches
                caches.tokens.clear()
            sessions: list[Session | OneByOne[Any]] = [self._target.session]
            self._target.session.attach(caches.target)
            if self._draft and caches.draft:
                self._draft.session.attach(caches.draft)
                sessions.append(self._draft.session)
            for session in sessions:
                session.watch(watch)
            try:
                yield self._target.session, caches
            finally:
                for session in sessions:
                    session.watch()
                # A conversation that is over leaves no memory behind
                self._target.session.attach(self._caches.target)
                if self._draft and self._caches.draft:
                    self._draft.session.attach(self._caches.draft)
        finally:
            self._lock.release()

    def _settings(self, options: Options) -> tuple[Settings, bool]:
        """The loop's settings, and whether what was asked for is exact: no set of widths may be known to be."""
        if self._target is None:
            raise Failure("this pair is closed; load it again")
        proven = self._target.calibration.widths if options.exact else None
        most = DRAFT_LIMIT if options.draft_length == AUTO else options.draft_length
        eos_ids = frozenset(self.target.spec.vocabulary.eos_ids)
        chunk = self._target.calibration.chunk
        settings = Settings(options.max_new_tokens, most, self.capacity, eos_ids, proven or ANY, chunk)
        return settings, proven is not None

    def chat(self, system: str | None = None, messages: Iterable[Message] = ()) -> Chat:
        """A conversation whose turns go on in one KV cache; several may be open. Ends with its last reference.

        system: the system message; messages: what was said before. Raises BadInput if the chat template has no use
        for them, or there is none.
        """
        return Chat(self, opening(self.text, system, messages))

    def restore(self, path: str | PathLike[str]) -> Chat:
        """The conversation that `Chat.save` wrote; of another draft's KV rows nothing is kept.

        Raises BadArtifact (another file, damaged, another version, another target), TooLong.
        """
        return Chat(self, *snapshot.read(path, self))

    def new_caches(self) -> Caches:
        """Memory for another conversation."""
        if self._target is None:
            raise Failure("this pair is closed; load it again")
        draft = self._draft.session.new_cache() if self._draft else None
        return Caches(self._target.session.new_cache(), draft)

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """See `prompt.encode`."""
        return encode(prompt, self.text, self.target.spec.vocabulary.size, chat=chat)

    def close(self) -> None:
        """Free the sessions; Failure while one of them runs."""
        if not self._lock.acquire(blocking=False):
            raise Failure("this pair is generating; close its stream first")
        self._target, self._draft = None, None
        self._lock.release()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watcher(cancelled: Event, deadline: float | None) -> Callable[[], None]:
    """What is asked before every step; deadline: of perf_counter()."""

    def watch() -> None:
        if cancelled.is_set():
            raise Halted("cancelled")
        if deadline is not None and perf_counter() > deadline:
            raise Halted("timeout")

    return watch
