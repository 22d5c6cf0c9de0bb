"""What a call of a layer must give, by the oracle, and how far off a result is."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.audit.layer import Operands
from lora_kernels.ops.lora_linear.reference import oracle
from lora_kernels.testing import fp64, tolerance


class Expected(NamedTuple):
    """A call as the oracle sees it: the layer's operands, and the dropout mask by its seed."""

    operands: Operands
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def output(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return y for x[..., K], every operand converted to `dtype`."""
        leaves = {id(t): t.detach().to(dtype) for t in self._adapters()}
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self._compose(x.detach().to(dtype), leaves)

    def gradients(
        self, x: Tensor, dy: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return dx, and the gradient of each A and B by the identity of the parameter."""
        leaves = {id(t): t.detach().to(dtype).requires_grad_() for t in self._adapters()}
        leaf = x.detach().to(dtype).requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = self._compose(leaf, leaves)
            dx, *others = torch.autograd.grad(y, [leaf, *leaves.values()], dy.detach().to(dtype))
        return dx, dict(zip(leaves, others, strict=True))

    def trained(self) -> list[Tensor]:
        """Return each A and B that requires a gradient, once."""
        return list({id(t): t for t in self._adapters() if t.requires_grad}.values())

    def _adapters(self) -> list[Tensor]:
        return [t for part in self.operands.parts for t in part[:2]]

    def _compose(self, x: Tensor, leaves: dict[int, Tensor]) -> Tensor:
        """Several adapters are one whose rank is the sum of theirs."""
        weight, bias, parts, *_ = self.operands
        weight, bias = weight.detach().to(x), None if bias is None else bias.detach().to(x)
        scaling = max((part.scaling for part in parts), key=abs, default=0.0)
        lora_a, lora_b = [weight[:0]], [weight[:, :0]]
        for part in parts:
            columns = leaves[id(part.lora_b)][:, part.columns]
            lora_a.append(leaves[id(part.lora_a)][part.rows])
            lora_b.append(
                columns if part.scaling == scaling else columns * (part.scaling / scaling)
            )
        return oracle(
            x,
            weight,
            torch.cat(lora_a),
            torch.cat(lora_b, 1),
            scaling,
            bias,
            dropout_p=self.dropout_p,
            seed=self.seed,
        )


def error_ratio(actual: Tensor | None, exact: Tensor, eager: Tensor) -> float:
    """Return the largest error of `actual` over the tolerance of `testing.assert_accurate`.

    Infinite if `actual` is missing, has another shape or is not finite.
    """
    if actual is None or actual.shape != exact.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    got, exact = actual.detach().to("cpu", fp64), exact.cpu()
    if not got.isfinite().all():
        return float("inf")
    error = (got - exact).abs().max()
    return float(error / tolerance(actual.dtype, exact, eager)) if error > 0 else 0.0


def worst_ratio(actual: Tensor | None, exact: Tensor, eager: Tensor, source: Tensor) -> float:
    """Return the error ratio of a result of the rows of `source`, or that of its zero rows alone.

    An error there can be small beside the other rows: a bias forgotten, a division by a norm.
    """
    ratio, zero = error_ratio(actual, exact, eager), ~source.detach().any(-1)
    if actual is None or ratio == float("inf") or not zero.any():
        return ratio
    return max(ratio, error_ratio(actual[zero], exact[zero], eager[zero]))
