"""A model's tokenizer files: the tokenizer itself, its ids and the chat template."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadCheckpoint, BadInput, PardWarning
from pard_onnx.models.folder_files import has_file, read_file
from pard_onnx.models.json_files import MOST, read_json

from .added_tokens import CONFIG_FILE, read_added_tokens
from .tokenizer import GuardedTokenizer, checked_tokenizer, id_problem

FILE = "tokenizer.json"
MOST_TOKENIZER = 1 << 26  # bytes; tokenizers of large vocabularies have 40 million
TEMPLATE_FILE = "chat_template.jinja"


def load_tokenizer(
    path: Path, error: type[BadInput] = BadInput, names: Collection[str] | None = None
) -> GuardedTokenizer:
    """The tokenizer in a tokenizer.json, which encodes whole texts; raises `error` if it cannot be read or used.

    Tokens of the files beside it are added, as transformers does. Truncation and padding that are saved in the file are
    switched off: they belong to the training of the model. So is BPE dropout, with a warning, which draws other ids of
    the same text each time. names: of the files that may be read; None: all.
    """
    content = read_file(path, MOST_TOKENIZER, error)
    try:
        content.decode()
    except UnicodeDecodeError as problem:
        raise error(f"{path} cannot be read: {problem}") from problem
    beside = read_added_tokens(path.parent, error, names)
    tokenizer = checked_tokenizer(path, content, beside.missing(set()), error)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        warn_of_dropout(path, tokenizer.model.dropout)
        tokenizer.model.dropout = None
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = beside.missing(known)
    if missing:
        tokenizer.add_tokens(missing)
    return GuardedTokenizer(tokenizer, path, error)


@cache  # a file is loaded several times
def warn_of_dropout(path: Path, dropout: float) -> None:
    problem = (
        f"{path}: BPE dropout of {dropout:g}, which draws other tokens of the same text each time, is switched off"
    )
    warnings.warn(PardWarning(f"{problem}; it is for training; set dropout to null"), stacklevel=2)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """How far a tokenizer's ids reach. Each is one more than the highest id."""

    ordinary: int  # of the tokens that text is made of
    all: int  # added tokens included


def token_ids(folder: Path) -> TokenIds:
    """How far the ids of a folder's tokenizer reach. Raises BadCheckpoint."""
    path = folder / FILE
    if not has_file(path, BadCheckpoint):
        raise BadCheckpoint(f"{folder}: no {FILE}; save the checkpoint's fast tokenizer beside its weights")
    value = read_json(path, BadCheckpoint, most=MOST_TOKENIZER)
    try:
        marked = {int(token["id"]) for token in value.get("added_tokens") or ()}
        own = set(_model_ids(value["model"]["vocab"]))
        ordinary, most = max(own - marked, default=-1), max(own | marked)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # OverflowError: Infinity
        problem = id_problem(value) or "not a tokenizer of the tokenizers library (no vocabulary in it)"
        raise BadCheckpoint(f"{path}: {problem}") from error
    try:
        added = load_tokenizer(path, BadCheckpoint).get_added_tokens_decoder()
    except BadCheckpoint as error:
        if error.__cause__ is None:  # a file beside it, which the message names
            raise
        raise BadCheckpoint(
            f"{path}: the tokenizers library cannot read it: {error.__cause__}; download it again"
        ) from error
    return TokenIds(ordinary + 1, max(most, *added, -1) + 1)


def _model_ids(vocab: Any) -> range | list[int]:
    # Unigram models list their pieces; all others map a piece to its id
    return range(len(vocab)) if isinstance(vocab, list) else [int(id_) for id_ in vocab.values()]


def chat_template(folder: Path) -> str | None:
    """The jinja text of the chat template (of several, the one named "default"); None if there is none."""
    config = folder / CONFIG_FILE
    value = read_json(config, BadCheckpoint).get("chat_template") if has_file(config, BadCheckpoint) else None
    path = folder / TEMPLATE_FILE
    if has_file(path, BadCheckpoint):
        content = read_file(path, MOST, BadCheckpoint)
        try:
            return content.decode("utf-8-sig")
        except ValueError as error:
            raise BadCheckpoint(f"{path}: not UTF-8 text") from error
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise BadCheckpoint(f"{config}: chat_template is neither text nor a list of named templates")
    return value
