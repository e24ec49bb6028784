"""The page's Markdown: beside markdown-it's, while it grows, and where a model's text is hostile or huge."""

import json
import random
import textwrap
import threading
from typing import Any

import markdown_trees
import pytest
from stub_server import Reply, Stub, delta, finish, text

pytestmark = pytest.mark.browser

WHOLE = """(texts) => texts.map((text) => {
  const root = document.createElement('div');
  new Growing(root).update(text, true);
  return root.innerHTML;
})"""
# In steps of at most so many characters, which a random number gives.
GROWN = """([texts, step]) => texts.map((text, i) => {
  const root = document.createElement('div'), growing = new Growing(root);
  let at = 0, random = i * 7919 + 1;
  while (at < text.length) {
    random = (random * 1103515245 + 12345) % 2147483648;
    at += 1 + (random >> 8) % step;
    growing.update(text.slice(0, at), false);
  }
  growing.update(text, true);
  return root.innerHTML;
})"""

SPANS = (
    "plain words", "**bold** text", "*emphasis*, too", "***both***", "snake_case_name", "__strong__ _em_",
    "`code *here*`",
    "a [link](https://a.example/b_c?d=1 \"title\") inside", "`` a ` b ``", "2 * 3 * 4", "~~gone~~", "\\*no\\* emphasis",
    "**bold with `code`**", "<https://a.example/>", "a & b < c", "**Note:** this", "«**quoted**»", "naïve café 数学",
    "line one\nline two", "hard  \nbreak", "f(x)[0]", "[not a link] (really)", "**a*b*c**", "![alt]",
    "[a [b](https://x.y/) c](mailto:d@e.org)", "5 > 3",
)  # fmt: skip


def document(source: random.Random, depth: int = 0) -> str:
    """A document as models write them: blocks of all kinds, nested."""
    return "\n\n".join(block(source, depth) for _ in range(source.randint(1, 3 if depth else 5)))


def block(source: random.Random, depth: int) -> str:
    def span() -> str:
        return " ".join(source.choice(SPANS) for _ in range(source.randint(1, 3)))

    def one_line() -> str:
        return span().replace("\n", " ")

    kind = source.choice("pppphccrqblot" if depth < 3 else "pph")
    if kind == "h":
        return f"{'#' * source.randint(1, 4)} {one_line()}"
    if kind == "c":
        fence, inside = source.choice((("```", "``"), ("~~~~", "```")))
        body = source.choice(("x = 1\n\n\tif x:\n", inside, "# a *b*", ""))
        return f"{fence}{source.choice(('', 'nolanguage'))}\n{body}\n{fence}"
    if kind == "r":
        return source.choice(("---", "***", "* * *"))
    if kind in "qb":
        return textwrap.indent(document(source, depth + 1), "> ", lambda _: True)
    if kind in "lo":
        between = source.choice(("\n", "\n\n"))
        items = []
        for number in range(source.randint(1, 4)):
            mark = "- " if kind == "l" else f"{number + 3}. "
            inside = document(source, depth + 1) if source.random() < 0.3 else span()
            items.append(mark + textwrap.indent(inside, " " * len(mark)).lstrip(" "))
        return between.join(items)
    if kind == "t":
        rows = [f"| {one_line()} | {one_line()} |" for _ in range(source.randint(0, 3))]
        return "\n".join((f"| {one_line()} | b |", "| --- | ---: |", *rows))
    return span()


PIECES = (
    "*", "**", "***", "_", "__", "`", "``", "[a](http://b.c/)", "[", "]", "- ", "1. ", "2) ", "> ", "  ", "    ", "\n",
    "\n\n", "\n```\n", "\n~~~\n", "\n# ", "\n---\n", "\n===\n", "\n| a | b |\n|---|--:|\n| c | *d* |\n", "word", " ",
    "\\*", "~~", "!", "(", "é", "\n- ", "\n1. ", "\n  - ", "\n    ", "\n> ", "\t", " #", "|", "<br>", "&lt;", "https://x.y/)",
)  # fmt: skip


def scrambled(source: random.Random) -> str:
    return "".join(source.choice(PIECES) for _ in range(source.randint(1, 14)))


def test_documents_are_what_another_reader_makes_of_them(page: Any) -> None:
    source = random.Random(17)
    texts = [document(source) for _ in range(600)]
    for written, html in zip(texts, page.evaluate(WHOLE, texts), strict=True):
        assert markdown_trees.tree(html) == markdown_trees.reference(written), written


def test_a_text_that_grew_looks_like_one_that_was_there_at_once(page: Any) -> None:
    source = random.Random(18)
    texts = [scrambled(source) for _ in range(3000)] + [document(source) for _ in range(100)]
    texts += ["text\n| a |\n|-- is no table |\n\nmore"] * 10  # for a moment it looks like one
    for written, whole, grown in zip(texts, page.evaluate(WHOLE, texts), page.evaluate(GROWN, [texts, 5]), strict=True):
        assert whole == grown, written


def test_long_tables_and_lists_come_in_parts(page: Any) -> None:
    table = "| a | b |\n| --- | ---: |\n" + "".join(f"| {row} | *x* |\n" for row in range(1000)) + "\n| no row |"
    items = "".join(f"{number}. item\n" for number in range(7, 1007))
    long = [f"before\n\n{table}\n\n> {items}".replace("\n7.", "\n> 7."), items]
    for written, whole, grown in zip(long, page.evaluate(WHOLE, long), page.evaluate(GROWN, [long, 500]), strict=True):
        assert whole == grown, written
    tree = markdown_trees.tree(page.evaluate(WHOLE, long[:1])[0])
    rows = [row for part in tree if part[0] == "table" for row in part[1:]]
    assert [row for row in rows if row[1][0] == "td"] == [
        ["tr", ["td", str(row)], ["td right", ["em", "x"]]] for row in range(1000)
    ]
    assert ["p", "| no row |"] in tree
    parts = markdown_trees.tree(page.evaluate(WHOLE, long[1:])[0])[1:]
    assert [part[0] for part in parts] == ["ol 7", "ol 407", "ol 807"]


def test_blocks_that_have_ended_are_built_once(page: Any) -> None:
    """While a reply grows, the elements of earlier blocks stay the same elements."""
    kept = page.evaluate("""() => {
      const root = document.createElement('div'), growing = new Growing(root);
      growing.update('# One\\n\\ntwo *three*\\n\\n- four\\n\\nfi', false);
      const before = [...root.children];
      growing.update('# One\\n\\ntwo *three*\\n\\n- four\\n\\nfive and more', false);
      return before.slice(0, 2).every((node, i) => node === root.children[i]);
    }""")
    assert kept


HOSTILE = (
    "<script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "<svg onload=window.harmed=1><iframe src='javascript:window.harmed=1'></iframe>",
    "[click](javascript:window.harmed=1) [click](JaVaScRiPt:window.harmed=1) [c](java\tscript:harmed=1)",
    "[click](data:text/html,<script>window.harmed=1</script>) [v](vbscript:x) [f](file:///etc/passwd) [b](blob:x)",
    "[rel](/v1/models) [rel](//evil.example/x) [x](<javascript:window.harmed=1>) <javascript:window.harmed=1>",
    "![pixel](https://evil.example/pixel.png) ![x](javascript:window.harmed=1)",
    '[a](https://e.example/"onmouseover="window.harmed=1) [b](https://e.example/\'><script>)',
    "```html\n<script>window.harmed = 1</script>\n",
    '```"><script>window.harmed=1</script>\nx\n```\n\n~~~__proto__\nx\n~~~\n\n```constructor\nx\n```',
    "| a |\n| --- |\n| <script>window.harmed=1</script> |\n| [x](javascript:window.harmed=1) |",
    "&lt;script&gt;window.harmed=1&lt;/script&gt; &constructor; &__proto__; &#60;script&#62;",
    "# <b onclick=window.harmed=1>x</b>\n\n> <style>*{display:none}</style>\n\n- <form action=//evil.example><input>",
    "\u202e reversed \u2066 \0 \ufffd \ud83d lone",
)


def test_hostile_text_stays_text(page: Any, stub: Stub) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for hostile in HOSTILE:
        stub.replies.append(Reply((delta(content=hostile, reasoning_content=hostile), finish())))
    for number, hostile in enumerate(HOSTILE, 1):
        page.fill("#prompt", hostile.encode("utf-8", "replace").decode())
        page.press("#prompt", "Enter")
        page.locator(".message.assistant.done").nth(number - 1).wait_for()
    for again in (False, True):  # as it came, and as it was kept
        if again:
            page.wait_for_timeout(300)  # until the last reply is kept
            page.reload()
            page.locator(".message.assistant.done").nth(len(HOSTILE) - 1).wait_for()
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        assert page.evaluate("window.harmed") is None
        forbidden = (
            "script, style, img, iframe, form, object, embed, video, audio, base, [onclick], [onload], [onerror]"
        )
        assert page.locator(f"#thread :is({forbidden})").count() == 0
        for link in page.locator("#thread a").element_handles():
            assert link.get_attribute("href").startswith(("https:", "http:", "mailto:"))
            assert "noopener" in link.get_attribute("rel")
            assert link.get_attribute("target") == "_blank"
    assert page.locator("#thread a[href='https://evil.example/pixel.png']").count() == 2  # an image is a link
    assert not [url for url in asked if not url.startswith(stub.url)]
    shown = page.locator(".message.assistant .body").all_text_contents()
    assert shown[0] == HOSTILE[0]


def test_deep_nesting_is_limited(page: Any) -> None:
    deep = ["> " * 5000 + "x", "- " * 5000 + "x", "*a " * 3000 + "b*" * 3000, "[" * 5000 + "](https://a.b)" * 5000]
    deep += ["".join("  " * level + "- x\n" for level in range(500)), "1. > " * 2000 + "x"]
    depth = """(texts) => texts.map((text) => {
      const root = document.createElement('div');
      new Growing(root).update(text, true);
      const deepest = (node) => 1 + Math.max(0, ...[...node.children].map(deepest));
      return deepest(root);
    })"""
    assert max(page.evaluate(depth, deep)) < 120


MEGABYTE = 1_000_000
HUGE = {
    "paragraphs": "Some *words* and `code`, again and again. [Link](https://a.example/).\n\n",
    "one line": "word ",
    "one paragraph": "Some words\nin **lines** ",
    "a list": "- an item with *some* text\n",
    "code": "    return value  # 1\n",
    "a table": "| cell *one* | two |\n",
    "brackets": "[",
    "stars": "*a **b ",
    "ticks": "`` ` ```",
    "quotes": "> ",
    "pipes": "|",
    "links": "[](",
    "spaces": " ",
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_reply_of_a_megabyte_does_not_stop_the_page(page: Any, stub: Stub, kind: str) -> None:
    begin = {"code": "```python\n", "a table": "| a | b |\n| --- | --- |\n"}.get(kind, "")
    written = begin + HUGE[kind] * (MEGABYTE // len(HUGE[kind]))
    reply = text(written, size=4000)
    paced = [event for part in reply.events for event in (part, 0.004)]
    stub.replies.append(Reply(tuple(paced)))
    page.evaluate("""() => {
      window.longest = 0;
      let last = performance.now();
      setInterval(() => { const now = performance.now(); longest = Math.max(longest, now - last); last = now; }, 10);
    }""")
    page.fill("#prompt", "Go")
    page.press("#prompt", "Enter")
    page.locator(".message.assistant.done").wait_for(timeout=30000)
    assert page.evaluate("state.chat.messages[1].content.length") == len(written)
    while page.evaluate("[...views.values()].some((view) => view.more)"):  # a long text is drawn in steps
        page.wait_for_timeout(50)
    assert page.evaluate("longest") < 4000  # milliseconds: a loop that is not linear takes minutes


def test_code_is_copied_as_it_is(page: Any, stub: Stub) -> None:
    code = 'def f():\n\treturn "<b>" # x\n\n\n  end'
    stub.replies.append(text(f"```python\n{code}\n```\n"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#prompt", "Go")
    page.press("#prompt", "Enter")
    page.locator(".message.done .block button").click()
    page.locator(".block button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_colours_lose_no_character(page: Any) -> None:
    source = random.Random(19)
    parts = (
        '"',
        "'",
        "`",
        '"""',
        "\\",
        "#",
        "//",
        "/*",
        "*/",
        "--",
        "def",
        "return",
        " ",
        "\n",
        "f(",
        "0x1F",
        "é",
        "$",
        "<",
    )
    texts = ["".join(source.choice(parts) for _ in range(30)) for _ in range(400)]
    found = page.evaluate(
        """(texts) => Object.keys(LANGUAGES).concat(Object.keys(ALIASES)).flatMap((name) => texts.map((text) => {
          const root = document.createElement('code');
          root.append(...coloured(text, name));
          return root.textContent === text;
        }))""",
        texts,
    )
    assert all(found)


def test_a_reply_is_kept_whole_across_odd_boundaries(page: Any, stub: Stub) -> None:
    """Events that the network cuts inside a character and inside a line end."""
    written = "Größe 数学 👩‍🚀 done."
    raw = "".join(f"data: {json.dumps(delta(content=c), ensure_ascii=False)}\r\n\r\n" for c in written).encode()
    gate = threading.Event()
    stub.replies.append(Reply((*[raw[at : at + 3] for at in range(0, len(raw), 3)], gate, finish())))
    page.fill("#prompt", "Go")
    page.press("#prompt", "Enter")
    page.locator(".message.running .body", has_text="done.").wait_for()
    gate.set()
    page.locator(".message.assistant.done").wait_for()
    assert page.locator(".message.assistant .body").text_content() == written
