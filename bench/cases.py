"""What is measured: frozen, named cases. Results are compared by name, so a name never changes."""

from itertools import product
from typing import NamedTuple

import torch

from lora_kernels.testing import Case

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
DIRECTIONS = ("forward", "backward", "both")


class Shape(NamedTuple):
    """A frozen projection: weight (n, k), with or without a bias."""

    n: int
    k: int
    bias: bool = False


# Every projection of each model; those of one shape share a line.
SHAPES = {
    "llama8b.qo": Shape(4096, 4096),
    "llama8b.kv": Shape(1024, 4096),
    "llama8b.gate_up": Shape(14336, 4096),
    "llama8b.down": Shape(4096, 14336),
    "llama70b.qo": Shape(8192, 8192),
    "llama70b.kv": Shape(1024, 8192),
    "llama70b.gate_up": Shape(28672, 8192),
    "llama70b.down": Shape(8192, 28672),
    "qwen7b.q": Shape(3584, 3584, bias=True),
    "qwen7b.kv": Shape(512, 3584, bias=True),
    "qwen7b.o": Shape(3584, 3584),
    "qwen7b.gate_up": Shape(18944, 3584),
    "qwen7b.down": Shape(3584, 18944),
    "smollm135m.qo": Shape(576, 576),
    "smollm135m.gate_up": Shape(1536, 576),
    "smollm135m.down": Shape(576, 1536),
    "smoke": Shape(48, 32, bias=True),
}


class BenchCase(NamedTuple):
    """One call to measure: a named projection and the sizes of `lora_kernels.testing.Case`."""

    shape: str
    case: Case

    @property
    def name(self) -> str:
        """The key of this case in every results file."""
        c = self.case
        words = [self.shape, f"m{c.m}", f"r{c.r}", short(c.dtype)]
        words += ["fp32adapters"] if c.adapter_dtype not in (None, c.dtype) else []
        words += [f"dropout{c.dropout_p:g}"] if c.dropout_p else []
        return "-".join(words)


def short(dtype: torch.dtype) -> str:
    """Return the short name of a floating dtype: bf16, fp16, fp32."""
    return {bf16: "bf16", fp16: "fp16", fp32: "fp32"}[dtype]


def _case(
    shape: str,
    m: int,
    r: int = 16,
    dtype: torch.dtype = bf16,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
) -> BenchCase:
    n, k, bias = SHAPES[shape]
    return BenchCase(shape, Case(m, n, k, r, dtype, adapter_dtype, bias, dropout_p))


_FULL = tuple(
    _case(shape, m, r, dtype, p)
    for shape, dtype, p, m, r in product(
        [shape for shape in SHAPES if shape.startswith(("llama", "qwen"))],
        (bf16, fp16),
        (0.0, 0.1),
        (1, 16, 512, 2048, 8192, 16384),
        (8, 16, 64, 128, 256),
    )
)
# The subset behind the README, most telling first: a time budget cuts off the end.
_GPU = (
    *(_case(shape, 8192) for shape in ("llama8b.qo", "llama8b.gate_up", "llama8b.down")),
    *(_case("llama8b.qo", 8192, r) for r in (64, 256)),
    _case("llama8b.qo", 8192, dropout_p=0.1),
    _case("llama8b.qo", 8192, adapter_dtype=fp32),
    *(_case("llama8b.qo", m) for m in (1, 16, 512, 2048)),
    _case("llama70b.qo", 8192),
    _case("llama8b.kv", 8192),
    _case("qwen7b.down", 8192),
    _case("llama8b.qo", 8192, dtype=fp16),
    *(_case("llama8b.qo", 8192, r) for r in (8, 128)),
    _case("llama8b.gate_up", 8192, 64, dropout_p=0.1),
)
_CPU = (
    _case("smollm135m.gate_up", 1024, dtype=fp32),
    _case("smollm135m.qo", 1024, dtype=fp32),
    _case("smollm135m.down", 1024, dtype=fp32),
    _case("smollm135m.gate_up", 1024, 64, fp32),
    _case("smollm135m.gate_up", 1024, dtype=fp32, dropout_p=0.1),
    _case("smollm135m.gate_up", 256),
    _case("smollm135m.gate_up", 256, adapter_dtype=fp32),
    _case("smollm135m.gate_up", 1, dtype=fp32),
)
_SMOKE = (
    _case("smoke", 24, 4, fp32),
    _case("smoke", 24, 4, bf16, 0.1),
)
TABLES = {"full": _FULL, "gpu": _GPU, "cpu": _CPU, "smoke": _SMOKE}
