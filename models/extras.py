"""This package's extras: the command that adds one to this installation, and imports of what an extra brings."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput
from .system_errors import is_out_of_memory, out_of_memory

PACKAGE = "pard-onnx"
RUNTIME = "onnxruntime"  # a module, of which each device's extra brings one build
CONSTRAINTS = "constraints.txt"  # of a source checkout: the versions that its tests ran with
PLAIN = re.compile(r"[\w./:-]+", re.ASCII)  # what no shell changes
SUBSTITUTED = re.compile(r'["$`!\\]')  # what POSIX shells change in double quotes


@dataclass(frozen=True, slots=True)
class Origin:
    """What this package was installed from, as pip and uv note it (PEP 610)."""

    installer: str = "pip"  # the words that begin its commands
    folder: Path | None = None  # of the sources
    editable: bool = False
    file: Path | None = None  # a wheel or an sdist
    address: str = ""  # of a repository or a file elsewhere, as pip takes it; "": none, the package is an index's

    def requirement(self, *extras: str) -> str:
        """What the installer is told to install, quoted for a shell."""
        wanted = f"[{','.join(extras)}]" if extras else ""
        if self.folder is not None:
            place = "." if is_current_folder(self.folder) else str(self.folder)
            if not self.editable:
                return quoted(place + wanted)
            pins = f"-c {quoted(str(Path(place, CONSTRAINTS)))} " if (self.folder / CONSTRAINTS).is_file() else ""
            return f"{pins}-e {quoted(place + wanted)}"
        if self.file is not None:
            return quoted(f"{self.file}{wanted}")
        return quoted(f"{PACKAGE}{wanted} @ {self.address}" if self.address else f"{PACKAGE}{wanted}")


def install_command(*extras: str) -> str:
    """The command that adds these extras to this installation. It names what the package was installed from: a package
    that was installed from a folder or a file need not be in any index."""
    found = origin()
    return f"{found.installer} install {found.requirement(*extras)}"


def rebuild_command() -> str:
    """The command that builds this package from its sources and installs it anew, without its dependencies."""
    found = origin()
    if found.editable:
        return f"{found.installer} install --no-deps {found.requirement()}"
    sources = "" if found.folder or found.address else f"--no-binary {PACKAGE} "
    place = PACKAGE if found.file else found.requirement()  # a wheel has no sources
    return f"{found.installer} install --force-reinstall --no-deps --no-cache-dir {sources}{place}"


@contextmanager
def needs(*extras: str) -> Iterator[None]:
    """BadInput, naming the command that installs them, for an import in the body that these extras would bring."""
    try:
        yield
    except ImportError as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        if not error.name or error.name.startswith("pard_onnx"):
            raise
        name = error.name.partition(".")[0]
        problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be used ({error})"
        raise BadInput(f"{name} {problem}; run: {install_command(*with_runtime(*extras))}") from error


def with_runtime(*extras: str) -> tuple[str, ...]:
    """The extras, and `cpu` where no build of onnxruntime is installed; beside another build it would overwrite it."""
    from importlib.util import find_spec

    try:
        found = RUNTIME in sys.modules or find_spec(RUNTIME) is not None
    except ValueError:  # a module without a spec
        found = True
    return extras if found else ("cpu", *extras)


@functools.cache
def origin() -> Origin:
    """What this package was installed from. A folder or file that is gone counts as none."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        installed = distribution(PACKAGE)
        uses_uv = (installed.read_text("INSTALLER") or "").strip() == "uv"
        noted = json.loads(installed.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):  # as in a frozen application
        return Origin()
    installer = "uv pip" if uses_uv else "pip"
    return noted_origin(noted, installer) if isinstance(noted, dict) else Origin(installer)


def noted_origin(noted: dict[str, Any], installer: str) -> Origin:
    """The origin in the note `direct_url.json` of an installed package."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    url = noted.get("url", "")
    parts = urlsplit(url)
    vcs = noted.get("vcs_info")
    if parts.scheme != "file" or vcs:
        version = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
        folder = noted.get("subdirectory")
        return Origin(installer, address=f"{version}#subdirectory={folder}" if folder else version)
    host = f"//{parts.netloc}" if parts.netloc else ""
    path = Path(url2pathname(host + parts.path))
    if noted.get("subdirectory"):
        path = path / noted["subdirectory"]
    if path.is_dir():
        return Origin(installer, folder=path, editable=bool((noted.get("dir_info") or {}).get("editable")))
    return Origin(installer, file=path if path.is_file() else None)


def is_current_folder(folder: Path) -> bool:
    try:
        return folder.samefile(".")
    except OSError:
        return False


def quoted(text: str) -> str:
    """The text as one word of a shell's line; in double quotes, which all shells know, if these suffice."""
    if PLAIN.fullmatch(text):
        return text
    return shlex.quote(text) if os.name != "nt" and SUBSTITUTED.search(text) else f'"{text}"'
