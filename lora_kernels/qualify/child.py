"""The process that touches the GPU: runs steps and reports each before and after it.

    python -m lora_kernels.qualify.child OPTIONS.json PIPE [BACKEND to leave out ...]

It writes one JSON object a line to the file descriptor PIPE: the environment, which backend it
asks what it can run, the steps; then, for each of those whose numbers it reads as a line from its
standard input, the beginning and the outcome. After anything but a right or a wrong result it ends,
as its CUDA context may be beyond use; its parent starts another for the rest.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.qualify import record
from lora_kernels.qualify.checks import Options, Step, on_trial, steps

CRASHED = 3  # the exit status after a step that raised


def main(argv: Sequence[str], backends: Sequence[Backend] = BACKENDS) -> int:
    """Say what there is to try, and try what is asked for."""
    options = Options(**json.loads(argv[0]))
    pipe, left_out = int(argv[1]), set(argv[2:])

    def say(**fields: Any) -> None:
        os.write(pipe, json.dumps(fields).encode() + b"\n")

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here, or this PyTorch is a CPU build")
        return CRASHED
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            print(f"there is no {device} here, the last is cuda:{torch.cuda.device_count() - 1}")
            return CRASHED
        torch.cuda.set_device(device)  # what a graph captures
    say(environment=record.environment(device.type))
    tried = [backend for backend in on_trial(options, backends) if backend.name not in left_out]
    for backend in tried:
        say(asking=backend.name)  # which may load what crashes
        steps(options, (backend,))
    listed = steps(options, tried)
    say(steps=[(step.backend, step.name, step.limit_s) for step in listed])
    for i in json.loads(sys.stdin.readline() or "[]"):
        step = listed[i]
        if step.backend in left_out:
            continue
        say(begin=i)
        outcome, detail, found = attempt(step)
        say(end=i, outcome=outcome, detail=detail, **found)
        if outcome == record.CRASHED:
            return CRASHED
        if outcome == record.WRONG:
            left_out.add(step.backend)
    return 0


def attempt(step: Step) -> tuple[str, str, dict[str, Any]]:
    """Run a step; return its outcome, why if it is not right, and what it found."""
    try:
        return record.RIGHT, "", step.run()
    except AssertionError as error:
        return record.WRONG, _line(error), {}
    except Exception as error:
        if _is_out_of_memory(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return record.MEMORY, _line(error), {}
        return record.CRASHED, f"{type(error).__name__}: {_line(error)}", {}


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory was short: by its type, or by what allocators and cuBLAS say."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(
        words in text for words in ("out of memory", "can't allocate memory", "alloc_failed")
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
