"""A child of a qualification whose backends are planted: each is the reference with one defect.

python tests/planted_child.py NAME,NAME... (then what lora_kernels.qualify.child takes)
"""

import ctypes
import itertools
import os
import signal
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


def wrong_in_the_last_row_past_128(call: Forward, y: torch.Tensor) -> torch.Tensor:
    if y.shape[0] > 128 and y.shape[0] % 128 == 1:
        y[-1, 0] += 1
    return y


def nan_to_zero(call: Forward, y: torch.Tensor) -> torch.Tensor:
    return y.nan_to_num_()


def writing_beside_y(call: Forward, y: torch.Tensor) -> torch.Tensor:
    new = call.x.new_empty(y.shape).copy_(y)
    if new.numel() > 64:
        ctypes.memset(new.data_ptr() + new.nbytes, 0, 1)
    return new


def coming_late(call: Forward, y: torch.Tensor) -> torch.Tensor:
    """As from a launch on another stream than the caller's."""
    new = torch.full_like(y, torch.nan)
    threading.Timer(2e-3, new.copy_, (y,)).start()
    return new


LEAKED: list[torch.Tensor] = []


def leaking(call: Forward, y: torch.Tensor) -> torch.Tensor:
    LEAKED.append(torch.zeros(64))
    return y


crashing_at_import = hanging_at_import = right


def flooding(call: Forward, y: torch.Tensor) -> torch.Tensor:
    print("spam " * 10**6, flush=True)
    print("the last words", flush=True)
    os.abort()


def closing_all_files_and_hanging(call: Forward, y: torch.Tensor) -> torch.Tensor:
    os.closerange(3, 64)
    while True:
        time.sleep(1)


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


def wrong_db_under_dropout(call: Backward, found: Gradients) -> Gradients:
    if call.dropout_p > 0 and found.db is not None:
        found.db[-1, -1] += 1
    return found


def wrong_da_alone(call: Backward, found: Gradients) -> Gradients:
    if call.needs == (False, True, False) and found.da is not None:
        found.da[0, 0] += 1
    return found


CALLS: list[int] = []


def another_da_in_one_of_20_calls(call: Backward, found: Gradients) -> Gradients:
    CALLS.append(0)
    if len(CALLS) % 20 == 0 and found.da is not None and found.da.numel():
        found.da[0, 0] *= 1 + 1e-6
    return found


def changing_dy(call: Backward, found: Gradients) -> Gradients:
    call.dy.mul_(2)
    return found


def hanging_backward(call: Backward, found: Gradients) -> Gradients:
    while call.seed is not None:
        pass
    return found


def adding_anew(call: Backward, found: Gradients, onto: torch.Tensor) -> Gradients:
    return found._replace(dx=onto + found.dx)


def ignoring_what_is_there(call: Backward, found: Gradients, onto: torch.Tensor) -> Gradients:
    return found


def adding_twice(call: Backward, found: Gradients, onto: torch.Tensor) -> Gradients:
    return found._replace(dx=onto.add_(found.dx, alpha=2))


ADDING = adding_anew, ignoring_what_is_there, adding_twice
BACKWARD = (
    wrong_da_under_dropout, slow_backward, without_db_in_company, wrong_db_under_dropout,
    wrong_da_alone, another_da_in_one_of_20_calls, changing_dy, hanging_backward,
)  # fmt: skip


def backend(name: str) -> Backend:
    """The reference backend with the defect of that name."""
    defect: Callable[..., Any] = globals()[name]

    def why_not(problem: Problem) -> str | None:
        if name == "crashing_at_import":
            os.kill(os.getpid(), signal.SIGSEGV)
        while name == "hanging_at_import":
            time.sleep(1)
        large = problem.m * problem.n * problem.k > 2**26
        return "only fp32, and small" if large or problem.dtype != torch.float32 else None

    def forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        y, p = reference.forward(call)
        return (y if defect in (*BACKWARD, *ADDING) else defect(call, y)), p

    def backward(call: Backward, onto: torch.Tensor | None = None) -> Gradients:
        if onto is not None and defect in ADDING:
            return defect(call, reference.backward(call), onto)
        found = reference.backward(call, onto)
        return defect(call, found) if defect in BACKWARD else found

    return Backend(name, why_not, forward, backward, lambda problem, backward: None)


def remembering() -> Backend:
    """Right, and fast when a call comes again: it keeps what the last one gave."""
    plain, kept = backend("right"), dict[str, tuple[Any, Any]]()

    def once(direction: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(call: Any, onto: torch.Tensor | None = None) -> Any:
            if onto is not None:
                return run(call, onto)
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
    manners = {"lingering", "starting_slowly", "under_a_wild_clock", "losing_the_device"}
    planted = [
        remembering() if name == "fast" else backend(name) for name in names if name not in manners
    ]
    if "starting_slowly" in names:
        time.sleep(3)
    if "losing_the_device" in names and len(sys.argv) > 4:  # a backend has failed
        print("there is no CUDA device here")
        sys.exit(child.CRASHED)
    if "under_a_wild_clock" in names:
        ticks = itertools.count()
        time.perf_counter = lambda: -float(next(ticks))
    if "leaving" in names and "leaving" not in sys.argv[4:]:  # between two steps
        write = os.write

        def write_and_leave(pipe: int, line: bytes) -> int:
            written = write(pipe, line)
            if b'"end": 2,' in line:
                os._exit(0)
            return written

        os.write = write_and_leave
    status = child.main(sys.argv[2:], planted)
    time.sleep(600 * ("lingering" in names))
    sys.exit(status)
