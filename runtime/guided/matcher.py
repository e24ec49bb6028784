"""Follows a grammar through a generation by llguidance: which ids each row allows, and which drafts are right."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.tokenizer_check import panics
from pard_onnx.models.errors import BadArtifact, BadInput, Failure
from pard_onnx.models.extras import install_command
from pard_onnx.models.helper_process import HelperStopped, NoHelper, run_helper
from pard_onnx.runtime.sampling.edits import Logits

from . import grammar_check
from .endless import refuse_endless
from .grammar import ANSWER, Grammar
from .messages import explained

SECONDS = 3.0  # that a grammar may take to compile
SAFE = 10_000  # characters of a JSON schema without regular expressions that is compiled without a trial
SLOW_KEYWORDS = ('"pattern', '"allOf"', '"multipleOf"', '"x-guidance"')  # of JSON schemas, which need a trial
# What may stand between two parts of a JSON text. Without a bound, a model may write line ends for ever.
WHITESPACE = r"[ \t]{1,4}|(\r?\n){1,2}[ \t]{0,64}"
FEW = 2048  # ids that are copied one by one; more are left where they are
KEPT = 32  # compiled grammars


def llguidance() -> Any:
    """The library; BadInput that names the extra where it is not installed."""
    try:
        import llguidance as library
    except ImportError as error:
        command = install_command("guided")
        raise BadInput(f"structured output needs llguidance, which is not installed; run: {command}") from error
    return library


class Grammars:
    """Compiles grammars for one model's tokenizer, and keeps the latest ones. Threads may share it."""

    def __init__(self, tokenizer: Callable[[], str], name: str, size: int, eos_ids: Collection[int]) -> None:
        """tokenizer: gives the text of a tokenizer.json, when the first grammar is compiled; name: of the model, for
        messages. size: ids 0..size-1 can be chosen. eos_ids: of the model."""
        self._text, self._name, self._size, self._eos_ids = tokenizer, name, size, eos_ids
        self._tokenizer: Any = None  # llguidance's
        self._special: dict[str, int] = {}  # its special tokens: ids by text
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()  # llguidance's matchers at their beginning
        self._lock = Lock()

    def matcher(self, grammar: Grammar, prompt_length: int, end_ids: Collection[int]) -> Matcher:
        """The grammar at the beginning of a generation. Arguments as of `Matcher`; errors as of `compiled`."""
        inner = self.compiled(grammar).deep_copy()
        return Matcher(inner, grammar.argument, self._tokenizer.vocab_size, self._size, prompt_length, end_ids)

    def compiled(self, grammar: Grammar) -> Any:
        """llguidance's matcher, which must not be moved. Takes most of a second for a model's first grammar.

        Raises BadInput for a grammar that llguidance does not support, that no text satisfies, or that takes too long;
        and where llguidance is not installed. Raises BadArtifact for a tokenizer that it does not support.
        """
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]

    def _compile(self, grammar: Grammar) -> Any:
        library = llguidance()
        if self._tokenizer is None:
            self._open(library)
        source = source_of(grammar, self._special, library.LLMatcher.grammar_from_regex)
        if needs_trial(grammar):
            refuse(grammar, problem_in_helper(source, library, self._tokenizer.vocab_size, self._special))
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # finds some grammars that no text satisfies
        refuse(grammar, trial.get_error())
        if grammar.kind == "json":
            refuse_endless(grammar.text, grammar.argument)
        return matcher

    def _open(self, library: Any) -> None:
        """Make llguidance's form of the tokenizer, without added tokens that the model does not have."""
        try:
            value = json.loads(self._text())
            value["added_tokens"] = [one for one in value.get("added_tokens") or () if one["id"] < self._size]
            known = 1 + max([*map(_id, value["added_tokens"]), *_model_ids(value["model"]["vocab"])])
            size = max(self._size, known)
            added = {one["content"]: one["id"] for one in value["added_tokens"]}
            eos_ids = [token for token in self._eos_ids if token < known]
            if not eos_ids:  # llguidance would take any token that looks like one; no row has this id
                eos_ids, size = [size], size + 1
                value["added_tokens"].append(unreachable(eos_ids[0]))
            opened = library.LLTokenizer(json.dumps(value), n_vocab=size, eos_token=eos_ids)
            self._special = {text: id_ for text, id_ in added.items() if opened.is_special_token(id_)}
            self._tokenizer = opened
        except BaseException as error:
            if not isinstance(error, Exception) and not panics(error):
                raise
            raise BadArtifact(
                f"{self._name}: llguidance cannot use this tokenizer ({error}); generate without a grammar"
            ) from None


def unreachable(id_: int) -> dict[str, object]:
    """An added token of a tokenizer.json that no text of a model has."""
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": "<|no end of text \0|>", "special": True, **no}


def _id(token: Any) -> int:
    return int(token["id"])


def _model_ids(vocabulary: Any) -> Collection[int]:
    # Unigram models list their pieces; all others map a piece to its id
    return range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()


def needs_trial(grammar: Grammar) -> bool:
    """Whether the grammar may take very long to compile, so that a helper process tries it first."""
    if grammar.kind == "json":
        return len(grammar.text) > SAFE or any(keyword in grammar.text for keyword in SLOW_KEYWORDS)
    return grammar.kind != "choice"


def problem_in_helper(source: str, library: Any, size: int, special: Mapping[str, int]) -> str:
    """What a helper process finds wrong with a grammar; empty if nothing is, and where no helper can be started.

    size: ids of llguidance's tokenizer; special: its special tokens.
    """
    packages = str(Path(library.__file__).parent.parent)
    request = {"packages": packages, "grammar": source, "size": size, "special": dict(special)}
    try:
        answer = run_helper(Path(grammar_check.__file__), request, SECONDS)
    except HelperStopped as stopped:
        return f"compiling it {stopped}"
    except NoHelper:
        return ""
    return str(answer["problem"])


def refuse(grammar: Grammar, problem: str) -> None:
    """Raise BadInput if there is a problem."""
    if problem:
        raise BadInput(f"{grammar.argument} cannot be followed: {explained(problem, grammar.kind)}")


def source_of(grammar: Grammar, special: Mapping[str, int], from_regex: Callable[[str], str]) -> str:
    """The grammar in llguidance's JSON form.

    special: the ids of special tokens by their texts. from_regex: llguidance's `grammar_from_regex`.
    """
    answer: dict[str, Any]
    if grammar.kind == "json":
        answer = {"json_schema": with_own_settings(json.loads(grammar.text))}
    elif grammar.kind == "regex":
        answer = {"lark_grammar": json.loads(from_regex(grammar.text))["grammars"][0]["lark_grammar"]}
    elif grammar.kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        answer = {"lark_grammar": f"start: CHOICE\nCHOICE: {texts}"}
    else:
        answer = {"lark_grammar": grammar.text}
    if grammar.reasoning is None:
        return json.dumps({"grammars": [answer]})
    block = reasoning_rules(grammar.reasoning.end, grammar.reasoning.begin, special)
    return json.dumps({"grammars": [{"lark_grammar": block}, {"name": ANSWER, **answer}]})


def with_own_settings(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with this package's settings of llguidance, where it has none of its own."""
    theirs = schema.get("x-guidance", {})
    if not isinstance(theirs, dict):  # llguidance refuses it
        return schema
    return schema | {"x-guidance": {"whitespace_pattern": WHITESPACE} | theirs}


def reasoning_rules(end: str, begin: str | None, special: Mapping[str, int]) -> str:
    """The Lark rules of a block of reasoning and the answer after it; begin: None where the prompt has begun it.

    A mark that is a token of its own is that token; otherwise it is found in the text, wherever tokens end.
    """

    def mark(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text, ensure_ascii=False)

    if end not in special:
        # "lazy": the block ends at the first mark
        rules = ["block: lazy_text", f"lazy_text[lazy]: /(?s:.*)/ {json.dumps(end, ensure_ascii=False)}"]
    else:
        rules = [f"block: TEXT? {mark(end)}", "TEXT: /(?s:.+)/"]
    start = "block LINES? " if begin is None else f"(SPACE? {mark(begin)} block LINES?)? "
    # Only what `ThinkingReader` leaves out of the answer may stand around the block
    spaces = [r"SPACE: /[ \t\r\n]{1,16}/", r"LINES: /[\r\n]{1,16}/"]
    return "\n".join([f"start: {start}@{ANSWER}", *rules, *spaces])


class Matcher:
    """A grammar's state in one generation, which moves forward with the tokens. A `RowEdit`.

    It has read the tokens before a position. What it says of the tokens after it depends on them alone.
    """

    def __init__(
        self, inner: Any, argument: str, mask_size: int, size: int, prompt_length: int, end_ids: Collection[int]
    ) -> None:
        """inner: llguidance's `LLMatcher`, not moved yet. argument: the grammar's option, for messages. mask_size: the
        ids that llguidance's masks have. size: ids 0..size-1 can be chosen, at most mask_size. prompt_length: the
        tokens before the first one that the grammar is for. end_ids: end the text: EOS, and ids of the user's, all
        below size; they are allowed only where the text is complete."""
        self._inner, self._argument, self._size, self._read = inner, argument, size, prompt_length
        self.end_ids = frozenset(end_ids)
        self._ends = np.array(sorted(end_ids), np.int64)
        self._mask = np.zeros((mask_size + 31) // 32, np.uint32)  # a bit for each id
        self._mask_at = -1  # the position that the mask is for

    def read(self, tokens: Sequence[int]) -> None:
        """Move forward to the end of `tokens`, the prompt included. Takes O(new tokens)."""
        if len(tokens) > self._read:
            new = list(tokens[self._read :])
            if not self._inner.consume_tokens(new):
                self._fail("a token that the grammar forbids was chosen, or the grammar became too complex")
            self._read = len(tokens)

    def edit(self, row: Logits, tokens: Sequence[int]) -> Logits:
        """See `RowEdit`: what the grammar forbids becomes -inf. Ids that end the text stay where it is complete."""
        self.read(tokens)
        self._compute_mask()
        ends = row[self._ends]
        keep_only(row, np.unpackbits(self._mask.view(np.uint8), count=len(row), bitorder="little").view(np.bool_))
        row[self._ends] = ends if self._inner.is_accepting() else -np.inf
        if self._inner.is_accepting() and not (ends > -np.inf).any() and self._only_ends():
            # A bias bans EOS, but nothing else may follow. Without drafts this row is never asked for.
            row[self._ends] = 0.0
        return row

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens satisfies the grammar, and nothing may follow it."""
        self.read(tokens)
        return self._inner.is_accepting() and (self._inner.is_stopped() or self._only_ends())

    def _only_ends(self) -> bool:
        self._compute_mask()
        bits = np.unpackbits(self._mask.view(np.uint8), count=self._size, bitorder="little")
        return self.end_ids.issuperset(np.flatnonzero(bits).tolist())

    def forced(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The only tokens that may follow these, as far as there is one way to write them."""
        self.read(tokens)
        forced = self._before_end(self._inner.compute_ff_tokens())
        return forced[: self._with_row(forced)]

    def allowed(self, tokens: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of the first drafts may follow these tokens; one that ends the text does not count."""
        self.read(tokens)
        count: int = self._inner.validate_tokens(list(self._before_end(drafts)))
        return self._with_row(drafts[:count])

    def _with_row(self, drafts: Sequence[int]) -> int:
        """How many of the first drafts, all of which are allowed, leave a row to choose from: where the model has no id
        that ends the text, none is left after a draft that completes it."""
        count = len(drafts)
        if self.end_ids or not count:
            return count
        after = Matcher(self._inner.deep_copy(), self._argument, self._mask.size * 32, self._size, 0, ())
        return count - 1 if after.is_complete(drafts) else count

    def _before_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        end = next((at for at, token in enumerate(tokens) if token in self.end_ids), len(tokens))
        return tuple(tokens[:end])

    def _compute_mask(self) -> None:
        if self._mask_at != self._read:
            self._inner.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._mask_at = self._read
            if self._inner.is_error():
                self._fail("the grammar became too complex")

    def _fail(self, problem: str) -> None:
        detail = explained(self._inner.get_error(), "")
        raise Failure(f"{self._argument} cannot be followed at token {self._read}: {problem} ({detail})")


def keep_only(row: Logits, allowed: NDArray[np.bool_]) -> None:
    """Make all other values of the row -inf; the two ways differ in time alone."""
    if np.count_nonzero(allowed) > FEW:
        np.copyto(row, -np.inf, where=~allowed)
    else:
        ids = np.flatnonzero(allowed)
        kept = row[ids]
        row.fill(-np.inf)
        row[ids] = kept
