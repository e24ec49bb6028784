"""The user's functions in a generation: `stop_when` and `logits_processor`, whatever is drafted."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pard_onnx import BadInput, Pair, Result, load
from pard_onnx.runtime.text.writer import Detokenizer, Writer, stop_strings

TEXT = "the quick brown fox"
LENGTHS = [0, 1, 4, "auto"]


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


def same(one: Result, other: Result) -> bool:
    return (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)


# --- stop_when


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_ends_with_the_token_after_which_it_shall(pair: Pair, length: Any, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 5}
    whole = pair.generate(TEXT, max_new_tokens=30, draft_length=0, **options)
    for count in (1, 2, 7, 30):
        seen: list[tuple[str, tuple[int, ...]]] = []

        def stop(text: str, tokens: Sequence[int], count: int = count, seen: Any = seen) -> bool:
            seen.append((text, tuple(tokens)))
            return len(tokens) == count

        found = pair.generate(TEXT, max_new_tokens=60, draft_length=length, stop_when=stop, **options)
        assert found.finish_reason == "stop"
        assert found.tokens == whole.tokens[:count]
        assert found.text == pair.generate(TEXT, max_new_tokens=count, draft_length=0, **options).text
        assert [tokens for _, tokens in seen] == [whole.tokens[:n] for n in range(1, count + 1)]
        assert all(found.text.startswith(text) for text, _ in seen)  # but what may still change


def test_text_that_was_held_back_is_given_at_the_end(pair: Pair) -> None:
    """As at EOS: the beginning of a stop string, and half a character."""
    whole = pair.generate(TEXT, max_new_tokens=6)
    last = whole.text[-1]
    ended = pair.generate(TEXT, max_new_tokens=60, stop=[last + "\0"], stop_when=lambda _, tokens: len(tokens) == 6)
    assert (ended.text, ended.finish_reason) == (whole.text, "stop")
    stopped = pair.generate(TEXT, max_new_tokens=60, stop=[whole.text[2:4]], stop_when=lambda *_: False)
    assert stopped.text == whole.text[: whole.text.find(whole.text[2:4])]


def test_it_may_read_the_text_and_cannot_change_the_tokens(pair: Pair) -> None:
    def stop(text: str, tokens: Sequence[int]) -> bool:
        assert tokens[-1] == list(tokens)[-1] and tokens[:2] == list(tokens)[:2]
        with pytest.raises(TypeError):
            tokens[0] = 1  # type: ignore[index]
        return np.bool_(len(text) > 9)  # type: ignore[return-value]

    found = pair.generate(TEXT, max_new_tokens=60, stop_when=stop)
    assert found.finish_reason == "stop" and len(found.text) > 9


def test_a_chat_keeps_the_answer_that_was_ended(pair: Pair) -> None:
    with pair.chat() as chat:
        result = chat.send("fox", max_new_tokens=20, stop_when=lambda _, tokens: len(tokens) == 3)
        assert chat.messages[-1] == {"role": "assistant", "content": result.text}
        assert len(result.tokens) == 3


@pytest.mark.parametrize("answer", [None, 1, "yes", np.array([True])])
def test_what_is_no_answer_is_told(pair: Pair, answer: Any) -> None:
    with pytest.raises(BadInput, match="what stop_when returns must be True or False, not"):
        pair.generate(TEXT, max_new_tokens=9, stop_when=lambda *_: answer)


# --- logits_processor


def ban_repeats(tokens: Sequence[int], row: np.ndarray) -> np.ndarray:
    """A function of tokens and row that changes a lot: the last four tokens cannot come again."""
    row[list(tokens[-4:])] = -np.inf
    return row


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processed_text_is_the_same_with_any_drafts(pair: Pair, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 40}
    expected = pair.generate(TEXT, draft_length=0, logits_processor=ban_repeats, **options)
    assert expected.tokens != pair.generate(TEXT, draft_length=0, **options).tokens
    assert all(token not in expected.tokens[max(0, i - 4) : i] for i, token in enumerate(expected.tokens))
    for length in LENGTHS:
        found = pair.generate(TEXT, draft_length=length, logits_processor=ban_repeats, **options)
        assert same(found, expected)
        assert found.stats.exact
    other = pair.generate(
        TEXT, draft_length=4, logits_processor=lambda tokens, row: ban_repeats(tokens, row.copy()), **options
    )
    assert same(other, expected)  # another array than the one that was given


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_rows_of_other_types_are_taken(pair: Pair, dtype: Any) -> None:
    def force(tokens: Sequence[int], row: np.ndarray) -> np.ndarray:
        other = np.zeros(row.shape, dtype)
        other[len(tokens) % 7] = 1
        return other

    prompt = pair.encode(TEXT)
    found = pair.generate(prompt, max_new_tokens=9, logits_processor=force)
    assert list(found.tokens) == [n % 7 for n in range(len(prompt), len(prompt) + 9)]


def test_the_tokens_are_all_of_them(pair: Pair) -> None:
    seen: list[list[int]] = []

    def look(tokens: Sequence[int], row: np.ndarray) -> np.ndarray:
        seen.append(list(tokens))
        assert row.shape == (pair.target_manifest.spec.vocabulary.size,) and row.dtype == np.float32
        return row

    prompt = pair.encode(TEXT)
    tokens = [*prompt, *pair.generate(prompt, max_new_tokens=12, draft_length=4, logits_processor=look).tokens]
    assert seen == [tokens[:n] for n in range(len(prompt), len(tokens))]
    assert tokens[len(prompt) :] == list(pair.generate(prompt, max_new_tokens=12).tokens)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (lambda row: None, "not None"),
        (lambda row: row.tolist(), r"of shape \(\d+,\), not \["),
        (lambda row: row[:-1], r"not of shape \(\d+,\)"),
        (lambda row: row[None], r"not of shape \(1, \d+\)"),
        (lambda row: row > 0, "not of the type bool"),
        (lambda row: row.astype(str), "not of the type <U"),
        (lambda row: row.astype(complex), "not of the type complex128"),
        (lambda row: np.full_like(row, np.nan), "has a NaN"),
        (lambda row: np.full_like(row, np.inf), "has an infinite logit"),
        (lambda row: np.full(row.shape, 1e300), "has an infinite logit"),
        (lambda row: np.full_like(row, -np.inf), "forbids every id"),
    ],
)
def test_what_is_no_row_is_told(pair: Pair, returned: Callable[[Any], Any], problem: str) -> None:
    with pytest.raises(BadInput, match=f"logits_processor (must return|returned) .*{problem}") as caught:
        pair.generate(TEXT, max_new_tokens=4, logits_processor=lambda _, row: returned(row))
    assert "\n" not in str(caught.value)


# --- both


@pytest.mark.parametrize("name", ["stop_when", "logits_processor"])
@pytest.mark.parametrize("error", [KeyError("own"), KeyboardInterrupt(), StopIteration(5), GeneratorExit()])
def test_what_they_raise_ends_the_generation_and_nothing_else(pair: Pair, name: str, error: BaseException) -> None:
    before = pair.generate(TEXT, max_new_tokens=8)
    calls = []

    def fail(one: Any, other: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return other if name == "logits_processor" else False

    expected = RuntimeError if isinstance(error, StopIteration) else type(error)  # as in any generator
    with pytest.raises(expected) as caught:
        pair.generate(TEXT, max_new_tokens=8, **{name: fail})
    assert caught.value is error or caught.value.__cause__ is error
    assert same(pair.generate(TEXT, max_new_tokens=8), before)
    with pair.chat() as chat:
        calls.clear()
        with pytest.raises(expected):
            chat.send("fox", max_new_tokens=8, **{name: fail})
        assert chat.messages == []
        chat.send("fox", max_new_tokens=8)
        assert len(chat.messages) == 2


@pytest.mark.parametrize("name", ["stop_when", "logits_processor"])
def test_they_are_functions(pair: Pair, name: str) -> None:
    for value in ("yes", 5, int, len, lambda: True, lambda one: True, lambda one, two, three: True):
        with pytest.raises(BadInput, match=f"{name} must be a function of the .* and the .*, not "):
            pair.generate(TEXT, **{name: value})
    assert pair.generate(TEXT, max_new_tokens=2, **{name: None}).tokens


def test_an_end_token_after_the_ended_text_completes_no_stop_string() -> None:
    """Both may be in one round; without drafts the end token is never reached."""

    class Letters:
        def decode(self, ids: Sequence[int]) -> str:
            return "".join(map(chr, ids))

    def text(ends: bool) -> str:
        writer = Writer(Detokenizer(Letters(), []), stop_strings("a<end>", {"<end>": 7}), stop_when=lambda *_: ends)
        writer.write([ord("b"), ord("a")] if not ends else [ord("a")])
        writer.finish(7)
        return "".join(writer.parts)

    assert (text(True), text(False)) == ("a", "b")
