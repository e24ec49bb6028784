"""What llguidance does with a stranger's grammar: whether it can be compiled, in a process that may be ended.

Some grammars take llguidance very long, such as those that intersect regular expressions, and nothing can end its work
from outside. So a grammar that may be one of them is compiled in a helper process first, which runs this file as a
script, for a tokenizer whose ordinary tokens are single bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

MEMORY = 2 << 30  # bytes of address space that the helper may take


class Bytes:
    """llguidance's `TokenizerWrapper` of a tokenizer with single bytes, and the special tokens of the model's."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, size: int, special: dict[str, int]) -> None:
        """size: ids of the model's tokenizer. special: ids by text, which grammars may name."""
        named = {id_: text.encode() for text, id_ in special.items()}
        ordinary = (id_ for id_ in count() if id_ not in named)
        single = {next(ordinary): bytes([value]) for value in range(256)}
        both = named | single
        self.eos_token_id = 1 + max(size, *both)
        self.tokens = [both.get(id_, b"") for id_ in range(self.eos_token_id)] + [b"<|end of text|>"]
        self.special_token_ids = [*named, self.eos_token_id]
        self._ids = {byte[0]: id_ for id_, byte in single.items()}

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._ids[value] for value in (text.encode() if isinstance(text, str) else text)]


def limit_memory() -> None:
    """Not where the system has no such limit (Windows, and macOS, which ignores it)."""
    if sys.platform == "win32":
        return
    import resource

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def problem_of(grammar: str, tokenizer: Any, limits: Any, make: Callable[..., Any]) -> str:
    """What llguidance finds wrong with a grammar; empty if nothing is. make: its `LLMatcher`."""
    matcher = make(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # finds some grammars that no text satisfies
    error: str = matcher.get_error()
    return error


def main() -> None:
    limit_memory()
    request = json.load(sys.stdin.buffer)
    sys.path.insert(0, request["packages"])
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    limits = LLParserLimits(verbose_errors=False)
    wrapper: Any = Bytes(request["size"], request["special"])  # looked at by its attributes, not by its class
    tokenizer = LLTokenizer(wrapper)
    problem = problem_of(request["grammar"], tokenizer, limits, LLMatcher)
    sys.stdout.buffer.write(json.dumps({"problem": problem}).encode())


if __name__ == "__main__":
    main()
