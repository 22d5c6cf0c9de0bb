"""What a launch asks about its device, by the cheapest calls that torch has."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

# torch.cuda.current_stream builds two objects to tell a number; CPU builds of torch have neither.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_nothing = nullcontext()


@functools.cache
def is_cuda(device: torch.device) -> bool:
    """Return whether `device` is a GPU; `type` builds its string anew each time it is read."""
    return device.type == "cuda"


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current one of its kind."""
    if not is_cuda(device) or device.index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """Return the handle of the stream that work on `device` is queued in; 0 off CUDA."""
    if not is_cuda(device):
        return 0
    if _raw_stream is not None:
        return _raw_stream(device.index)
    return torch.cuda.current_stream(device).cuda_stream
