"""`load()` and `Pair`: a target and its draft, ready to generate."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from os import PathLike, fspath
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

from pard_onnx.models import hub
from pard_onnx.models.errors import BadArtifact, BadInput, Failure
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import Format, Recipe
from pard_onnx.models.spec import Role

from .drafter import Drafter, NoDraft, PardDrafter
from .loop import Settings, decode
from .providers import Provider, installed
from .result import Chunk, Result
from .session import DraftSession, TargetSession
from .stop import stop_strings
from .stream import Facts, Stream, Writer, chunks
from .text import TOKENIZER, Message, Text, first_difference
from .threads import Threads
from .widths import ANY, EVEN

Prompt = str | Sequence[int] | Sequence[Message]
WANTED = "a prompt is text, token ids, or a list of messages with role and content"
DRAFT_LENGTH = 7  # odd: a verify step of K + 1 tokens is even without padding


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that was read and verified."""

    name: str  # as the user gave it
    folder: Path
    manifest: Manifest

    def text(self) -> Text:
        return Text(self.folder, self.manifest.spec.chat_template)


def load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    share_threads: bool = False,
) -> Pair:
    """Open a pair, or a target alone for plain decoding.

    target, draft: a folder that pard-export has written, or the hub id of one. provider: a key of
    `providers.PROVIDERS`. threads: of each step, None for one per physical core. share_threads: one pool
    for the process; ONNX Runtime then refuses all other sessions that have a pool of their own.

    Raises BadArtifact (missing, damaged, wrong role, other tokenizer), BadProvider, BadInput.
    """
    wanted = Threads(threads, share_threads)
    found = installed(provider)
    target_artifact = open_artifact(target, "target")
    draft_artifact = None if draft is None else open_artifact(draft, "draft")
    if draft_artifact:
        require_same_tokenizer(target_artifact, draft_artifact)
    return Pair(target_artifact, draft_artifact, found, wanted)


def open_artifact(name: str | PathLike[str], role: Role) -> Artifact:
    """Resolve, read and verify a folder; BadArtifact if it has the other role."""
    folder = hub.resolve_artifact(fspath(name))
    manifest = Manifest.read(folder)
    if manifest.role != role:
        raise BadArtifact(f"{fspath(name)}: is a {manifest.role}, not a {role}; give it as {manifest.role}")
    manifest.verify(folder)
    return Artifact(fspath(name), folder, manifest)


def require_same_tokenizer(target: Artifact, draft: Artifact) -> None:
    """BadArtifact names the first id whose tokens differ. Padded vocabularies may have different sizes."""
    if (target.folder / TOKENIZER).read_bytes() == (draft.folder / TOKENIZER).read_bytes():
        return
    difference = first_difference(target.text().vocabulary(), draft.text().vocabulary())
    if difference:
        token_id, ours, theirs = difference
        raise BadArtifact(
            f"{draft.name}: its tokenizer is not that of {target.name}; id {token_id} is {theirs!r} there and "
            f"{ours!r} here; take a draft made for this target"
        )


def quantized(recipe: Recipe) -> bool:
    """Whether any matrix rounds its activations, so that a step's width can change its rows."""
    formats: list[Format] = [recipe.matrices, recipe.head, *(fmt for _, fmt in recipe.overrides)]
    return any(fmt.kind == "nbits" for fmt in formats)


class Pair:
    """A target, with or without a draft. Each call starts afresh; one at a time."""

    def __init__(self, target: Artifact, draft: Artifact | None, provider: Provider, threads: Threads) -> None:
        self.target = target.manifest
        self.draft = draft.manifest if draft else None
        self.target_name, self.draft_name = target.name, draft.name if draft else None
        self._text = target.text()
        self._provider = provider
        self._model: TargetSession | None = TargetSession(target.folder, target.manifest, provider, threads)
        self._drafter: Drafter = NoDraft()
        if draft:
            self._drafter = PardDrafter(DraftSession(draft.folder, draft.manifest, provider, threads))
        self._lock = Lock()

    @property
    def capacity(self) -> int:
        """Tokens that a conversation may hold, prompt included."""
        return min(manifest.capacity for manifest in (self.target, self.draft) if manifest)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int = DRAFT_LENGTH,
        stop: str | Sequence[str] = (),
        exact: bool = True,
        chat: bool = False,
    ) -> Result:
        """Greedy decoding to the end; arguments and errors as of `stream`."""
        stream = self.stream(
            prompt, max_new_tokens=max_new_tokens, draft_length=draft_length, stop=stop, exact=exact, chat=chat
        )
        with stream:  # an interruption between rounds must not leave it running as long as its traceback lives
            for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int = DRAFT_LENGTH,
        stop: str | Sequence[str] = (),
        exact: bool = True,
        chat: bool = False,
    ) -> Stream:
        """Greedy decoding, a chunk a round; `Stream.result` once it is read to its end.

        prompt: text, token ids, or chat messages; chat: the text is a user's message. draft_length: tokens
        proposed a round, 1 to 32, or 0 for plain decoding. stop: strings that end the text, themselves left
        out. exact: plain decoding gives the same tokens as any draft, bit for bit on quantized targets.

        Raises BadInput (TooLong: for a prompt that fills the capacity) at once, Failure on the first chunk
        if another generation runs.
        """
        start = perf_counter()
        stops = stop_strings(stop)
        ids = self._ids(prompt, chat)
        even = exact and quantized(self.target.recipe)
        eos_ids = frozenset(self.target.spec.vocabulary.eos_ids)
        settings = Settings(max_new_tokens, draft_length, self.capacity, eos_ids, EVEN if even else ANY)
        settings.room(len(ids))
        return Stream(self._run(ids, settings, stops, Facts(len(ids), start, exact, self._provider.key)))

    def _run(
        self, ids: list[int], settings: Settings, stops: tuple[str, ...], facts: Facts
    ) -> Generator[Chunk, None, Result]:
        if not self._lock.acquire(blocking=False):
            raise Failure("this pair is generating already; read that stream to its end, close it, or load another")
        try:
            if self._model is None:
                raise Failure("this pair is closed; load it again")
            self._model.rollback(0)
            self._drafter.rollback(0)
            writer = Writer(self._text.stream(ids), stops)
            return (yield from chunks(decode(self._model, self._drafter, ids, settings), writer, facts))
        finally:
            self._lock.release()

    def _ids(self, prompt: Prompt, chat: bool) -> list[int]:
        """The prompt's ids, each one that the tokenizer knows."""
        if isinstance(prompt, str):
            if not prompt:
                raise BadInput("the prompt is empty")
            return self._text.encode_chat([{"role": "user", "content": prompt}]) if chat else self._text.encode(prompt)
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise BadInput(f"{WANTED}, not {type(prompt).__name__}")
        items: Sequence[Any] = list(prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            return self._text.encode_chat(items)
        try:
            ids = [index(item) for item in items]
        except TypeError:
            raise BadInput(WANTED) from None
        size = self.target.spec.vocabulary.size
        for token in ids:
            if not 0 <= token < size:
                raise BadInput(f"token id {token} in the prompt; the tokenizer has ids 0 to {size - 1}")
        return ids

    def close(self) -> None:
        """Free the sessions; Failure while one of them runs."""
        if not self._lock.acquire(blocking=False):
            raise Failure("this pair is generating; close its stream first")
        self._model, self._drafter = None, NoDraft()
        self._lock.release()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
