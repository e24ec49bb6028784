"""Builds what is published: the sdist, a wheel for each platform, and the wheel without kernels for all others.

    pip install -r packaging/requirements.txt
    python packaging/wheels.py dist [--platform TAG ...]

zig compiles for every platform on any machine. The wheels differ in the library of kernels alone: the package is built
once, from the sdist. Nothing is written to the folder unless every check has passed. The same sources give the same
bytes; the time of all files is SOURCE_DATE_EPOCH, or the last commit's.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runtime" / "kernels" / "native"))

from archives import OLDEST, read_wheel, with_tag, write_sdist, write_wheel  # noqa: E402 need the path above
from library import Refused, check_library, compile_library  # noqa: E402
from long_description import VARIABLE, repository  # noqa: E402
from platforms import PLATFORMS, PURE, Platform  # noqa: E402

LARGEST = {".whl": 12_000_000, ".gz": 100_000_000}  # bytes: what a wheel should have, and PyPI's limit for a file


def output_of(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {done.stdout.strip()} {done.stderr.strip()}")
    return done.stdout


def source_date() -> int:
    """The time that all files get: SOURCE_DATE_EPOCH, the last commit's, or in an unpacked sdist 1980."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given:
        return int(given)
    return int(output_of("git", "log", "-1", "--format=%ct")) if (ROOT / ".git").exists() else OLDEST


def copy_sources(folder: Path) -> None:
    """Copy the files that git knows, or those of an unpacked sdist."""
    known = (ROOT / ".git").exists()
    names = output_of("git", "ls-files", "-z").split("\0")[:-1] if known else files_below(ROOT)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def files_below(root: Path) -> list[str]:
    made = re.compile(r"(.*/)?(__pycache__|[^/]*\.egg-info)/.*|PKG-INFO|setup\.cfg")
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return [name for name in names if not made.fullmatch(name)]


def build_package(folder: Path, epoch: int) -> tuple[Path, Path]:
    """The sdist, and the wheel without kernels that is built from it."""
    copy_sources(folder / "source")
    environment = {"SOURCE_DATE_EPOCH": str(epoch), "PARD_ONNX_BUILD_KERNELS": "off", VARIABLE: repository(ROOT)}
    command = (sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source"))
    output_of(*command, **environment)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def build_wheel(platform: Platform, pure: Path, folder: Path, epoch: int) -> Path:
    """The wheel for this platform: the pure wheel's files and the library, which is compiled and checked."""
    with tempfile.TemporaryDirectory() as scratch:
        library = compile_library(platform, Path(scratch))
        check_library(library, platform)
        files = read_wheel(pure) | {f"pard_onnx/runtime/kernels/{library.name}": library.read_bytes()}
    path = folder / pure.name.replace("-none-any.whl", f"-none-{platform.tag}.whl")
    write_wheel(with_tag(files, platform.tag, pure=False), path, epoch)
    return path


def check_files(paths: list[Path]) -> None:
    """Refused where twine or auditwheel find a fault, or a file is too large."""
    output_of(sys.executable, "-m", "twine", "check", "--strict", *map(str, paths))
    for path in paths:
        check_size(path)
        if "linux_" in path.name:
            check_linux_tag(path, output_of(sys.executable, "-m", "auditwheel", "show", "--json", str(path)))


def check_size(path: Path) -> None:
    size, largest = path.stat().st_size, LARGEST[path.suffix]
    if size > largest:
        raise Refused(f"{path.name}: has {size:,} bytes, and may have {largest:,}")


def check_linux_tag(path: Path, report: str) -> None:
    """Refused unless auditwheel finds that the library runs on the oldest system that the wheel's tag names."""
    pattern = r"(manylinux|musllinux)_(\d+)_(\d+)_"
    tag = json.loads(report)["overall_tag"]
    found, named = re.match(pattern, tag), re.search(pattern, path.name)
    if (
        not found
        or not named
        or found[1] != named[1]
        or (int(found[2]), int(found[3])) > (int(named[2]), int(named[3]))
    ):
        raise Refused(f"{path.name}: auditwheel gives it the tag {tag}: {' '.join(report.split())}")


def build(folder: Path, tags: list[str]) -> list[Path]:
    """Build and check what `tags` names and the sdist, and move it to `folder`."""
    epoch = source_date()
    with tempfile.TemporaryDirectory() as scratch:
        made, built = Path(scratch, "made"), Path(scratch, "built")
        made.mkdir()
        sdist, pure = build_package(made, epoch)
        built.mkdir()
        paths = [built / sdist.name]
        write_sdist(sdist, paths[0], epoch)
        if PURE in tags:
            paths.append(built / pure.name)
            write_wheel(with_tag(read_wheel(pure), PURE, pure=True), paths[-1], epoch)
        for platform in PLATFORMS:
            if platform.tag in tags:
                print(f"{platform.tag} ...", file=sys.stderr, flush=True)
                paths.append(build_wheel(platform, pure, built, epoch))
        check_files(paths)
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, folder)) for path in paths]


def main(arguments: list[str] | None = None) -> int:
    every = [*(platform.tag for platform in PLATFORMS), PURE]
    parser = argparse.ArgumentParser(description="Build the sdist and the wheels for all platforms.")
    parser.add_argument("folder", type=Path, help="where the files go; a folder that is new or empty")
    parser.add_argument("--platform", action="append", choices=every, metavar="TAG", help=f"of {', '.join(every)}")
    options = parser.parse_args(arguments)
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder}: has files in it; name a new folder")
    try:
        paths = build(options.folder, options.platform or every)
    except Refused as refused:
        print(f"wheels.py: {refused}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
