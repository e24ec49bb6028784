"""Log probabilities of generations on toy artifacts: the same whatever is drafted, and in step with the tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pard_onnx import Chunk, Failure, Options, Pair, Result, load
from pard_onnx.runtime import scoring
from pard_onnx.runtime.text.prompt import Prompt
from pard_onnx.runtime.tuning.steps import ANY, PREFILL_CHUNK

TEXT = "the quick brown"
LENGTHS: list[Any] = [0, 1, 4, 8, "auto"]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 2.0, "top_k": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 1},
    {"logit_bias": {5: 100.0, 6: 100.0}},
]


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


def rows_of(pair: Pair, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The log-softmax of the target's rows after each token, computed by the session itself in one step."""
    target = pair.engine.models[0]
    target.session.rollback(0)
    logits = target.session.step(ids, len(ids)).logits[:, : target.manifest.spec.vocabulary.size].astype(np.float64)
    target.session.rollback(0)
    logits -= logits.max(axis=1, keepdims=True)
    found: np.ndarray[Any, np.dtype[np.float64]] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def require_right(pair: Pair, prompt: list[int], result: Result, top: int) -> None:
    rows = rows_of(pair, [*prompt, *result.tokens])
    assert result.logprobs is not None
    assert [one.token for one in result.logprobs] == list(result.tokens)
    for position, one in enumerate(result.logprobs, len(prompt)):
        row = rows[position - 1]
        assert one.logprob == pytest.approx(row[one.token], abs=1e-5)
        best = np.sort(row)[::-1][:top]
        assert [other.logprob for other in one.top] == pytest.approx(best.tolist(), abs=1e-5)
        assert [other.logprob for other in one.top] == pytest.approx([row[other.token] for other in one.top], abs=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_they_are_of_the_models_own_distribution_and_the_same_with_drafts(pair: Pair, way: dict[str, Any]) -> None:
    prompt = pair.encode(TEXT)
    plain = pair.generate(prompt, max_new_tokens=40, draft_length=0, logprobs=4, **way)
    require_right(pair, prompt, plain, 4)
    for k in LENGTHS[1:]:
        result = pair.generate(prompt, max_new_tokens=40, draft_length=k, logprobs=4, **way)
        assert (result.tokens, result.logprobs) == (plain.tokens, plain.logprobs)  # floats, compared bit for bit
    without = pair.generate(prompt, max_new_tokens=40, **way)
    assert (without.tokens, without.logprobs, without.prompt_logprobs) == (plain.tokens, None, None)


def test_none_of_the_most_likely_tokens(pair: Pair) -> None:
    result = pair.generate(TEXT, max_new_tokens=5, logprobs=0)
    assert result.logprobs is not None
    assert all(one.top == () and one.logprob < 0 for one in result.logprobs)


@pytest.mark.parametrize("k", LENGTHS)
def test_chunks_have_those_of_their_tokens(pair: Pair, k: Any) -> None:
    with pair.stream(TEXT, max_new_tokens=30, draft_length=k, logprobs=2) as stream:
        chunks = list(stream)
        require_aligned(chunks, stream.result)
    assert all(chunk.logprobs is None for chunk in pair.stream(TEXT, max_new_tokens=3))


def require_aligned(chunks: list[Chunk], result: Result) -> None:
    assert result.logprobs is not None
    for chunk in chunks:
        assert chunk.logprobs is not None
        assert tuple(one.token for one in chunk.logprobs) == chunk.tokens
    assert tuple(one for chunk in chunks for one in chunk.logprobs or ()) == result.logprobs
    assert tuple(one.token for one in result.logprobs) == result.tokens


@pytest.mark.parametrize("k", [0, 3, 8])
def test_a_stop_string_cuts_both_at_the_same_token(pair: Pair, k: int) -> None:
    whole = pair.generate(TEXT, max_new_tokens=40, draft_length=k, logprobs=1)
    assert whole.logprobs is not None
    for at in range(2, len(whole.text) - 2, 3):
        with pair.stream(TEXT, max_new_tokens=40, draft_length=k, logprobs=1, stop=whole.text[at : at + 2]) as stream:
            chunks = list(stream)
            result = stream.result
        require_aligned(chunks, result)
        assert result.logprobs == whole.logprobs[: len(result.tokens)]


@pytest.mark.parametrize("k", [0, 5])
def test_the_token_that_ends_a_text_has_none(pair: Pair, k: int) -> None:
    tokens = pair.generate(TEXT, max_new_tokens=40).tokens
    result = pair.generate(TEXT, max_new_tokens=40, draft_length=k, stop_token_ids=tokens[9], logprobs=1)
    assert result.finish_reason == "stop"
    assert result.logprobs is not None
    assert tuple(one.token for one in result.logprobs) == result.tokens == tokens[: tokens.index(tokens[9])]


@pytest.mark.parametrize("k", [0, 5])
def test_rounds_have_those_of_their_tokens(pair: Pair, k: int) -> None:
    tokens = pair.generate(TEXT, max_new_tokens=40).tokens
    options = Options(max_new_tokens=40, draft_length=k, stop_token_ids=tokens[9], logprobs=1, prompt_logprobs=0)
    sequence = pair.engine.new_sequence()
    sequence.tokens = pair.encode(TEXT)
    prompt = len(sequence.tokens)
    first, *rest = steps = list(pair.engine.run(sequence, options))
    assert all(tuple(one.token for one in step.logprobs) == step.tokens for step in steps)
    assert steps[-1].end == tokens[9]
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == prompt
    assert all(step.prompt_logprobs is None for step in rest)


PROMPTS: list[Prompt] = [TEXT, [7], [1, 2, 3] * 30, [{"role": "user", "content": "lazy dog"}]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
@pytest.mark.parametrize("most", [0, 1 << 25], ids=["narrow steps", "wide steps"])
def test_of_a_prompt(pair: Pair, prompt: Prompt, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, rows = pair.encode(prompt), rows_of(pair, pair.encode(prompt))
    monkeypatch.setattr(scoring, "SCORED_BYTES", most)
    plain = pair.generate(prompt, max_new_tokens=20)
    result = pair.generate(prompt, max_new_tokens=20, prompt_logprobs=2)
    assert (result.text, result.logprobs, result.stats.cached_tokens) == (plain.text, None, 0)
    assert result.prompt_logprobs is not None
    first, *rest = result.prompt_logprobs
    assert first is None
    assert [one.token for one in rest if one] == ids[1:]
    for position, one in enumerate(rest):
        assert one is not None
        assert one.logprob == pytest.approx(rows[position][ids[position + 1]], abs=1e-5)
        assert [other.token for other in one.top] == np.argsort(-rows[position], kind="stable")[:2].tolist()


def test_a_chat_computes_its_prompt_anew_for_them(pair: Pair) -> None:
    with pair.chat() as chat, pair.chat() as other:
        for question in ("lazy dog", "the fox"):
            found = chat.send(question, max_new_tokens=8, logprobs=1, prompt_logprobs=0)
            plain = other.send(question, max_new_tokens=8, logprobs=1)
            assert (found.text, found.logprobs) == (plain.text, plain.logprobs)
            assert found.prompt_logprobs is not None
            assert len(found.prompt_logprobs) == found.stats.prompt_tokens == plain.stats.prompt_tokens
            assert found.stats.cached_tokens == 0
        assert plain.stats.cached_tokens > 0


def test_the_logits_of_a_prompt_are_never_all_in_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scoring.step_form(PREFILL_CHUNK, 151_936, ANY).scored == 48
    session = pair.engine.models[0].session
    step, kept = session.step, []
    monkeypatch.setattr(session, "step", lambda ids, keep: kept.append(keep) or step(ids, keep))
    monkeypatch.setattr(scoring, "SCORED_BYTES", 16 * 4 * session.manifest.spec.vocabulary.rows)
    pair.generate([1] * 100, max_new_tokens=4, draft_length=4, prompt_logprobs=0)
    assert max(kept) == 16


def test_a_call_that_ends_within_its_prompt_has_none(pair: Pair) -> None:
    stream = pair.stream([1] * 100, max_new_tokens=4, prompt_logprobs=0)
    stream.cancel()
    result = stream.read()
    assert (result.finish_reason, result.prompt_logprobs, result.tokens) == ("cancelled", None, ())
    assert pair.generate(TEXT, max_new_tokens=4, prompt_logprobs=0).prompt_logprobs is not None


def test_a_broken_row_of_a_prompt_is_a_failure(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    session = pair.engine.models[0].session
    step = session.step

    def broken(ids: Any, keep: int) -> Any:
        rows = step(ids, keep)
        rows.logits[3, 5] = np.nan
        return rows

    monkeypatch.setattr(session, "step", broken)
    with pytest.raises(Failure, match="largest logit for position 4 is NaN"):
        pair.generate([1] * 20, max_new_tokens=1, prompt_logprobs=0)
