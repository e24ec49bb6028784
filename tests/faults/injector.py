"""Runs one scenario with a fault at its nth file event, for one n after the other until it ends without a fault.

    LD_PRELOAD=shim.so python injector.py REQUEST

REQUEST is JSON: scenario, kinds, root, inputs, library, exchange, first, step. Each run is a child process that was
forked after all imports. One line of JSON a fault goes to stdout: what the fault was, and the problems that were found.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarios import SCENARIOS, Scenario, Tree, recovered, tree

KILL, FAIL, SHORT, TORN = 1, 2, 3, 4  # of the library
HANG = 60  # seconds
# By name: the library's kind, the error, and whether all later events have it too
KINDS = {
    "kill": (KILL, 0, False),
    "torn": (TORN, 0, False),
    "ENOSPC": (FAIL, errno.ENOSPC, False),
    "EIO": (FAIL, errno.EIO, False),
    "short": (SHORT, 0, False),
    "full": (FAIL, errno.ENOSPC, True),
    "broken": (FAIL, errno.EIO, True),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child process ended."""

    status: int  # its exit code, or the negative number of the signal that ended it
    text: str  # what it wrote to stdout and stderr
    event: str  # the event that had the fault; empty if there was none, or if it killed
    events: int  # of the whole run; 0 if it was killed


class Injector:
    def __init__(self, scenario: Scenario, library: Any, *, exchange: bool) -> None:
        self.scenario, self.library, self.exchange = scenario, library, exchange
        library.fault_last.restype = ctypes.c_char_p
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 until the process ends
        with redirect_stdout(sys.stderr):
            scenario.warm_up()
        scenario.reset()
        first = self.child("", 0)
        self.new = tree(scenario.root, scratch=True)
        if first.status or self.new == scenario.old:
            raise SystemExit(f"without a fault: {first}")
        print(json.dumps({"events": first.events}), flush=True)

    def child(self, kind: str, n: int) -> Outcome:
        """Run the scenario in a child process, with a fault at its nth event."""
        self.output.seek(0)
        self.output.truncate()
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            self.run_armed(kind, n, write)
        os.close(write)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with os.fdopen(read) as pipe:
            events, _, event = pipe.read().partition(" ")
        self.output.seek(0)
        return Outcome(status, self.output.read().decode(errors="replace"), event, int(events or 0))

    def run_armed(self, kind: str, n: int, report: int) -> None:
        os.dup2(self.output.fileno(), 1)
        os.dup2(self.output.fileno(), 2)
        signal.alarm(HANG)
        number, error, lasting = KINDS.get(kind, (0, 0, False))
        self.library.fault_arm(os.fsencode(self.scenario.root), number, error, n, lasting, not self.exchange)
        try:
            status = self.scenario.run()
            gc.collect()
        except BaseException:
            traceback.print_exc()
            status = 70
        os.write(report, b"%d %s" % (self.library.fault_disarm(), self.library.fault_last()))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)

    def inject(self, kind: str, n: int) -> dict[str, Any] | None:
        """The report of a fault at the nth event, which is of another kind if it has no `event`; None if there were
        fewer events."""
        self.scenario.reset()
        found = self.child(kind, n)
        killed = found.status == -signal.SIGKILL
        if not killed and not found.event:
            return None if found.events < n else {"kind": kind, "n": n, "problems": []}
        problems = [] if killed else self.problems_of_output(found)
        state = recovered(self.scenario)
        problems += self.problems_of_state(found, state)
        again = self.child("", 0)
        if again.status:
            problems.append(f"the next run fails: {again}")
        left = tree(self.scenario.root, scratch=True)
        if left != self.new:
            problems.append(f"the next run leaves {sorted(left.items() ^ self.new.items())}")
        return {"kind": kind, "n": n, "status": found.status, "event": found.event or "killed", "problems": problems}

    def problems_of_output(self, found: Outcome) -> list[str]:
        if found.status not in (0, 1, 2):
            return [f"ends with {found.status}: {found.text}"]
        if any(words in found.text for words in ("Traceback", "please report", "Exception ignored")):
            return [found.text]
        errors = [line for line in found.text.splitlines() if line.startswith("error: ")]
        if len(errors) != bool(found.status):
            return [f"exit code {found.status} and {errors}"]
        named = not errors or any(str(path) in errors[0] for path in (self.scenario.root, self.scenario.place))
        return [] if named and ".pard-" not in "".join(errors) else [f"does not name the file: {errors}"]

    def problems_of_state(self, found: Outcome, state: Tree) -> list[str]:
        if state == self.new or (found.status and state != self.scenario.old and self.scenario.refuses()):
            return []
        before = {name: what for name, what in self.scenario.old.items() if name in state}
        rest = {name: what for name, what in state.items() if name not in self.scenario.old}
        if before != self.scenario.old or any(what != "folder" for what in rest.values()):
            return [f"neither old nor new: {state}"]
        if found.status == 0 and not self.scenario.optional:
            return ["exit code 0, and nothing has changed"]
        return []


def main(request: dict[str, Any]) -> None:
    root, inputs = Path(request["root"]), Path(request["inputs"])
    scenario = SCENARIOS[request["scenario"]](root, inputs)
    injector = Injector(scenario, ctypes.CDLL(request["library"]), exchange=request["exchange"])
    for kind in request["kinds"]:
        n = request["first"]
        while (report := injector.inject(kind, n)) is not None:
            if report.get("event"):
                print(json.dumps(report), flush=True)
            n += request["step"]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
