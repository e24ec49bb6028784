"""`ControlTokens`: special tokens in the text of users, which stay text.

A chat template writes one string, in which a user's `<|im_end|>` looks like the template's own. So the conversation is
rendered a second time with marks at such places. If the string is the same but for the marks, the marks say which
tokens are the user's. The string is then encoded by a copy of the tokenizer in which each control token has another
text, a secret one, which takes the place of those that the template wrote. What is left is text to that copy, and
is encoded as if the tokenizer had no such token. Conversations without such text take none of these steps.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from tokenizers import Tokenizer

from pard_onnx.models.checkpoints.tokenizer import GuardedTokenizer
from pard_onnx.models.errors import BadInput, shown

from .template import ASSISTANT, CONTENT, Message, with_joined_parts

# What becomes of special tokens in messages of users and tools: they stay text, are encoded as tokens, or are refused
Handling = Literal["text", "encode", "refuse"]
HANDLINGS: tuple[str, ...] = get_args(Handling)
TEXT, ENCODE, REFUSE = HANDLINGS
DEVELOPERS = ("system", "developer")  # roles whose messages are the program's own, which may have special tokens
MARKS = range(0xE000, 0xF8FF)  # characters for private use
SECRET_MARKS, SECRET_LENGTH = range(0x100000, 0x10FFFE), 4  # those of another plane
FIRST_NUMBER = 0xF0000
ADVICE = 'leave it out, or give special_tokens="encode"'

Render = Callable[[Sequence[Message]], str]
Encode = Callable[[str, GuardedTokenizer], list[int]]  # the plain encoding of a text by this tokenizer


def checked_handling(value: object) -> str:
    """The user's `special_tokens`; BadInput for an unknown one."""
    if not isinstance(value, str) or value not in HANDLINGS:
        raise BadInput(f"special_tokens must be one of {', '.join(map(repr, HANDLINGS))}, not {shown(value)}")
    return str(value)


@dataclass(frozen=True, slots=True)
class Renamed:
    """A copy of a tokenizer whose control tokens have secret texts."""

    tokenizer: GuardedTokenizer
    secret: str  # what all of these texts begin with
    names: Mapping[str, str]  # by the tokens' own texts


class ControlTokens:
    """The tokens that structure a conversation: special ones, and other added tokens that the chat template writes."""

    def __init__(self, tokenizer: GuardedTokenizer, template: str | None) -> None:
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content.strip()]
        self._tokenizer = tokenizer
        self._special = {token.content for token in added if token.special}
        self._all = self._special | {token.content for token in added if token.content in (template or "")}
        self._ids = {text: tokenizer.token_to_id(text) for text in self._all}
        # Such tokens are found in text that is written in another way, too, such as in capital letters
        folded = tokenizer.normalizer is not None and any(
            token.normalized for token in added if token.content in self._all
        )
        self._folded_ids = set(self._ids.values()) if folded else None
        self._renamed: Renamed | None = None

    def ids(self, messages: Sequence[Message], render: Render, encode: Encode, handling: str) -> list[int]:
        """The ids of a conversation. render, encode: the template, and the encoding of what it writes.

        Raises BadInput, naming the token, where `handling` says so, and where the template changes such text.
        """
        if handling == ENCODE:
            return encode(render(messages), self._tokenizer)
        messages = [self._whole(message) for message in messages]
        found = self._found(messages)
        refused = self._found([one for one in messages if one.get("role") != ASSISTANT]) if handling == REFUSE else []
        if refused:
            raise BadInput(f"a message has the special token {shown(refused[0])}; {ADVICE}, or 'text'")
        text = render(messages)
        if not found:
            ids = encode(text, self._tokenizer)
            if not self._has_folded(ids, text):
                return ids
            if handling == REFUSE:
                raise BadInput(f"a message has a special token in another form; {ADVICE}, or 'text'")
            return self._encode_apart(text, encode)
        before, after = unused_characters(text, messages)
        for place in (both_marks, inner_mark, before_mark, after_mark):
            marked = render([self._marked(message, found, partial(place, before, after)) for message in messages])
            if marked.replace(before, "").replace(after, "") == text:
                return self._encode_apart(marked, encode, before, after, place is both_marks)
        raise BadInput(f"the chat template changes a message that has the special token {shown(found[0])}; {ADVICE}")

    # Where the messages have control tokens

    def _texts(self, role: object) -> set[str]:
        """The tokens that are text in messages of this role. A model's own answer has no special ones: where its text
        has one, it was written in plain tokens."""
        if role in DEVELOPERS:
            return set()
        if role == ASSISTANT:
            return self._special
        return self._all

    def _found(self, messages: Sequence[Message]) -> list[str]:
        found: dict[str, None] = {}
        for message in messages:
            texts = self._texts(message.get("role"))
            for value in strings(message):
                found |= dict.fromkeys(text for text in texts if text in value)
        return list(found)

    def _whole(self, message: Message) -> Message:
        """The message, with its text parts joined where a token begins in one and ends in another."""
        content, texts = message.get(CONTENT), self._texts(message.get("role"))
        if not isinstance(content, list | tuple) or len(content) < 2 or not texts:
            return message
        whole = with_joined_parts(message)[CONTENT]
        if not isinstance(whole, str):
            return message
        apart = [value for part in content for value in strings(part)]
        split = any(whole.count(text) > sum(value.count(text) for value in apart) for text in texts)
        return {**message, CONTENT: whole} if split else message

    def _marked(self, message: Message, found: Sequence[str], mark: Callable[[str], Put]) -> Message:
        texts = self._texts(message.get("role")).intersection(found)
        if not texts:
            return message
        pattern = alternatives(texts)

        def walk(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(mark(value), value)
            if isinstance(value, Mapping):
                return {walk(key): walk(item) for key, item in value.items()}
            return [walk(item) for item in value] if isinstance(value, list | tuple) else value

        return {key: value if key == "role" else walk(value) for key, value in message.items()}

    def _has_folded(self, ids: list[int], text: str) -> bool:
        """Whether the ids have more control tokens than the text."""
        if self._folded_ids is None:
            return False
        return sum(id_ in self._folded_ids for id_ in ids) > sum(1 for _ in alternatives(self._all).finditer(text))

    # Encoding

    def _encode_apart(
        self, marked: str, encode: Encode, before: str = "", after: str = "", both: bool = False
    ) -> list[int]:
        """The ids of a text, in which the control tokens beside marks (or between two of them) are text."""
        renamed = self._copy(marked)
        token = f"(?:{alternatives(text for text in self._all if text in marked).pattern})"
        mine = f"{before}{token}{after}" if both else f"{before}{token}|{token}{after}" if before else "(?!)"
        count = 0

        def replace(found: re.Match[str]) -> str:
            nonlocal count
            if found["own"] is None:
                return found[0].replace(before, "").replace(after, "")
            count += 1
            return renamed.names[found["own"]]

        text = re.sub(f"{mine}|(?P<own>{token})|[{before}{after}]" if before else f"(?P<own>{token})", replace, marked)
        ids = encode(text, renamed.tokenizer)
        known = set(self._ids.values())
        if sum(id_ in known for id_ in ids) != count:
            raise BadInput(f"a message has a special token that this tokenizer cannot take as text; {ADVICE}")
        return ids

    def _copy(self, text: str) -> Renamed:
        if self._renamed is None or self._renamed.secret in text:
            self._renamed = rename(self._tokenizer, self._ids)
        return self._renamed


def strings(value: Any) -> Iterator[str]:
    """All texts in a message but its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield str(key)
                yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the texts, of which the longest counts, as in tokenizers."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def unused_characters(text: str, messages: Sequence[Message]) -> tuple[str, str]:
    """Two characters for private use that neither the text nor the messages have."""
    used = set(text).union(*(value for message in messages for value in strings(message)))
    free = (chr(code) for code in MARKS if chr(code) not in used)
    found = next(free, None), next(free, None)
    if found[0] is None or found[1] is None:
        raise BadInput(f"the messages have all characters for private use, and special tokens; {ADVICE}")
    return found[0], found[1]


Put = Callable[[re.Match[str]], str]


def both_marks(before: str, after: str, _: str) -> Put:
    """A mark on each side, of which none is taken for that of another token where the template cuts the text."""
    return lambda found: before + found[0] + after


def inner_mark(before: str, after: str, text: str) -> Put:
    """The mark on the side of the token that is not the text's end, where templates look at texts and trim them."""
    return lambda found: before + found[0] if text[: found.start()].strip() else found[0] + after


def before_mark(before: str, _: str, __: str) -> Put:
    return lambda found: before + found[0]


def after_mark(_: str, after: str, __: str) -> Put:
    return lambda found: found[0] + after


def rename(tokenizer: GuardedTokenizer, ids: Mapping[str, int]) -> Renamed:
    """A copy of the tokenizer whose tokens `ids` have other texts, and the same ids."""
    secret = "".join(chr(secrets.choice(SECRET_MARKS)) for _ in range(SECRET_LENGTH))
    names = {text: secret + chr(FIRST_NUMBER + number) for number, text in enumerate(ids)}
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
    if "merges" in model:
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    copy = tokenizer.like(Tokenizer.from_str(json.dumps(content)))
    if any(copy.token_to_id(names[text]) != id_ for text, id_ in ids.items()):
        raise BadInput(f"a message has a special token, which this tokenizer cannot take as text; {ADVICE}")
    return Renamed(copy, secret, names)
