"""Log probabilities of rows: torch's log-softmax, the most likely ids in order, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pard_onnx import BadInput, Options
from pard_onnx.runtime.sampling.logprobs import LEAST, MOST_TOP, RowLogprobs, TokenLogprob, most_likely
from pard_onnx.runtime.sampling.sampler import Logits

VOCABULARY = 40
# Few different values, so that there are ties; -inf as for ids that the tokenizer does not have
ROWS = arrays(np.float32, VOCABULARY, elements=st.sampled_from([-np.inf, -30.0, -1.5, 0.0, 0.25, 7.0, 80.0])).filter(
    lambda row: row.max() > -np.inf
)


def of(row: Logits, token: int, top: int = 0, vocabulary: int = VOCABULARY) -> TokenLogprob:
    return RowLogprobs(vocabulary, top, lambda id_: bytes([id_])).of(row, token)


@given(ROWS, st.integers(0, VOCABULARY - 1), st.integers(0, MOST_TOP))
def test_they_are_torchs_log_softmax(row: Logits, token: int, top: int) -> None:
    expected = torch.log_softmax(torch.from_numpy(row).double(), -1).numpy()
    padded = np.concatenate([row, np.full(8, 99, np.float32)])  # columns behind the model's ids
    found = of(padded, token, top)
    assert found.logprob == pytest.approx(expected[token], abs=1e-12)
    assert [one.logprob for one in found.top] == pytest.approx([expected[one.token] for one in found.top], abs=1e-12)
    by_id = {one.token: one.logprob for one in found.top}
    assert by_id.get(token, found.logprob) == found.logprob


@given(ROWS, st.integers(0, VOCABULARY + 3))
def test_the_most_likely_ids_are_the_first_of_a_stable_sort(row: Logits, count: int) -> None:
    possible = [id_ for id_ in np.argsort(-row, kind="stable").tolist() if row[id_] > -np.inf]
    assert most_likely(row, count) == possible[:count]


@given(ROWS, st.integers(0, VOCABULARY - 1))
def test_the_row_is_left_as_it_was(row: Logits, token: int) -> None:
    before = row.copy()
    of(row, token, 3)
    assert row.tobytes() == before.tobytes()


def test_a_large_vocabulary_loses_nothing() -> None:
    row = np.random.default_rng(1).normal(size=150_000).astype(np.float32) * 4
    expected = torch.log_softmax(torch.from_numpy(row).double(), -1)[7].item()
    found = RowLogprobs(len(row), 0, lambda _: b"").of(row, 7)
    assert found.logprob == pytest.approx(expected, abs=1e-10)


def test_nothing_is_rounded_to_float32() -> None:
    row = np.array([0.1, 16.3, 16.2, -3.7], np.float32)
    expected = torch.log_softmax(torch.from_numpy(row).double(), -1).tolist()
    assert [RowLogprobs(4, 0, lambda _: b"").of(row, id_).logprob for id_ in range(4)] == pytest.approx(
        expected, abs=1e-14
    )


def test_the_form_of_openai() -> None:
    row = np.array([0, -np.inf, -1], np.float32)
    found = RowLogprobs(3, 2, {0: b"\xc3", 1: "ä".encode(), 2: b" x"}.__getitem__).of(row, 1).openai()
    assert (found["token"], found["bytes"], found["logprob"]) == ("ä", [0xC3, 0xA4], LEAST)
    assert [(one["token"], one["bytes"]) for one in found["top_logprobs"]] == [("\ufffd", [0xC3]), (" x", [32, 120])]
    assert all(set(one) == {"token", "bytes", "logprob"} for one in found["top_logprobs"])


@pytest.mark.parametrize("value", [True, False, -1, 21, 2.0, "3", float("nan"), [1], 10**400])
@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_what_is_no_number_of_tokens_is_refused(name: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"^{name} .*0 to 20"):
        Options(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 0, 20, np.int64(3)])
def test_numbers_of_tokens(value: int | None) -> None:
    assert Options(logprobs=value).logprobs == value
