"""The native CPU kernels, if they were built and this processor can run them.

They are built with the package if there is a compiler. Everything works without them, but slower. PARD_ONNX_KERNEL=off
switches them off; PARD_ONNX_KERNEL set to an instruction set of `ISAS` selects it instead of the best one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import rebuild_command

ISAS = ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "reference")
PORTABLE = "reference"  # simple and slow code for any processor: used only if PARD_ONNX_KERNEL selects it
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")  # that have an instruction set of these, as `platform` names them
VARIABLE, OFF = "PARD_ONNX_KERNEL", "off"
LIBRARY = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")


def library() -> Path | None:
    """The operator library to register with ONNX Runtime; None if there is none, or it is not used.

    BadInput if PARD_ONNX_KERNEL is neither `off` nor an instruction set that this processor has.
    """
    return None if isa() is None else LIBRARY


def isa() -> str | None:
    """The instruction set of kernels that are created from now on, such as "avx512-vnni"; None as for `library`."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in (OFF, *ISAS):
        raise BadInput(f"{VARIABLE}={wanted}: takes {OFF}, {', '.join(ISAS)}")
    native = None if wanted == OFF else load()
    if native is None:
        return None
    if not native.pard_select_isa(wanted.encode() or None):
        raise BadInput(f"{VARIABLE}={wanted}: this processor has no such instructions; unset it")
    name: str = native.pard_isa().decode()
    return None if name == PORTABLE and not wanted else name


def problem() -> str | None:
    """Why this package's kernels are missing where they could run, with the fix; None where they are not missing.

    They are not where PARD_ONNX_KERNEL switches them off, nor on processors for which there are none.
    """
    if os.environ.get(VARIABLE) == OFF or platform.machine().lower() not in MACHINES or load() is not None:
        return None
    fix = f"install a C++ compiler, then run: {rebuild_command()}"
    if getattr(sys, "frozen", False):
        fix = (
            f"freeze the application with {LIBRARY.name} beside pard_onnx.runtime.kernels, as the PyInstaller hook does"
        )
    try:
        ctypes.CDLL(str(LIBRARY))
        reason = "cannot be loaded"
    except OSError as error:
        reason = f"cannot be loaded ({error})" if LIBRARY.exists() else "were not built"
    return f"this package's CPU kernels {reason}, so ONNX Runtime's run, at about half the speed; {fix}"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library's plain C functions; None if the library was not built, or not for this system."""
    try:
        native = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    native.pard_isa.restype = ctypes.c_char_p
    native.pard_select_isa.argtypes = [ctypes.c_char_p]
    return native
