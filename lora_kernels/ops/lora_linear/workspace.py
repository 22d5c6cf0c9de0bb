"""The int32 words that a launch counts tickets and flags in: all zero before and after each launch.

A launch needs them to itself while it runs, and no launch may be spent on clearing them. So:

- Eager launches on one stream run one after another and share one slice, which the kernel leaves
  zeroed. (A stream handle stands for its stream, as in torch's own cuBLAS workspaces; the handle of
  the per-thread default stream stands for another one in each thread.)
- A launch captured into a CUDA graph gets a slice of its own, for ever: the graph may replay beside
  eager launches and beside other graphs, and one graph never runs twice at a time.
- Slices are cut from chunks that were zeroed once, on a side stream, and waited for. Inside a
  capture nothing can be waited for; if the chunk is used up there, the slice comes from the graph's
  own memory and the graph clears it at each replay.
"""

import threading

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear.device import is_cuda

CHUNK = 1 << 18  # int32 words, 1 MiB: thousands of captured launches

_lock = threading.Lock()
_by_stream: dict[tuple[torch.device, int, object], Tensor] = {}
# What is left of each chunk. None is ever freed: a graph holds no reference to its slices.
_chunks: dict[torch.device, list[Tensor]] = {}
_PER_THREAD = 2  # cudaStreamPerThread
_thread = threading.local()


def reserve(length: int, device: torch.device, stream: int) -> Tensor:
    """Return at least `length` zeroed int32 that no launch running at the same time will use.

    `device` is the current one, and `stream` the handle of its current stream.
    """
    if is_cuda(device) and torch.cuda.is_current_stream_capturing():
        with _lock:
            cut = _cut(length, device)
        return torch.zeros(length, dtype=torch.int32, device=device) if cut is None else cut
    key = (device, stream, _this_thread() if stream == _PER_THREAD else None)
    held = _by_stream.get(key)
    if held is not None and held.numel() >= length:
        return held
    with _lock:
        size = max(1 << (length - 1).bit_length(), 256)  # doubling wastes no more than it uses
        held = _cut(size, device)
        if held is None:
            chunk = _zeroed(max(2 * size, CHUNK), device)
            _chunks.setdefault(device, []).append(chunk)
            held = _cut(size, device)
            assert held is not None
        _by_stream[key] = held
        return held


def _this_thread() -> object:
    """Return what no other thread gets, not even a later one of the same number."""
    if not hasattr(_thread, "identity"):
        _thread.identity = object()
    return _thread.identity


def _cut(length: int, device: torch.device) -> Tensor | None:
    """Cut a slice off the newest chunk, in whole cache lines of 128 bytes."""
    chunks = _chunks.get(device)
    if not chunks or chunks[-1].numel() < length:
        return None
    cut, chunks[-1] = chunks[-1][:length], chunks[-1][-(-length // 32) * 32 :]
    return cut


def _zeroed(length: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(length, dtype=torch.int32, device=device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        words = torch.zeros(length, dtype=torch.int32, device=device)
    side.synchronize()
    return words
