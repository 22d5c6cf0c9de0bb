"""The kind with experts: PEFT's `ParamWrapper` over the 3-D weights that `target_parameters` names.

PEFT adds `s·B·A` to every expert's weight at every call and differentiates by the sum, so a call
holds several tensors of the size of all experts. Here the experts of a call are computed as
transformers' interface for them (`ALL_EXPERTS_FUNCTIONS`) lays down, with low-rank products beside
the frozen ones, whichever of its three own implementations the model is set to.

Measured on a CPU, one thread's time, fp32, r = 16, 512 tokens of two experts each, interleaved,
medians [quartiles] over PEFT's as transformers dispatches it, forward and forward with backward:
0.70 [0.68-0.73] and 0.62 [0.55-0.63] for E = 8, H = 256, I = 512, with a peak of 15.2 MiB for 29.0
(42.8 where PEFT runs "eager"); 0.47 [0.44-0.49] and 0.49 [0.49-0.50] for E = 32, H = I = 256, with
9.7 MiB for 40.0 (72.7). A `lora_linear` for each expert took 1.04 to 1.35 times as long as the
grouped products, and on a GPU it would be a launch for each and a wait for the counts.
"""

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora_layer
from torch import Tensor, nn

from lora_kernels.ops.lora_linear.problem import short
from lora_kernels.ops.lora_linear.validate import PLAIN_TYPES
from lora_kernels.peft import calls
from lora_kernels.peft.grouped import grouped_lora
from lora_kernels.peft.layer import Fused, surroundings
from lora_kernels.peft.parts import kind, parameter
from lora_kernels.peft.patched import altered, patched

moe: Any = None  # before version 5 transformers has no such interface
with contextlib.suppress(ImportError):
    moe = importlib.import_module("transformers.integrations.moe")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# transformers' own; any other reads the experts' weights in a way of its own.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


class ParamWrapper(Fused, lora_layer.ParamWrapper):
    """PEFT's wrapper of one parameter of an experts module, fused.

    Wrappers nest, one for each parameter; the outermost computes for all of them. PEFT tells a
    wrapper by the name of its class, so this one has it, too.
    """

    plain = lora_layer.ParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the weighted sum of each token's experts: x[T,H] -> [T,H].

        The arguments are the experts' own: each token's experts [T,k], and their weights [T,k].
        """
        if isinstance(self, ParamWrapper):
            found = ParamWrapper.find(self, x, args, kwargs)
        else:  # this bound method was kept across `unfuse`
            found = f"the layer became a {kind(self)}"
        if isinstance(found, str):
            calls.note(self, found)
            return lora_layer.ParamWrapper.forward(self, x, *args, **kwargs)
        wrappers, base, adapted = found
        for wrapper in wrappers:
            calls.note(wrapper, calls.FUSED)
        return _run(base, adapted, x, *args)

    @classmethod
    def find(
        cls, layer: Any, x: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return what a call of `layer` computes with, or why PEFT has to run it."""
        if not isinstance(layer, cls) and "forward" in layer.__dict__:
            return "its forward was replaced on the instance"
        if x is not None and (kwargs or len(args) != 2):
            return f"called with other arguments: {', '.join(kwargs) or len(args)}"
        if layer.disable_adapters:
            return calls.DISABLED
        if layer.merged:
            return calls.MERGED
        if not _active(layer):
            return calls.NO_ADAPTER
        wrappers: list[Any] = []
        base: Any = layer
        while isinstance(base, lora_layer.ParamWrapper):
            if not (base.disable_adapters or base.merged or not _active(base)):
                wrappers.append(base)
            base = base._modules["base_layer"]
            reason = altered("base layer", base)
            if reason:
                return reason
        if not _is_dispatched(type(base)):
            return f"{kind(base)} is not dispatched by transformers' interface for experts"
        adapted = {}
        for wrapper in wrappers:
            found = _adapted(wrapper, base, _active(wrapper))
            if isinstance(found, str):
                return found if wrapper is layer else f"{wrapper.parameter_name}: {found}"
            adapted[wrapper.parameter_name] = found
        weight = adapted[layer.parameter_name].weight
        reason = patched(lora_layer.ParamWrapper) or surroundings()
        return reason or _why_not(base, weight, x) or (wrappers, base, adapted)

    def held(self) -> Any:
        """Return what merging writes to, by the names that it has in a linear layer."""
        return _Held(self.get_param(), None)

    def exactly_merged(self, frozen: Tensor) -> Tensor:
        """Return what merging would make of the frozen weights if nothing rounded."""
        layer: Any = self
        experts, exact = len(frozen), frozen
        for name in layer.merged_adapters:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a = a.to(frozen.dtype).view(experts, -1, a.shape[1])
            b = b.to(frozen.dtype).view(len(b), -1, experts).permute(2, 0, 1)
            update = b @ a if layer._did_swap_in_out_features else (b @ a).transpose(1, 2)
            exact = exact + layer.scaling[name] * update
        return exact


class _Held(NamedTuple):
    weight: Tensor
    bias: None


class Adapted(NamedTuple):
    """What `grouped_lora` takes beside the rows: W as [E,K,N], A[E·R,K], B[N,R·E] and s."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def _active(layer: Any) -> list[str]:
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def _why_not(base: Any, weight: Tensor, x: Tensor | None) -> str | None:
    """Return why an experts module cannot be computed here, adapters apart, or None."""
    if getattr(base, "_is_expert_parallel", False):
        return "the experts are spread over processes (expert parallel)"
    implementation = base.config._experts_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"the experts implementation {implementation!r} reads whole weights itself"
    device = weight.device.type
    if implementation != "grouped_mm" and torch.is_autocast_enabled(device):
        return f"the experts implementation {implementation!r} multiplies in autocast's dtype"
    if device == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "PyTorch has no grouped product for this GPU"
    if device not in ("cpu", "cuda"):
        return f"grouped products were not tried on {device}"
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return f"torch.compile knows no grouped product of {short(weight.dtype)}"
    if x is None:
        return None
    if type(x) not in PLAIN_TYPES or x.dim() != 2:
        return f"x is a {kind(x)} of {x.dim()} dimensions, not a plain matrix"
    if x.dtype != weight.dtype and implementation != "grouped_mm":
        return f"x is {short(x.dtype)} beside {short(weight.dtype)} experts"
    return None


def _adapted(layer: Any, base: Any, names: list[str]) -> Adapted | str:
    """Return what a wrapper's active adapter hands over for its parameter, or why it cannot."""
    if len(names) > 1:
        return f"{len(names)} active adapters"
    parameter_name = layer.parameter_name
    if parameter_name not in (_up(base), "down_proj"):
        return f"the experts do not multiply by {parameter_name}"
    if parameter_name in getattr(base, "parametrizations", ()):
        return "base weight is parametrised (quantised, for one)"
    weight = parameter(base, parameter_name)
    if type(weight) not in PLAIN_TYPES:
        return f"base weight is a {kind(weight)}, not a plain tensor"
    if weight.requires_grad:
        return "base weight is trainable"
    if weight.dtype not in _DTYPES:
        return f"base weight is {short(weight.dtype)}"
    if layer.num_experts == 1 or weight.dim() != 3:
        return "base weight is not one matrix for each of several experts"
    if layer._did_swap_in_out_features == base.is_transposed:
        return "the adapter was made for a weight of the other orientation"
    if not base.is_transposed:
        weight = weight.transpose(1, 2)
    experts, k, n = weight.shape
    sizes = k, n // 2 if parameter_name == "gate_up_proj" else n  # hidden and intermediate
    if any(size * weight.itemsize % 16 for size in sizes):
        return f"{sizes[0]} or {sizes[1]} features are no multiple of 16 bytes"
    a = parameter(layer._modules["lora_A"]._modules[names[0]], "weight")
    b = parameter(layer._modules["lora_B"]._modules[names[0]], "weight")
    if type(a) not in PLAIN_TYPES or type(b) not in PLAIN_TYPES:
        return f"lora_A is a {kind(a)}, lora_B a {kind(b)}, not both plain tensors"
    if a.shape[1] != k or b.shape[0] != n or a.shape[0] != b.shape[1] or len(a) % experts:
        return f"lora_A is {tuple(a.shape)}, lora_B {tuple(b.shape)} beside {tuple(weight.shape)}"
    if torch.compiler.is_compiling() and len(a) // experts * weight.itemsize % 16:
        return f"torch.compile knows no grouped product of rank {len(a) // experts}"
    scaling = layer.scaling[names[0]]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {kind(scaling)}, not a number"
    return Adapted(weight, a, b, scaling)


def _up(base: Any) -> str:
    return "gate_up_proj" if base.has_gate else "up_proj"


def _run(
    base: Any, adapted: dict[str, Adapted], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Return the weighted sum of each token's experts, in x's dtype."""
    # A pair that names no expert counts nothing, as in transformers' own loop: its row goes to the
    # last one, for grouped products leave what no expert has uninitialised.
    weights = weights.masked_fill(index >= base.num_experts, 0)
    index = index.clamp(max=base.num_experts - 1)
    # One row for each pair of a token and one of its experts, sorted by expert. How many rows each
    # expert has stays on the device.
    ids, order = torch.sort(index.reshape(-1))
    numbers = torch.arange(base.num_experts, device=ids.device)
    ends = torch.searchsorted(ids, numbers, right=True, out_int32=True)

    def multiply(name: str, rows: Tensor) -> Tensor:
        if name in adapted:
            y = grouped_lora(rows.to(adapted[name].weight.dtype), *adapted[name], ends)
        else:
            weight = getattr(base, name)
            weight = weight if base.is_transposed else weight.transpose(1, 2)
            y = F.grouped_mm(rows.to(weight.dtype), weight, offs=ends)
        return y.add_(getattr(base, f"{name}_bias")[ids]) if base.has_bias else y

    rows = multiply(_up(base), x[order // index.shape[1]])
    rows = multiply("down_proj", base._apply_gate(rows) if base.has_gate else base.act_fn(rows))
    if base.has_post_expert_norm:
        rows = base.post_expert_norm(rows)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    chosen = rows[back].view(*index.shape, rows.shape[1])
    return (chosen * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _is_dispatched(experts: Any) -> bool:
    """Return whether the forward of a class is what the interface's decorator put there."""
    forward = experts.forward
    code = getattr(forward, "__code__", None)
    if _DISPATCH is None or code is not _DISPATCH:
        return False
    cells = dict(zip(code.co_freevars, forward.__closure__, strict=True))
    return cells["experts_interface"].cell_contents is moe.ALL_EXPERTS_FUNCTIONS


def _dispatch_code() -> Any:
    """Return the code that every forward put there by the decorator shares, or None without it."""
    if moe is None:
        return None

    class Probe(nn.Module):
        def forward(self) -> None: ...

    return moe.use_experts_implementation(Probe).forward.__code__


_DISPATCH = _dispatch_code()
patched(lora_layer.ParamWrapper)  # before a compiler traces it
