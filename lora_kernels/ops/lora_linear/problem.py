"""The plain facts of one `lora_linear` call: what dispatch, tuning and benchmarks decide on."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Why a kernel cannot run a problem.
UNEVEN = (
    "a slice of x under dropout (tensor parallelism by rows) must begin and end at a multiple of "
    "8 columns"
)


class Problem(NamedTuple):
    """Sizes, dtypes and device of one call; buildable without a GPU.

    M tokens, N out-features, K in-features, R rank. `dtype` is the storage of x, W, bias, y, dy
    and dx; `adapter_dtype` that of A, B, P, da and db. `arch` is the CUDA compute capability
    times ten, None off CUDA. The defaults are those of an H100.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    arch: int | None = 90
    bias: bool = False
    dropout: bool = False
    # Whether x is a slice of a wider one's columns that cuts through a counter's eight. Where it
    # ends counts, too: ranks of equal slices then see the same, also the one that starts at 0.
    uneven: bool = False

    def __str__(self) -> str:
        where = self.device if self.arch is None else f"{self.device} sm_{self.arch}"
        dtypes = f"{short(self.dtype)}, adapters {short(self.adapter_dtype)}"
        return f"lora_linear M={self.m} N={self.n} K={self.k} R={self.r} ({dtypes}, {where})"

    @classmethod
    def of(
        cls,
        m: int,
        weight: Tensor,
        lora_a: Tensor,
        bias: Tensor | None,
        dropout_p: float,
        uneven: bool = False,
    ) -> "Problem":
        """Describe a call on m tokens."""
        (n, k), r, device = weight.shape, lora_a.shape[0], weight.device
        dtypes, has_bias = (weight.dtype, lora_a.dtype), bias is not None
        return cls(m, n, k, r, *dtypes, device.type, arch(device), has_bias, dropout_p > 0, uneven)

    def flops(self, *, backward: bool = False) -> int:
        """Return the floating-point operations: `2·M·K·N` plus the low-rank path, da and db too."""
        low_rank = 2 * self.m * self.r * (self.k + self.n)
        return 2 * self.m * self.n * self.k + (2 * low_rank if backward else low_rank)

    def bytes(self, *, backward: bool = False) -> int:
        """Return the fewest bytes through device memory: inputs read once, outputs written once."""
        m, n, k, r = self.m, self.n, self.k, self.r
        adapters = r * (k + n)
        wide = m * k + n * k + m * n
        if backward:  # x is read and dx written; da and db mirror A and B
            wide, adapters = wide + m * k, 2 * adapters
        elif self.bias:
            wide += n
        return wide * self.dtype.itemsize + (adapters + m * r) * self.adapter_dtype.itemsize


@functools.cache
def arch(device: torch.device) -> int | None:
    """Return the CUDA compute capability times ten, None off CUDA."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
