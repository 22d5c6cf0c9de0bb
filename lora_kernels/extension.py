"""Lazy access to the compiled extension `lora_kernels._C`, and the reason when it is absent."""

import functools
import importlib
from types import ModuleType


@functools.cache
def _load() -> ModuleType | ImportError:
    try:
        return importlib.import_module("lora_kernels._C")
    except ImportError as error:
        return error


def why_absent() -> str | None:
    """Return why the compiled extension cannot be used, or None when it is loaded."""
    loaded = _load()
    if not isinstance(loaded, ImportError):
        return None
    if isinstance(loaded, ModuleNotFoundError):
        return "the CUDA extension lora_kernels._C is not built, which takes nvcc at installation"
    return f"the CUDA extension lora_kernels._C does not load: {loaded}"


def load() -> ModuleType:
    """Return the compiled extension.

    Raises:
        ImportError: it is not built or does not load; `why_absent` says which.
    """
    loaded = _load()
    if isinstance(loaded, ImportError):
        raise loaded
    return loaded
