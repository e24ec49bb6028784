"""Tokens that the files beside a tokenizer.json add to it, as transformers adds them when it loads a tokenizer.

tokenizer_config.json     `added_tokens_decoder`, the named tokens (`eos_token`, ...) and `extra_special_tokens`, which
                          older files call `additional_special_tokens`
special_tokens_map.json   the older files; transformers reads them only where tokenizer_config.json has no
added_tokens.json         `added_tokens_decoder`
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.json_files import read_json

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
OLDER_FILE = "added_tokens.json"
FILES = (CONFIG_FILE, MAP_FILE, OLDER_FILE)
DECODER = "added_tokens_decoder"
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
BOTH_NAMES = f"{EXTRA} ({OLDER_EXTRA} in older files)"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_ID = 2**32 - 1
AN_ID = f"it must be a token id, a whole number from 0 to {MOST_ID}"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """What the files add, in transformers' order."""

    tokens: tuple[AddedToken, ...]  # of `added_tokens_decoder` or added_tokens.json; ascending by their ids there
    named: Mapping[str, AddedToken]  # the special tokens that have a name: bos_token, eos_token, ...
    extra: tuple[AddedToken, ...]  # special tokens without a name

    @property
    def texts(self) -> Mapping[str, str]:
        """The named tokens as text, by the names that chat templates use."""
        return {name: token.content for name, token in self.named.items()}

    def missing(self, known: set[str]) -> list[AddedToken]:
        """The tokens to add to a tokenizer, in order. known: the added tokens that it has already."""
        out = list(self.tokens)
        seen = known | {token.content for token in out}
        # A text that stands here twice is added twice: the flags of the last one count
        out += [token for token in (*self.named.values(), *self.extra) if token.content not in seen]
        names = set(self.texts.values())
        for token in out:
            token.special = token.special or token.content in names
        return out


def read_added_tokens(folder: Path, error: type[BadInput], names: Collection[str] | None = None) -> AddedTokens:
    """What the files of a folder add; raises `error`, naming file and key, for what is not a token.

    names: of the files that may be read, as a manifest lists them; None: all.
    """

    def read(name: str) -> dict[str, Any]:
        is_there = (names is None or name in names) and has_file(folder / name, error)
        return read_json(folder / name, error) if is_there else {}

    path = folder / CONFIG_FILE
    config = with_one_extra_key(read(CONFIG_FILE))
    where = dict.fromkeys(config, path)
    if DECODER in config:
        tokens = decoder_tokens(config[DECODER], path, error)
        return AddedTokens(tokens, named_tokens(config, where, error), extra_tokens(config, where, error))
    older = folder / MAP_FILE
    mapped = read(MAP_FILE)
    both = [part.get(EXTRA) for part in (config, mapped)]
    late = not any(both)  # transformers makes such tokens special after it has read added_tokens.json
    if not config.get(EXTRA):
        mapped = with_one_extra_key(mapped)
    elif all(isinstance(part, list) for part in both):
        mapped = mapped | {EXTRA: [token for part in both for token in part or ()]}
    # The older file wins, but for a text under a name that is not a usual one
    taken = {key: value for key, value in mapped.items() if key in NAMES or not isinstance(config.get(key), str)}
    config, where = config | taken, where | dict.fromkeys(taken, older)
    named, extra = named_tokens(config, where, error), extra_tokens(config, where, error)
    early = (*(named[name] for name in NAMES if name in named), *(() if late else extra))
    special = {token.content for token in early}
    return AddedTokens(older_tokens(read(OLDER_FILE), special, folder / OLDER_FILE, error), named, extra)


def with_one_extra_key(config: dict[str, Any]) -> dict[str, Any]:
    """The object with its special tokens without a name under their present key."""
    out = {key: value for key, value in config.items() if key != OLDER_EXTRA}
    if not out.get(EXTRA) and config.get(OLDER_EXTRA):
        out[EXTRA] = config[OLDER_EXTRA]
    return out


def decoder_tokens(value: object, path: Path, error: type[BadInput]) -> tuple[AddedToken, ...]:
    """The tokens of `added_tokens_decoder`: an object of tokens by id."""
    if not isinstance(value, Mapping):
        raise error(f"{path}: {DECODER} is {shown(value)}; it must be an object of tokens by id")
    try:
        by_id = sorted((int(id_), token) for id_, token in value.items())
    except (TypeError, ValueError):  # TypeError: two keys of one id, whose tokens have no order
        raise error(f"{path}: a key of {DECODER} is not a token id, or stands there twice") from None
    for id_, _ in by_id:
        require_id(id_, f"a key of {DECODER}", path, error)
    return tuple(added_token(token, f"{DECODER}.{id_}", path, error) for id_, token in by_id)


def older_tokens(
    ids: Mapping[str, Any], special: set[str], path: Path, error: type[BadInput]
) -> tuple[AddedToken, ...]:
    """The tokens of added_tokens.json: an object of ids by text. special: texts of special tokens."""
    for text, id_ in ids.items():
        require_id(id_, shown(text), path, error)
    return tuple(
        added_token({"content": text, "normalized": text not in special, "special": text in special}, text, path, error)
        for text in sorted(ids, key=lambda text: ids[text])
    )


def named_tokens(config: Mapping[str, Any], where: Mapping[str, Path], error: type[BadInput]) -> dict[str, AddedToken]:
    """The special tokens that have a name, the usual ones first, and of the others those with flags first."""
    own = [name for name in config if name.endswith("_token") and name not in NAMES and is_token(config[name])]
    own.sort(key=lambda name: isinstance(config[name], str))
    values = {name: config[name] for name in (*NAMES, *own) if config.get(name) is not None}
    paths = {name: where[name] for name in values}
    if isinstance(config.get(EXTRA), Mapping):  # names of this model's own, such as image_token
        values |= config[EXTRA]
        paths |= dict.fromkeys(config[EXTRA], where[EXTRA])
    return {name: added_token(value, name, paths[name], error, special=True) for name, value in values.items()}


def extra_tokens(config: Mapping[str, Any], where: Mapping[str, Path], error: type[BadInput]) -> tuple[AddedToken, ...]:
    """The special tokens without a name."""
    found = config.get(EXTRA)
    if not found or isinstance(found, Mapping):
        return ()
    if not isinstance(found, list):
        raise error(f"{where[EXTRA]}: {BOTH_NAMES} is {shown(found)}; it must be a list of tokens")
    return tuple(added_token(value, BOTH_NAMES, where[EXTRA], error, special=True) for value in found)


def is_id(value: object) -> bool:
    """Whether the value is a token id; the tokenizers library has those of 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_ID


def require_id(value: object, name: str, path: Path, error: type[BadInput]) -> None:
    if not is_id(value):
        raise error(f"{path}: {name} is {shown(value)}; {AN_ID}")


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can have and tokenizers cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and value.get("__type") == "AddedToken")


def added_token(value: Any, key: str, path: Path, error: type[BadInput], *, special: bool = False) -> AddedToken:
    """One token: its text, or an object with its text as `content` and its flags. special: where the object has no such
    flag; a text is always special."""
    if isinstance(value, str):
        value, special = {"content": value}, True
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, str) or not is_unicode(content):
        problem = f"is {shown(value)}; it must be a token's text, or an object with it as content"
        raise error(f"{path}: {key} {problem}")
    flags = {flag: value[flag] for flag in FLAGS if value.get(flag) is not None}
    for flag, given in flags.items():
        if not isinstance(given, bool):
            raise error(f"{path}: {flag} of {key} is {shown(given)}; it must be true or false")
    return AddedToken(content, **({"special": special} | flags))
