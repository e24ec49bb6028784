"""Writes the conda-forge recipe and the Homebrew formula for an sdist: its version and its digest are filled in.

python packaging/registries.py dist/pard_onnx-0.1.0.tar.gz FOLDER
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("conda-forge/recipe.yaml", "homebrew/pard-onnx.rb")


def fill(text: str, sdist: Path) -> str:
    """A file of a registry with the values of an sdist in the place of @VERSION@ and @SHA256@."""
    named = re.fullmatch(r"pard_onnx-(.+)\.tar\.gz", sdist.name)
    if not named:
        raise SystemExit(f"{sdist}: is no sdist of this package, whose name is pard_onnx-VERSION.tar.gz")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    return text.replace("@VERSION@", named[1]).replace("@SHA256@", digest)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the files of conda-forge and Homebrew for an sdist.")
    parser.add_argument("sdist", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if not options.sdist.is_file():
        parser.error(f"{options.sdist}: no such file; packaging/wheels.py makes it")
    for name in FILES:
        text = fill((HERE / name).read_text(encoding="utf-8"), options.sdist)
        (options.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (options.folder / name).write_text(text, encoding="utf-8")
        print(options.folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
