"""Products that compilers made and that are right on hardware: the machine must agree with them."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ptx_machine.launch import Grid, Memory, Run, run
from ptx_machine.parse import Kernel


class Compiled(Protocol):
    """A program, and how it takes its arguments."""

    kernel: Kernel

    def pack(self, arguments: dict[str, Any], memory: Memory) -> bytes:
        """Return the parameters for `arguments` by name."""


@dataclass
class Launch:
    """A compiled product and its tensors; each run starts from fresh outputs."""

    compiled: Compiled
    values: dict[str, object]
    grid: Grid
    inputs: tuple[Tensor, Tensor]
    output: Tensor
    scratch: list[Tensor]

    def run(self, grid: Grid, kernel: Kernel | None = None) -> Run:
        """Run the program, or a changed one."""
        memory = Memory()
        for tensor in self.inputs:
            memory.add(tensor, writable=False)
        self.output.fill_(float("nan"))
        for tensor in self.scratch:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        parameters = self.compiled.pack(self.values, memory)
        return run(kernel or self.compiled.kernel, parameters, memory, grid)

    def error(self) -> float:
        """Return the greatest error against float64, relative to the greatest value."""
        a, b = (t.double() for t in self.inputs)
        expected = a @ b
        error = ((self.output.double() - expected).abs().max() / expected.abs().max()).item()
        return error if error == error else float("inf")

    def check(self, run: Run) -> None:
        """Assert that a run went well and the result is right."""
        run.check()
        tolerance = 2e-3 if self.output.dtype == torch.float32 else 2**-7
        assert self.error() <= tolerance, f"error {self.error():.3g}"
        if "flag" in self.values:
            assert not self.scratch[-1].any(), "a flag is not zero again"
