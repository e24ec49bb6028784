"""The ids that a draft's LM head keeps: the most frequent ones of a text, and all that a target may need besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import DraftVocabulary, Ids
from pard_onnx.quantize.calibration.text import SHIPPED, read_text_file

LEAST = 64  # ids; with fewer a draft can propose next to nothing


@dataclass(frozen=True, slots=True)
class SelectedVocabulary:
    """The ids that a draft can propose."""

    ids: Ids  # [N], ascending: the rows of the LM head that are kept
    record: DraftVocabulary  # the manifest's record


def select_vocabulary(checkpoint: Checkpoint, size: int, text: Path | None = None) -> SelectedVocabulary:
    """Select `size` ids for a draft. text: a file as `read_text_file` takes it; None: the text that ships.

    The ids that end a turn and all added tokens (targets use them in chat templates) are always selected, the mask
    never is. Raises BadInput for a target, for a size that is not possible, and for a text without tokens.
    """
    option, spec = f"--draft-vocabulary {size}", checkpoint.spec
    if spec.pard is None:
        raise BadInput(f"{option}: {checkpoint.path} is a target, which must be able to say every token; leave it out")
    tokenizer = checkpoint.tokenizer()
    size_of_all = spec.vocabulary.size  # the tokenizer may have added tokens that the embedding has no rows for
    known = {id_ for id_ in tokenizer.get_vocab().values() if id_ < size_of_all} - {spec.pard.mask_id}
    always = (set(tokenizer.get_added_tokens_decoder()) | set(spec.vocabulary.eos_ids)) & known
    least = max(LEAST, len(always))
    if not least <= size <= len(known):
        raise BadInput(
            f"{option}: takes {least} to {len(known)}, of which {len(always)} are always in (ends of turns, added "
            "tokens)"
        )
    sample = read_text_file(text or SHIPPED, "--vocabulary-text")
    counts = np.bincount(sample.tokens(tokenizer), minlength=spec.vocabulary.size)
    ids = most_frequent(counts, known, always, size)
    covered = float(counts[ids].sum() / counts.sum())
    return SelectedVocabulary(ids, DraftVocabulary(size, sample.name, sample.sha256, covered))


def most_frequent(counts: Ids, known: Iterable[int], always: Iterable[int], size: int) -> Ids:
    """The `size` known ids with the highest counts, ascending. `always`: ids that are selected whatever their count.

    Of ids with equal counts, and so of all that the text does not contain, the lower ones come first: byte-pair
    encodings number tokens in the order of merging, and merge first what is most frequent in their training text.
    """
    rank = np.full(len(counts), -1, np.int64)
    allowed = list(known)
    rank[allowed] = counts[allowed]
    rank[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-rank, kind="stable")[:size])
