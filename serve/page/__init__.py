"""The chat page that a server shows at `/`: one HTML file, and the headers that belong to it."""

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

# `frame-ancestors` and `form-action` do not fall back on `default-src`. Images are the icon alone, a data: address.
# `trusted-types 'none'` makes each use of innerHTML and its relatives an error, also of those that are added later.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True, slots=True)
class Page:
    body: bytes
    headers: Mapping[str, str]


def load_page() -> Page:
    """The page as it is sent: UTF-8 with LF line ends, which the hashes in its policy are computed from."""
    text = files(__name__).joinpath("index.html").read_text("utf-8")  # universal newlines: LF on Windows too
    body = text.encode()
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",  # a browser asks again, and gets the page of a new version at once
        "Vary": "Accept",  # see facts.show_page
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    }
    return Page(body, headers)


def content_security_policy(text: str) -> str:
    """The policy under which this page's own script and style run, and nothing else."""
    return POLICY.format(script=_source_hash(text, "script"), style=_source_hash(text, "style"))


def _source_hash(text: str, tag: str) -> str:
    (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
