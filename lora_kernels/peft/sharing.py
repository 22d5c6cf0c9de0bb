"""Which layers may read one x, and what then stands for it (`shared_dx.py` beside the op).

Candidates are the fused layers of one parent that take x of one width: q, k, v (and o), or gate and
up. Whether they do read one x is seen at each call, so neither names nor the order of calls matter.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear import shared_dx
from lora_kernels.peft.parts import Adapter, Frozen

_SHARES = "_lora_kernels_shares_input"  # in a layer's __dict__


def share(layers: Mapping[str, Any], wanted: bool) -> list[list[str]]:
    """Make the candidates among the layers of these names share, and no others; return them."""
    families: dict[tuple[str, int], list[str]] = {}
    for name, layer in layers.items():
        layer.__dict__.pop(_SHARES, None)
        families.setdefault((name.rpartition(".")[0], layer.in_features), []).append(name)
    groups = [names for names in families.values() if wanted and len(names) > 1]
    for name in (name for names in groups for name in names):
        layers[name].__dict__[_SHARES] = True
    return groups


def stand_in(
    layer: Any, frozen: Frozen, adapter: Adapter, x: Tensor, dtype: torch.dtype, copy: bool
) -> Tensor | None:
    """Return what a call reads in place of x[..., K], in `dtype`, or None for x or its own copy."""
    state = layer.__dict__
    if (
        _SHARES not in state
        or not x.requires_grad
        or torch.compiler.is_compiling()  # a compiler sums as it likes
        or state["_backward_hooks"]  # which may look for this layer's own dx in the graph
        or frozen.split is not None  # sums dx over processes
        or (adapter.compute is not None and adapter.dropout_p)  # reads x outside the operator, too
    ):
        return None
    return shared_dx.stand_in(x, dtype, copy)
