"""Leads a qualification through children and never touches the GPU itself.

A step that makes no progress within its limit has its child killed; a child that dies takes only
its step along. Either way the backend has its verdict, its other steps are left out, and a fresh
child goes on with the rest.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from lora_kernels.qualify import record
from lora_kernels.qualify.checks import SPEED, Options
from lora_kernels.qualify.child import CRASHED
from lora_kernels.qualify.record import Record, Verdict

CHILD = (sys.executable, "-m", "lora_kernels.qualify.child")
START_S = 300.0  # until a child has listed its steps: importing from a cold disk, a CUDA context
_LOOK_S = 0.5  # between two looks whether a silent child still lives
_LAST_LINES = 400  # characters of what a dead child printed
_MOST_BYTES = 1 << 30  # of a file that a child writes

Progress = Callable[[int, int, str], None]


Key = tuple[str, str]  # a backend, and a step's name
Steps = Sequence[tuple[str, str, float]]  # with the seconds that it may take without progress
Wanted = Callable[[Mapping[str, Any], Steps], Iterable[Key]]


@dataclass
class _Run:
    """What is known so far."""

    wanted: Wanted
    budget_s: float
    environment: Mapping[str, Any] = field(default_factory=dict)
    open: list[Key] = field(default_factory=list)  # what is still to be tried
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    deadline: float | None = None  # on the monotonic clock, once the first child has begun
    stopped: str = "the budget ended"
    total: int = 0

    def settle(self, key: Key, outcome: str, detail: str, found: Mapping[str, Any]) -> None:
        """Add the outcome of a step to its backend's verdict."""
        backend, name = key
        verdict = self.verdicts[backend]
        if key in self.open:
            self.open.remove(key)
        if outcome == record.RIGHT and "measured" in found:
            with contextlib.suppress(TypeError, ValueError):  # the clock went backwards, say
                measured = (*verdict.measured, record.measured(found["measured"]))
                verdict = replace(verdict, measured=measured, timed=(*verdict.timed, name))
        elif outcome == record.RIGHT:
            verdict = replace(
                verdict,
                outcome=record.RIGHT,
                checks=verdict.checks + 1,
                worst_error=max(verdict.worst_error, found.get("error", 0.0)),
            )
        elif outcome != record.MEMORY:
            detail = f"{name}: {detail}" if detail else name
            verdict = replace(verdict, outcome=outcome, detail=detail)
            self.open = [other for other in self.open if other[0] != backend]
        elif name.startswith(SPEED):  # too little memory says nothing about a backend
            verdict = replace(verdict, timed=(*verdict.timed, name))
        self.verdicts[backend] = verdict

    def concluded(self) -> dict[str, Verdict]:
        """Return the verdicts, with what was not reached."""
        verdicts = dict(self.verdicts)
        for backend, name in self.open:
            verdict = verdicts[backend]
            verdicts[backend] = replace(verdict, unreached=(*verdict.unreached, name))
        for backend, verdict in verdicts.items():
            checks = sum(not name.startswith(SPEED) for name in verdict.unreached)
            if checks:
                detail = f"{self.stopped} {checks} checks too early"
                verdicts[backend] = replace(verdict, outcome=record.UNTRIED, detail=detail)
        return verdicts

    @property
    def left_out(self) -> list[str]:
        fine = (record.RIGHT, record.UNTRIED)
        return [name for name, verdict in self.verdicts.items() if verdict.outcome not in fine]


def qualify(
    options: Options,
    budget_s: float = float("inf"),
    progress: Progress | None = None,
    child: Sequence[str] = CHILD,
    wanted: Wanted | None = None,
) -> Record | None:
    """Try every backend and return the record; None if nothing is wanted.

    All is over `budget_s` seconds after the first child has said what there is to try, whatever is
    going on then. A backend whose checks were not all reached has no verdict; timings that were not
    are missing.

    Args:
        wanted: picks what is tried, by backend and name, once the environment and all steps are
            known; all of them by default.

    Raises:
        RuntimeError: no child could list its steps; the message ends with what it printed.
    """
    run = _Run(wanted or _all, budget_s)
    while _one_child(run, options, progress or _no_progress, child):
        pass
    if not run.total and not run.left_out:
        return None
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Record(run.environment, run.concluded(), created)


def _all(environment: Mapping[str, Any], steps: Steps) -> list[Key]:
    return [(backend, name) for backend, name, _ in steps]


def _no_progress(done: int, total: int, name: str) -> None:
    pass


def _one_child(run: _Run, options: Options, progress: Progress, child: Sequence[str]) -> bool:
    """Let a child run what is still to be tried; return whether another is needed."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*child, json.dumps(options._asdict()), str(writing), *run.left_out],
            pass_fds=(writing,), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_bounded,
        )  # fmt: skip
        os.close(writing)
        current: Key | None = None
        steps: Steps = ()
        pipe, settled = _Pipe(reading, START_S, process, run), 0
        try:
            for said in pipe:
                if said is None:
                    break  # no progress within the limit, or the budget is over
                if "environment" in said:
                    run.environment = run.environment or said["environment"]
                elif "asking" in said:
                    current = said["asking"], "asked what it can run"
                    run.verdicts.setdefault(current[0], Verdict(record.UNTRIED))
                elif "steps" in said:
                    current, steps = None, [tuple(step) for step in said["steps"]]
                    _begin(run, steps)
                    listed = [step[:2] for step in steps]
                    _tell(process, [listed.index(key) for key in run.open if key in listed])
                elif "begin" in said:
                    backend, name, pipe.limit_s = steps[said["begin"]]
                    current = backend, name
                    progress(run.total - len(run.open), run.total, f"{backend} {name}")
                else:
                    run.settle(steps[said["end"]][:2], said["outcome"], said["detail"], said)
                    current, settled = None, settled + 1
            else:
                process.wait()
                said = {}
            if not run.environment:
                if said is None:
                    _end(process)  # it has said nothing for minutes
                refused = process.returncode == CRASHED and _last(output)
                raise RuntimeError(f"nothing can be tried: {refused or _ending(process, output)}")
            if said is None and not pipe.silent:
                return False  # the budget is over
            if said is None and current is not None:
                run.settle(current, record.HUNG, f"no end within {pipe.limit_s:.0f} s", {})
            elif current is not None:
                # A SIGKILL that nobody here sent is the kernel's, out of memory.
                killed = process.returncode == -signal.SIGKILL
                outcome = record.MEMORY if killed else record.CRASHED
                run.settle(current, outcome, _ending(process, output), {})
            elif said is not None and steps and process.returncode != CRASHED and run.open:
                ending = f"ended before it, {_ending(process, output)}"
                run.settle(run.open[0], record.CRASHED, ending, {})
            elif not settled and (run.open or run.deadline is None):
                # Such children could follow one another for ever.
                how = "it said nothing" if said is None else _ending(process, output)
                if run.deadline is None:
                    raise RuntimeError(f"nothing can be tried: {how}")
                run.stopped = f"a new child could not begin ({how}),"
                return False
            return bool(run.open) or run.deadline is None
        finally:
            os.close(reading)
            _end(process)


def die_with_parent() -> None:
    """Let this process be killed when the one that started it is; a group of its own hides it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _bounded() -> None:
    """Let a child leave no core dump when it crashes, and not fill the disk when it prints."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = _MOST_BYTES if most == resource.RLIM_INFINITY else min(most, _MOST_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))


def _begin(run: _Run, steps: Steps) -> None:
    if run.deadline is None:
        run.deadline = time.monotonic() + run.budget_s
        wanted = set(run.wanted(run.environment, steps))
        run.open = [step[:2] for step in steps if step[:2] in wanted]
        run.total = len(run.open)


def _tell(process: "subprocess.Popen[bytes]", wanted: Sequence[int]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(wanted).encode() + b"\n")


class _Pipe:
    """What a child says, object by object; None once it has said nothing for the limit, or the
    run's deadline is over.

    It ends with the child, even if a process that the child started still holds the other end.
    """

    def __init__(
        self, descriptor: int, limit_s: float, process: "subprocess.Popen[bytes]", run: _Run
    ) -> None:
        self._descriptor, self.limit_s, self._process = descriptor, limit_s, process
        self._run, self._closed, self.silent = run, False, False

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        pending = b""
        while True:
            silent_since = time.monotonic()
            while not self._something(_LOOK_S):
                if self._process.poll() is not None and not self._something(0.0):
                    return
                self.silent = time.monotonic() - silent_since > self.limit_s
                if self.silent or self._is_over():
                    yield None
                    return
            chunk = os.read(self._descriptor, 1 << 16)
            self._closed = not chunk  # by a child that may go on all the same
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                if self._is_over():
                    yield None
                    return
                with contextlib.suppress(ValueError):  # a backend may have written there too
                    yield json.loads(line)

    def _is_over(self) -> bool:
        return self._run.deadline is not None and time.monotonic() > self._run.deadline

    def _something(self, seconds: float) -> bool:
        if self._closed:
            time.sleep(seconds)
            return False
        return bool(select.select([self._descriptor], [], [], seconds)[0])


def _ending(process: "subprocess.Popen[bytes]", output: Any) -> str:
    code = process.wait() if process.returncode is None else process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{how}: {_last(output)}" if _last(output) else how


def _last(output: Any) -> str:
    length = output.seek(0, os.SEEK_END)
    output.seek(max(0, length - 4 * _LAST_LINES))  # it may have printed gigabytes
    return " ".join(output.read().decode(errors="replace").split())[-_LAST_LINES:]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the child and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
