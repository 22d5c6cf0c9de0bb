"""DeepSpeed's ZeRO-3, imitated: what it leaves of a parameter, and a reason instead of a crash.

DeepSpeed is not needed. What is imitated (deepspeed/runtime/zero, partition_parameters.py and
parameter_offload.py): every parameter carries `ds_id`, `ds_shape` and `ds_status`; between calls
its data are empty (`free_param`); `_parameters` of every module is a subclass of OrderedDict; and
hooks on every module gather the parameters of its own before its forward and free them after.
Backward, hooks on the outputs and inputs do the same, which is left out: parameters stay gathered
from the last forward on.
"""

import copy
import enum
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from distributed import counted
from peft_models import fp64, peft_model, run, x_for
from peft_models import one_thread as one_thread

from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


class ZeroDict(OrderedDict):  # type: ignore[type-arg]
    """Stands where DeepSpeed's stands; what it does on access concerns parameters of others."""


def partition(model: nn.Module) -> None:
    """Do to a model what the engine's start does."""
    shards: dict[Any, torch.Tensor] = {}
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        shards[parameter] = parameter.data
        free(parameter)
    for module in model.modules():
        module._parameters = ZeroDict(module._parameters)

        def gather(module: nn.Module, _: Any) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data, parameter.ds_status = shards[parameter], Status.AVAILABLE

        module.register_forward_pre_hook(gather)


def free(parameter: Any) -> None:
    parameter.data = torch.empty(0, dtype=parameter.dtype)
    parameter.ds_status = Status.NOT_AVAILABLE


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_partitioned_model_runs_peft_and_says_why(when: str) -> None:
    plain = peft_model(dtype=fp64)
    model = copy.deepcopy(plain)
    if when == "before":
        assert len(fuse(model).fused) == 2
    partition(model)
    report = fuse(model)
    assert not report.fused
    assert all("has hooks" in r or "ZeRO-3" in r for r in report.not_fused.values()), str(report)
    with counted() as calls:
        got, expected = run(model, x_for(plain)), run(plain, x_for(plain))
    assert not calls
    for name, value in expected.items():
        assert_accurate(name, got[name], value, value)


def test_parameters_that_are_partitioned_before_there_are_hooks() -> None:
    """So it is inside `deepspeed.zero.Init`, until the engine starts."""
    model = peft_model()
    for parameter in model.parameters():
        parameter.ds_id = 0
        free(parameter)
    report = fuse(model)
    assert not report.fused
    assert all("ZeRO-3" in reason for reason in report.not_fused.values()), str(report)
