"""A machine that stands for a GPU: where a backend's launches run, and what is tried on them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear import workspace
from ptx_machine.launch import Grid, Memory, Run, Wrong, run
from ptx_machine.parse import Kernel


@dataclass
class Machine:
    """Runs kernels, keeps their runs and judges each, by what it leaves in the workspace too.

    `multiprocessors` bounds the CTAs of a launch, `resident` clusters run at a time. One that is
    not `adversarial` is for counting. `edit` changes a kernel before it runs; it must return the
    same object for the same kernel.
    """

    seed: int = 0
    multiprocessors: int = 6
    resident: int = 3
    adversarial: bool = True
    limit: int = 100_000_000
    edit: Callable[[Kernel], Kernel] = lambda kernel: kernel
    runs: list[Run] = field(default_factory=list)

    def launch(self, kernel: Kernel, parameters: bytes, memory: Memory, grid: Grid) -> Run:
        """Run `kernel` on `grid` as this machine times it."""
        grid = replace(
            grid,
            resident=self.resident,
            seed=self.seed,
            adversarial=self.adversarial,
            limit=self.limit,
        )
        self.runs.append(run(self.edit(kernel), parameters, memory, grid))
        left = _dirty_words()
        self.runs[-1].check()
        if left:
            raise Wrong(f"{left} words of the workspace are not zero again")
        return self.runs[-1]


def reserved(length: int, device: torch.device, stream: int) -> Tensor:
    """Return the words that a launch asks for and no more: what follows may be another's."""
    return workspace.reserve(length, device, stream)[:length]


def _dirty_words() -> int:
    """Return how many words the last launch has left in the workspace, and clear them."""
    dirty = 0
    for words in workspace._by_stream.values():
        dirty += int(words.count_nonzero())
        words.zero_()
    return dirty


def inputs(operands: tuple[object, ...]) -> list[Tensor]:
    """Return the tensors among a call's operands, which kernels may only read."""
    return [operand for operand in operands if isinstance(operand, Tensor)]
