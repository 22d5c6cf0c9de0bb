"""Seeds of 64 bits, on either side of the bus, for every backend on the PTX machine."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.testing import Case, bf16, check_backend

VALUES = (3, 3 + 2**40, -1)


class _OnDevice(Tensor):
    """Says that it is on a GPU; kernels on the machine read it where it is."""

    device, is_cuda = torch.device("cuda"), True


def by_address(backend: Backend) -> Backend:
    """Return a backend that is handed its seeds on the GPU: kernels then read them themselves."""

    def placed(call: Any) -> Any:
        return call if call.seed is None else call._replace(seed=call.seed.as_subclass(_OnDevice))

    return backend._replace(
        forward=lambda call: backend.forward(placed(call)),
        backward=lambda call, *onto: backend.backward(placed(call), *onto),
    )


def check_seeds(backend: Backend, adapter_dtype: torch.dtype) -> None:
    """Assert that both words of a seed count, in either place: another mask is another result."""
    case = Case(72, 64, 136, 8, bf16, adapter_dtype, dropout_p=0.5)
    for value in VALUES:
        seed = torch.tensor([value])
        for placed in (backend, by_address(backend)):
            check_backend(placed, case, change=lambda drawn, seed=seed: drawn._replace(seed=seed))
