"""A child of a qualification whose backends are planted: each is the reference with one defect.

python tests/planted_child.py NAME,NAME... (then what lora_kernels.qualify.child takes)
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import reference
from lora_kernels.ops.lora_linear.operands import Forward
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.qualify import child

BUSY = (300, 24)  # M and R of the cases that are repeated in company


def right(call: Forward, y: torch.Tensor) -> torch.Tensor:
    return y


def wrong_in_one_element(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if y.shape[0] == 130:
        y[-1, -1] += 1
    return y


def wrong_for_zero_rows(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if call.x.shape[1] > 0:
        y[(call.x == 0).all(1)] = torch.nan
    return y


def wrong_in_company(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if threading.active_count() > 1:
        y[0, 0] = torch.nan
    return y


def hanging(call: Forward, y: torch.Tensor) -> torch.Tensor:
    while call.seed is not None:
        pass
    return y


def aborting(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if call.bias is not None:
        os.abort()
    return y


def raising(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if call.x.shape[0] == 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return y


def out_of_memory(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if call.x.shape[0] == 200:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")
    return y


def cpu_out_of_memory(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if call.x.shape[0] == 200:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")
    return y


def always_out_of_memory(call: Forward, y: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("another process has it all")


leaving = right


def slow(call: Forward, y: torch.Tensor) -> torch.Tensor:
    time.sleep(2e-3)
    return y


def backend(name: str) -> Backend:
    defect: Callable[[Forward, torch.Tensor], torch.Tensor] = globals()[name]

    def why_not(problem: Problem) -> str | None:
        large = problem.m * problem.n * problem.k > 2**26
        return "only fp32, and small" if large or problem.dtype != torch.float32 else None

    def forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        y, p = reference.forward(call)
        return defect(call, y), p

    return Backend(name, why_not, forward, reference.backward, lambda problem, backward: None)


def remembering() -> Backend:
    """Right, and fast when a call comes again: it keeps what the last one gave."""
    plain, kept = backend("right"), dict[str, tuple[Any, Any]]()

    def once(direction: str, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def remembered(call: Any) -> Any:
            known, result = kept.get(direction, (None, None))
            if known is not call:
                result = run(call)
                kept[direction] = call, result  # at once: another thread may be here too
            return result

        return remembered

    return plain._replace(
        name="fast",
        forward=once("forward", reference.forward),
        backward=once("backward", reference.backward),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1].split(",")
    lingers = "lingering" in names
    planted = [
        remembering() if name == "fast" else backend(name) for name in names if name != "lingering"
    ]
    if "leaving" in names:  # between two steps
        write = os.write

        def write_and_leave(pipe: int, line: bytes) -> int:
            written = write(pipe, line)
            if b'"end": 2,' in line:
                os._exit(0)
            return written

        os.write = write_and_leave
    status = child.main(sys.argv[2:], planted)
    time.sleep(600 * lingers)
    sys.exit(status)
