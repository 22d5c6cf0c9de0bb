"""Lazy access to the compiled extension `lora_kernels._C`, and the reason when it is absent."""

import functools
import importlib
from pathlib import Path
from types import ModuleType

_REASON = Path(__file__).with_name("no_extension.txt")  # where setup.py built none, it says why


@functools.cache
def _load() -> ModuleType | ImportError:
    try:
        module = importlib.import_module("lora_kernels._C")
    except ImportError as error:
        return error
    if not hasattr(module, "why_not"):
        return ImportError("it is older than this package and must be built anew")
    reason = module.why_not()  # a driver too old, say
    return module if reason is None else ImportError(reason)


def why_absent() -> str | None:
    """Return why the compiled extension cannot be used, or None when it can."""
    loaded = _load()
    if not isinstance(loaded, ImportError):
        return None
    if isinstance(loaded, ModuleNotFoundError):
        why = _REASON.read_text() if _REASON.exists() else "it takes nvcc and ninja at installation"
        return f"the CUDA extension lora_kernels._C is not built: {why}"
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
