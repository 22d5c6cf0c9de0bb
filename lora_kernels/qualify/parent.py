"""Leads a qualification through children and never touches the GPU itself.

A step that makes no progress within its limit has its child killed; a child that dies takes only
its step along. Either way the backend has its verdict, its other steps are left out, and a fresh
child goes on with the rest.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from lora_kernels.qualify import record
from lora_kernels.qualify.checks import SPEED, Options
from lora_kernels.qualify.child import CRASHED
from lora_kernels.qualify.record import Measured, Record, Verdict

CHILD = (sys.executable, "-m", "lora_kernels.qualify.child")
START_S = 120.0  # until a child has listed its steps: importing, a first CUDA context
_LOOK_S = 0.5  # between two looks whether a silent child still lives
_LAST_LINES = 400  # characters of what a dead child printed

Progress = Callable[[int, int, str], None]


@dataclass
class _Run:
    """What is known so far."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    steps: list[tuple[str, str, float]] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    next: int = 0
    deadline: float = float("inf")  # on the monotonic clock

    def settle(self, i: int, outcome: str, detail: str, found: Mapping[str, Any]) -> None:
        """Add the outcome of step `i` to its backend's verdict."""
        backend, name, _ = self.steps[i]
        verdict = self.verdicts[backend]
        self.next = i + 1
        if outcome in (record.RIGHT, record.MEMORY) and name.startswith(SPEED):
            verdict = replace(verdict, timed=(*verdict.timed, name))
            self.verdicts[backend] = verdict
        if outcome == record.RIGHT:
            if "measured" in found:  # a time proves nothing
                measured = (*verdict.measured, Measured(**found["measured"]))
                self.verdicts[backend] = replace(verdict, measured=measured)
                return
            self.verdicts[backend] = replace(
                verdict,
                outcome=record.RIGHT,
                checks=verdict.checks + 1,
                worst_error=max(verdict.worst_error, found.get("error", 0.0)),
            )
        elif outcome != record.MEMORY:  # too little memory says nothing about a backend
            detail = f"{name}: {detail}" if detail else name
            self.verdicts[backend] = replace(verdict, outcome=outcome, detail=detail)

    def concluded(self) -> dict[str, Verdict]:
        """Return the verdicts, with what the budget did not reach."""
        verdicts = dict(self.verdicts)
        for i in self.rest:
            backend, name, _ = self.steps[i]
            verdict = verdicts[backend]
            verdicts[backend] = replace(verdict, unreached=(*verdict.unreached, name))
        for backend, verdict in verdicts.items():
            checks = sum(not name.startswith(SPEED) for name in verdict.unreached)
            if checks:
                detail = f"the budget ended {checks} checks too early; --budget sets it"
                verdicts[backend] = replace(verdict, outcome=record.UNTRIED, detail=detail)
        return verdicts

    @property
    def rest(self) -> list[int]:
        """The steps that are still to be tried."""
        left_out, steps = self.left_out, range(self.next, len(self.steps))
        return [i for i in steps if self.steps[i][0] not in left_out]

    @property
    def left_out(self) -> list[str]:
        fine = (record.RIGHT, record.UNTRIED)
        return [name for name, verdict in self.verdicts.items() if verdict.outcome not in fine]


def listed(
    options: Options, child: Sequence[str] = CHILD
) -> tuple[Mapping[str, Any], list[tuple[str, str, float]]]:
    """Return the environment that a child sees and the steps it would run: (backend, name, limit).

    Raises:
        RuntimeError: the child could not say; the message ends with what it printed.
    """
    run = _Run(next=1 << 30)
    _one_child(run, options, _no_progress, child)
    return run.environment, run.steps


def qualify(
    options: Options,
    budget_s: float = float("inf"),
    progress: Progress | None = None,
    child: Sequence[str] = CHILD,
) -> Record:
    """Try every backend and return the record.

    No step begins once `budget_s` seconds are over. A backend whose checks were not all reached by
    then has no verdict; timings that were not are missing.

    Raises:
        RuntimeError: no child could list its steps; the message ends with what it printed.
    """
    run = _Run(deadline=time.monotonic() + budget_s)
    while _one_child(run, options, progress or _no_progress, child):
        pass
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Record(run.environment, run.concluded(), created)


def _no_progress(done: int, total: int, name: str) -> None:
    pass


def _one_child(run: _Run, options: Options, progress: Progress, child: Sequence[str]) -> bool:
    """Let a child run the steps from `run.next` on; return whether another is needed."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*child, json.dumps(options._asdict()), str(run.next), str(writing), *run.left_out],
            pass_fds=(writing,), stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        os.close(writing)
        current, started_at, pipe = None, run.next, _Pipe(reading, START_S, process)
        try:
            for said in pipe:
                if said is None:
                    break  # no progress within the limit
                if "environment" in said:
                    _begin(run, said)
                elif "begin" in said:
                    current = said["begin"]
                    backend, name, pipe.limit_s = run.steps[current]
                    progress(current, len(run.steps), f"{backend} {name}")
                    if time.monotonic() > run.deadline:
                        return False
                else:
                    run.settle(said["end"], said["outcome"], said["detail"], said)
                    current = None
            else:
                process.wait()
                said = {}
            if not run.environment:
                if said is None:
                    _end(process)  # it has said nothing for two minutes
                refused = process.returncode == CRASHED and _last(output)
                raise RuntimeError(f"nothing can be tried: {refused or _ending(process, output)}")
            if said is None and current is None:  # between steps, or after the last
                return run.next > started_at and bool(run.rest)
            if said is None:
                assert current is not None
                run.settle(current, record.HUNG, f"no end within {pipe.limit_s:.0f} s", {})
            elif current is not None:
                # A SIGKILL that nobody here sent is the kernel's, out of memory.
                killed = process.returncode == -signal.SIGKILL
                outcome = record.MEMORY if killed else record.CRASHED
                run.settle(current, outcome, _ending(process, output), {})
            elif process.returncode != CRASHED and run.rest:
                ending = f"ended before it, {_ending(process, output)}"
                run.settle(run.rest[0], record.CRASHED, ending, {})
            return bool(run.rest)
        finally:
            os.close(reading)
            _end(process)


def die_with_parent() -> None:
    """Let this process be killed when the one that started it is; a group of its own hides it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _begin(run: _Run, said: Mapping[str, Any]) -> None:
    run.environment, run.steps = said["environment"], [tuple(s) for s in said["steps"]]
    for backend, _, _ in run.steps:
        run.verdicts.setdefault(backend, Verdict(record.UNTRIED))


class _Pipe:
    """What a child says, object by object; None once it has said nothing for the limit.

    It ends with the child, even if a process that the child started still holds the other end.
    """

    def __init__(self, descriptor: int, limit_s: float, process: "subprocess.Popen[bytes]") -> None:
        self._descriptor, self.limit_s, self._process = descriptor, limit_s, process

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        pending = b""
        while True:
            silent_since = time.monotonic()
            while not self._something(_LOOK_S):
                if self._process.poll() is not None and not self._something(0.0):
                    return
                if time.monotonic() - silent_since > self.limit_s:
                    yield None
                    return
            chunk = os.read(self._descriptor, 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from map(json.loads, lines)

    def _something(self, seconds: float) -> bool:
        return bool(select.select([self._descriptor], [], [], seconds)[0])


def _ending(process: "subprocess.Popen[bytes]", output: Any) -> str:
    code = process.wait() if process.returncode is None else process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{how}: {_last(output)}" if _last(output) else how


def _last(output: Any) -> str:
    output.seek(0)
    return " ".join(output.read().decode(errors="replace").split())[-_LAST_LINES:]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the child and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
