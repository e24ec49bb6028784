"""Calibration text: read from a file, and cut into rows of tokens for the algorithms that need a layer's inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.adapt.packing import Drop, pack
from pard_onnx.models.checkpoints.tokenizer import GuardedTokenizer
from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import text_lines
from pard_onnx.models.spec import ModelSpec

OPTION = "--calibration"  # the commands' option that names a text
SHIPPED = Path(__file__).parent / "calibration.jsonl"
FIELDS = ("text", "prompt", "data")
ROW, ROWS = 512, 128  # tokens in a row; the most rows
DRAFT_ROW = 192  # tokens in a draft's row, without its masks, which make it three times as long
SEED = 6


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of texts."""

    name: str  # the file's
    sha256: str  # of the file's bytes
    texts: tuple[str, ...]
    option: str = OPTION  # the command's option that named the file, for error messages

    def tokens(self, tokenizer: GuardedTokenizer) -> NDArray[np.int64]:
        """The token ids of all texts, concatenated. Raises BadInput if there are none."""
        encoded = (tokenizer.encode(text, add_special_tokens=False).ids for text in self.texts)
        ids = np.concatenate([np.array(part, np.int64) for part in encoded])
        if not len(ids):
            raise BadInput(f"{self.option} {self.name}: the tokenizer makes no tokens of it; give another text")
        return ids


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """Tokens that go through the model as one sequence."""

    ids: NDArray[np.int64]  # [S]
    positions: NDArray[np.int64]  # [S]
    mask: NDArray[np.bool_] | None = None  # [S, S], True where a token attends to another; None: causal attention


def read_text_file(path: Path = SHIPPED, option: str = OPTION) -> TextFile:
    """Read a .jsonl file (one object a line, its text under "text", "prompt" or "data"), or any other as one text.

    Raises BadInput for a file that cannot be read or has no text, with the number of a broken line.
    """
    try:
        data = path.read_bytes()
        whole = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise BadInput(f"{option} {path}: {reason}; give a .txt or .jsonl file") from error
    lines = path.suffix == ".jsonl"
    texts = tuple(text_lines(whole, f"{option} {path}", FIELDS, empty=True)) if lines else (whole,)
    if not any(text.strip() for text in texts):
        raise BadInput(f"{option} {path}: has no text; leave the option out for the text that ships")
    return TextFile(path.name, hashlib.sha256(data).hexdigest(), texts, option)


def calibration_rows(text: TextFile, tokenizer: GuardedTokenizer, spec: ModelSpec) -> list[CalibrationRow]:
    """Cut the texts' tokens into rows; a draft's rows contain masks, as its inputs do when it runs.

    A draft proposes tokens after every prefix. PARD's packing puts the K - 1 masks of many prefixes into one row.
    """
    length = min(ROW if spec.pard is None else DRAFT_ROW, spec.max_positions)
    ids = text.tokens(tokenizer)
    count = max(1, min(ROWS, len(ids) // length))
    cut = [ids[i * length : (i + 1) * length] for i in range(count)]
    if spec.pard is None:
        return [CalibrationRow(part, np.arange(len(part))) for part in cut]
    rng = np.random.default_rng(SEED)
    packed = [pack(part, spec.pard.mask_id, Drop(), rng) for part in cut]
    return [CalibrationRow(p.ids, p.positions, p.mask()) for p in packed]


def spread_rows(rows: Sequence[CalibrationRow], most: int) -> list[CalibrationRow]:
    """At most `most` rows, spread evenly over the text."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)
