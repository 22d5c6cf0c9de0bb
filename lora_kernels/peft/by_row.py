"""Adapters that act on some rows alone: batches of several adapters (`adapter_names`), and aLoRA.

`y = x·Wᵀ + s·(mask∘(x·Aᵀ))·Bᵀ (+ bias)`, the ranks of all adapters side by side: mask[row, rank]
says whether the row is that adapter's. PEFT picks each adapter's rows out and puts them back. The
products are PyTorch's own and autograd differentiates them. An adapter of the batch whose B is not
finite reaches every row, where PEFT keeps it to its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.lora_linear.op import autocasts
from lora_kernels.peft import calls
from lora_kernels.peft.adapters import changed, joined
from lora_kernels.peft.lora import plain
from lora_kernels.peft.parts import Adapter, Factors, kind

ARGUMENTS = frozenset(("adapter_names", "alora_offsets"))
_ALORA = "peft.tuners.lora.variants.ALoraLinearVariant"
# Every row is multiplied by every adapter's A and B, which are put side by side for each call.
# Forward, of PEFT's time on a CPU at r=16: 5 adapters at K = 2048 take 1.01 on 8 rows and 1.00 on
# 256; 12 of them 1.05 and 1.12; 4 at K = 1024 0.91 and 0.99. With gradients 0.88 to 0.98.
_COLUMNS_PER_RANK = 25
# Where no adapter acts PEFT computes none: aLoRA on half of 1024 rows takes 0.94 of PEFT's time
# (forward and backward 0.89), on a tenth of them 1.05 (1.09), on all of them 0.77 (0.68). In 16
# bits it depends on the CPU: on 0.7 of the rows 0.94 (0.80) of PEFT's, or more than 1.
_ACTING_SHARE = 0.65
_ACTING_SHARE_IN_16_BITS = 0.8


def is_alora(layer: Any, name: str) -> bool:
    """Return whether an adapter is an aLoRA."""
    return kind(layer.lora_variant.get(name)) == _ALORA


def by_row(
    layer: Any, x: Tensor, names: Sequence[str], offsets: Sequence[int | None] | None
) -> Adapter | str:
    """Return the adapters that act on x[B, ..., K] as one, or why PEFT has to apply them.

    names: an adapter for each of the B; another name ("__base__") stands for none.
    offsets: how many of the last positions an aLoRA acts on, for each of the B; None for none.
    """
    if x.dim() < 2 or len(names) != len(x):
        return f"x is {tuple(x.shape)}, with {len(names)} adapter names"
    present = layer._modules["lora_A"]._modules
    used = [name for name in dict.fromkeys(names) if name in present]
    if not used:
        return calls.NO_ADAPTER
    # What costs least to ask is asked first: where PEFT runs, that is all it costs.
    rank = sum(layer.r.get(name, 0) for name in used)  # PEFT may leave it stale
    if len(used) > 1 and rank * _COLUMNS_PER_RANK > x.shape[-1]:
        return f"a rank of {rank} for every row, where PEFT's code is faster"
    aloras = [name for name in used if is_alora(layer, name)]
    length = x.shape[1] if x.dim() == 3 else 1
    # How many of a row's last positions are acted on.
    last = [length if name in used else 0 for name in names]
    if aloras:
        if offsets is None:
            return "aLoRA without offsets, which is the frozen layer"
        if x.dim() > 3 or len(offsets) != len(x):
            return f"x is {tuple(x.shape)}, with {len(offsets)} aLoRA offsets"
        for i, name in enumerate(names):
            if name in aloras:
                last[i] = min(offsets[i] or 0, last[i])
    narrow = x.itemsize == 2 or autocasts(x)
    least = _ACTING_SHARE_IN_16_BITS if narrow else _ACTING_SHARE
    if x.dim() > 2 and sum(last) < least * length * len(last):
        return "adapters act on too few of the rows, which PEFT picks out"
    adapters = []
    for name in used:
        adapter = plain(layer, name, now=True)
        if name in aloras:
            adapter = changed(layer.lora_variant[name]) or adapter
        if isinstance(adapter, str):
            return f"{adapter} (adapter {name!r}, for some rows)"
        if adapter.derive is not None or (name in layer.lora_variant and name not in aloras):
            return f"adapter {name!r}, for some rows, is more than LoRA"
        if adapter.dropout_p:
            return "dropout on some rows alone"
        adapters.append(adapter)
    ranks = [adapter.lora_a.shape[0] for adapter in adapters]
    if len(used) == 1 and min(last) == length:
        return adapters[0]
    found = joined(adapters)
    if isinstance(found, str):
        return found
    owners = [used.index(name) if name in used else 0 for name in names]
    scaling = found.scaling

    def compute(x: Tensor, weight: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
        idle = []
        if min(last) < length:
            idle.append(_before(x, length, last))
        if len(ranks) > 1:
            idle.append(_others(x, owners, ranks))
        return _add(F.linear(x, weight, bias), x, factors, idle, scaling)

    return found._replace(compute=compute)


def _before(x: Tensor, length: int, last: list[int]) -> Tensor:
    """Return which positions come before the `last` ones that are acted on: [B, length, 1, ...]."""
    first = length - torch.tensor(last, device=x.device)
    before = torch.arange(length, device=x.device) < first.unsqueeze(1)
    return before.view(*before.shape, *(1,) * (x.dim() - 2))


def _others(x: Tensor, owners: list[int], ranks: list[int]) -> Tensor:
    """Return which ranks belong to another adapter than the row does: [B, 1, ..., R]."""
    owner = torch.tensor(owners, device=x.device).view(-1, *(1,) * (x.dim() - 1))
    return owner != torch.tensor(
        [i for i, rank in enumerate(ranks) for _ in range(rank)], device=x.device
    )


def _add(y: Tensor, x: Tensor, factors: Factors, idle: list[Tensor], scaling: float) -> Tensor:
    """Return `y + s·(x·Aᵀ nowhere idle)·Bᵀ`, rounded once, to y's dtype."""
    lora_a, lora_b, _ = factors
    p = F.linear(x.to(lora_a.dtype), lora_a)
    for where in idle:
        p = p.masked_fill(where, 0)
    p = p.flatten(0, -2)
    rows, lora_b = y.flatten(0, -2), lora_b.to(p.dtype)  # autocast leaves addmm_ alone
    if p.dtype == y.dtype:
        rows.addmm_(p, lora_b.t(), alpha=scaling)
    else:
        rows = rows.to(p.dtype).addmm_(p, lora_b.t(), alpha=scaling).to(y.dtype)
    return rows.view(y.shape)
