"""The contract of a backend: what a call hands it in each direction, and what it returns.

No scaling passes through a 16-bit number on its own: `s/(1-p) = m·2ᵉ` (`split_scaling`), P and Q
carry m, and the power of two multiplies fp32 sums.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear.philox import is_uneven
from lora_kernels.ops.lora_linear.problem import Problem, arch


class Forward(NamedTuple):
    """The operands of `y = x·Wᵀ + 2ᵉ·P·Bᵀ (+ bias)` and `P = m·keep(x)·Aᵀ`, all that it returns.

    x[M,K], weight[N,K], bias[N] and y[M,N] share one dtype; lora_a[R,K], lora_b[N,R] and P[M,R]
    share the adapters'. Strides are any; y and P are new. `keep` zeroes what dropout drops; seed is
    int64[1], on the CPU or x's device, or None for no dropout. first_column is the column of the
    mask where x starts, or None for a whole x.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    seed: Tensor | None
    scaling: float
    dropout_p: float
    first_column: int | None = None

    def problem(self) -> Problem:
        """Return what dispatch decides on; x may still have its leading dimensions."""
        m = self.x.shape[0] if self.x.dim() == 2 else math.prod(self.x.shape[:-1])
        uneven = is_uneven(self.first_column, self.weight.shape[1])
        return Problem.of(m, self.weight, self.lora_a, self.bias, self.dropout_p, uneven)

    def scale(self) -> "Scale":
        """Return m and 2ᵉ."""
        return split_scaling(self.scaling, self.dropout_p, self.x.dtype)


class Backward(NamedTuple):
    """What the needed ones of three gradients read, and nothing else: the rest is None.

    `dx = dy·W + 2ᵉ·keep(Q·A)` where weight is given, `da = 2ᵉ·Qᵀ·keep(x)` where x is,
    `db = 2ᵉ·dyᵀ·P` where P is, with `Q = m·dy·B`. lora_a is given for dx, lora_b for dx and da.
    dy[M,N] and dx[M,K] have x's dtype, Q[M,R], da[R,K] and db[N,R] the adapters'.

    `onto`, given beside a call that needs dx, is a contiguous [M,K] of x's dtype which nothing else
    reads or writes meanwhile: dx is added to it in place and it is what is returned.
    """

    dy: Tensor
    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    p: Tensor | None
    seed: Tensor | None
    scaling: float
    dropout_p: float
    first_column: int | None = None

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Which of dx, da and db are needed."""
        return self.weight is not None, self.x is not None, self.p is not None

    def sizes(self) -> tuple[int, int, int, int]:
        """Return M, N, K and R; db alone involves no K, and N stands for it."""
        (m, n), narrow = self.dy.shape, self._narrow()
        wide = self.x if self.weight is None else self.weight
        return m, n, n if wide is None else wide.shape[1], narrow.shape[1]

    def adapter_dtype(self) -> torch.dtype:
        """Return the dtype of A, B, P, Q, da and db."""
        return self._narrow().dtype

    def problem(self) -> Problem:
        """Return what dispatch decides on."""
        dtypes, device = (self.dy.dtype, self.adapter_dtype()), self.dy.device
        m, n, k, r = self.sizes()
        masked = self.x is not None or self.weight is not None
        uneven, where = masked and is_uneven(self.first_column, k), (device.type, arch(device))
        dropout = self.dropout_p > 0
        return Problem(m, n, k, r, *dtypes, *where, dropout=dropout, uneven=uneven)

    def scale(self) -> "Scale":
        """Return m and 2ᵉ."""
        return split_scaling(self.scaling, self.dropout_p, self.dy.dtype)

    def _narrow(self) -> Tensor:
        narrow = self.p if self.lora_b is None else self.lora_b
        assert narrow is not None, "no gradient is needed"
        return narrow


class Gradients(NamedTuple):
    """dx[M,K], da[R,K] and db[N,R]; None where not needed."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None


class Scale(NamedTuple):
    """`s/(1-p) = factor · power`, the power being one of two."""

    factor: float
    power: float


@functools.lru_cache(maxsize=1024)
def split_scaling(scaling: float, dropout_p: float, dtype: torch.dtype) -> Scale:
    """Split `s/(1-p)` into `m·2ᵉ` with |m| in (½, 1] and 2ᵉ a float, for x of `dtype`.

    P = m·keep(x)·Aᵀ is then never larger than the unscaled product. A kernel may multiply its fp32
    accumulator by 2⁻ᵉ and back without losing a bit: fp16 products are multiples of 2⁻⁴⁸ below 2⁶³,
    and e is in [-64, 100] beside them. bf16, fp32 and fp64 have exponents as far as the
    accumulator's: a small s rides in m whole, and e is in [0, 24], so that bits are lost below
    2⁻¹⁰² alone; beyond the ends, m takes the rest.
    """
    s = scaling / (1 - dropout_p)
    mantissa, exponent = math.frexp(s)
    if abs(mantissa) == 0.5:
        exponent -= 1
    least, most = (-64, 100) if dtype == torch.float16 else (0, 24)
    exponent = min(max(exponent, least), most)
    factor = math.ldexp(s, -exponent)
    if dtype == torch.float16:  # beyond 2¹⁰⁰ whatever is not zero is infinite there anyway
        factor = max(-1.0, min(factor, 1.0))
    return Scale(factor, math.ldexp(1.0, exponent))
