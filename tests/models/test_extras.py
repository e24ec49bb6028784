"""The commands that install extras: they name what the package was installed from, and a shell reads them as meant."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models import extras
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import Origin, install_command, needs, noted_origin, quoted, rebuild_command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets a test say what the package was installed from, by `setattr(extras, "origin", ...)`."""
    monkeypatch.setattr(extras, "origin", Origin)
    return monkeypatch


def words(noted: dict[str, object], *names: str) -> list[str]:
    return shlex.split(noted_origin(noted, "pip").requirement(*names))


def test_a_package_of_an_index(installed: pytest.MonkeyPatch) -> None:
    assert install_command("export") == 'pip install "pard-onnx[export]"'
    assert install_command("cpu", "serve") == 'pip install "pard-onnx[cpu,serve]"'
    assert rebuild_command().endswith("--no-binary pard-onnx pard-onnx")
    installed.setattr(extras, "origin", lambda: Origin("uv pip"))
    assert install_command("export") == 'uv pip install "pard-onnx[export]"'


def test_a_source_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    noted = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    assert words(noted, "cpu", "export") == ["-e", f"{folder}[cpu,export]"]
    (folder / "constraints.txt").touch()
    assert words(noted, "export") == ["-c", str(folder / "constraints.txt"), "-e", f"{folder}[export]"]
    monkeypatch.chdir(folder)
    assert words(noted, "export") == ["-c", "constraints.txt", "-e", ".[export]"]
    assert words({"url": folder.as_uri(), "dir_info": {}}, "export") == [".[export]"]


def test_files_repositories_and_what_is_gone(tmp_path: Path, installed: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "pard_onnx-1.0-py3-none-any.whl"
    wheel.touch()
    noted = {"url": wheel.as_uri(), "archive_info": {}}
    assert words(noted, "export") == [f"{wheel}[export]"]
    installed.setattr(extras, "origin", lambda: noted_origin(noted, "pip"))
    assert rebuild_command().endswith("--no-binary pard-onnx pard-onnx")  # the wheel has no sources
    wheel.unlink()
    assert words(noted, "export") == ["pard-onnx[export]"]
    info = {"vcs": "git", "commit_id": "abc"}
    noted = {"url": "https://example.org/r.git", "vcs_info": info, "subdirectory": "p"}
    assert words(noted, "export") == ["pard-onnx[export] @ git+https://example.org/r.git@abc#subdirectory=p"]
    noted = {"url": "https://example.org/x.whl", "archive_info": {}}
    assert words(noted, "export") == ["pard-onnx[export] @ https://example.org/x.whl"]


@pytest.mark.skipif(os.name == "nt", reason="shlex is for POSIX shells")
@given(st.text("ab \n\"'$`!\\[]{}(),;&|<>*?~#/é-", min_size=1, max_size=8))
def test_a_shell_reads_one_word(text: str) -> None:
    assert shlex.split(quoted(text)) == [text]


def test_an_import_that_fails_names_its_extra(installed: pytest.MonkeyPatch) -> None:
    installed.setitem(sys.modules, "no_such_module", None)
    fix = r'run: pip install "pard-onnx\[export\]"$'
    with pytest.raises(BadInput, match=f"^no_such_module is not installed; {fix}"), needs("export"):
        import no_such_module.inner  # noqa: F401
    problem = r"^os cannot be used \(cannot import name 'newer' from 'os'"
    with pytest.raises(BadInput, match=f"{problem}.*; {fix}"), needs("export"):
        from os import newer  # noqa: F401
    with pytest.raises(ImportError, match="our own"), needs("export"):
        raise ImportError("our own", name="pard_onnx.models")


def test_a_missing_runtime_is_named_too(installed: pytest.MonkeyPatch) -> None:
    installed.delitem(sys.modules, "onnxruntime", raising=False)
    installed.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'"pard-onnx\[cpu,serve\]"'), needs("serve"):
        import no_such_module  # noqa: F401


def test_every_extra_that_errors_name_is_one_of_the_package() -> None:
    root = Path(__file__).parents[2]
    known = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set()
    for folder in ("api", "benchmarks", "export", "models", "quantize", "runtime", "serve"):
        for file in (root / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for call in re.findall(r"\b(?:needs|install_command)\(([^()]*)\)", text):
                named |= set(re.findall(r"[\"'](\w+)[\"']", call))
            assert 'pip install "pard-onnx' not in text and "pip install 'pard-onnx" not in text, file
    assert {"export", "serve", "adapt", "guided", "bench", "eval"} <= named <= set(known)
