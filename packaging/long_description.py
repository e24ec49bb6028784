"""The package's description on PyPI: README.md with links that lead to the repository, and commands for PyPI's package.

The sources do not know where their repository is: PARD_ONNX_REPOSITORY says it when a release is built, as
https://github.com/OWNER/NAME, and the sdist keeps it for whoever builds from that. Without it, README.md stays.
"""

from __future__ import annotations

import os
import re
from email.parser import HeaderParser
from pathlib import Path
from posixpath import normpath

VARIABLE = "PARD_ONNX_REPOSITORY"
LABEL = "Repository"  # of its address among the project's URLs
# Where code begins and ends, in which nothing is a link
CODE = re.compile(r"^(```+|~~~+).*?^\1[`~]*[ \t]*$|(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
# The target of a link or picture, `](target "title")`; of a reference, `[name]: target`; of HTML, `src="target"`
TARGET = re.compile(
    r"(?P<before>\]\(\s*<?|^ {0,3}\[[^\]\n]+\]:\s+<?|\b(?:href|src)\s*=\s*[\"'])(?P<target>[^\s<>()\"']+)", re.MULTILINE
)
# An install from the sources, but where their tests follow
FROM_SOURCES = re.compile(r"pip install -c constraints\.txt -e \"\.\[([\w,]+)\]\"(?! && pytest)")
PICTURE = re.compile(r"\.(?:png|svg|gif|jpe?g|webp)$", re.IGNORECASE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


def repository(root: Path) -> str:
    """The repository's address, "" where it is not known. SystemExit for an address of another form."""
    given = os.environ.get(VARIABLE, "").rstrip("/").removesuffix(".git")
    if given and not re.fullmatch(r"https://[\w.-]+(?::\d+)?(?:/[\w.~-]+){2,}", given, re.ASCII):
        raise SystemExit(f"{VARIABLE}={given}: is no repository's address; write https://github.com/OWNER/NAME")
    return given or noted_repository(root / "PKG-INFO")


def noted_repository(metadata: Path) -> str:
    """The address in the metadata that an sdist has."""
    if not metadata.is_file():
        return ""
    urls = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Project-URL", [])
    pairs = [url.partition(", ") for url in urls]
    return next((address for label, _, address in pairs if label == LABEL), "")


def project_urls(repository: str, version: str) -> dict[str, str]:
    """What PyPI shows beside the description."""
    if not repository:
        return {}
    return {
        LABEL: repository,
        "Documentation": f"{repository}/tree/v{version}/docs",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        "Security": f"{repository}/blob/v{version}/SECURITY.md",
    }


def description(readme: str, repository: str, version: str) -> str:
    """The text on PyPI; README.md itself where the repository is not known."""
    if not repository:
        return readme
    return FROM_SOURCES.sub(r'pip install "pard-onnx[\1]"', with_absolute_links(readme, repository, version))


def with_absolute_links(text: str, repository: str, version: str) -> str:
    """The Markdown text, whose relative links lead to the files of the tag `v` + version of the repository."""

    def absolute(found: re.Match[str]) -> str:
        target = found["target"]
        if ELSEWHERE.match(target):
            return found[0]
        path, mark, rest = target.partition("#")
        kind = "raw" if PICTURE.search(path) else "tree" if path.endswith("/") else "blob"
        return f"{found['before']}{repository}/{kind}/v{version}/{normpath(path).lstrip('/')}{mark}{rest}"

    out, at = [], 0
    for code in CODE.finditer(text):
        out += [TARGET.sub(absolute, text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*out, TARGET.sub(absolute, text[at:])])
