"""`GuardedTokenizer`: a tokenizer of the tokenizers library that was checked, and whose failures are one line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken, Tokenizer

from pard_onnx.models.cache_folder import is_remembered, remember
from pard_onnx.models.errors import BadInput, Failure, shown
from pard_onnx.models.helper_process import HelperStopped, NoHelper, run_helper

from . import tokenizer_check
from .added_tokens import AN_ID, is_id
from .fewest_tokens import FewestTokens, fewest_tokens
from .tokenizer_check import growth_problem, panics

SECONDS, BYTES_PER_SECOND = 6.0, 4_000_000  # that a check may take: so long, and longer for a long file
LONG = 1 << 16  # characters of a text that takes so long, 40 ms, that it is encoded in a thread of its own
POLL = 0.05  # seconds
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Late(Exception):
    """Work was not done by its deadline."""


def in_thread(work: Callable[[], Any], deadline: float | None) -> Any:
    """What `work` returns, called in another thread: a signal or the deadline (Late) ends the wait for it."""
    done = Event()
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    Thread(target=run, name="pard-onnx encoding", daemon=True).start()
    while not done.wait(POLL):
        if deadline is not None and perf_counter() > deadline:
            raise Late
    if failed:
        raise failed[0]
    return found[0]


class GuardedTokenizer:
    """A tokenizer whose errors and panics become one line. Has all other attributes of the library's `Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, path: Path, error: type[BadInput]) -> None:
        self.inner = tokenizer
        self._path, self._error = path, error
        self._fewest: FewestTokens | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def like(self, tokenizer: Tokenizer) -> GuardedTokenizer:
        """Another tokenizer, whose failures are those of this one's file."""
        return GuardedTokenizer(tokenizer, self._path, self._error)

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least; 0 for texts that are encoded in a moment."""
        if len(text) <= LONG:
            return 0
        if self._fewest is None:
            self._fewest = fewest_tokens(self.inner) or FewestTokens(sys.maxsize, shortens=False, trims=False)
        return self._fewest.of(text)

    def encode(self, text: str, add_special_tokens: bool = True, deadline: float | None = None) -> Any:
        """The library's encoding of a text. Raises the error that the tokenizer was loaded with.

        deadline: of perf_counter(). A long text that is not encoded by then raises Failure.
        """
        try:
            if len(text) <= LONG:
                return self.inner.encode(text, add_special_tokens=add_special_tokens)
            # Of a batch, the library leaves the interpreter to other threads
            return in_thread(
                lambda: self.inner.encode_batch([text], add_special_tokens=add_special_tokens)[0], deadline
            )
        except Late:
            raise Failure(
                f"the time is over, and the prompt of {len(text):,} characters is not encoded; shorten it, or give a "
                "longer timeout"
            ) from None
        except BaseException as problem:
            self._fail("encode this text", problem)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens; errors as of `encode`."""
        try:
            return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as problem:
            self._fail("decode these tokens", problem)

    def _fail(self, action: str, problem: BaseException) -> NoReturn:
        if not isinstance(problem, Exception) and not panics(problem):
            raise problem  # Ctrl-C
        raise self._error(
            f"{self._path}: the tokenizers library cannot {action} with it: {problem}; take another tokenizer"
        ) from None


def checked_tokenizer(path: Path, content: bytes, added: Sequence[AddedToken], error: type[BadInput]) -> Tokenizer:
    """The tokenizer in `content`, a tokenizer.json, with the tokens that are added to it. Raises `error`.

    A file that was not seen before is tried in a helper process first. The check is remembered by its content.
    """
    beside = [{"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS} for token in added]
    facts = (tokenizer_check.VERSION, tokenizers.__version__, json.dumps(beside))
    digest = hashlib.sha256(hashlib.sha256(content).digest() + repr(facts).encode()).hexdigest()
    known = is_remembered("tokenizers", digest)
    problem = None if known else problem_in_helper(path, beside, len(content))
    if problem:
        raise error(f"{path}: {problem}; take another tokenizer")
    try:
        # Not from_file, which fails on paths with letters that the platform's encoding lacks
        tokenizer = Tokenizer.from_str(content.decode())
    except BaseException as failure:  # tokenizers raises plain Exception
        if not isinstance(failure, Exception) and not panics(failure):
            raise
        wrong = None
        with suppress(ValueError, RecursionError):
            wrong = id_problem(json.loads(content))
        if wrong:
            raise error(f"{path}: {wrong}") from None
        raise error(f"{path} cannot be read: {failure}") from failure
    if problem := growth_problem(tokenizer):
        raise error(f"{path}: {problem}; take another tokenizer")
    if not known:
        remember("tokenizers", digest)
    return tokenizer


def id_problem(value: Any) -> str | None:
    """The first token of a tokenizer.json, added or of its model, whose id is none; the library does not name it."""
    try:
        vocabulary = value["model"].get("vocab")
        found = [(token.get("content"), token.get("id")) for token in value.get("added_tokens") or ()]
        found += vocabulary.items() if isinstance(vocabulary, dict) else ()
    except (AttributeError, KeyError, TypeError):  # wrong in another way
        return None
    for text, id_ in found:
        if not is_id(id_):
            return f"the id of the token {shown(text)} is {shown(id_)}; {AN_ID}"
    return None


def problem_in_helper(path: Path, beside: list[dict[str, Any]], size: int) -> str | None:
    """What a helper process finds wrong; None where nothing is, and where no helper can be started."""
    packages = str(Path(tokenizers.__file__).parent.parent)
    request = {"packages": packages, "file": str(path.resolve()), "added": beside}
    try:
        answer = run_helper(Path(tokenizer_check.__file__), request, SECONDS + size / BYTES_PER_SECOND)
    except HelperStopped as stopped:
        return f"trying this tokenizer {stopped}"
    except NoHelper:
        return None
    problem: str | None = answer.get("problem")
    return problem
