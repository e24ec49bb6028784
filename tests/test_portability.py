"""Calls and names that Windows does not have, found in the sources: each place with one is in a table, with its guard.

mypy with `--platform win32` (.ci/run) knows all names of the standard library that Windows lacks where a guard is
written with sys.platform. This check is about what types do not show: text files in the system's own encoding or with
its own line ends, paths of Linux, renames beside models/atomic.py, file names that Windows has not, ways to start
processes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("api", "benchmarks", "export", "models", "quantize", "runtime", "serve")
MODULES = {"crypt", "curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "termios", "tty", "uvloop"}
TABLE = {  # names of modules; the last line of `os` has what Windows has, but otherwise
    "os": """
        chown chroot ctermid fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp
        getpriority getresuid getsid getuid initgroups killpg lchown lockf major minor mkfifo mknod nice openpty
        posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv register_at_fork
        sched_getaffinity sched_setaffinity sched_yield sendfile setpriority setsid setuid statvfs sync sysconf
        tcgetpgrp ttyname uname wait wait3 wait4 WEXITSTATUS WIFEXITED WNOHANG writev
        O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE
        symlink link kill environb getcwdb system popen""",
    "signal": """
        SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGUSR1 SIGUSR2
        SIGWINCH SIGXCPU SIGXFSZ alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending
        sigtimedwait sigwait sigwaitinfo""",
    "mmap": """
        MAP_ANON MAP_ANONYMOUS MAP_NORESERVE MAP_POPULATE MAP_PRIVATE MAP_SHARED PROT_EXEC PROT_READ PROT_WRITE""",
    "socket": "AF_UNIX AF_NETLINK AF_PACKET SCM_RIGHTS",
    "select": "epoll kqueue poll",
    "time": "clock_getres clock_gettime clock_settime pthread_getcpuclockid tzset",
    "locale": "nl_langinfo",
    "multiprocessing": "Manager Pool Process Queue set_start_method",  # those of a context that spawns are no matter
}
NAMES = {module: frozenset(names.split()) for module, names in TABLE.items()}
METHODS = {"add_signal_handler", "owner", "group", "hardlink_to", "symlink_to", "lchmod", "as_uri"}
KEYWORDS = {"preexec_fn", "pass_fds", "start_new_session", "process_group", "umask"}
RENAMES = {"rename", "renames"}  # and those of `replace` with one argument
LINUX_PATH = re.compile(r"/(?:proc|dev|sys|tmp|etc|usr|var|bin|home)(?:/|$)")
NO_NAME = re.compile(r'[:<>|?*"\\]')  # in a file's name
TEXT = {"open": 3, "read_text": 0, "write_text": 1, "fdopen": 3, "TextIOWrapper": 1}  # position of the encoding
SAME = {"utf-8", "utf8", "ascii", "latin-1", "utf-8-sig"}

# What a place has, and why that runs on Windows too. An entry that no place has is an error.
NOT_THERE = "a file that Windows does not have, which is expected"
GUARDED = {
    ("api/chat_screen.py", "import readline"): "ImportError is expected",
    ("api/entry_points.py", "import resource"): "not on win32",
    ("api/interrupts.py", "signal.pthread_kill"): "hasattr",
    ("api/quantize_choice.py", "a rename"): "files of ended measurements, in a scratch folder",
    ("benchmarks/bench.py", "/proc/self/clear_refs"): NOT_THERE,
    ("benchmarks/bench.py", "/proc/self/status"): NOT_THERE,
    ("benchmarks/bench.py", "import resource"): "not on win32",
    ("benchmarks/measures/kernel.py", "/proc/self/smaps_rollup"): NOT_THERE,
    ("benchmarks/peers/forms.py", "a rename"): "to a name that nothing has",
    ("benchmarks/peers/process.py", "os.killpg"): "not on win32",
    ("benchmarks/peers/process.py", "signal.SIGKILL"): "not on win32",
    ("benchmarks/peers/process.py", "start_new_session="): "only on posix",
    ("benchmarks/peers/servers.py", "start_new_session="): "only on posix",
    ("benchmarks/peers/worker_protocol.py", "/proc/self/status"): NOT_THERE,
    ("benchmarks/peers/worker_protocol.py", "import resource"): "not on win32",
    ("benchmarks/quality/quantizations.py", "a rename"): "to names that nothing has",
    ("models/adapt/memory.py", "/proc/meminfo"): NOT_THERE,
    ("models/adapt/memory.py", "/proc/self/status"): NOT_THERE,
    ("models/adapt/training.py", "a rename"): "of a closed file, which nobody else reads",
    ("models/atomic.py", "a rename"): "this is the place that renames",
    ("models/atomic.py", "import fcntl"): "not on win32",
    ("models/atomic.py", "os.geteuid"): "hasattr",
    ("models/cache_folder.py", "os.geteuid"): "not on win32",
    ("models/checkpoints/tokenizer_check.py", "import resource"): "not on win32",
    ("models/demo/recipe.py", "a rename"): "of a closed file, which nobody else reads",
    ("models/helper_process.py", "start_new_session="): "only on posix",
    ("models/hub.py", ".hardlink_to()"): "a copy where there is no link",
    ("runtime/asynchronous.py", "os.register_at_fork"): "hasattr",
    ("runtime/doctor.py", "/proc/meminfo"): NOT_THERE,
    ("runtime/doctor.py", "/proc/self/cgroup"): NOT_THERE,
    ("runtime/doctor.py", "/sys/class/drm"): NOT_THERE,
    ("runtime/doctor.py", "/sys/fs/cgroup"): NOT_THERE,
    ("runtime/doctor.py", "os.sysconf"): "not on win32",
    ("runtime/forks.py", "os.register_at_fork"): "hasattr",
    ("runtime/guided/grammar_check.py", "import resource"): "not on win32",
    ("runtime/providers/threads.py", "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"): NOT_THERE,
    ("runtime/providers/threads.py", "os.sched_getaffinity"): "hasattr",
    ("runtime/sessions/kv_cache.py", "mmap.MAP_ANONYMOUS"): "not on win32",
    ("runtime/sessions/kv_cache.py", "mmap.MAP_PRIVATE"): "not on win32",
    ("runtime/tuning/remembered.py", "/proc/cpuinfo"): NOT_THERE,
    ("runtime/tuning/remembered.py", "/proc/driver/nvidia/version"): NOT_THERE,
    ("runtime/tuning/remembered.py", "/sys/module/amdgpu/version"): NOT_THERE,
}


def findings(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a source file with what is not the same on Windows."""
    tree = ast.parse(source)
    documented = {id(text) for text in _docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, f"import {name}") for name in names if name.partition(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom) and not node.level:
                known = NAMES.get(node.module or "", ())
                yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names if a.name in known)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in NAMES.get(node.value.id, ()):
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            if LINUX_PATH.match(node.value):
                yield node.lineno, node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _is_bad_name(node.right):
            yield node.lineno, "a name that Windows has not"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node))


def _of_call(node: ast.Call) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in METHODS:
        yield f".{name}()"
    yield from (f"{keyword}=" for keyword in KEYWORDS & given.keys())
    if (name in RENAMES and owner != "os" and len(node.args) == 1) or (owner, name) in {
        ("os", "rename"),
        ("os", "replace"),
    }:
        yield "a rename"
    if name == "replace" and owner != "os" and len(node.args) == 1 and not given:
        yield "a rename"
    context = [
        argument
        for argument in node.args
        if getattr(argument, "value", "") == "spawn" or _calls(argument, "get_context")
    ]
    if name in ("get_context", "ProcessPoolExecutor") and not (context or "mp_context" in given):
        yield "processes that are not spawned"
    if getattr(given.get("shell"), "value", False) is True:
        yield "shell=True"
    if "encoding" not in given and any(_is_true(given.get(name)) for name in ("text", "universal_newlines")):
        yield "text without encoding"
    yield from _of_text(node, name, owner, given)


def _of_text(node: ast.Call, name: str, owner: str, given: dict[str | None, ast.expr]) -> Iterator[str]:
    """Text that is read in the system's encoding, or written with its line ends."""
    is_method = isinstance(node.func, ast.Attribute) and owner not in ("os", "io")
    if name not in TEXT or (name == "open" and owner == "os"):
        return
    mode_at = 0 if is_method else 1
    mode = given.get("mode") or (
        node.args[mode_at] if name in ("open", "fdopen") and len(node.args) > mode_at else None
    )
    if name in ("open", "fdopen"):
        if is_method and mode is None and (node.args or given):
            return  # an `open` of this package's classes, or of zipfile: none has a mode
        if not (isinstance(mode, ast.Constant) and isinstance(mode.value, str)):
            if mode is not None:
                return  # a class's own `open(path)`, or a mode that is computed
        elif "b" in mode.value or not re.fullmatch(r"[rwax+t]+", mode.value):
            return
    at = TEXT[name] - (1 if is_method and name == "open" else 0)
    if "encoding" not in given and len(node.args) <= at:
        yield "text without encoding"
    writes = name == "write_text" or (isinstance(mode, ast.Constant) and set("wax") & set(str(mode.value)))
    if writes and "newline" not in given:
        yield "text with the system's line ends"


def _calls(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == name


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_bad_name(node: ast.expr) -> bool:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return any(isinstance(part, ast.Constant) and NO_NAME.search(str(part.value)) is not None for part in parts)


def _docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def test_every_place_that_windows_does_not_have_is_guarded() -> None:
    found: dict[tuple[str, str], list[int]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, what in findings(path.read_text(encoding="utf-8")):
                found.setdefault((path.relative_to(ROOT).as_posix(), what), []).append(line)
    new = {place: lines for place, lines in found.items() if place not in GUARDED}
    assert not new, "\n".join(f"{file}:{lines}: {what}" for (file, what), lines in new.items())
    assert not GUARDED.keys() - found.keys()


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import os\nos.fork()", "os.fork"),
        ("from os import getuid", "os.getuid"),
        ("import fcntl", "import fcntl"),
        ("from resource import getrlimit", "import resource"),
        ("import signal\nsignal.signal(signal.SIGHUP, f)", "signal.SIGHUP"),
        ("flags = os.O_RDONLY | os.O_NOFOLLOW", "os.O_NOFOLLOW"),
        ("mmap.mmap(-1, 5, mmap.MAP_PRIVATE)", "mmap.MAP_PRIVATE"),
        ("Path('/proc/self/status')", "/proc/self/status"),
        ("open('/dev/null')", "/dev/null"),
        ("open(path)", "text without encoding"),
        ("open(path, 'w', encoding='utf-8')", "text with the system's line ends"),
        ("path.open('r')", "text without encoding"),
        ("path.open()", "text without encoding"),
        ("path.read_text()", "text without encoding"),
        ("path.write_text('x', encoding='utf-8')", "text with the system's line ends"),
        ("subprocess.run(command, text=True)", "text without encoding"),
        ("subprocess.run(command, start_new_session=True)", "start_new_session="),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("path.rename(other)", "a rename"),
        ("os.replace(one, other)", "a rename"),
        ("scratch.replace(path)", "a rename"),
        ("folder / f'{hour}:{minute}.json'", "a name that Windows has not"),
        ("get_context('fork')", "processes that are not spawned"),
        ("get_context()", "processes that are not spawned"),
        ("multiprocessing.Pool(4)", "multiprocessing.Pool"),
        ("from multiprocessing import Process", "multiprocessing.Process"),
        ("ProcessPoolExecutor(4)", "processes that are not spawned"),
    ],
)
def test_a_place_is_found(source: str, what: str) -> None:
    assert what in [found for _, found in findings(source)]


@pytest.mark.parametrize(
    "source",
    [
        "getattr(os, 'O_NOFOLLOW', 0)",
        "open(path, 'rb')",
        "path.open('wb')",
        "path.read_text('utf-8')",
        "path.read_text(encoding='utf-8')",
        "path.write_text(text, encoding='utf-8', newline='\\n')",
        "Checkpoint.open(folder)",
        "text.replace('a', 'b')",
        "get_context('spawn').Event()",
        "ProcessPoolExecutor(1, get_context('spawn'))",
        "'''/proc/self/status'''",
        "folder / f'{name}.json'",
    ],
)
def test_what_is_the_same_everywhere_is_not_found(source: str) -> None:
    assert list(findings(source)) == []
