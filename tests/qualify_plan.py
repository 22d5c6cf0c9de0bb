"""What a default qualification would do on an H100, counted without one.

    python tests/qualify_plan.py > PLAN.json

Like `triton_offline.py` it needs a process of its own: launches are recorded, and those are
counted that Triton would compile anew.
"""

import json
from collections import Counter
from typing import Any

import torch
import triton_offline as offline
from triton.runtime import driver

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify import checks
from lora_kernels.testing import Case, Inputs

ARCH = 90


class Launches:
    """Notes which kernels the Triton backend would compile, and launches none."""

    def __init__(self) -> None:
        driver.set_active(offline.Target(ARCH))
        self.kernels, self.recorders = {}, {}
        self.compiled: set[str] = set()
        for direction, (module, name) in offline.KERNELS.items():
            self.kernels[direction] = getattr(module, name)
            self.recorders[direction] = offline.Recorder()
            setattr(module, name, self.recorders[direction])

        def picked(problem: Problem, **how: bool) -> TileConfig:
            return pick(problem._replace(device="cuda", arch=ARCH), **how)

        backend.pick = picked  # type: ignore[assignment]
        backend._has_tma = lambda problem: problem.dtype.itemsize == 2

    def note(self, direction: str) -> None:
        recorder = self.recorders[direction]
        if hasattr(recorder, "arguments"):  # else there was nothing to do
            binder = self.kernels[direction].device_caches[ARCH][-1]
            options = {"num_stages": 1, **recorder.options}
            _, specialisation, _ = binder(*recorder.arguments, **options)
            self.compiled.add(f"{direction} {specialisation} {sorted(recorder.options.items())}")
            del recorder.arguments

    def forward(self, call: Forward) -> Any:
        results = backend.forward(call)
        self.note("forward")
        return results

    def backward(self, call: Backward, onto: torch.Tensor | None) -> Gradients:
        results = backend.backward(call, onto)
        self.note("backward")
        return results


def inputs(case: Case) -> Inputs:
    """Return operands as `testing.make_inputs` lays them out, of memory that nobody touches."""

    def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if case.strided:
            return torch.empty(columns + 3, rows, dtype=dtype)[1:-2].t()
        return torch.empty(rows, columns, dtype=dtype)

    m, n, k, r, dtype, adapters, *_ = case
    return Inputs(
        empty(m, k, dtype),
        empty(n, k, dtype),
        empty(r, k, adapters or dtype),
        empty(n, r, adapters or dtype),
        empty(2 if case.strided else 1, n, dtype)[0] if case.bias else None,
        empty(m, n, dtype),
        torch.tensor([1]) if case.dropout_p > 0 else None,
        empty(m, k, dtype).contiguous() if case.onto else None,
    )


def plan() -> dict[str, Any]:
    """Count the steps by kind, and what they compile."""
    checks.arch = lambda device: ARCH  # type: ignore[assignment]
    cuda.extension.why_absent = lambda: None  # type: ignore[attr-defined]
    tried: list[Backend] = [cuda.BACKEND, backend.BACKEND]
    options = command._options(command._parser().parse_args([]))
    launches, steps = Launches(), checks.steps(options, tried)
    for step in steps:
        if step.backend != "triton":
            continue
        case = next(a for a in step.run.args if isinstance(a, Case))  # type: ignore[attr-defined]
        case = case._replace(m=min(case.m, 8192))
        operands = inputs(case)
        if not step.name.startswith("speed backward"):
            launches.forward(operands.forward(case))
        if not step.name.startswith(("speed forward", "offsets")):
            p = torch.empty(case.m, case.r, dtype=case.adapter_dtype or case.dtype)
            launches.backward(operands.backward(case, p), operands.onto)
    timings = [step for step in steps if step.name.startswith(checks.SPEED)]
    slow = sum("m=8192" in step.name and "dropout_p=0.05" in step.name for step in timings)
    return {
        "names": len({step[:2] for step in steps}),
        "steps": len(steps),
        "compilations": len(launches.compiled),
        "timings": len(timings),
        "timings under dropout of many tokens": slow,
        "checks": dict(Counter(s.backend for s in steps if not s.name.startswith(checks.SPEED))),
    }


if __name__ == "__main__":
    print(json.dumps(plan()))
