"""What the installed scripts call. The signal handlers are set before a command's modules are imported.

The imports of a command take from 0.2 seconds to several. A Ctrl-C before this module is imported is the Python
interpreter's own business: it is starting, and the script that pip writes imports `re`.
"""

from __future__ import annotations

from pard_onnx.interrupts import exit_at_once, handle

handle(exit_at_once)  # before the imports below

TYPE_CHECKING = False  # as typing's, whose import takes milliseconds
if TYPE_CHECKING:
    from typing import Any, NoReturn

import atexit  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from importlib import import_module  # noqa: E402

from pard_onnx.standard_streams import flushed  # noqa: E402

# Bytes of address space. Where the limit (ulimit -v) is below SMALL, OpenBLAS, which numpy loads, is told to start no
# threads, as each takes space. Where less than LEAST is free, it ends the process with words of its own
SMALL, LEAST = 4 << 30, 96 << 20


def adapt() -> NoReturn:
    run("adapt_command")


def export() -> NoReturn:
    run("export_command")


def quantize() -> NoReturn:
    run("quantize_command")


def generate() -> NoReturn:
    run("generate_command")


def chat() -> NoReturn:
    run("chat_command")


def demo() -> NoReturn:
    run("demo_command")


def bench() -> NoReturn:
    run("bench_command")


def doctor() -> NoReturn:
    run("doctor_command")


def models() -> NoReturn:
    run("models_command")


def deploy() -> NoReturn:
    run("deploy_command")


def serve() -> NoReturn:
    run("serve_command")


def imported(command: str) -> Any:
    """The command's module. Ends with one line on stderr where the memory does not suffice for its libraries."""
    from pard_onnx.models.system_errors import is_out_of_memory, out_of_memory  # now: later there may be no memory

    try:
        prepare_for_small_memory()
        return import_module(f"pard_onnx.{command}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"error: {out_of_memory(error)}") from None


def prepare_for_small_memory() -> None:
    """Where the address space is limited, let numpy take little of it. OSError if there is too little."""
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or limit > SMALL:
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mmap import mmap

    mmap(-1, LEAST).close()


def run(command: str) -> NoReturn:
    """Run a command and end the process with its exit code."""
    try:
        code: int = imported(command).main()
    except SystemExit as end:  # argparse, after --help or an unknown option
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    code = max([code, *(flushed(name) for name in ("stdout", "stderr"))])
    # All is done and written. Python would now free the modules, which takes up to a second with torch, and for that
    # time it would print what Ctrl-C interrupts.
    atexit._run_exitfuncs()
    os._exit(code)
