"""README.md as PyPI shows it: links, pictures and commands that work there, in the metadata that a build writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from long_description import VARIABLE, description, noted_repository, project_urls, repository, with_absolute_links

ROOT = Path(__file__).parents[2]
ADDRESS = "https://example.org/owner/name"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)")
METADATA = "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(sys.argv[1])"


def absolute(text: str) -> str:
    return with_absolute_links(text, ADDRESS, "1.0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/a.md)", f"[a]({ADDRESS}/blob/v1.0/docs/a.md)"),
        ('[a](docs/a.md#part "title")', f'[a]({ADDRESS}/blob/v1.0/docs/a.md#part "title")'),
        ("[a](<docs/a.md>)", f"[a](<{ADDRESS}/blob/v1.0/docs/a.md>)"),
        ("[a](./docs/../a.md)", f"[a]({ADDRESS}/blob/v1.0/a.md)"),
        ("[a](docs/)", f"[a]({ADDRESS}/tree/v1.0/docs)"),
        ("![a](docs/a.SVG)", f"![a]({ADDRESS}/raw/v1.0/docs/a.SVG)"),
        ("[![a](a.png)](b.md)", f"[![a]({ADDRESS}/raw/v1.0/a.png)]({ADDRESS}/blob/v1.0/b.md)"),
        ("[a]: docs/a.md", f"[a]: {ADDRESS}/blob/v1.0/docs/a.md"),
        ('<img src="a.png">', f'<img src="{ADDRESS}/raw/v1.0/a.png">'),
    ],
)
def test_relative_links(text: str, expected: str) -> None:
    assert absolute(text) == expected
    assert absolute(f"before {text.lstrip('[')} after\n\n{text}\n").endswith(f"\n\n{expected}\n")


@pytest.mark.parametrize(
    "text",
    [
        "[a](https://example.org)", "[a](mailto:a@example.org)", "[a](//example.org/a)", "[a](#part)", "`[a](b.md)`",
        "``a ` [a](b.md)``", "```\n[a](b.md)\n```", "~~~ sh\n[a](b.md)\n~~~", "a[0] (b.md)",
    ],
)  # fmt: skip
def test_what_is_no_relative_link_stays(text: str) -> None:
    assert absolute(text) == text
    assert absolute(f"{text}\n\n[a](c.md)").startswith(f"{text}\n\n[a]({ADDRESS}/")


def metadata(folder: Path, address: str) -> Message:
    """What a build writes; from links to the sources, since setuptools writes beside them."""
    source = folder / "source"
    source.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("build", "dist") and path.suffix != ".egg-info":
            (source / path.name).symlink_to(path)
    environment = os.environ | {VARIABLE: address, "PARD_ONNX_BUILD_KERNELS": "off"}
    command = [sys.executable, "-c", METADATA, str(folder)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    [file] = folder.glob("*.dist-info/METADATA")
    return message_from_bytes(file.read_bytes())


def body(found: Message) -> str:
    payload = found.get_payload(decode=True)
    assert isinstance(payload, bytes) and len(payload) > 5000
    return payload.decode()


@pytest.mark.skipif(os.name == "nt", reason="links to files need a right there")
def test_the_metadata_of_a_release(tmp_path: Path) -> None:
    found = metadata(tmp_path, ADDRESS)
    assert found["Description-Content-Type"] == "text/markdown"
    version = found["Version"]
    urls = dict(url.split(", ") for url in found.get_all("Project-URL", []))
    assert urls == project_urls(ADDRESS, version) and urls["Repository"] == ADDRESS
    text = body(found)
    links = LINK.findall(text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    for link in (link for link in [*links, *urls.values()] if link.startswith(f"{ADDRESS}/") and "/issues" not in link):
        kind, path = re.fullmatch(rf"{ADDRESS}/(blob|raw|tree)/v{version}/([^#]+)(?:#.*)?", link).groups()  # type: ignore[union-attr]
        assert (ROOT / path).is_dir() if kind == "tree" else (ROOT / path).is_file(), link
    assert 'pip install "pard-onnx[cpu]" && pard-demo' in text
    assert re.findall(r"-e .*", text) == [re.search(r"-e .* && pytest .*", text)[0]]  # type: ignore[index]


@pytest.mark.skipif(os.name == "nt", reason="links to files need a right there")
def test_the_metadata_of_other_builds(tmp_path: Path) -> None:
    found = metadata(tmp_path / "sources", "")
    assert found.get_all("Project-URL") is None
    assert body(found).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_an_sdist_keeps_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert repository(tmp_path) == ""
    lines = ["Metadata-Version: 2.4", f"Project-URL: Repository, {ADDRESS}", "", "Project-URL: Repository, no"]
    (tmp_path / "PKG-INFO").write_text("\n".join(lines), encoding="utf-8")
    assert repository(tmp_path) == noted_repository(tmp_path / "PKG-INFO") == ADDRESS
    monkeypatch.setenv(VARIABLE, "https://example.org/other/name.git")
    assert repository(tmp_path) == "https://example.org/other/name"
    for wrong in ("owner/name", "http://example.org/a/b", "https://example.org", "https://example.org/a b/c"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(SystemExit, match="is no repository's address"):
            repository(tmp_path)


def test_without_an_address_nothing_is_changed() -> None:
    assert description("[a](b.md)", "", "1.0") == "[a](b.md)" and project_urls("", "1.0") == {}
