"""What the slices of an x give against the whole of it, for every backend."""

import itertools

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.philox import keep_mask
from lora_kernels.testing import Case, Inputs, fp64, make_inputs, poisoned_memory, run_backend


def check_slices(
    backend: Backend,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    first: int = 1000,
    width: int = 136,
) -> None:
    """Assert that slices of x have the whole x's results, bit for bit, and these the right mask.

    W is zero, A and B the identity: y and P are then the sums of the slices', of which one alone is
    not zero, and dx and da theirs side by side. Of small integers every sum is exact. The whole x
    is `width` columns from `first` on; one of its elements draws the threshold itself.
    """
    case = Case(
        70, width, width, width, dtype, adapter_dtype, dropout_p=0.4, scaling=0.6,
        first_column=first,
    )  # fmt: skip
    drawn, eye = make_inputs(case), torch.eye(width, dtype=adapter_dtype)
    x, dy = ((2 * t).round() for t in (drawn.x, drawn.dy))
    weight = torch.zeros(width, width, dtype=dtype)
    tile = range(case.m), range(first, first + width)
    seed = _seed_with_a_tie(case.dropout_p, *tile)
    mask = keep_mask(seed, case.dropout_p, *tile)
    whole = drawn._replace(x=x, weight=weight, lora_a=eye, lora_b=eye, dy=dy, seed=seed)

    def results(start: int, end: int) -> dict[str, Tensor]:
        x, weight, lora_a = (t[:, start:end].contiguous() for t in whole[:3])
        part = case._replace(k=end - start, first_column=first + start)
        with poisoned_memory():
            inputs: Inputs = whole._replace(x=x, weight=weight, lora_a=lora_a)
            return run_backend(backend, part, inputs)._asdict()

    cuts = (0, 24, width - 40, width)
    right, parts = results(0, width), [results(*ends) for ends in itertools.pairwise(cuts)]
    kept = (x * mask).to(fp64)
    sums = dy.to(fp64).t() @ kept
    exact = {"y": kept, "p": kept, "dx": dy * mask, "da": sums, "db": sums}
    for name in right:
        assert torch.equal(right[name], exact[name].to(right[name])), f"{name} has another mask"
        found = [part[name] for part in parts]
        together = torch.cat(found, 1) if name in ("dx", "da") else sum(found)
        assert torch.equal(together, right[name]), f"{name} of a slice is another"


def _seed_with_a_tie(dropout_p: float, rows: range, columns: range) -> Tensor:
    """Return a seed by which an element that is just kept draws the threshold."""
    drops_it = dropout_p + 2**-16
    return next(
        seed
        for seed in map(torch.tensor, itertools.count(7 << 33))
        if not torch.equal(*(keep_mask(seed, p, rows, columns) for p in (dropout_p, drops_it)))
    )
