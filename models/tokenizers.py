"""Tokenizer files, read the same way by every part of the package."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from .errors import BadInput


def load_tokenizer(path: Path, error: type[BadInput] = BadInput) -> Tokenizer:
    """The tokenizer in a tokenizer.json, which encodes whole texts; raises `error` if it cannot be read.

    Truncation and padding that are saved in the file are switched off: they belong to the training of the model.
    """
    try:
        # Not from_file, which fails on paths with letters that the platform's encoding lacks
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as problem:  # tokenizers raises plain Exception
        raise error(f"{path} cannot be read: {problem}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
