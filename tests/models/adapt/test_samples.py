"""Samples on disk: what was written is what is read, and the split is the same at each call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.models.adapt.samples import Counts, Sample, SampleStore, write_samples
from pard_onnx.models.errors import BadInput

LENGTHS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=12)  # document, tokens


def made(lengths: list[tuple[int, int]], seed: int = 0) -> list[tuple[int, Sample]]:
    rng = np.random.default_rng(seed)
    return [(source, Sample(rng.integers(0, 99, n), rng.random(n) < 0.5)) for source, n in lengths]


def stored(folder: Path, samples: list[tuple[int, Sample]]) -> SampleStore:
    write_samples(folder, samples, Counts(documents=9, cut=2, unused=1))
    return SampleStore(folder)


@settings(max_examples=25)  # each writes to the disk
@given(lengths=LENGTHS)
def test_what_was_written_is_read(lengths: list[tuple[int, int]]) -> None:
    samples = made(lengths)
    with TemporaryDirectory() as folder:
        store = stored(Path(folder) / "samples", samples)
        assert len(store) == len(samples)
        for found, (_, wanted) in zip(store, samples, strict=True):
            assert found.ids.dtype == np.int64 and np.array_equal(found.ids, wanted.ids)
            assert found.replies.dtype == np.bool_ and np.array_equal(found.replies, wanted.replies)
        assert np.array_equal(store[-1].ids, samples[-1][1].ids)
        assert [len(one.ids) for one in store[1:]] == [n for _, n in lengths[1:]]
        facts = store.facts
        assert (facts.documents, facts.cut, facts.unused, facts.samples) == (9, 2, 1, len(samples))
        assert facts.tokens == sum(n for _, n in lengths)
        assert facts.reply_tokens == sum(one.replies.sum() for _, one in samples)


@settings(max_examples=25)  # each writes to the disk
@given(lengths=LENGTHS, held_out=st.integers(0, 12))
def test_the_split_holds_out_whole_documents(lengths: list[tuple[int, int]], held_out: int) -> None:
    samples = [(source, Sample(np.full(n, source), np.ones(n, np.bool_))) for source, n in lengths]
    sources = {source for source, _ in lengths}
    with TemporaryDirectory() as folder:
        store = stored(Path(folder) / "samples", samples)
        try:
            training, held = store.split(held_out)
        except BadInput as error:
            assert f"{held_out} are to be held out" in str(error)
            counts = sorted(sum(one == source for one, _ in lengths) for source in sources)
            assert sum(counts[1:]) < held_out or len(counts) == 1 or held_out > sum(counts[:-1])
            return
        again = store.split(held_out)
        assert [one.ids.tolist() for part in (training, held) for one in part] == [
            one.ids.tolist() for part in again for one in part
        ]
        assert len(held) >= held_out and len(training) + len(held) == len(store) and len(training) > 0
        assert not {int(one.ids[0]) for one in training} & {int(one.ids[0]) for one in held}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    stored(folder, made([(0, 4), (1, 5)]))
    whole = (folder / "ids.bin").read_bytes()
    (folder / "ids.bin").write_bytes(whole[:-4])
    with pytest.raises(BadInput, match="its files are damaged; remove it"):
        SampleStore(folder)
    (folder / "ids.bin").write_bytes(whole)
    (folder / "samples.json").write_text(json.dumps({"samples": 2}))
    with pytest.raises(BadInput, match="is no folder of samples"):
        SampleStore(folder)


def test_no_samples_are_a_store_too(tmp_path: Path) -> None:
    assert len(stored(tmp_path / "samples", [])) == 0


def test_nothing_half_written(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[int, Sample]]:
        yield from made([(0, 4)])
        raise BadInput("line 2")

    with pytest.raises(BadInput, match="line 2"):
        write_samples(tmp_path / "samples", failing(), Counts())
    assert not list(tmp_path.iterdir())
