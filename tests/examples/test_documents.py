"""The Python code of README's section for applications and of docs/applications.md runs, block by block, in order."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_artifacts import QWEN_LIKE

import pard_onnx

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: The city's name
    """
    return f"rain in {city}"


@pytest.fixture(scope="module")
def names(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the blocks take from the application around them."""
    pytest.importorskip("llguidance")
    root = tmp_path_factory.mktemp("documented pair")
    options: dict[str, Any] = {"kv_rows": 4096 + 64, "template": QWEN_LIKE, "eos": (279,)}
    target, draft = root / "target", root / "draft"
    write_artifact(target, "target", **options)
    write_artifact(draft, "draft", rows=284, **options)
    pair = pard_onnx.load(target, draft, threads=1)
    known = {name: getattr(pard_onnx, name) for name in pard_onnx.__all__}
    own = {
        "load": lambda *_, **more: pair,
        "pair": pair,
        "chat": pair.chat(),
        "target": str(target),
        "draft": str(draft),
        "prompt": "the fox",
        "messages": [{"role": "user", "content": "fox"}],
        "long_text": "the quick brown fox " * 9,
        "get_weather": get_weather,
        "asyncio": asyncio,
        "json": json,
        "logging": logging,
        "__name__": "documented",
    }
    yield known | own
    pair.close()


def blocks(file: str, start: str = "", end: str = "") -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    text = text[text.index(start) :] if start else text
    return BLOCK.findall(text[: text.index(end)] if end else text)


@pytest.mark.parametrize(
    ("file", "start", "end", "count"),
    [("docs/applications.md", "", "", 9), ("README.md", "## In an application", "## Exactness", 1)],
)
def test_the_blocks_run(names: dict[str, Any], file: str, start: str, end: str, count: int) -> None:
    found = blocks(file, start, end)
    assert len(found) >= count
    known = dict(names)

    async def run() -> None:
        for source in found:
            code = compile(source, file, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, known)
            if inspect.isawaitable(result):
                await result
        if main := known.get("main"):
            await main()

    asyncio.run(run())


def test_headings_that_are_linked_exist() -> None:
    page = (ROOT / "docs/applications.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall(r"\]\(#([\w-]+)\)", page)
    assert len(linked) > 10 and set(linked) <= anchors
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    contents = page[: page.index("\n## ")]
    assert re.findall(r"^- \[(.*?)\]\(#", contents, re.MULTILINE) == sections
    for file in re.findall(r"\]\((\.\./[\w./]+|[\w]+\.md)", page):
        assert (ROOT / "docs" / file).exists()
