"""Regular expressions over the names of modules, as peft matches them; a stranger's expressions, which may backtrack.

Expressions run in a helper process with a deadline, which runs this file as a script: Python's `re` cannot be stopped.
Names without operators, which most adapters have, are matched here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 8.0
PLAIN = re.compile(r"[\w.-]*", re.ASCII)
# What cannot take long without a helper process: few repetitions, and none of a group
REPETITION, REPEATED_GROUP, MOST_REPETITIONS = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]|\\\d|\(\?P="), 4


@dataclass(frozen=True, slots=True)
class Pattern:
    """An expression, and how it is matched."""

    source: str  # as the configuration has it
    before: str = ""  # what peft puts before and after it
    after: str = ""
    whole: bool = False  # the whole name must match, not its beginning

    @property
    def expression(self) -> str:
        return f"{self.before}{self.source}{self.after}"

    @property
    def is_bounded(self) -> bool:
        return len(REPETITION.findall(self.source)) <= MOST_REPETITIONS and not REPEATED_GROUP.search(self.source)


class TooSlow(Exception):
    """The expressions take too long, or could. The message is a part of a sentence."""


class NotAnExpression(Exception):
    """An expression that Python's `re` does not take."""


Found = Mapping[str, Any]  # by name: the text of the group `idx`, or None


class ModulePatterns:
    """What each of some expressions matches of some names, found out at once."""

    def __init__(self, patterns: Iterable[Pattern], names: Iterable[str]) -> None:
        """Raises TooSlow."""
        unique, listed = list(dict.fromkeys(patterns)), list(names)
        request: tuple[list[list[Any]], list[str]] = ([[one.expression, one.whole] for one in unique], listed)
        if all(PLAIN.fullmatch(pattern.source) for pattern in unique):
            answers = match_all(*request)
        else:
            answers = self._in_helper(request, unique)
        self._found = dict(zip(unique, answers, strict=True))

    @staticmethod
    def _in_helper(request: tuple[list[list[Any]], list[str]], patterns: list[Pattern]) -> Any:
        from pard_onnx.models.helper_process import HelperStopped, NoHelper, run_helper

        try:
            return run_helper(Path(__file__), request, SECONDS)
        except HelperStopped as stopped:
            raise TooSlow(f"has patterns whose matching {stopped}") from None
        except NoHelper:
            if not all(pattern.is_bounded for pattern in patterns):
                raise TooSlow("has patterns that could take for ever, and no helper process can be started") from None
            return match_all(*request)

    def match(self, pattern: Pattern, name: str) -> tuple[bool, str | None]:
        """Whether the pattern matches the name, and the text of its group `idx`. Raises NotAnExpression."""
        found = self._found[pattern]
        if isinstance(found, str):
            raise NotAnExpression(found)
        return name in found, found.get(name)


def match_all(patterns: list[list[Any]], names: list[str]) -> list[Any]:
    """For each expression the names that it matches, or why it is none."""
    out: list[Any] = []
    for expression, whole in patterns:
        try:
            compiled = re.compile(expression)
            matched = {name: compiled.fullmatch(name) if whole else compiled.match(name) for name in names}
        except (re.error, OverflowError, RecursionError) as error:
            out.append(str(error))
            continue
        groups = compiled.groupindex
        out.append({name: found["idx"] if "idx" in groups else None for name, found in matched.items() if found})
    return out


if __name__ == "__main__":
    json.dump(match_all(*json.load(sys.stdin)), sys.stdout)
