"""Text and tokens: the tokenizer, the chat template, and decoding as tokens come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.json_files import read_json

Message = Mapping[str, Any]
TOKENIZER = "tokenizer.json"
UNDECODED = "\ufffd"
PIECES = 3  # replacement characters that the start of one character can show as (byte fallback)
CONTEXT = 8  # tokens in front of a new one that decide how it decodes
WINDOW = 16  # tokens decoded at once at most


class Text:
    """An artifact folder's tokenizer and chat template."""

    def __init__(self, folder: Path, chat_template: str | None) -> None:
        try:
            # Not from_file: paths with letters that the platform's encoding lacks
            self._tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise BadArtifact(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = chat_template
        self._special = special_tokens(folder / "tokenizer_config.json")

    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def encode(self, text: str) -> list[int]:
        """A raw prompt's ids, with what the tokenizer itself adds (a BOS token)."""
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant answers; BadInput without a template."""
        return self._ids(self.render(messages), add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: bytes of another encoding on a command line
            raise BadInput(f"the prompt is not valid Unicode: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text, with what transformers gives templates to work with."""
        if self._template is None:
            raise BadInput("this model has no chat template; give the prompt as text")
        try:
            return render(self._template, messages, self._special)
        except Exception as error:  # a template is a program
            raise BadInput(f"the chat template refuses these messages: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, prompt: Sequence[int]) -> Detokenizer:
        return Detokenizer(self, prompt)


class Decodes(Protocol):
    """What Detokenizer asks of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Text as tokens come, never half a character.

    A window of recent ids is decoded as a whole, because decoders treat a first token's space differently and
    a character may span tokens; it is cut back now and then, so a token costs O(1).
    """

    def __init__(self, text: Decodes, prompt: Sequence[int]) -> None:
        self._text = text
        self._ids = list(prompt[-CONTEXT:])
        start = text.decode(self._ids)
        self._given = len(start) - trailing(start)  # characters of the window's text that are out already

    def push(self, token: int) -> str:
        """The text that this token makes certain, often empty inside a character."""
        self._ids.append(token)
        text = self._text.decode(self._ids)
        held = trailing(text)
        delta = text[self._given : len(text) - held]
        self._given = max(self._given, len(text) - held)
        if len(self._ids) == WINDOW:
            self._ids = self._ids[-CONTEXT:]
            self._given = max(len(self._text.decode(self._ids)) - held, 0)
        return delta

    def finish(self) -> str:
        """What was held back: the replacement characters of a character that was never completed."""
        text = self._text.decode(self._ids)
        delta, self._given = text[self._given :], len(text)
        return delta


def trailing(text: str) -> int:
    """Characters at the end that the next token may still change."""
    held = 0
    while held < min(PIECES, len(text)) and text[-1 - held] == UNDECODED:
        held += 1
    return held


def special_tokens(path: Path) -> dict[str, str]:
    """bos_token, eos_token and their like out of tokenizer_config.json, as templates name them."""
    if not path.is_file():
        return {}
    config = read_json(path, BadArtifact)
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: value for key, value in texts.items() if isinstance(value, str)}


def render(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """A Hugging Face chat template, with what it may ask for."""
    return compiled(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
    )


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """In transformers' own environment (chat_template_utils.py); once, for it takes milliseconds."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[int, str | None, str | None] | None:
    """The lowest id whose token differs, and both tokens; None if the vocabularies are the same."""
    if ours == theirs:
        return None
    left, right = ({id_: token for token, id_ in vocabulary.items()} for vocabulary in (ours, theirs))
    differing = (id_ for id_ in left.keys() | right.keys() if left.get(id_) != right.get(id_))
    first = min(differing)
    return first, left.get(first), right.get(first)
