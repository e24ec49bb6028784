"""An artifact's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pard_onnx.models.checkpoints.added_tokens import read_added_tokens
from pard_onnx.models.checkpoints.tokenizer import GuardedTokenizer
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.errors import BadArtifact, BadInput, TooLong

from .control_tokens import ENCODE, TEXT, ControlTokens, checked_handling
from .template import Message, checked_arguments, render, up_to_end_mark, with_end_mark
from .token_bytes import TokenBytes
from .writer import Detokenizer

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the encoding of a prompt is bounded by."""

    capacity: int | None = None  # tokens, at least one of them new; None: any number
    advice: str = "shorten it"  # what to do about a prompt that is too long
    deadline: float | None = None  # of perf_counter()

    def require_room(self, fewest: int) -> None:
        """TooLong for a prompt of at least so many tokens, if that is too many."""
        if self.capacity is not None and fewest >= self.capacity:
            raise TooLong(
                f"the prompt has at least {fewest} tokens, but the capacity is {self.capacity} with at least one of "
                f"them new; {self.advice}"
            )


UNBOUNDED = Bounds()


class Text:
    """An artifact folder's tokenizer and chat template."""

    def __init__(self, folder: Path, chat_template: str | None, names: Collection[str] | None = None) -> None:
        """names: of the files that may be read, as a manifest lists them; None: all."""
        self._tokenizer = load_tokenizer(folder / TOKENIZER, BadArtifact, names)
        self._template = chat_template
        self._control_tokens: ControlTokens | None = None
        self._bytes: TokenBytes | None = None
        self._writes_tools: bool | None = None
        self.special_tokens = read_added_tokens(folder, BadArtifact, names).texts  # by the names that templates use

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def token(self, id_: int) -> str | None:
        """The text of one token, special or not, as the tokenizer's files have it; None for an id that has none."""
        token: str | None = self._tokenizer.id_to_token(id_)
        return token

    def tokenizer_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, with the tokens of the files beside it."""
        text: str = self._tokenizer.to_str()
        return text

    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens by their texts. `decode` leaves these tokens out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def encode(self, text: str, bounds: Bounds = UNBOUNDED) -> list[int]:
        """The ids of a plain prompt, with the special tokens that the tokenizer adds (such as BOS).

        Raises TooLong for a text that has too many in any case, and Failure after the deadline.
        """
        return self._ids(text, self._tokenizer, bounds, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
        bounds: Bounds = UNBOUNDED,
        begun: str = "",
        *,
        continued: bool = False,
    ) -> list[int]:
        """The ids of a conversation up to the beginning of the assistant's answer; BadInput if there is no template.

        bounds: as of `encode`. arguments: further variables of the template. special_tokens: one of
        `control_tokens.HANDLINGS`. begun: what the answer begins with; special tokens in it are encoded. continued: the
        last message is the beginning of the answer.
        """
        render = self.render_continued if continued else self.render
        return self._control.ids(
            messages,
            lambda chosen: render(chosen, arguments) + begun,
            lambda text, tokenizer: self._ids(text, tokenizer, bounds, add_special_tokens=False),
            checked_handling(special_tokens),
        )

    @property
    def _control(self) -> ControlTokens:
        if self._control_tokens is None:
            self._control_tokens = ControlTokens(self._tokenizer, self._template)
        return self._control_tokens

    def tokenize(self, text: str, *, add_special_tokens: bool = True, special_tokens: str = ENCODE) -> list[int]:
        """The ids of a text.

        add_special_tokens: whether with those that the tokenizer adds, such as BOS. special_tokens: what becomes of
        those in the text, one of `control_tokens.HANDLINGS`.
        """
        if checked_handling(special_tokens) == ENCODE:
            return self._ids(text, self._tokenizer, UNBOUNDED, add_special_tokens=add_special_tokens)
        bare = self._ids(text, self._tokenizer, UNBOUNDED, add_special_tokens=False)
        message = {"role": "user", "content": text}
        ids = self._control.ids(
            [message],
            lambda chosen: str(chosen[0]["content"]),
            lambda text, tokenizer: self._ids(text, tokenizer, UNBOUNDED, add_special_tokens=False),
            special_tokens,
        )
        if add_special_tokens:
            added = self._ids(text, self._tokenizer, UNBOUNDED, add_special_tokens=True)
            before = next((at for at in range(len(added)) if added[at : at + len(bare)] == bare), 0)
            ids = [*added[:before], *ids, *added[before + len(bare) :]]
        return ids

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that one token stands for, those of a special token's text included; see `TokenBytes`."""
        if self._bytes is None:
            self._bytes = TokenBytes(self._tokenizer)
        return self._bytes(id_)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text, without special tokens before or after it; those in it are encoded."""
        return self._ids(text, self._tokenizer, UNBOUNDED, add_special_tokens=False)

    def offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, as of `tokenize`, and the characters that each stands for: its first, and the one after
        its last. A token that the tokenizer adds stands for none."""
        require_unicode(text)
        found = self._tokenizer.encode(text, add_special_tokens)
        return found.ids, found.offsets

    def _ids(self, text: str, tokenizer: GuardedTokenizer, bounds: Bounds, *, add_special_tokens: bool) -> list[int]:
        require_unicode(text)
        bounds.require_room(tokenizer.fewest_tokens(text))
        ids: list[int] = tokenizer.encode(text, add_special_tokens, bounds.deadline).ids
        return ids

    def render(self, messages: Sequence[Message], arguments: Mapping[str, object] | None = None) -> str:
        """The text that the chat template writes; BadInput if there is no template, or it refuses the messages.

        arguments: further variables of the template.
        """
        if self._template is None:
            raise BadInput("this model has no chat template; give the prompt as text")
        try:
            return render(self._template, messages, dict(self.special_tokens) | checked_arguments(arguments))
        except BadInput:
            raise
        except Exception as error:  # a template is a program, which may fail in any way
            raise BadInput(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error

    def render_continued(self, messages: Sequence[Message], arguments: Mapping[str, object] | None = None) -> str:
        """As `render`, up to the end of the last message's text."""
        marked = [*messages[:-1], with_end_mark(messages[-1])]
        return up_to_end_mark(self.render(marked, {**(arguments or {}), "add_generation_prompt": False}))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these tokens, without special tokens unless they are wanted."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """The id of the token with this text, special or not; None if there is none."""
        id_: int | None = self._tokenizer.token_to_id(text)
        return id_

    @property
    def template(self) -> str:
        """The chat template; empty if there is none."""
        return self._template or ""

    def writes_tools(self) -> bool:
        """Whether the chat template tells the model of tools, found by trying it."""
        if self._writes_tools is None:
            question = [{"role": "user", "content": "?"}]
            function = {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}}
            tools = [{"type": "function", "function": function}]
            try:
                self._writes_tools = self.render(question) != self.render(question, {"tools": tools})
            except BadInput:  # a template may want other messages beside tools
                self._writes_tools = True
        return self._writes_tools

    def stream(self, prompt: Sequence[int]) -> Detokenizer:
        """Decodes the tokens that follow a prompt, one by one."""
        return Detokenizer(self, prompt)


def require_unicode(text: str) -> None:
    """BadInput for half a surrogate pair, which a command line in another encoding may have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"the prompt is not valid Unicode: {error}") from error


def first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[int, str | None, str | None] | None:
    """The lowest id whose tokens differ, and both tokens (None if missing); None if the vocabularies are equal."""
    if ours == theirs:
        return None
    left, right = ({id_: token for token, id_ in vocabulary.items()} for vocabulary in (ours, theirs))
    differing = (id_ for id_ in left.keys() | right.keys() if left.get(id_) != right.get(id_))
    first = min(differing)
    return first, left.get(first), right.get(first)
