"""The exception tree.

PardError
├── BadInput            what the user gave cannot be used: one line, names the value and the fix; exit code 2
│   ├── BadCheckpoint   a Hugging Face folder that cannot be exported
│   ├── BadArtifact     an exported folder that cannot be run
│   ├── BadProvider     an execution provider that is not there
│   └── TooLong         a prompt that does not fit the capacity
└── Failure             something else went wrong while working; exit code 1

PardWarning             it works, but not as well as it could: one line, names the fix
"""

from __future__ import annotations


class PardError(Exception):
    """Base of all errors of this package; `exit_code` is what the commands return."""

    exit_code = 1


class BadInput(PardError, ValueError):
    exit_code = 2


class BadCheckpoint(BadInput): ...


class BadArtifact(BadInput): ...


class BadProvider(BadInput): ...


class TooLong(BadInput): ...


class Failure(PardError, RuntimeError): ...


class PardWarning(UserWarning): ...
