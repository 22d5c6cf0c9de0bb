"""The CUDA C++ backend (Hopper): not part of this version; asking for it by name says so."""

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.problem import Problem


def why_not(problem: Problem) -> str | None:
    """Return why this backend cannot run `problem`."""
    return "not part of this version yet"


def _absent(*_: object) -> None:
    raise NotImplementedError("the CUDA backend is not part of this version yet")


BACKEND = Backend("cuda", why_not, _absent, _absent)
