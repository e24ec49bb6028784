"""`Command`: arguments of a program, as a line that a shell takes."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

# PowerShell splits an unquoted argument such as --name.key at its point, and takes @, ; and others for operators
PLAIN = re.compile(r"[A-Za-z0-9_/-]+", re.ASCII)
QUOTES = re.compile("['\u2018\u2019\u201a\u201b]")  # all of these end a text in single quotes


@dataclass(frozen=True, slots=True)
class Command:
    """A program and its arguments."""

    purpose: str
    arguments: tuple[str, ...]
    # For PowerShell, where it needs other ones: before version 7.3 it removes the double quotes in an argument
    powershell_arguments: tuple[str, ...] = ()

    @property
    def posix(self) -> str:
        """The line for sh, bash and zsh."""
        return shlex.join(self.arguments)

    @property
    def powershell(self) -> str:
        """The line for PowerShell."""
        return " ".join(map(powershell_quoted, self.powershell_arguments or self.arguments))


def powershell_quoted(argument: str) -> str:
    """The argument as PowerShell reads it as itself."""
    if PLAIN.fullmatch(argument):
        return argument
    return "'" + QUOTES.sub(lambda found: found[0] * 2, argument) + "'"
