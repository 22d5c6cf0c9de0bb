"""The audit of a whole model: an A or B that belongs to another layer is named, with its layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from audit_models import DOWN, UP, Forward, lora, parts, plant, run, stack, statuses
from audit_models import reentrant as reentrant
from peft_models import bf16, fp32
from peft_models import one_thread as one_thread

from lora_kernels.peft import fuse


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_mispaired_layers(dtype: torch.dtype, reentrant: bool | None) -> None:
    model = stack(reentrant, dtype=dtype)
    layers = [model.get_submodule(name) for name in UP]

    def with_(*, a: int, b: int) -> Forward:
        def forward(x: Tensor, w: Tensor, *others: Any) -> Tensor:
            *_, bias, s = others
            return lora(x, w, parts(layers[a])[1], parts(layers[b])[2], bias, s)

        return forward

    for a, b, words in ((1, 0, "its B is that of"), (0, 1, "its A is"), (0, 0, "its A and B are")):
        plant(layers[1], with_(a=a, b=b))
        report = run(model)
        # The gradients of layer 0 hold those of layer 1, and that explains them.
        assert statuses(report) == {UP[1]: "mispaired"}, str(report)
        assert words in report.layers[UP[1]].reason
        assert UP[0] in report.layers[UP[1]].reason


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_swapped_columns_of_two_layers(
    dtype: torch.dtype, fused: bool, reentrant: bool | None
) -> None:
    model = stack(reentrant, dtype=dtype)
    if fused:
        fuse(model)
    first, second = (model.get_submodule(DOWN[i]) for i in (0, 2))

    def swapped(own: nn.Module, other: nn.Module) -> Forward:
        def forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
            foreign = parts(other)[2]
            mixed = torch.cat([b[:, :1], foreign[:, 1:3], b[:, 3:]], 1)
            return lora(x, w, a, mixed, *rest)

        return forward

    plant(first, swapped(first, second))
    plant(second, swapped(second, first))
    report = run(model)
    assert statuses(report) == {DOWN[0]: "mispaired", DOWN[2]: "mispaired"}, str(report)
    assert report.layers[DOWN[0]].reason == f"columns 1, 2 of its B belong to {DOWN[2]}"
    assert report.layers[DOWN[2]].reason == f"columns 1, 2 of its B belong to {DOWN[0]}"


def test_permuted_columns() -> None:
    model = stack()
    layer = model.get_submodule(UP[1])
    plant(layer, lambda x, w, a, b, *rest: lora(x, w, a, b.flip(1), *rest))
    report = run(model)
    assert statuses(report) == {UP[1]: "mispaired"}
    assert report.layers[UP[1]].reason == "the columns of its B are in another order"


@pytest.mark.parametrize("share", ["parameter", "storage"])
def test_the_parameter_of_another_layer(share: str) -> None:
    model = stack()
    layers = [model.get_submodule(name) for name in UP]
    if share == "parameter":
        layers[2].lora_B["default"].weight = layers[0].lora_B["default"].weight
    else:
        layers[2].lora_B["default"].weight.data = layers[0].lora_B["default"].weight.data
    report = run(model)
    assert statuses(report) == {UP[0]: "mispaired", UP[2]: "mispaired"}
    assert report.layers[UP[2]].reason == f"its B is the very tensor of {UP[0]}"
