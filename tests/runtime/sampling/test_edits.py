"""Edits of rows: in which order, of which rows, and that drafts change no text."""

from collections.abc import Sequence
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models.errors import Failure
from pard_onnx.runtime.sampling.edits import Logits
from pard_onnx.runtime.sampling.sampler import Sampler, chooser
from pard_onnx.runtime.sampling.settings import Sampling

VOCABULARY, PADDING, LENGTH = 7, 2, 12
PROMPT = [1, 2]
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    top_k=st.sampled_from([0, 1, 3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {3: 1.5}]),
)


class Allowed:
    """Allows a set of ids that is a function of the tokens before; moves a state forward, and records what it saw."""

    def __init__(self, *, in_place: bool = True) -> None:
        self.seen: list[list[int]] = []
        self._in_place, self._sum, self._read = in_place, 0, 0

    def edit(self, row: Logits, tokens: Sequence[int]) -> Logits:
        self.seen.append(list(tokens))
        self._sum, self._read = self._sum + sum(tokens[self._read :]), len(tokens)
        assert self._sum == sum(tokens)
        row = row if self._in_place else row.copy()
        row[(np.arange(len(row)) + self._sum) % 3 == 0] = -inf
        return row


def logits_after(tokens: Sequence[int]) -> Logits:
    """The scripted target's row after these tokens."""
    row = np.random.default_rng(hash(tuple(tokens)) % 2**32).normal(size=VOCABULARY + PADDING).astype(np.float32)
    row[VOCABULARY:] = -inf
    return row


def text(sampling: Sampling, edit: Allowed, drafts: Sequence[Sequence[int]]) -> list[int]:
    """LENGTH tokens or a few more, in rounds with these drafts."""
    committed = list(PROMPT)
    one = chooser(sampling, VOCABULARY, len(PROMPT), 5, [edit])
    for proposal in [*drafts, *[[]] * LENGTH]:
        rows = np.stack([logits_after([*committed, *proposal[:i]]) for i in range(len(proposal) + 1)])
        before = rows.copy()
        committed += one.choose(rows, committed, proposal)
        assert np.array_equal(rows, before), "the target's rows were changed"
    return committed[len(PROMPT) :]


@given(samplings, st.booleans(), st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=3), max_size=4))
def test_drafts_change_no_text(sampling: Sampling, in_place: bool, proposals: list[list[int]]) -> None:
    plain = text(sampling, Allowed(), ())
    right = [plain[:2], plain[3:6]]  # all accepted
    for drafts in (proposals, right):
        edit = Allowed(in_place=in_place)
        assert text(sampling, edit, drafts)[:LENGTH] == plain[:LENGTH]
        for earlier, later in zip(edit.seen, edit.seen[1:], strict=False):
            assert len(earlier) < len(later) and later[: len(earlier)] == earlier


def test_edits_are_applied_in_order_after_penalties_and_bias() -> None:
    class Recorded:
        def __init__(self, add: float) -> None:
            self.add = add

        def edit(self, row: Logits, tokens: Sequence[int]) -> Logits:
            rows.append(row.tolist())
            return row + np.float32(self.add)

    rows: list[list[float]] = []
    one = Sampler(Sampling(logit_bias={1: 5.0}, presence_penalty=2.0), 3, 1, 0, [Recorded(1), Recorded(1)])
    assert one.choose(np.array([[4, 0, 4, 9]], np.float32), [0, 2], ()) == [1]
    assert rows == [[4, 5, 2], [5, 6, 3]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_id_that_is_left_is_a_failure(temperature: float) -> None:
    class Nothing:
        def edit(self, row: Logits, tokens: Sequence[int]) -> Logits:
            return np.full_like(row, -inf)

    one = Sampler(Sampling(temperature=temperature), 3, 1, 0, [Nothing()])
    with pytest.raises(Failure, match=r"no id is left for position 1: .*edit of logits forbids"):
        one.choose(np.zeros((1, 3), np.float32), [0], ())
