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
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
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


def dawdling(call: Forward, y: torch.Tensor) -> torch.Tensor:
    time.sleep(0.3)
    return y


def wrong_for_odd_m(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if y.shape[0] % 2:
        y[-1] += 1
    return y


def nan_in_the_last_block_of_rows(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if y.shape[0] > 64 and y.shape[0] % 64:
        y[y.shape[0] // 64 * 64 :] = torch.nan
    return y


def returning_part_of_a_buffer(call: Forward, y: torch.Tensor) -> torch.Tensor:
    buffer = y.new_empty(y.shape[0], y.shape[1] + 8)
    buffer[:, : y.shape[1]] = y
    return buffer[:, : y.shape[1]]


BUFFER = torch.empty(1 << 20)


def keeping_one_buffer(call: Forward, y: torch.Tensor) -> torch.Tensor:
    """Right until the next call, which overwrites it."""
    return BUFFER[: y.numel()].view(y.shape).copy_(y)


def changing_x(call: Forward, y: torch.Tensor) -> torch.Tensor:
    call.x.mul_(2)
    return y


def returning_x(call: Forward, y: torch.Tensor) -> torch.Tensor:
    return call.x.copy_(y) if call.x.shape == y.shape else y


def changing_the_default_dtype(call: Forward, y: torch.Tensor) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    return y


def seeding(call: Forward, y: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    torch.rand(3)
    return y


def changing_determinism(call: Forward, y: torch.Tensor) -> torch.Tensor:
    torch.use_deterministic_algorithms(True)
    return y


def chatty(call: Forward, y: torch.Tensor) -> torch.Tensor:
    print('{"begin": 7}')
    print("y is fine", file=sys.stderr)
    os.write(1, b"straight to the descriptor")
    return y


def failing_import(call: Forward, y: torch.Tensor) -> torch.Tensor:
    raise ImportError("libsomething.so.4: cannot open shared object file")


def exiting(call: Forward, y: torch.Tensor) -> torch.Tensor:
    sys.exit(0)


def aborting_with_a_survivor(call: Forward, y: torch.Tensor) -> torch.Tensor:
    """A process of its own session still holds the pipe when the child is gone."""
    if os.fork() == 0:
        os.setsid()
        time.sleep(15)
        os._exit(0)
    os.abort()


def wrong_da_under_dropout(call: Backward, found: Gradients) -> Gradients:
    if call.seed is not None and found.da is not None:
        found.da[0, 0] += 1
    return found


def slow_backward(call: Backward, found: Gradients) -> Gradients:
    time.sleep(2e-3)
    return found


def without_db_in_company(call: Backward, found: Gradients) -> Gradients:
    return found._replace(db=None) if threading.active_count() > 1 else found


BACKWARD = (wrong_da_under_dropout, slow_backward, without_db_in_company)


def backend(name: str) -> Backend:
    """The reference backend with the defect of that name."""
    defect: Callable[[Any, Any], Any] = globals()[name]

    def why_not(problem: Problem) -> str | None:
        large = problem.m * problem.n * problem.k > 2**26
        return "only fp32, and small" if large or problem.dtype != torch.float32 else None

    def forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        y, p = reference.forward(call)
        return (y if defect in BACKWARD else defect(call, y)), p

    def backward(call: Backward) -> Gradients:
        found = reference.backward(call)
        return defect(call, found) if defect in BACKWARD else found

    return Backend(name, why_not, forward, backward, lambda problem, backward: None)


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
    torch.use_deterministic_algorithms(False)  # the first such call imports for seconds
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
