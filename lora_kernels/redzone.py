"""Red zones: bytes around what is allocated, which show what is written beside it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WIDTH = 512  # bytes on either side: as aligned as an allocation of its own
_BYTE = 0xFF  # as floats of any kind: NaN
_aten = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)


class RedZones(TorchDispatchMode):
    """While it is entered, `torch.empty` and its kin return NaN between two red zones.

    A tensor that is not dense, or of bool, is left alone. What was given out stays alive with
    this, and `check` looks at all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Tensor, Tensor]] = []  # whole buffers, and what was given out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._between(result) if func in _EMPTY else result

    def _between(self, plain: Tensor) -> Tensor:
        size = plain.numel() * plain.element_size()
        dense = plain.layout == torch.strided and plain.untyped_storage().nbytes() == size
        if not dense or plain.dtype == torch.bool or plain.device.type == "meta":
            return plain
        shape = (size + 2 * _WIDTH,)
        buffer = torch.full(shape, _BYTE, dtype=torch.uint8, device=plain.device)
        inside = buffer[_WIDTH : _WIDTH + size].view(plain.dtype)
        given = inside.as_strided(plain.shape, plain.stride())
        self._held.append((buffer, given))
        return given

    def check(self) -> None:
        """Assert that no byte of a red zone was written to."""
        for buffer, given in self._held:
            whole = all((side == _BYTE).all() for side in (buffer[:_WIDTH], buffer[-_WIDTH:]))
            assert whole, f"something was written beside a new tensor of {tuple(given.shape)}"
