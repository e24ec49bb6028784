"""What llguidance does with a stranger's grammar: whether it can be compiled, in a process that may be ended.

Some grammars take llguidance very long, such as those that intersect regular expressions, and nothing can end its work
from outside. So a grammar that may be one of them is compiled in a helper process first, which runs this file as a
script, for a tokenizer whose tokens are single bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

IDS = re.compile(r"<\[[\d,-]+\]>")  # tokens of the model's vocabulary in a Lark grammar
MEMORY = 2 << 30  # bytes of address space that the helper may take


class Bytes:
    """llguidance's `TokenizerWrapper` of a tokenizer whose tokens are the bytes, and an end of text."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<|end|>")
    special_token_ids = (256,)
    is_tokenizer_wrapper = True

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def limit_memory() -> None:
    """Not where the system has no such limit (Windows, and macOS, which ignores it)."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass


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
    grammar = IDS.sub(f"<[{Bytes.eos_token_id}]>", request["grammar"])
    problem = problem_of(grammar, LLTokenizer(Bytes()), limits, LLMatcher)
    sys.stdout.buffer.write(json.dumps({"problem": problem}).encode())


if __name__ == "__main__":
    main()
