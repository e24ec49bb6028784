"""The ids that a draft can propose, where its LM head has only some of the tokenizer's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import BadArtifact
from .json_files import read_json, write_json

FILE_NAME = "draft_vocabulary.json"
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """size: ids; text, sha256: name and hash of the file whose most frequent tokens they are; coverage: share of that
    text's tokens that they are."""

    size: int
    text: str
    sha256: str
    coverage: float


def write_ids(folder: Path, ids: Ids) -> None:
    """ids: rising, [N]; the id of each column of the draft's logits."""
    write_json(folder / FILE_NAME, {"ids": ids.tolist()})


def read_ids(folder: Path) -> Ids:
    """See `write_ids`; the file's hash is the manifest's to check. Raises BadArtifact."""
    value = read_json(folder / FILE_NAME, BadArtifact)
    return np.array(value["ids"], np.int64)
