"""The plain adapter: LoRA with or without a bias of its own."""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lora_kernels.ops.lora_linear.problem import short
from lora_kernels.ops.lora_linear.validate import FP32_MAX
from lora_kernels.peft.parts import Adapter, Factors, kind, parameter
from lora_kernels.peft.patched import not_plain
from lora_kernels.peft.sharding import gathers_itself, handed_over, out_of_reach
from lora_kernels.peft.tensor_parallel import split_of

_DROPOUT = (nn.Identity, nn.Dropout)


def plain(
    layer: Any, name: str, now: bool, types: Collection[type[nn.Module]] = (nn.Linear,)
) -> Adapter | str:
    """Return what an adapter hands over whose A and B are modules of `types`, or why it cannot.

    It runs at every call, so it reads `_modules` and `_parameters`: `nn.Module.__getattr__` costs
    about a microsecond each time, a dictionary a twentieth of that.
    """
    children = layer._modules
    lora_a = children["lora_A"]._modules[name]
    lora_b = children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    reason = not_plain("lora_dropout", dropout, _DROPOUT)
    if reason:
        return reason
    scaling = layer.scaling[name]
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        return f"scaling is a {kind(scaling)}, not a number"
    if not abs(scaling) <= FP32_MAX:
        return f"scaling is {scaling}"
    dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    if dropout_p >= 1:
        return "the dropout probability is 1"
    reason = not_plain("lora_A", lora_a, types) or not_plain("lora_B", lora_b, types)
    if reason:
        return (
            _sharded_alone(lora_a, lora_b, scaling, dropout_p)
            or _split(lora_a, lora_b, scaling, dropout_p, now)
            or reason
        )
    a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
    reason = out_of_reach("lora_A", a, lora_a, now) or out_of_reach("lora_B", b, lora_b, now)
    if reason:
        return reason
    if b.dtype != a.dtype:
        return f"lora_A is {short(a.dtype)}, lora_B {short(b.dtype)}"
    if lora_a._parameters.get("bias") is not None:
        return "lora_A has a bias"
    bias = lora_b._parameters.get("bias")
    if bias is None:
        return Adapter(a, b, scaling, dropout_p)
    if bias.dtype != a.dtype:
        return f"the bias of lora_B is {short(bias.dtype)}"
    return Adapter(a, b, scaling, dropout_p, lambda: Factors(a, b, bias * scaling))


def _split(
    lora_a: Any, lora_b: Any, scaling: float, dropout_p: float, now: bool
) -> Adapter | str | None:
    """Return the adapter whose A or B processes share out, or None if it is not one."""
    split = split_of(lora_b, now) or split_of(lora_a, now)
    if split is None:
        return None
    whole = lora_a if split.dim == 0 else lora_b
    part = "lora_A" if split.dim == 0 else "lora_B"
    reason = not_plain(part, whole) or out_of_reach(part, whole.weight, whole, now)
    if reason is None and lora_b.bias is not None:
        reason = "lora_B has a bias under tensor parallelism"
    if reason:
        return reason
    a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (lora_a.weight, lora_b.weight))
    if b.dtype != a.dtype:
        return f"lora_A is {short(a.dtype)}, lora_B {short(b.dtype)}"
    return Adapter(a, b, scaling, dropout_p, split=split)


def _sharded_alone(
    lora_a: Any, lora_b: Any, scaling: float, dropout_p: float
) -> Adapter | str | None:
    """Return the adapter whose A and B only their own calls gather, or None if it is not one."""
    if not (gathers_itself(lora_a) and gathers_itself(lora_b)):
        return None
    a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
    if b.dtype != a.dtype:
        return f"lora_A is {short(a.dtype)}, lora_B {short(b.dtype)}"

    def derive() -> Factors:
        weight_a, _ = handed_over(lora_a, a.dtype)
        weight_b, bias = handed_over(lora_b, a.dtype)
        return Factors(weight_a, weight_b, None if bias is None else bias * scaling)

    return Adapter(a, b, scaling, dropout_p, derive, collective=True)
