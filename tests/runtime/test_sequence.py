"""What a conversation's sequence keep of a new prompt: rows of its beginning, and as many as there are."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.runtime.decoding.drafter import DraftMemory
from pard_onnx.runtime.sequence import Sequence

IDS = st.lists(st.integers(0, 2), max_size=12)


@given(tokens=IDS, ids=IDS, target=st.integers(0, 12), start=st.integers(0, 12), draft=st.integers(0, 12))
def test_each_cache_keeps_the_rows_that_the_new_prompt_begins_with(
    fakes: SimpleNamespace, tokens: list[int], ids: list[int], target: int, start: int, draft: int
) -> None:
    """A cache here is the list of the tokens whose rows it holds; the draft's may begin later than the conversation."""
    start = min(start, len(tokens))
    ours, theirs = fakes.Target(max, tokens[:target]), fakes.Draft(max, tokens[start:][:draft])
    sequence = Sequence(ours, theirs, list(tokens), DraftMemory(start))
    held, kept = len(ours.cache), sequence.continue_with(ids)
    same = next((i for i, (one, two) in enumerate(zip(tokens, ids, strict=False)) if one != two), None)
    same = min(len(tokens), len(ids)) if same is None else same
    assert sequence.tokens == ids
    assert kept == len(ours.cache) == min(held, same)
    assert ours.cache == ids[:kept]
    assert theirs.cache == ids[sequence.memory.start :][: len(theirs.cache)]
    assert sequence.memory.start in (0, start)
    assert len(theirs.cache) == (min(len(tokens[start:][:draft]), same - start) if same > start else 0)


def test_without_a_draft_there_is_one_cache(fakes: SimpleNamespace) -> None:
    sequence = Sequence(fakes.Target(max, [1, 2, 3]), None, [1, 2, 3])
    assert sequence.continue_with([1, 2, 5, 6]) == 2
    assert sequence.tokens == [1, 2, 5, 6]
