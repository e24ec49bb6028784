"""The demo pair's corpus: the Python standard library's own sources, as found on any machine.

Two views of the same modules are mixed: whole files, and chat turns that ask for the body of a
documented function. Held-out modules appear in neither.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

HELD_OUT = frozenset(
    [
        "bisect",
        "cmd",
        "colorsys",
        "csv",
        "fnmatch",
        "fractions",
        "glob",
        "graphlib",
        "heapq",
        "json",
        "mimetypes",
        "netrc",
        "queue",
        "sched",
        "shlex",
        "stat",
        "string",
        "textwrap",
        "timeit",
        "wsgiref",
    ]
)
# Installed packages, test suites and generated tables are not the library's own prose.
EXCLUDED = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "ensurepip", "__pycache__"]
)


@dataclass(frozen=True, slots=True)
class Module:
    """One source file; `name` is its path below the library folder, with dots."""

    name: str
    source: str

    @property
    def held_out(self) -> bool:
        return self.name.split(".")[0] in HELD_OUT


def modules(root: Path | None = None) -> Iterator[Module]:
    """Every module of the standard library in a stable order.

    root: the library folder; the running interpreter's own by default.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    # Sorted by parts: Windows compares whole paths without case.
    for relative in sorted((path.relative_to(root) for path in root.rglob("*.py")), key=lambda path: path.parts):
        if EXCLUDED.isdisjoint(relative.parts[:-1]) and not relative.name.startswith("_sysconfigdata"):
            text = (root / relative).read_text(encoding="utf-8", errors="ignore")  # every line end as one \n
            yield Module(".".join(relative.with_suffix("").parts), text)


def chat(user: str, assistant: str) -> str:
    """One turn in the form that the pair's chat template writes."""
    return f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n{assistant}{IM_END}\n"


def functions(module: Module) -> Iterator[tuple[str, str]]:
    """(signature with docstring, body) of every documented function, in source order."""
    try:
        tree = ast.parse(module.source)
    except (SyntaxError, ValueError):
        return
    lines = module.source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        head = lines[node.lineno - 1 : node.body[0].end_lineno]
        body = lines[node.body[0].end_lineno or 0 : node.end_lineno]
        yield "\n".join(head), "\n".join(body)


def documents(module: Module) -> Iterator[str]:
    """The training documents of one module: its text, then its functions as chat turns."""
    yield f"# {module.name}\n{module.source}{END_OF_TEXT}"
    for head, body in functions(module):
        yield chat(f"Complete the code.\n{head}\n", f"{body}\n") + END_OF_TEXT


def held_out_prompts(count: int, shortest: int = 60, longest: int = 200) -> list[str]:
    """The first documented function of each held-out module, up to its docstring, that is of fitting length."""
    fitting = (
        next((head for head, _ in functions(m) if shortest < len(head) < longest), None)
        for m in modules()
        if m.held_out
    )
    return [f"{head}\n" for head in fitting if head][:count]
