"""HTML as trees that can be compared: the page's elements beside markdown-it's output."""

import re
from html.parser import HTMLParser
from typing import Any

from markdown_it import MarkdownIt

# The page reads no HTML and no reference definitions; it never shows an image.
REFERENCE = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable(["reference", "image"])

Tree = list[Any]  # [tag, children...]; text is a string


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root: Tree = ["root"]
        self.open: list[Tree] = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        name = "del" if tag == "s" else tag
        if tag == "a" and re.match(r"(?i)https?:|mailto:", facts.get("href") or ""):
            name = f"a {facts['href']}"
        if tag == "ol":
            name = f"ol {facts.get('start') or 1}"
        align = facts.get("align") or (facts.get("style") or "").removeprefix("text-align:")
        node: Tree = [f"{name} {align}" if tag in ("td", "th") and align not in ("", "left") else name]
        self.open[-1].append(node)
        self.open.append(node)
        if tag in ("br", "hr"):
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # markdown-it's <br />

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].append(data)


UNWRAPPED = {"span", "div", "a", "thead", "tbody"}  # colours, scrollers, links to nowhere
INLINE = {"em", "strong", "del", "code", "br", "a"}


def tree(html: str, *, headings: int = 0) -> Tree:
    """The elements and texts of a piece of HTML; `headings` is added to the levels of headings."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return _tidy(reader.root, headings, in_pre=False)


def reference(text: str) -> Tree:
    return tree(REFERENCE.render(text), headings=2)


def _tidy(node: Tree, headings: int, *, in_pre: bool) -> Tree:
    tag = node[0]
    if re.fullmatch(r"h[1-6]", tag):
        tag = f"h{min(6, int(tag[1]) + headings)}"
    children: Tree = []
    for child in node[1:]:
        if isinstance(child, str):
            children.append(child)
        elif child[0] != "header":  # a code block's language and button
            inner = _tidy(child, headings, in_pre=in_pre or child[0] == "pre")
            children += inner[1:] if inner[0] in UNWRAPPED else [inner]
    merged: Tree = []
    for child in children:
        if isinstance(child, str) and merged and isinstance(merged[-1], str):
            merged[-1] += child
        else:
            merged.append(child)
    if in_pre:
        texts = [child.rstrip() if isinstance(child, str) else child for child in merged]
        return [tag, *(child for child in texts if child)]
    return [tag, *_trimmed([re.sub(r"\s+", " ", child) if isinstance(child, str) else child for child in merged])]


def _trimmed(children: Tree) -> Tree:
    """Spaces beside block elements and at both ends mean nothing."""
    out: Tree = []
    for i, child in enumerate(children):
        if isinstance(child, str):
            if i == 0 or not _is_inline(children[i - 1]):
                child = child.lstrip(" ")
            if i + 1 == len(children) or not _is_inline(children[i + 1]):
                child = child.rstrip(" ")
            if not child:
                continue
        out.append(child)
    return out


def _is_inline(child: Any) -> bool:
    return isinstance(child, str) or (child[0].split()[0] in INLINE and child[0] != "br")
