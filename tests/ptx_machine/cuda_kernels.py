"""The CUDA backend with its own host code, whose launches run on the machine.

nvcc makes the objects and the PTX from csrc/; host/cuda_runtime.cpp stands for the CUDA runtime. So
tensor maps, parameters and grid are those of a real launch.
"""

import ast
import ctypes
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_builds
import torch
from torch import Tensor

from lora_kernels import extension
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import cuda
from ptx_machine.launch import Grid, Memory, Run, run
from ptx_machine.parse import Kernel, parse

HOST = Path(__file__).parent / "host"
_HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.POINTER(ctypes.c_void_p)
)


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Return the compiled kernels by their mangled names."""
    texts = [path.read_text() for path in sorted(_folder().glob("*.ptx"))]
    return {kernel.name: kernel for kernel in map(parse, texts)}


def kernel(direction: str, dtype: torch.dtype = torch.bfloat16) -> Kernel:
    """Return the kernel of `direction` for `dtype`."""
    element = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}[dtype]
    (found,) = (k for name, k in kernels().items() if direction in name and element in name)
    return found


@dataclass
class Machine:
    """Where the backend's launches run.

    `multiprocessors` bounds the CTAs of a launch, `resident` clusters run at a time. `edit` changes
    a kernel before it runs. Runs are kept in `runs`, and are judged unless `judged` is False.
    """

    seed: int = 0
    multiprocessors: int = 6
    resident: int = 3
    strict: bool = False
    edit: Callable[[Kernel], Kernel] = lambda kernel: kernel
    judged: bool = True

    def __post_init__(self) -> None:
        self.runs: list[Run] = []
        self.backend = Backend(
            "cuda", cuda.why_not, self._on(cuda.forward), self._on(cuda.backward)
        )

    def _on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            memory = Memory()
            inputs = [a for a in arguments if isinstance(a, Tensor)]
            for tensor in inputs:
                memory.add(tensor, writable=False)
            with _Recorded(memory, {t.data_ptr() for t in inputs}) as recorded:
                library, module = _library()
                handler, failures = self._handler(memory)
                library.ptx_machine_attach(handler, self.multiprocessors)
                saved, extension.load = extension.load, lambda: module
                recorded.active = True
                try:
                    return function(*arguments)
                except RuntimeError as error:
                    raise (failures[0] if failures else error) from None
                finally:
                    extension.load = saved

        return call

    def _handler(self, memory: Memory) -> tuple[Any, list[Exception]]:
        failures: list[Exception] = []

        @_HANDLER
        def handler(
            name: bytes, ctas: int, cluster: int, threads: int, shared: int, parameters: Any
        ) -> int:
            try:
                kernel = self.edit(kernels()[name.decode()])
                last = kernel.parameters[-1]
                blob = ctypes.string_at(parameters[0], last.offset + last.size)
                grid = Grid(
                    ctas, threads, cluster, shared, self.resident, self.seed, True, self.strict
                )
                self.runs.append(run(kernel, blob, memory, grid))
                if self.judged:
                    self.runs[-1].check()
            except Exception as error:
                failures.append(error)
                return 1
            return 0

        return handler, failures


class _Recorded:
    """Meanwhile, lets the machine touch every tensor whose address is asked for."""

    def __init__(self, memory: Memory, inputs: set[int]) -> None:
        self.memory, self.inputs, self.active = memory, inputs, False

    def __enter__(self) -> "_Recorded":
        self.saved = saved = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            address = saved(tensor)
            if self.active and address not in self.inputs and tensor.numel() > 0:
                span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                size = (span + 1) * tensor.element_size()
                self.memory.add_range(address, size, writable=True)
            return address

        Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Tensor.data_ptr = self.saved  # type: ignore[method-assign]


@functools.cache
def _library() -> tuple[ctypes.CDLL, ModuleType]:
    folder = _folder()
    module = cuda_builds._load(folder)
    return ctypes.CDLL(str(folder / f"_C{cuda_builds.SUFFIX}")), module


def _folder() -> Path:
    """Return the folder with the backend's _C, linked without a GPU, and the PTX."""
    objects = cuda_builds.compiled() / "objects"

    def build(folder: Path) -> None:
        nvcc = shutil.which("nvcc")
        assert nvcc is not None
        runtime = folder / "cuda_runtime.o"
        source = str(HOST / "cuda_runtime.cpp")
        cuda_builds._run([nvcc, "-std=c++20", "-Xcompiler=-fPIC", "-c", source, "-o", str(runtime)])
        made = [str(path) for path in (*sorted(objects.rglob("*.o")), runtime)]
        library = str(folder / f"_C{cuda_builds.SUFFIX}")
        cuda_builds._run(["g++", "-shared", "-Wl,-Bsymbolic", *made, "-o", library])
        for path in sorted(cuda_builds.CSRC.glob("lora_linear/*.cu")):
            target = folder / f"{path.stem}.ptx"
            cuda_builds._run([nvcc, "-ptx", *_flags(), str(path), "-o", str(target)])

    return cuda_builds._built("ptx", build)


def _flags() -> list[str]:
    """Return the flags of setup.py that decide what the PTX is."""
    tree = ast.parse((cuda_builds.ROOT / "setup.py").read_text())
    (flags,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS"
    )
    kept = [flag for flag in flags if not flag.startswith("-X")]
    return [flag.replace("code=sm_", "code=compute_") for flag in kept]
