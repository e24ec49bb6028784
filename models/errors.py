"""The exception tree.

PardError
├── BadInput            what the user gave cannot be used: one line, names the value and the fix; exit code 2
│   ├── BadCheckpoint   a Hugging Face folder that cannot be exported
│   ├── BadArtifact     an exported folder that cannot be run
│   ├── BadProvider     an execution provider that is not available
│   └── TooLong         a prompt that does not fit the capacity
└── Failure             something else went wrong while working; exit code 1
    └── Busy            too many generations run and wait; the same request succeeds later

PardWarning             it works, but not as well as it could: one line, names the fix
"""

from __future__ import annotations

import re
from reprlib import Repr

# Characters that change how a terminal shows other characters, or end a line: controls (escape sequences begin with
# one), directions of text, invisible tags. Joiners stay: some scripts are written with them.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
LONGEST_VALUE, LONGEST_MESSAGE = 120, 1200  # characters
CUT = " ... "
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST_VALUE
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 6
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """A foreign value for an error message, as `repr` has it: at most LONGEST_VALUE characters, none unprintable."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an object of the user's whose repr fails, or a number that has too many digits for one
        text = f"<{type(value).__name__}>"
    return cut(printable(text), LONGEST_VALUE)


def printable(text: str) -> str:
    """The text in one line: line ends and tabs as spaces, other characters of UNPRINTABLE as their escapes."""
    return UNPRINTABLE.sub(lambda found: " " if found[0] in "\t\n\v\f\r\u2028\u2029" else escaped(found[0]), text)


def escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def cut(text: str, most: int) -> str:
    """The text, without its middle where it has more than `most` characters."""
    if len(text) <= most:
        return text
    head = (most - len(CUT)) * 2 // 3
    return text[:head] + CUT + text[len(text) - (most - len(CUT) - head) :]


def one_line(message: object) -> str:
    """A message as it is printed. A message that is too long keeps its beginning and its end, which names the fix."""
    text = str(message)
    if len(text) > 4 * LONGEST_MESSAGE:  # what is left out need not be searched
        text = cut(text, 4 * LONGEST_MESSAGE)
    return cut(printable(text), LONGEST_MESSAGE)


class PardError(Exception):
    """Base of all errors of this package; `exit_code` is what the commands return.

    The message is one printable line of bounded length, whatever values it names.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class BadInput(PardError, ValueError):
    """An argument, option or file cannot be used. The message is one line that names the value and the fix."""

    exit_code = 2


class BadCheckpoint(BadInput):
    """A Hugging Face folder cannot be exported: a file is missing, damaged or of an unsupported kind."""


class BadArtifact(BadInput):
    """An exported folder cannot be run: a file is missing or changed, or the folder does not fit its partner."""


class BadProvider(BadInput):
    """An execution provider is not available, does not take an option, or cannot run the model."""


class TooLong(BadInput):
    """A prompt has more tokens than the capacity that the models were exported with."""


class Failure(PardError, RuntimeError):
    """Work that was asked for correctly went wrong: a disk is full, a download broke off, a check failed."""


class Busy(Failure):
    """As many generations run and wait as the pair was loaded for. The same request succeeds later."""


class PardWarning(UserWarning):
    """The work continues, but slower or with less than was asked for. The message is one line that names the fix."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))
