"""Who is measured: this project's backends, the frozen layer, plain compositions, PEFT.

A provider is a function that builds its layer on given operands. To add one, write that function
and add a line to `PROVIDERS` (docs/benchmarking.md). Peers that need a process of their own live
in peers.py.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import PEERS, Peer
from lora_kernels import lora_linear
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import BACKENDS, Problem
from lora_kernels.testing import Case, Inputs, fp32

FROZEN = "frozen"
AGAIN = "frozen.again"  # the same provider a second time: their difference is the noise floor
Composition = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]


class Layer(NamedTuple):
    """A provider's layer on one set of operands: `forward()` gives y; leaves are x, A and B."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


class Provider(NamedTuple):
    """Builds a layer, or says why not.

    `own_mask`: it draws its own dropout mask, so its accuracy is judged without dropout.
    `package`: what an optional peer needs; it is measured in a process of its own.
    """

    name: str
    build: Callable[[Inputs, Case], Layer]
    why_not: Callable[[Case, torch.device], str | None] = lambda case, device: None
    own_mask: bool = True
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether its package can be found; importing it may still fail, which is reported."""
        return self.package is None or find_spec(self.package) is not None

    @property
    def ours(self) -> bool:
        """Whether it is this project's: then a wrong result is a failure, not a finding."""
        return self.name.startswith("lora_kernels")

    @property
    def frozen(self) -> bool:
        """Whether it is the bare frozen layer."""
        return self.name in (FROZEN, AGAIN)


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, A and B as leaves that need gradients, on the same memory."""
    x, a, b = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b))
    return x, a, b


def problem(case: Case, device: torch.device) -> Problem:
    """Return the case as dispatch sees it on `device`."""
    if device.type != "cuda":
        return case.problem(device.type)
    major, minor = torch.cuda.get_device_capability(device)
    return case.problem("cuda", 10 * major + minor)


def _frozen(inputs: Inputs, case: Case) -> Layer:
    x, _, _ = leaves(inputs)
    return Layer(lambda: F.linear(x, inputs.weight, inputs.bias), (x,))


def eager(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, s: float, p: float
) -> Tensor:
    """Compose the layer as its definition reads."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    return F.linear(x, w, bias) + F.linear(F.linear(F.dropout(x, p), a), b) * s


def addmm(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, s: float, p: float
) -> Tensor:
    """Compose the layer with its second half accumulated in place by the second GEMM."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    return F.linear(x, w, bias).addmm_(F.linear(F.dropout(x, p), a), b.t(), alpha=s)


def _composed(function: Composition, compiled: bool = False) -> Callable[[Inputs, Case], Layer]:
    def build(inputs: Inputs, case: Case) -> Layer:
        x, a, b = leaves(inputs)
        run = torch.compile(function, dynamic=False) if compiled else function
        arguments = (x, inputs.weight, a, b, inputs.bias, case.scaling, case.dropout_p)
        return Layer(lambda: run(*arguments), (x, a, b))

    return build


def _why_not_compiled(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "torch.compile is measured on CUDA only"


def peft_layer(inputs: Inputs, case: Case, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return PEFT's own layer on the weights of `inputs`, and its A and B in `dtype`."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(case.k, case.n, case.bias, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.bias is not None:
        base.bias = nn.Parameter(inputs.bias, requires_grad=False)
    config = LoraConfig(
        r=case.r,
        lora_alpha=case.scaling * case.r,  # type: ignore[arg-type]
        lora_dropout=case.dropout_p,
        target_modules=["0"],
    )
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    a.weight = nn.Parameter(inputs.lora_a.to(dtype))
    b.weight = nn.Parameter(inputs.lora_b.to(dtype))
    return layer, a.weight, b.weight


def _peft(inputs: Inputs, case: Case) -> Layer:
    x, _, _ = leaves(inputs)
    layer, a, b = peft_layer(inputs, case, case.adapter_dtype or case.dtype)
    return Layer(lambda: layer(x), (x, a, b))


def _peft_default(inputs: Inputs, case: Case) -> Layer:
    x, _, _ = leaves(inputs)
    layer, a, b = peft_layer(inputs, case, fp32)

    def forward() -> Tensor:
        with torch.autocast(x.device.type, case.dtype):
            return layer(x)

    return Layer(forward, (x, a, b))


def _why_not_peft_default(case: Case, device: torch.device) -> str | None:
    return "the same as peft where x is fp32" if case.dtype == fp32 else None


def _peer(peer: Peer, inputs: Inputs, case: Case) -> Layer:
    x, a, b = leaves(inputs)
    function = peer.bind(inputs, case)
    return Layer(lambda: function(x, a, b), (x, a, b))


def _ours(backend: Backend, inputs: Inputs, case: Case) -> Layer:
    x, a, b = leaves(inputs)
    seed = None if inputs.seed is None else inputs.seed.to(x.device)
    call: dict[str, Any] = {"dropout_p": case.dropout_p, "seed": seed, "backend": backend.name}
    return Layer(
        lambda: lora_linear(x, inputs.weight, a, b, case.scaling, inputs.bias, **call), (x, a, b)
    )


def _why_not_ours(backend: Backend, case: Case, device: torch.device) -> str | None:
    return backend.why_not(problem(case, device))


PROVIDERS = (
    Provider(FROZEN, _frozen),
    Provider(AGAIN, _frozen),
    *(
        Provider(
            f"lora_kernels.{backend.name}",
            functools.partial(_ours, backend),
            functools.partial(_why_not_ours, backend),
            own_mask=False,
        )
        for backend in BACKENDS
    ),
    Provider("addmm", _composed(addmm)),
    Provider("eager", _composed(eager)),
    Provider("addmm.compiled", _composed(addmm, compiled=True), _why_not_compiled),
    Provider("eager.compiled", _composed(eager, compiled=True), _why_not_compiled),
    Provider("peft", _peft),
    Provider("peft.default", _peft_default, _why_not_peft_default),
    *(
        Provider(peer.name, functools.partial(_peer, peer), peer.why_not, package=peer.package)
        for peer in PEERS
    ),
)
