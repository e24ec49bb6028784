"""What is run with faults: each scenario replaces something in a folder, by the command or function that users have."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pard_onnx.models.atomic import SCRATCH, atomic_file, atomic_folder, recover
from pard_onnx.models.system_errors import naming

# What does not count: notes of huggingface_hub beside the files of a fetched folder, in which times stand, and marks of
# tokenizers that were checked, which may be missing
NOTES = {".cache", "tokenizers"}
Tree = dict[str, str]  # relative names of files and folders, with a digest of what files hold


def digest(path: Path) -> str:
    if zipfile.is_zipfile(path):  # a saved chat, in which times stand too
        with np.load(path) as arrays:
            parts = [name.encode() + arrays[name].tobytes() for name in sorted(arrays.files)]
        return hashlib.sha256(b"".join(parts)).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(root: Path, *, scratch: bool) -> Tree:
    """All that is in a folder; scratch: with scratch names."""
    out: Tree = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if NOTES.intersection(name.parts):
            continue
        if scratch or not any(SCRATCH.fullmatch(part) for part in name.parts):
            out[str(name)] = digest(path) if path.is_file() else "folder"
    return out


class Scenario:
    """A command that is run in a child process with a fault; everything that it changes is below `root`."""

    optional: ClassVar[bool] = False  # whether a failure to write is no failure of the command

    def __init__(self, root: Path, inputs: Path) -> None:
        self.root, self.inputs = root, inputs
        self.place = root / "out"  # what is replaced
        self.prepare()
        self.reset()
        self.old = tree(root, scratch=True)

    def prepare(self) -> None:
        """Make the inputs; called once."""

    def reset(self) -> None:
        """Make `root` as it is before the command."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        self.fill()

    def fill(self) -> None:
        """Make what is there before the command."""

    def run(self) -> int:
        """The command's exit code; an error is one line on stderr."""
        try:
            self.write()
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    def write(self) -> None:
        """What `run` does, where it is no command."""

    def refuses(self) -> bool:
        """Whether what is there now, which is neither old nor new, is refused when it is used."""
        return False

    def warm_up(self) -> None:
        """Import what the command needs, once for all child processes."""
        self.run()


class OneFile(Scenario):
    def fill(self) -> None:
        self.place.write_bytes(b"old")

    def write(self) -> None:
        with atomic_file(self.place) as file:
            for part in range(3):
                file.write(bytes([part]) * 20_000)


class OneFolder(Scenario):
    def fill(self) -> None:
        for name in ("old", "inner/older"):
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"old")

    def write(self) -> None:
        with atomic_folder(self.place, replace=True) as folder:
            (folder / "inner").mkdir()
            for name in ("new", "inner/newer"):
                with naming(folder / name):
                    (folder / name).write_bytes(b"new" * 1000)


class FirstFolder(OneFolder):
    """There is none before, nor its parents."""

    def __init__(self, root: Path, inputs: Path) -> None:
        super().__init__(root, inputs)
        self.place = root / "a" / "b" / "out"

    def fill(self) -> None:
        pass


class CacheRecord(Scenario):
    """What was measured of a model. A cache that cannot be written is no error."""

    optional = True

    def fill(self) -> None:
        self.save(1)

    def save(self, cost: int) -> None:
        from pard_onnx.runtime.tuning.measurement import Tuning
        from pard_onnx.runtime.tuning.remembered import save_record
        from pard_onnx.runtime.tuning.steps import ANY, StepCosts

        (self.root / "machine").mkdir(mode=0o700, exist_ok=True)
        save_record(self.root / "machine" / "out.json", Tuning(StepCosts(((1, cost),)), ANY, (1,)))

    def write(self) -> None:
        self.save(2)


class Command(Scenario):
    """What a command's errors and exit codes are made of."""

    def run(self) -> int:
        from pard_onnx.cli import exit_code

        return exit_code(self.write)


class GgufFolder(Command):
    """The folder in the cache that a GGUF file's configs and tokenizer are written to."""

    def prepare(self) -> None:
        import gguf_files
        import tiny

        gguf_files.write(self.inputs / "model.gguf", tiny.write(self.inputs / "model", layers=1), "F32")

    def write(self) -> None:
        from pard_onnx.models.checkpoints.checkpoint import Checkpoint

        os.environ["PARD_ONNX_CACHE"] = str(self.root)
        Checkpoint.open(self.inputs / "model.gguf")


class HubCopy(Command):
    """An exported model in the hub's cache, which consists of links: files are copied to this package's cache."""

    def prepare(self) -> None:
        import tiny
        import toy
        import toy_artifacts

        source = self.inputs / "source"
        source.mkdir()
        for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
            (source / name).write_text(name * 100)
        toy_artifacts.manifest(toy.Shape(), "target", source, "fp32", (), "float32", "").write(source)
        self.snapshot = tiny.save_in_hub_cache(source, self.inputs / "hub", "org/exported")

    def write(self) -> None:
        from pard_onnx.models.hub import resolve_artifact

        os.environ["PARD_ONNX_CACHE"] = str(self.root)
        resolve_artifact(self.snapshot)


class HubCopyToAnotherDisk(HubCopy):
    """Where hard links do not work."""

    def write(self) -> None:
        def refuse(path: Path, target: Path) -> None:
            raise OSError("another disk")

        Path.hardlink_to = refuse  # type: ignore[method-assign]
        super().write()


class HubFetch(Command):
    """An exported model of the hub whose branch has moved on. huggingface_hub replaces one file after another,
    so the folder may be of both commits for a while. The manifest's hashes tell, and the next fetch ends it."""

    def prepare(self) -> None:
        import toy
        import toy_artifacts
        from huggingface_hub import constants
        from stand_in_hub import Hub, serving

        self.versions = []
        for version in ("old", "new"):
            source = self.inputs / version
            source.mkdir()
            for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
                (source / name).write_text((version + name) * 20_000)
            toy_artifacts.manifest(toy.Shape(), "target", source, "fp32", (), "float32", "").write(source)
            self.versions.append({path.name: path.read_bytes() for path in source.iterdir()})
        self.place = self.root / "artifacts" / "org--name@main"
        self.server = serving()
        own = {
            "PARD_ONNX_CACHE": self.root,
            "HF_ENDPOINT": self.server.__enter__(),
            "HF_HUB_CACHE": self.inputs / "hub",
        }
        os.environ |= {name: str(value) for name, value in own.items()} | {"HF_HUB_OFFLINE": "0"}
        constants.HF_HUB_OFFLINE = False
        Hub.files = self.versions[0]
        self.root.mkdir()
        self.write()
        shutil.copytree(self.root, self.inputs / "before")

    def fill(self) -> None:
        from stand_in_hub import Hub

        shutil.copytree(self.inputs / "before", self.root, dirs_exist_ok=True)
        Hub.files, Hub.commit = self.versions[1], "f" * 40

    def write(self) -> None:
        from pard_onnx.models.hub import resolve_artifact

        resolve_artifact("org/name")

    def refuses(self) -> bool:
        from pard_onnx.models.errors import BadArtifact
        from pard_onnx.models.manifest import Manifest

        own = os.environ["PARD_ONNX_CACHE"]
        os.environ["PARD_ONNX_CACHE"] = str(self.inputs / "other")  # what is verified leaves a stamp
        try:
            Manifest.read(self.place).verify(self.place)
        except BadArtifact:
            return True
        finally:
            os.environ["PARD_ONNX_CACHE"] = own
        return False


class FirstHubFetch(HubFetch):
    """Nothing was fetched before."""

    def fill(self) -> None:
        super().fill()
        shutil.rmtree(self.root / "artifacts")


class ChatSave(Command):
    """Chat.save over a saved chat. The exported target is the test's."""

    def prepare(self) -> None:
        from pard_onnx import load

        self.target = self.inputs / "target"
        with load(self.target, threads=1) as pair:
            for name in ("old", "new"):
                chat = pair.chat(name)
                chat.send("the quick fox", max_new_tokens=4)
                chat.save(self.inputs / name)

    def fill(self) -> None:
        shutil.copyfile(self.inputs / "old", self.place)

    def write(self) -> None:
        from pard_onnx import load

        with load(self.target, threads=1) as pair:
            pair.restore(self.inputs / "new").save(self.place)


class Quantize(Command):
    """pard-quantize --force of an export in floats, which needs no torch. The export is the test's."""

    def prepare(self) -> None:
        self.arguments = [str(self.inputs / "floats"), "--recipe", "int4-rtn"]

    def fill(self) -> None:
        shutil.copytree(self.inputs / "floats", self.place)

    def run(self) -> int:
        from pard_onnx.quantize_command import main

        return main([*self.arguments, "--output", str(self.place), "--force", "--no-verify", "--json"])


class CalibratedQuantize(Quantize):
    """pard-quantize --force of a checkpoint by GPTQ, which spools its matrices to a temporary file."""

    def prepare(self) -> None:
        text = self.inputs / "text.txt"
        text.write_text("def the quick brown fox: return self\n" * 20)
        self.arguments = [str(self.inputs / "model"), "--recipe", "int4-gptq", "--calibration", str(text)]

    def warm_up(self) -> None:
        super().warm_up()
        keep_trace(self)


class Export(Quantize):
    """pard-export --force of a checkpoint. The trace, which writes no file, is made once."""

    def prepare(self) -> None:
        self.arguments = ["--model", str(self.inputs / "model"), "--precision", "fp16"]

    def run(self) -> int:
        from pard_onnx.export_command import main

        return main([*self.arguments, "--output", str(self.place), "--force", "--no-verify", "--json"])

    def warm_up(self) -> None:
        super().warm_up()
        keep_trace(self)


def keep_trace(scenario: Scenario) -> None:
    """Let the commands of child processes take the trace that is made now."""
    from pard_onnx.export.graphs import traced

    trace: Callable[..., Any] = traced.traced_trunk
    kept: list[Any] = []

    class Enough(Exception):
        pass

    def keep(*arguments: Any) -> Any:
        kept.append(trace(*arguments))
        raise Enough

    traced.traced_trunk = keep
    os.environ["PARD_ONNX_TRACEBACK"] = "1"
    scenario.reset()
    try:
        scenario.run()
    except Enough:
        traced.traced_trunk = lambda *_: kept[0]
    finally:
        del os.environ["PARD_ONNX_TRACEBACK"]


SCENARIOS: dict[str, type[Scenario]] = {
    "file": OneFile,
    "folder": OneFolder,
    "first folder": FirstFolder,
    "cache": CacheRecord,
    "gguf": GgufFolder,
    "hub": HubCopy,
    "hub on another disk": HubCopyToAnotherDisk,
    "hub fetch": HubFetch,
    "first hub fetch": FirstHubFetch,
    "chat": ChatSave,
    "quantize": Quantize,
    "calibrated quantize": CalibratedQuantize,
    "export": Export,
}


def recovered(scenario: Scenario) -> Tree:
    """What a command finds that looks for the replaced folder."""
    recover(scenario.place)
    return tree(scenario.root, scratch=False)
