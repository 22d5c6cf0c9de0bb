"""Merging that can be undone: the frozen bits are kept while an adapter is merged.

PEFT unmerges by subtracting what it added, which in bf16 restores neither the bits nor, over many
cycles, anything near them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_kernels.peft.adapters import adapter_of
from lora_kernels.peft.rows import row_norms

_KEPT = "_lora_kernels_frozen_bits"
_WORD = 8  # bytes that a fingerprint takes at a time
_BLOCK = 1 << 17  # words


class ExactMerge:
    """`merge` and `unmerge` of a PEFT layer, the latter exact; one more copy of W while merged."""

    plain: ClassVar[type[nn.Module]]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does, after keeping the frozen bits aside."""
        layer: Any = self
        base = self.held()
        kept, stamp = layer.__dict__.pop(_KEPT, (None, None))
        if not layer.merged and self._owns(base):
            kept = self.keep(base)
        elif kept is not None and stamp != self._stamp(base):
            kept = None  # W was written to while merged: these bits are of another one
        try:
            layer.plain.merge(layer, safe_merge, adapter_names)
        finally:
            if layer.merged and kept is not None:
                layer.__dict__[_KEPT] = kept, self._stamp(self.held())

    def unmerge(self) -> None:
        """Unmerge as PEFT does, and put the frozen bits back unless W was written to meanwhile."""
        layer: Any = self
        kept, stamp = layer.__dict__.pop(_KEPT, (None, None))
        exact = kept is not None and stamp == self._stamp(self.held())
        layer.plain.unmerge(layer)
        if exact and not layer.merged:
            self.restore(self.held(), kept)  # which may be another one now

    def held(self) -> Any:
        """Return the holder of the weight and the bias that merging writes to."""
        layer: Any = self
        return layer.get_base_layer()

    def exactly_merged(self, frozen: Tensor) -> Tensor:
        """Return what merging would make of the frozen weight, in its dtype, if nothing rounded."""
        layer: Any = self
        if layer.is_target_conv_1d_layer:
            frozen = frozen.t()
        exact = frozen
        for name in layer.merged_adapters:
            adapter: Any = adapter_of(layer, name, now=True)
            factors = adapter.factors()
            lora_a, lora_b = factors.lora_a.to(frozen.dtype), factors.lora_b.to(frozen.dtype)
            exact = exact + adapter.scaling * (lora_b @ lora_a)
            if adapter.compute is not None:  # DoRA
                norms = row_norms(frozen, lora_a, lora_b, adapter.scaling)
                magnitude = layer.lora_magnitude_vector[name].weight.to(frozen.dtype)
                exact *= (magnitude / norms).unsqueeze(1)
        return exact.t() if layer.is_target_conv_1d_layer else exact

    def _owns(self, base: Any) -> bool:
        """Return whether the layer's tensors lie here, whole, rather than sharded or on meta."""
        return all(
            t is None or (not is_traceable_wrapper_subclass(t) and t.device.type != "meta")
            for t in self.inside(base)
        )

    def _stamp(self, base: Any) -> list[Any]:
        """Return a fingerprint of the layer's tensors: equal for equal bits, in copies as well."""
        return [
            None if t is None else (t.dtype, t.shape, _fingerprint(t)) for t in self.inside(base)
        ]

    @staticmethod
    def inside(base: Any) -> list[Any]:
        """Return the tensors (or None) that hold what merging changes."""
        return [base.weight, base.bias]

    @staticmethod
    def keep(base: Any) -> Any:
        """Return what `restore` needs: copies, for PEFT adds to the tensors in place."""
        return base.weight.data.clone(), None if base.bias is None else base.bias.data.clone()

    @staticmethod
    def restore(base: Any, kept: Any) -> None:
        """Put back what `keep` returned, into the tensors that are there."""
        weight, bias = kept
        base.weight.data.copy_(weight)
        if bias is not None:
            base.bias.data.copy_(bias)


def merge_loss(model: nn.Module) -> dict[str, float]:
    """Return what share of its update each merged fused layer lost to the rounding of W's dtype.

    `‖(merged - W) - Δ‖ / ‖Δ‖` with Δ, the exact change, in float64: 0 is nothing, 1 as much as if
    nothing had been merged. Layers over quantised weights are not among them.
    """
    losses = {}
    for name, layer in model.named_modules():
        kept = layer.__dict__.get(_KEPT)
        if kept is not None and isinstance(kept[0], tuple):
            losses[name] = _loss(layer, kept[0][0])
    return losses


@torch.no_grad()
def _loss(layer: Any, frozen: Tensor) -> float:
    merged, frozen = layer.held().weight.data.double(), frozen.double()
    exact = layer.exactly_merged(frozen)
    change = (exact - frozen).norm()
    return 0.0 if change == 0 else ((merged - exact).norm() / change).item()


def _fingerprint(tensor: Tensor) -> tuple[int, bytes]:
    """Return `Σ word·odd number`, modulo 2⁶⁴: a write that no version counter saw changes it."""
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)
    if flat.storage_offset() * flat.itemsize % _WORD:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = octets.numel() // _WORD * _WORD
    words = octets[:whole].view(torch.int64)
    odd = 2 * torch.arange(min(words.numel(), _BLOCK), device=words.device) + 1
    sums = [
        (block * odd[: len(block)]).sum() * (2 * n + 1)
        for n, block in enumerate(words.split(_BLOCK))
    ]
    return int(torch.stack(sums).sum()), bytes(octets[whole:].tolist())
