"""Which ids a draft keeps, against a literal loop, and what is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.quantize.draft_vocabulary import LEAST, most_frequent, select_vocabulary

Tiny = Callable[..., Path]
SPECIAL = {297, 298, 299}  # of tests/tiny.py's tokenizer, its last ids


def literal(counts: list[int], known: set[int], always: set[int], size: int) -> list[int]:
    kept = set(always)
    while len(kept) < size:
        kept.add(max(known - kept, key=lambda i: (counts[i], -i)))
    return sorted(kept)


@given(st.data())
def test_the_most_frequent_ids_are_those_of_a_literal_loop(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=30))
    ids = st.sampled_from(range(len(counts)))
    known = data.draw(st.sets(ids, min_size=1))
    always = data.draw(st.sets(st.sampled_from(sorted(known))))
    size = data.draw(st.integers(max(1, len(always)), len(known)))
    assert most_frequent(np.array(counts), known, always, size).tolist() == literal(counts, known, always, size)


@pytest.fixture
def draft(tmp_path: Path, tiny: Tiny) -> Checkpoint:
    return Checkpoint.open(tiny(tmp_path / "draft", role="draft"))


def test_a_text_of_ones_own_comes_first_and_the_rest_in_the_order_of_ids(draft: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("return range return dogs")
    tokenizer = Tokenizer.from_file(str(draft.folder / "tokenizer.json"))
    counted = Counter(tokenizer.encode(text.read_text()).ids)
    found = select_vocabulary(draft, 70, text)
    ids = found.ids.tolist()
    assert ids == sorted(set(ids)) and len(ids) == 70
    assert SPECIAL | counted.keys() <= set(ids)
    filled = sorted(set(ids) - SPECIAL - counted.keys())
    assert filled == [i for i in range(300) if i not in counted][: len(filled)]
    assert (found.record.size, found.record.text, found.record.coverage) == (70, "mine.txt", 1)


def test_coverage_is_of_the_texts_tokens(draft: Checkpoint) -> None:
    some, more, most = (select_vocabulary(draft, size).record.coverage for size in (LEAST, 150, 300))
    assert 0 < some < more < most == 1


def test_the_mask_is_never_in(tmp_path: Path, tiny: Tiny) -> None:
    """Llama's masks are tokens that the tokenizer has."""
    folder = tiny(tmp_path / "draft", role="draft", pard_token=297)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec.pard is not None and checkpoint.spec.pard.mask_id == 297
    assert 297 not in select_vocabulary(checkpoint, 299).ids
    with pytest.raises(BadInput, match="takes 64 to 299"):
        select_vocabulary(checkpoint, 300)


@pytest.mark.parametrize("size", (0, -5, LEAST - 1, 301, 10**9))
def test_sizes_that_cannot_be(draft: Checkpoint, size: int) -> None:
    with pytest.raises(BadInput, match=f"--draft-vocabulary {size}: takes {LEAST} to 300, of which 3 are always in"):
        select_vocabulary(draft, size)


def test_targets_say_every_token(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(BadInput, match="is a target, which must be able to say every token"):
        select_vocabulary(Checkpoint.open(tiny(tmp_path / "target")), 100)


@pytest.mark.parametrize(("content", "reason"), ((" \n", "has no text"), (None, "No such file")))
def test_texts_that_hold_nothing(draft: Checkpoint, tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
    with pytest.raises(BadInput, match=f"--vocabulary-text .*{reason}"):
        select_vocabulary(draft, 100, tmp_path / "text.txt")
