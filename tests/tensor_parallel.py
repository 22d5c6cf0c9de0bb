"""Models whose layers two processes share out, and the masks that they drop by."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import RANKS, gradients, loss_of, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lora_kernels.ops.lora_linear import reference
from lora_kernels.ops.lora_linear.philox import drop, keep_mask

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def parallel(model: Any, mesh: DeviceMesh | None = None) -> Any:
    """Share out every linear layer as PyTorch's documentation does, adapters included."""
    mesh = mesh or init_device_mesh("cpu", (RANKS,))
    for layer in model.base_model.model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            plan: dict[str, Any] = {}
            for name in [n for n in COLUMNS if hasattr(block, n)]:
                plan[f"{name}.base_layer"] = ColwiseParallel()
                plan[f"{name}.lora_B.default"] = ColwiseParallel()
            for name in [n for n in ROWS if hasattr(block, n)]:
                plan[f"{name}.base_layer"] = RowwiseParallel()
                plan[f"{name}.lora_A.default"] = RowwiseParallel()
            parallelize_module(block, mesh, plan)
    return model


def same_batch(model: nn.Module, batch: Tensor) -> Tensor:
    return loss_of(model, tokens())


@contextlib.contextmanager
def seen_masks() -> Iterator[list[Tensor]]:
    """Record the mask of every tile that is dropped from."""
    masks: list[Tensor] = []

    def watched(seed: Tensor, p: float, rows: range, columns: range, *tiles: Tensor) -> Any:
        masks.append(keep_mask(seed, p, rows, columns))
        return drop(seed, p, rows, columns, *tiles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "drop", watched)
        yield masks


def dropped(model: nn.Module, run: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the masks of a fused model's step and its gradients, from one torch seed."""
    torch.manual_seed(7)
    with seen_masks() as masks:
        run(model)
    return masks, gradients(model)
