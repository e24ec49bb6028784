"""The samples of a training run: `Sample`, and `SampleStore`, all of them in a folder of mapped files."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.atomic import atomic_folder
from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import read_json

FACTS, IDS, REPLIES, ENDS, SOURCES = "samples.json", "ids.bin", "replies.bin", "ends.bin", "sources.bin"
SEED = 20260  # of the choice of what is held out


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence of tokens to train on."""

    ids: NDArray[np.int64]  # [n]
    replies: NDArray[np.bool_]  # [n]: whether token i is part of a reply, so that predicting it counts for the loss

    @property
    def is_useful(self) -> bool:
        """Whether a token of a reply can be predicted: the first token of a sequence cannot."""
        return bool(self.replies[1:].any())


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What was made of a data set."""

    documents: int  # conversations and texts that were read
    samples: int
    tokens: int
    reply_tokens: int
    cut: int  # conversations that were longer than a sample may be, and lost their end
    unused: int  # documents that gave no sample: they have no reply, or none before the cut


class SampleStore(Sequence[Sample]):
    """The samples in a folder that `write_samples` has written. They are read from the disk when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput where the files are damaged."""
        try:
            self.facts = SampleFacts(**read_json(folder / FACTS))
            self._ends = _mapped(folder / ENDS, np.int64)
            self._sources = _mapped(folder / SOURCES, np.int64)
            self._ids, self._replies = _mapped(folder / IDS, np.int32), _mapped(folder / REPLIES, np.bool_)
        except (OSError, TypeError, ValueError) as error:
            raise BadInput(
                f"{folder}: is no folder of samples ({error}); remove it, and it is written again"
            ) from error
        tokens = self.facts.tokens
        if {len(self._ends), len(self._sources)} != {self.facts.samples} or {len(self._ids), len(self._replies)} != {
            tokens
        }:
            raise BadInput(f"{folder}: its files are damaged; remove it, and it is written again")

    def __len__(self) -> int:
        return self.facts.samples

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(place, slice):
            return ChosenSamples(self, np.arange(len(self))[place])
        number = range(len(self))[place]
        begin, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        return Sample(self._ids[begin:end].astype(np.int64), np.array(self._replies[begin:end]))

    def split(self, held_out: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """The samples to train on, and at least `held_out` others to measure with: the same at each call.

        Samples of one document are on one side. Raises BadInput where nothing would be left to train on.
        """
        documents = np.unique(self._sources)
        order = np.random.default_rng(SEED).permutation(documents)
        counts = np.cumsum([np.count_nonzero(self._sources == number) for number in order[: held_out + 1]])
        taken = int(np.searchsorted(counts, held_out)) + 1 if held_out else 0
        if taken >= len(documents):
            raise BadInput(
                f"of the {len(self)} samples of {len(documents)} documents {held_out} are to be held out, so that none "
                "would be left to train on; give more data, or a smaller --held-out"
            )
        chosen = np.isin(self._sources, order[:taken])
        return ChosenSamples(self, np.flatnonzero(~chosen)), ChosenSamples(self, np.flatnonzero(chosen))


class ChosenSamples(Sequence[Sample]):
    """Some samples of a store."""

    def __init__(self, store: SampleStore, numbers: NDArray[np.int64]) -> None:
        self._store, self._numbers = store, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(place, slice):
            return ChosenSamples(self._store, self._numbers[place])
        return self._store[int(self._numbers[place])]


@dataclass(slots=True)
class Counts:
    """What an encoder counts while it makes samples."""

    documents: int = 0
    cut: int = 0
    unused: int = 0


def write_samples(folder: Path, samples: Iterable[tuple[int, Sample]], counts: Counts) -> None:
    """Write the samples to a new folder, whole or not at all. Raises OSError.

    samples: each with the number of its document. counts: those of the documents, complete when `samples` has ended.
    """
    ends, sources, tokens, replies = array("q"), array("q"), 0, 0
    with atomic_folder(folder, replace=True) as partial:
        with (partial / IDS).open("wb") as ids_file, (partial / REPLIES).open("wb") as replies_file:
            for source, sample in samples:
                ids_file.write(sample.ids.astype(np.int32).tobytes())
                replies_file.write(sample.replies.astype(np.bool_).tobytes())
                tokens, replies = tokens + len(sample.ids), replies + int(np.count_nonzero(sample.replies))
                ends.append(tokens)
                sources.append(source)
        (partial / ENDS).write_bytes(ends.tobytes())
        (partial / SOURCES).write_bytes(sources.tobytes())
        facts = SampleFacts(counts.documents, len(ends), tokens, replies, counts.cut, counts.unused)
        (partial / FACTS).write_text(json.dumps(asdict(facts)) + "\n", encoding="utf-8", newline="\n")


def _mapped(path: Path, kind: type[Any]) -> NDArray[Any]:
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r")
