"""Which ids a draft's LM head keeps: those that a text has most often, and what a target may need besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import DraftVocabulary, Ids
from pard_onnx.quantize.calibration import text as texts

LEAST = 64  # ids; fewer than that leave a draft nothing to say


@dataclass(frozen=True, slots=True)
class Proposable:
    """ids: rising, [N]: the rows of the head that stay; told: what the manifest says of them."""

    ids: Ids
    told: DraftVocabulary


def proposable(checkpoint: Checkpoint, size: int, text: Path | None = None) -> Proposable:
    """`size` ids for a draft; text: a file as `calibration.read` takes it, None for the one that ships.

    What ends a turn and all added tokens (a chat template makes targets say them) are always in, the mask never is.
    Raises BadInput for a target, a size that cannot be, and a text without tokens.
    """
    told, spec = f"--draft-vocabulary {size}", checkpoint.spec
    if spec.pard is None:
        raise BadInput(f"{told}: {checkpoint.folder} is a target, which must be able to say every token; leave it out")
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    known = set(tokenizer.get_vocab(with_added_tokens=True).values()) - {spec.pard.mask_id}
    always = (set(tokenizer.get_added_tokens_decoder()) | set(spec.vocabulary.eos_ids)) & known
    least = max(LEAST, len(always))
    if not least <= size <= len(known):
        raise BadInput(
            f"{told}: takes {least} to {len(known)}, of which {len(always)} are always in (ends of turns, added tokens)"
        )
    seen = texts.read(text or texts.SHIPPED, "--vocabulary-text")
    counts = np.bincount(seen.tokens(tokenizer), minlength=spec.vocabulary.size)
    ids = most_frequent(counts, known, always, size)
    covered = float(counts[ids].sum() / counts.sum())
    return Proposable(ids, DraftVocabulary(size, seen.name, seen.sha256, covered))


def most_frequent(counts: Ids, known: Iterable[int], always: Iterable[int], size: int) -> Ids:
    """The `size` of the known ids with the highest counts, rising. `always`: in whatever their count.

    Of equal counts, those that the text does not have among them, lower ids come first: byte-pair encodings number
    their tokens in the order of merging, the most frequent ones of the tokenizer's own training text first.
    """
    rank = np.full(len(counts), -1, np.int64)
    allowed = list(known)
    rank[allowed] = counts[allowed]
    rank[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-rank, kind="stable")[:size])
