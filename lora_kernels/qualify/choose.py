"""What "auto" may pick, from this machine's record alone; nothing is ever measured here.

A backend is picked for one direction of a problem if it passed every check on this machine and was
not slower than the composition where the nearest sizes were measured (`nearest`).
"""

import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_kernels import dispatch
from lora_kernels.qualify import ranks, record
from lora_kernels.qualify.record import Measured, Record, Verdict

COMMAND = "python -m lora_kernels.qualify"
KEPT_FOR = ("cuda",)  # types of device that have a record
_NEAR = 1.0  # in octaves: N, K and R at most a factor of two away

_lock = threading.Lock()
_records: dict[str, Record | str] = {}  # by type of device
_asked_in: dict[str, Any] = {}  # a weak reference to the process group it was read in, or None


def why_not_auto(backend: str, problem: Any, backward: bool) -> str | None:
    """Return why "auto" passes over `backend` for a direction of `problem`, or None.

    Raises:
        RuntimeError: a pinned record, or that of all ranks, cannot serve here; the message says
            what to do.
    """
    found = known(problem.device)
    return found if isinstance(found, str) else judge(found, backend, problem, backward)


def known(device_type: str) -> Record | str:
    """Return the record to obey, read once per process and process group, or why there is none.

    In a process group it is the one that all ranks use (`ranks.agreed`). A group is noticed at the
    first question after it was made: until a problem comes up that was not seen before, choices
    from before it stand.
    """
    if device_type not in KEPT_FOR:
        return f"no record is kept for {device_type}"
    with _lock:
        group = ranks.group()
        if device_type not in _records or group not in (None, _asked_in[device_type]()):
            _read(device_type, group)
        return _records[device_type]


def forget() -> None:
    """Read the record again at the next question, after a qualification say."""
    _records.clear()
    dispatch.forget()


def judge(found: Record, backend: str, problem: Any, backward: bool) -> str | None:
    """Return why a record speaks against `backend` for a direction of `problem`, or None."""
    verdict = found.backends.get(backend)
    if verdict is None or verdict.outcome == record.UNTRIED:
        why = f" ({verdict.detail})" if verdict is not None and verdict.detail else ""
        return f"not yet tried on this machine{why}: {COMMAND}"
    if verdict.outcome != record.RIGHT:
        return f"{verdict.outcome} on this machine: {verdict.detail}"
    near = nearest(verdict.measured, problem, backward)
    if not near:
        return f"no size near this one was measured on this machine: {COMMAND}"
    slow = next((measured for measured in near if measured.slower), None)
    if slow is not None:
        worst = max(slow.x_composition, slow.x_graph or 0)
        return f"{worst:.2f} x the composition's time at {size(slow)} on this machine"
    return None


def nearest(measured: Sequence[Measured], problem: Any, backward: bool) -> list[Measured]:
    """Return the measurements that speak for a direction of `problem`; all must speak well.

    Of the same direction, dtypes and dropout; at the (N, K, R) nearest in octaves, summed, none of
    the three more than one away; there, M on either side: the largest measured M up to the
    problem's and the smallest from it on. Beyond the largest, the largest speaks alone, a kernel's
    fixed costs being past; below the smallest, none does if it is more than an octave away.
    """
    kind = (str(problem.dtype), str(problem.adapter_dtype), problem.dropout, backward)

    def octaves(one: int, other: int) -> float:
        return abs(math.log2(max(one, 1) / max(other, 1)))

    groups: dict[tuple[int, int, int], list[Measured]] = {}
    for m in measured:
        if kind != (f"torch.{m.dtype}", f"torch.{m.adapter_dtype}", m.dropout, m.backward):
            continue
        away = [octaves(a, b) for a, b in zip(problem[1:4], (m.n, m.k, m.r), strict=True)]
        if max(away) <= _NEAR:
            groups.setdefault((m.n, m.k, m.r), []).append(m)
    if not groups:
        return []

    def distance(sizes: tuple[int, int, int]) -> float:
        return sum(octaves(a, b) for a, b in zip(problem[1:4], sizes, strict=True))

    least = min(map(distance, groups))
    near = []
    for sizes, group in groups.items():
        if math.isclose(distance(sizes), least, abs_tol=1e-9):  # of several, all have a say
            below = max((m.m for m in group if m.m <= problem.m), default=None)
            above = min((m.m for m in group if m.m > problem.m), default=None)
            if below is None and octaves(problem.m, above or 0) > _NEAR:
                return []
            beside = {below} if below == problem.m else {below, above}
            near += [m for m in group if m.m in beside]
    return near


def trust(backends: Sequence[Any], device_type: str) -> Iterator[str]:
    """Yield what this machine has shown of each of `backends` that needs a proof, a line each."""
    found = known(device_type)
    for name in (backend.name for backend in backends if backend.why_not_auto is not None):
        yield f"{name}: {found if isinstance(found, str) else _shown(found, name)}"


def _shown(found: Record, name: str) -> str:
    verdict, day = found.backends.get(name, Verdict(record.UNTRIED)), found.created[:10]
    if verdict.outcome == record.RIGHT:
        return f"proven on {day}: {record.summary(verdict)}"
    if verdict.outcome == record.UNTRIED:
        why = f" ({verdict.detail})" if verdict.detail else ""
        return f"not yet tried on this machine{why}: {COMMAND}"
    return f"failed on {day}, {record.summary(verdict)}; to try it anew: {COMMAND} --force"


def size(measured: Measured) -> str:
    """Return the sizes of a measurement, as errors and tables name them."""
    return f"M={measured.m} N={measured.n} K={measured.k} R={measured.r}"


def _read(device_type: str, group: Any) -> None:
    here = record.environment(device_type)
    found = _own(here)
    if group is not None:
        found = ranks.agreed(found, here)
    if _records.get(device_type, found) != found:
        dispatch.forget()  # what was chosen before there was this group
    _records[device_type] = found
    _asked_in[device_type] = (lambda: None) if group is None else weakref.ref(group)


def _own(here: Mapping[str, Any]) -> Record | str:
    if here.get("mixed"):
        return "the visible GPUs differ: let CUDA_VISIBLE_DEVICES name GPUs of one kind"
    found = record.find(here)
    return found if isinstance(found, Record) else f"{found}: {COMMAND}"
