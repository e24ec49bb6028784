"""An artifact's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pard_onnx.models.checkpoints.added_tokens import read_added_tokens
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.errors import BadArtifact, BadInput

from .control_tokens import TEXT, ControlTokens, checked_handling
from .template import Message, checked_arguments, render
from .writer import Detokenizer

TOKENIZER = "tokenizer.json"


class Text:
    """An artifact folder's tokenizer and chat template."""

    def __init__(self, folder: Path, chat_template: str | None, names: Collection[str] | None = None) -> None:
        """names: of the files that may be read, as a manifest lists them; None: all."""
        self._tokenizer = load_tokenizer(folder / TOKENIZER, BadArtifact, names)
        self._template = chat_template
        self._control: ControlTokens | None = None
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

    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens by their texts. `decode` leaves these tokens out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """The ids of a plain prompt, with the special tokens that the tokenizer adds (such as BOS)."""
        return self._ids(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> list[int]:
        """The ids of a conversation up to the beginning of the assistant's answer; BadInput if there is no template.

        arguments: further variables of the template. special_tokens: one of `control_tokens.HANDLINGS`.
        """
        if self._control is None:
            self._control = ControlTokens(self._tokenizer, self._template)
        return self._control.ids(
            messages,
            lambda chosen: self.render(chosen, arguments),
            lambda text: self._ids(text, add_special_tokens=False),
            checked_handling(special_tokens),
        )

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, from a command line in another encoding
            raise BadInput(f"the prompt is not valid Unicode: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, prompt: Sequence[int]) -> Detokenizer:
        """Decodes the tokens that follow a prompt, one by one."""
        return Detokenizer(self, prompt)


def first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[int, str | None, str | None] | None:
    """The lowest id whose tokens differ, and both tokens (None if missing); None if the vocabularies are equal."""
    if ours == theirs:
        return None
    left, right = ({id_: token for token, id_ in vocabulary.items()} for vocabulary in (ours, theirs))
    differing = (id_ for id_ in left.keys() | right.keys() if left.get(id_) != right.get(id_))
    first = min(differing)
    return first, left.get(first), right.get(first)
