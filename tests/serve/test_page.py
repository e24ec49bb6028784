"""The page as a file: it loads nothing, runs no strings as code or HTML, and its policy fits it."""

import base64
import hashlib
import json
import re
import urllib.request
from html.parser import HTMLParser

from stub_server import Stub

from pard_onnx.serve.page import content_security_policy, load_page

TEXT = load_page().body.decode()


def directives(policy: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements() -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(TEXT)
    return parser.found


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    policy = directives(load_page().headers["Content-Security-Policy"])
    for tag in ("script", "style"):
        (source,) = re.findall(f"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)
        expected = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == [f"'sha256-{expected}'"]
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"]
    assert "unsafe" not in str(policy)


def test_another_script_has_another_policy() -> None:
    assert content_security_policy(TEXT) != content_security_policy(TEXT.replace('"use strict";', '"use strict"; '))


def test_the_page_loads_nothing() -> None:
    for tag, attributes in elements():
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", (tag, "the policy allows no style attributes")
            if name in ("src", "href", "srcset", "action", "data", "poster", "formaction"):
                assert (value or "").startswith(("#", "data:")), (tag, value)
    assert not re.search(r"@import|url\(", TEXT)
    assert not {"iframe", "object", "embed", "base", "img"} & {tag for tag, _ in elements()}


def test_the_script_makes_no_code_and_no_html_of_strings() -> None:
    (script,) = re.findall("<script>(.*?)</script>", TEXT, re.DOTALL)
    code = re.sub(r"//[^\n]*", "", script)
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
        "DOMParser",
    ):
        assert sink not in code


def test_every_field_and_button_has_a_name() -> None:
    labelled = set(re.findall(r"<label[^>]*>[^<]*<(?:input|select|textarea) id=\"([^\"]+)\"", TEXT))
    for tag, attributes in elements():
        if tag in ("input", "select", "textarea"):
            assert attributes.get("aria-label") or attributes.get("id") in labelled, attributes


def test_a_server_sends_the_page_with_its_headers(stub: Stub) -> None:
    with urllib.request.urlopen(stub.url) as answer:
        assert answer.read() == load_page().body
        for name, value in load_page().headers.items():
            assert answer.headers[name] == value
    with urllib.request.urlopen(f"{stub.url}v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == list(stub.models)
