"""Calibration text: what the algorithms that look at inputs are shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pard_onnx.models.adapt.packing import Drop, pack
from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import text_lines
from pard_onnx.models.spec import ModelSpec

OPTION = "--calibration"  # of the commands, that names a text
SHIPPED = Path(__file__).parent / "calibration.jsonl"
FIELDS = ("text", "prompt", "data")
ROW, ROWS = 512, 128  # tokens a row, rows at most
DRAFT_ROW = 192  # real tokens; the masks behind them make it three times as long
SEED = 6


@dataclass(frozen=True, slots=True)
class Calibration:
    """name: the file's; sha256: of its bytes; option: that named it, for what is told of it."""

    name: str
    sha256: str
    texts: tuple[str, ...]
    option: str = OPTION

    def tokens(self, tokenizer: Tokenizer) -> NDArray[np.int64]:
        """The texts' ids, one text behind the other; BadInput if there are none."""
        encoded = (tokenizer.encode(text, add_special_tokens=False).ids for text in self.texts)
        ids = np.concatenate([np.array(part, np.int64) for part in encoded])
        if not len(ids):
            raise BadInput(f"{self.option} {self.name}: the tokenizer makes no tokens of it; give another text")
        return ids


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens as the model runs them: [S] each, and which sees which [S, S]; None: those before it."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None


def read(path: Path = SHIPPED, option: str = OPTION) -> Calibration:
    """A .jsonl file (one object a line, its text under "text", "prompt" or "data"), or any other as one plain text.

    Raises BadInput, naming the line that is broken.
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
    return Calibration(path.name, hashlib.sha256(data).hexdigest(), texts, option)


def rows(calibration: Calibration, tokenizer: Tokenizer, spec: ModelSpec) -> list[Row]:
    """The texts' tokens, one behind the other, cut to rows; of a draft with the masks that it is run with.

    A draft proposes behind every prefix: PARD's packing puts the K - 1 masks of many prefixes into one row.
    """
    length = min(ROW if spec.pard is None else DRAFT_ROW, spec.max_positions)
    ids = calibration.tokens(tokenizer)
    count = max(1, min(ROWS, len(ids) // length))
    cut = [ids[i * length : (i + 1) * length] for i in range(count)]
    if spec.pard is None:
        return [Row(part, np.arange(len(part))) for part in cut]
    rng = np.random.default_rng(SEED)
    packed = [pack(part, spec.pard.mask_id, Drop(), rng) for part in cut]
    return [Row(p.ids, p.positions, p.mask()) for p in packed]
