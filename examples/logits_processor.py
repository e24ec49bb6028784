"""A logits processor: python logits_processor.py TARGET [DRAFT]

The text has no letter e. The function below depends on the row and the tokens before it alone, so the text is the same
with and without drafts.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from pard_onnx import Pair, load

PROMPT = "The weather today is"


def without(letter: str, pair: Pair) -> Callable[[Sequence[int], np.ndarray], np.ndarray]:
    """A logits processor that forbids every token with this letter."""
    size = pair.target_manifest.spec.vocabulary.size
    tokens = (pair.text.token(id_) or "" for id_ in range(size))
    banned = np.array([letter in token.lower() for token in tokens])

    def process(tokens: Sequence[int], row: np.ndarray) -> np.ndarray:
        row[banned] = -np.inf
        return row

    return process


def main(pair: Pair) -> None:
    process = without("e", pair)
    with_drafts = pair.generate(PROMPT, logits_processor=process, max_new_tokens=40)
    plain = pair.generate(PROMPT, logits_processor=process, max_new_tokens=40, draft_length=0)
    print(with_drafts.text)
    print("the same without drafts:", with_drafts.tokens == plain.tokens)


if __name__ == "__main__":
    with load(*sys.argv[1:3]) as pair:
        main(pair)
