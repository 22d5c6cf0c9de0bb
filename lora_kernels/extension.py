"""Lazy access to what is compiled, and the reason when it is absent.

`lora_kernels._C` has the CUDA kernels, `lora_kernels._cpu` is a C library for the CPU.
"""

import ctypes
import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

# Where setup.py built none, it says why.
_REASON = Path(__file__).with_name("no_extension.txt")
_INTERFACE = 3  # csrc/bindings.cpp
_NO_CPU_REASON = Path(__file__).with_name("no_cpu_extension.txt")


@functools.cache
def _load() -> ModuleType | ImportError:
    try:
        module = importlib.import_module("lora_kernels._C")
    except ImportError as error:
        return error
    if getattr(module, "INTERFACE", None) != _INTERFACE:
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


@functools.cache
def load_cpu() -> ctypes.CDLL | str:
    """Return the library compiled for the CPU, or why it is absent: then PyTorch's operators serve.

    A call through ctypes gives up the GIL.
    """
    found = importlib.util.find_spec("lora_kernels._cpu")
    if found is None or found.origin is None:
        no_reason = "it takes a C++ compiler at installation"
        why = _NO_CPU_REASON.read_text() if _NO_CPU_REASON.exists() else no_reason
        return f"the CPU extension lora_kernels._cpu is not built: {why}"
    try:
        library = ctypes.CDLL(found.origin)
        library.lora_drop.restype = None
    except (OSError, AttributeError) as error:
        return f"the CPU extension lora_kernels._cpu does not load: {error}"
    return library
