"""`pair.score` on toy artifacts: sums of generations' log probabilities, the border of two texts, lists, refusals."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx import BadInput, Pair, TooLong, load
from pard_onnx.models.checks import common_prefix
from pard_onnx.runtime.decoding.loop import Halted
from pard_onnx.runtime.engine import TargetSeat
from pard_onnx.runtime.scoring import Form, Passage
from pard_onnx.runtime.sessions.session import do_nothing
from pard_onnx.runtime.tuning.steps import ANY

TEXT = "the quick brown"
MESSAGES = [{"role": "user", "content": "lazy <|im_end|> dog"}]


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("prompt", [TEXT, "é", [1, 2, 3], MESSAGES, [4] * 90], ids=repr)
def test_a_generation_has_the_score_of_its_tokens(pair: Pair, prompt: Any) -> None:
    result = pair.generate(prompt, max_new_tokens=20, logprobs=3)
    score = pair.score(prompt, result.tokens, logprobs=3)
    assert result.logprobs is not None
    assert score.tokens == result.logprobs
    assert score.logprob == sum(one.logprob for one in result.logprobs)
    assert (score.is_greedy, score.prompt_tokens) == (True, result.stats.prompt_tokens)
    assert all(one.top == () for one in pair.score(prompt, result.tokens).tokens)


def test_one_other_token_is_not_greedy(pair: Pair) -> None:
    tokens = list(pair.generate(TEXT, max_new_tokens=8).tokens)
    for at in range(len(tokens)):
        other = [*tokens[:at], (tokens[at] + 1) % 270, *tokens[at + 1 :]]
        score = pair.score(TEXT, other)
        assert not score.is_greedy
        assert score.logprob < pair.score(TEXT, tokens[: at + 1]).logprob + 1e-9


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_texts_are_encoded_together(pair: Pair, prompt: str, continuation: str) -> None:
    before, whole = pair.encode(prompt), pair.encode(prompt + continuation)
    first = common_prefix(before, whole)
    if not first:
        return
    score = pair.score(prompt, continuation)
    assert [one.token for one in score.tokens] == whole[first:]
    assert score.prompt_tokens == first
    assert b"".join(one.bytes for one in score.tokens).endswith(continuation.encode())


def test_a_space_at_the_prompts_end_is_the_next_words(pair: Pair) -> None:
    assert pair.score("the ", "brown") == pair.score("the", " brown")
    assert [one.text for one in pair.score("the ", "brown").tokens] == [" br", "ow", "n"]


def test_after_an_empty_prompt_where_the_tokenizer_begins_texts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    bos = pair.tokenize("<|end|>")
    monkeypatch.setattr(pair.text, "encode", lambda text: [*bos, *pair.tokenize(text)])
    assert pair.score("", " fox") == pair.score(bos, " fox")


def test_the_continuation_of_messages_is_the_beginning_of_the_answer(pair: Pair) -> None:
    ids = pair.encode(MESSAGES)
    score = pair.score(MESSAGES, "the fox<|im_end|>")
    assert [one.token for one in score.tokens] == pair.encode("the fox<|im_end|>")
    assert score == pair.score(ids, pair.encode("the fox<|im_end|>")) == pair.score(ids, "the fox<|im_end|>")
    assert score == pair.score(MESSAGES[0]["content"], "the fox<|im_end|>", chat=True)
    encoded = pair.score(MESSAGES, "the fox", special_tokens="encode")
    assert encoded.prompt_tokens < score.prompt_tokens


ANSWERS = [" fox", " dog", " fox jumps over", " dog"]


def test_lists_give_what_single_calls_give(pair: Pair) -> None:
    prompts = [TEXT, [1, 2, 3], TEXT, MESSAGES]
    assert pair.score(TEXT, ANSWERS) == [pair.score(TEXT, one) for one in ANSWERS]
    chats = pair.score(TEXT, ANSWERS, chat=True, logprobs=2)
    assert (
        chats
        == [pair.score(TEXT, one, chat=True, logprobs=2) for one in ANSWERS]
        != pair.score(TEXT, ANSWERS, logprobs=2)
    )
    assert pair.score(TEXT, [[5], [6, 7]]) == [pair.score(TEXT, [5]), pair.score(TEXT, [6, 7])]
    both: Any = prompts
    assert pair.score(both, ANSWERS) == [pair.score(p, a) for p, a in zip(both, ANSWERS, strict=True)]  # type: ignore[comparison-overlap]
    assert pair.score(both, " x") == [pair.score(p, " x") for p in both]  # type: ignore[comparison-overlap]
    assert pair.score(iter(ANSWERS), (one for one in ANSWERS)) == pair.score(ANSWERS, ANSWERS)  # type: ignore[call-overload]


def test_what_continuations_share_is_computed_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    session, fed = pair.engine.models[0].session, []
    step = session.step
    monkeypatch.setattr(session, "step", lambda ids, keep: fed.append(len(ids)) or step(ids, keep))
    pair.score([1] * 100, [[2, 3], [4], [5, 6, 7]])
    assert sum(fed) == 100 + 1 + 1 + 3
    fed.clear()
    pair.score([1] * 100, [2, 3])  # a call of its own depends on none before it
    assert sum(fed) == 101


def test_it_leaves_generations_and_chats_as_they_were(pair: Pair) -> None:
    plain = pair.generate(TEXT, max_new_tokens=20).tokens
    with pair.chat() as chat:
        first = chat.send("lazy dog", max_new_tokens=6)
        pair.score(TEXT, ANSWERS)
        assert pair.generate(TEXT, max_new_tokens=20).tokens == plain
        second = chat.send("the fox", max_new_tokens=6)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens


def test_tokens_up_to_the_capacity(pair: Pair) -> None:
    assert len(pair.score([1], [2] * (pair.capacity - 1)).tokens) == pair.capacity - 1
    with pytest.raises(TooLong, match="prompt and continuation have 129 tokens, but the capacity is 128; shorten"):
        pair.score([1], [2] * pair.capacity)


@pytest.mark.parametrize(
    ("prompt", "continuation", "problem"),
    [
        ("", "x", "no token is before the continuation"),
        ([], "x", "no token is before the continuation"),
        ("x", "", "the continuation is empty"),
        ("x", [], "the continuation has no token of its own"),
        ("x", [MESSAGES[0]], "a continuation is text or token ids; "),
        ("x", b"y", "a continuation is text or token ids, not b'y'"),
        ("x", 3, "a continuation is text or token ids, not 3"),
        ("x", [3, "y"], "a continuation is text or token ids; 'y' is none"),
        ("x", [5000], "token id 5000 in the continuation; the model has ids 0 to"),
        (5, "x", "a prompt is text, token ids, or a list of messages"),
        ([5000], "x", "token id 5000 in the prompt"),
        (TEXT, ["x", ""], r"^pair\[1\]: the continuation is empty"),
        (["x", [5000]], "x", r"^pair\[1\]: token id 5000 in the prompt"),
        (["x", "y"], ["x"] * 3, "2 prompts but 3 continuations"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored(pair: Pair, prompt: Any, continuation: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        pair.score(prompt, continuation)


def test_while_a_stream_runs(pair: Pair) -> None:
    alone = pair.score(TEXT, " fox")
    with pair.stream(TEXT) as stream:
        next(stream)
        assert pair.score(TEXT, " fox") == alone
        assert stream.read().tokens == pair.generate(TEXT).tokens


def test_a_scorer_goes_on_where_it_was_interrupted(pair: Pair) -> None:
    ids, target = [1, 2, 3] * 20, pair.engine.models[0]
    whole = pair.score(ids[:5], ids[5:], logprobs=1)
    scorer = pair.engine._scorer(Passage(tuple(ids), 5), ANY, 1)
    scorer._form = Form(chunk=4, scored=8, widths=ANY)
    seen: list[int] = []

    def interrupt() -> None:
        seen.append(len(scorer.found))
        if len(seen) % 3 == 0:
            raise Halted("cancelled")

    with pair.chat() as chat:
        sequence = chat._open()
        seat = TargetSeat(target.session, sequence.target, do_nothing, pair.engine._session_locks[0])
        while not scorer.is_complete:
            assert scorer.take_prompt() is None
            with suppress(Halted):
                scorer.run(seat, interrupt)
            sequence.target.rollback(max(0, sequence.target.length - 6))  # as if the cache had been needed elsewhere
        seat.leave()
    assert tuple(scorer.found) == whole.tokens
    assert len(seen) > 6 and seen == sorted(seen)
    assert scorer.take_prompt() == (None, *whole.tokens) and scorer.take_prompt() is None
