"""Several prompts in one call, and counting, tokenizing and detokenizing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx import BadInput, Pair, Result, TooLong, load

TEXT = "the quick brown"
QUESTION = {"role": "user", "content": "lazy <|im_end|> dog"}


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


def answer(result: Result) -> tuple[object, ...]:
    return result.text, result.tokens, result.finish_reason, result.logprobs, result.stats.prompt_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}, {"chat": True, "logprobs": 1}], ids=repr)
@pytest.mark.parametrize(
    "prompts",
    [
        [TEXT, "é", TEXT],
        [TEXT],
        [[1, 2, 3], [4]],
        [[QUESTION], [QUESTION, {"role": "assistant", "content": "x"}, QUESTION]],
        [TEXT, [1, 2], [QUESTION]],
        (TEXT, "é"),
        np.array([[1, 2], [3, 4]]),
        np.array([TEXT, "é"]),
    ],
    ids=repr,
)
def test_each_of_several_is_answered_as_by_itself(pair: Pair, prompts: Any, options: Any) -> None:
    results = pair.generate(prompts, max_new_tokens=12, **options)
    assert [answer(one) for one in results] == [
        answer(pair.generate(prompt, max_new_tokens=12, **options)) for prompt in prompts
    ]


@pytest.mark.parametrize("prompt", [[1, 2, 3], [QUESTION], np.array([1, 2]), [np.array(1), np.array(2)], (1, 2)])
def test_ids_and_messages_are_one_prompt(pair: Pair, prompt: Any) -> None:
    assert isinstance(pair.generate(prompt, max_new_tokens=2), Result)


def test_iterators_are_read_once(pair: Pair) -> None:
    texts: Any = (text for text in (TEXT, "é"))
    assert len(pair.generate(texts, max_new_tokens=2)) == 2
    ids: Any = iter([1, 2, 3])
    assert pair.generate(ids, max_new_tokens=2).stats.prompt_tokens == 3


@pytest.mark.parametrize(
    ("prompts", "kind", "problem"),
    [
        ([TEXT, ""], BadInput, r"^prompt\[1\]: the prompt is empty$"),
        ([[1], []], BadInput, r"^prompt\[1\]: the prompt is empty$"),
        ([TEXT, 3], BadInput, r"^prompt\[1\]: a prompt is text, token ids"),
        ([TEXT, "x", None], BadInput, r"^prompt\[2\]: a prompt is text, token ids"),
        ([[1], [5000]], BadInput, r"^prompt\[1\]: token id 5000"),
        ([[1], [1] * 128], TooLong, r"^prompt\[1\]: the prompt has 128 tokens"),
        ([[[1]], [2]], BadInput, r"^prompt\[0\]: a prompt is text, token ids"),
        ([3, TEXT], BadInput, "^a prompt is text, token ids"),
        ([], BadInput, "^the prompt is empty"),
    ],
)
def test_an_error_names_the_index_before_anything_runs(
    pair: Pair, prompts: Any, kind: type[Exception], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.engine, "run", None)
    with pytest.raises(kind, match=problem):
        pair.generate(prompts)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (TEXT, {}),
        (TEXT, {"chat": True}),
        ([1, 2, 3], {"temperature": 0.5}),
        ([QUESTION], {}),
        ([QUESTION], {"special_tokens": "encode"}),
        ([QUESTION], {"template_arguments": {"add_generation_prompt": False}}),
    ],
    ids=repr,
)
def test_the_count_is_that_of_a_generation(pair: Pair, prompt: Any, options: Any) -> None:
    assert (
        pair.count_tokens(prompt, **options) == pair.generate(prompt, max_new_tokens=1, **options).stats.prompt_tokens
    )


def test_a_count_may_exceed_the_capacity_but_not_the_vocabulary(pair: Pair) -> None:
    assert pair.count_tokens([1] * 1000) == 1000
    with pytest.raises(BadInput, match="token id 5000"):
        pair.count_tokens([5000])
    with pytest.raises(BadInput, match="unknown option temperatur; did you mean temperature"):
        pair.count_tokens(TEXT, temperatur=1)  # type: ignore[call-arg]


@given(st.text(max_size=20))
def test_tokens_and_back(pair: Pair, text: str) -> None:
    ids = pair.tokenize(text)
    assert pair.detokenize(ids) == text
    if text:
        assert ids == pair.encode(text)


def test_special_tokens_of_a_text(pair: Pair) -> None:
    written = "a<|im_end|>b"
    as_token, as_text = pair.tokenize(written), pair.tokenize(written, special_tokens="text")
    assert len(as_token) == 3 < len(as_text)
    assert (pair.detokenize(as_token), pair.detokenize(as_token, skip_special_tokens=False)) == ("ab", written)
    assert pair.detokenize(as_text) == written
    with pytest.raises(BadInput, match="has the special token"):
        pair.tokenize(written, special_tokens="refuse")
    assert pair.tokenize("ab", special_tokens="refuse") == pair.tokenize("ab")


@pytest.mark.parametrize("ids", [3, "text", [1, "x"], [True], [-1], [5000], b"ab", {1: 2}])
def test_ids_that_are_none(pair: Pair, ids: Any) -> None:
    with pytest.raises(BadInput, match=r"is a list of token ids|in the list; the model has ids"):
        pair.detokenize(ids)


@pytest.mark.parametrize("text", [3, None, ["x"], b"x"])
def test_a_text_that_is_none(pair: Pair, text: Any) -> None:
    with pytest.raises(BadInput, match="the text to tokenize must be text, not"):
        pair.tokenize(text)
