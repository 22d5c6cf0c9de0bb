"""What several processes change for a layer: which of its tensors train, and the mask it draws.

FSDP1 shows a layer views of one flat parameter, which asks for gradients as soon as one of its
parts does; whether a part itself trains is known to the parameter it was.

Processes that share out a batch draw different masks. Most scripts seed torch alike in every
process, and torch's own dropout then drops the same elements of every process's rows. Here each
process moves the seed that it draws by its place among those that share out the batch, as far as
the wrapper says who they are: DistributedDataParallel and FSDP do. Tensor parallelism does not
count: its processes see the same rows and must agree on the mask.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels.ops.lora_linear.philox import keep_mask, seed_tensor

_PLACE = "_lora_kernels_place_in_batch"
_STEP = 0x1E3779B97F4A7C15  # between the seeds of two places; odd, and below 2**61


def if_trained(tensor: Any, module: nn.Module, name: str) -> Any:
    """Return a module's parameter of that name, or None, detached if in truth it is frozen."""
    if tensor is None or not tensor.requires_grad:
        return tensor
    flat = tensor._base
    if flat is None or not getattr(flat, "_is_flat_param", False):
        return tensor
    for info, original in zip(flat._param_infos, flat._params or (), strict=False):
        if info.module is module and info.param_name == name:
            return tensor if original.requires_grad else tensor.detach()
    return tensor


def dropout_seed(layer: Any, x: Tensor) -> Tensor | None:
    """Return the seed int64[1] of a layer's mask for x, or None to let `lora_linear` draw it.

    `(drawn + place·step) mod 2⁶³`: one process, and the first of several, draws what it would
    alone. A checkpoint that restores torch's generator draws it again.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    place = _place(layer)
    if place == 0:
        return None
    return seed_tensor(None, x) + place * _STEP % 2**63 & 2**63 - 1


def dropout(layer: Any, x: Tensor, p: float) -> Tensor:
    """Return `F.dropout(x, p)` of x[..., K], with a mask that differs as those of `lora_linear` do.

    For what a layer computes outside of that.
    """
    seed = dropout_seed(layer, x)
    if seed is None:
        return F.dropout(x, p)
    if seed.is_cpu and not torch.compiler.is_compiling():
        generator = torch.Generator(x.device).manual_seed(int(seed))
        keep = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    else:  # the seed may not be looked at
        rows = range(math.prod(x.shape[:-1]))
        keep = keep_mask(seed, p, rows, range(x.shape[-1]), x.device).view(x.shape).to(x.dtype)
    return x * keep.div_(1 - p)


def _place(layer: Any) -> int:
    """Return the place of this process among those that share out the batch, 0 if it has none."""
    state = layer.__dict__
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is not None:
        # Kept, for a checkpoint runs the layer again in the backward, where nothing is active.
        state[_PLACE] = dist.get_rank(parallel.process_group)
    elif _PLACE not in state and "_is_fsdp_managed_module" in state:
        state[_PLACE] = _fsdp_place(layer)
    return state.get(_PLACE, 0)


# What `torch.compiler.assume_constant_result` sets, after an import of all of Dynamo.
_place._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fsdp_place(layer: Any) -> int:
    from torch.distributed._composable_state import _module_state_mapping

    for module, reference in list(_module_state_mapping.items()):
        if any(part is layer for part in module.modules()):
            state = reference()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # torch has made a list of the only one
                groups = filter(None, [getattr(state, "_fsdp_param_group", None)])
            for group in groups:
                mesh = group.mesh_info
                replica = getattr(mesh, "replicate_mesh_rank", 0)
                return replica * mesh.shard_mesh_size + mesh.shard_mesh_rank
    return dist.get_rank()  # FSDP1, which shards over all processes
