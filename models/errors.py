"""The exception tree.

PardError
├── BadInput            what the user gave cannot be used: one line, names the value and the fix; exit code 2
│   ├── BadCheckpoint   a Hugging Face folder that cannot be exported
│   ├── BadArtifact     an exported folder that cannot be run
│   ├── BadProvider     an execution provider that is not available
│   └── TooLong         a prompt that does not fit the capacity
└── Failure             something else went wrong while working; exit code 1

PardWarning             it works, but not as well as it could: one line, names the fix
"""

from __future__ import annotations


class PardError(Exception):
    """Base of all errors of this package; `exit_code` is what the commands return."""

    exit_code = 1


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


class PardWarning(UserWarning):
    """The work continues, but slower or with less than was asked for. The message is one line that names the fix."""
