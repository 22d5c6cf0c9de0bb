"""The CUDA backend with its own host code, whose launches run on the machine.

nvcc makes the objects and the PTX from csrc/; host/cuda_runtime.cpp stands for the CUDA runtime. So
tensor maps, parameters and grid are those of a real launch.
"""

import ast
import contextlib
import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cuda_builds import compiled
from torch import Tensor

from bench import builds
from lora_kernels import extension
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear.problem import Problem
from ptx_machine.launch import Grid, Memory
from ptx_machine.machine import Machine, inputs, reserved
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


def mutant(folder: Path, unit: str, file: str, old: str, new: str) -> Kernel:
    """Return the kernel of lora_linear/`unit`.cu with `old` replaced by `new` in a source of it."""
    kernels()  # or skip, where nvcc is not
    shutil.copytree(builds.CSRC, folder / "csrc")
    source = folder / "csrc" / file
    text = source.read_text()
    assert old in text, f"{file} has changed: {old!r}"
    source.write_text(text.replace(old, new))
    target = folder / f"{unit}.ptx"
    _compile(folder / f"csrc/lora_linear/{unit}.cu", target)
    return parse(target.read_text())


def takes(problem: Problem) -> bool:
    """Whether the backend runs `problem` where it is built and a Hopper GPU is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "why_absent", lambda: None)
        return cuda.why_not(problem._replace(device="cuda", arch=90)) is None


def on(machine: Machine) -> Backend:
    """Return the CUDA backend whose launches go to `machine`."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(operands: Any, *onto: Tensor | None) -> Any:
            memory = Memory()
            for tensor in inputs(operands):
                memory.add(tensor, writable=False)
            library, module = _library()
            handler, failures = _handler(machine, memory)
            library.ptx_machine_attach(handler, machine.multiprocessors)
            with _noting_addresses(memory), pytest.MonkeyPatch.context() as patch:
                patch.setattr(extension, "load", lambda: module)
                patch.setattr(cuda, "reserve", reserved)
                try:
                    return function(operands, *onto)
                except RuntimeError as error:
                    raise (failures[0] if failures else error) from None

        return call

    return Backend("cuda", cuda.why_not, wrap(cuda.forward), wrap(cuda.backward))


def _handler(machine: Machine, memory: Memory) -> tuple[Any, list[Exception]]:
    """Return what takes the launches, and where it leaves what it cannot raise through C++."""
    failures: list[Exception] = []

    @_HANDLER
    def handler(
        name: bytes, ctas: int, cluster: int, threads: int, shared: int, parameters: Any
    ) -> int:
        try:
            kernel = kernels()[name.decode()]
            last = kernel.parameters[-1]
            blob = ctypes.string_at(parameters[0], last.offset + last.size)
            machine.launch(kernel, blob, memory, Grid(ctas, threads, cluster, shared))
        except Exception as error:
            failures.append(error)
            return 1
        return 0

    return handler, failures


@contextlib.contextmanager
def _noting_addresses(memory: Memory) -> Iterator[None]:
    """Meanwhile, let kernels touch every tensor whose address is asked for."""
    data_ptr = Tensor.data_ptr
    inside = False

    def noted(tensor: Tensor) -> int:
        nonlocal inside
        if inside:
            return data_ptr(tensor)
        inside = True
        try:
            return memory.add(tensor, writable=True)
        finally:
            inside = False

    Tensor.data_ptr = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.data_ptr = data_ptr  # type: ignore[method-assign]


@functools.cache
def _library() -> tuple[ctypes.CDLL, ModuleType]:
    path = _folder() / f"_C{builds.SUFFIX}"
    # pybind11 would take a second module of one name for the first.
    return ctypes.CDLL(str(path)), builds.load(f"{path.parent.name}._C", path)


def _folder() -> Path:
    """Return the folder with the backend's _C, linked without a GPU, and the PTX."""
    objects = compiled() / "objects"

    def build(folder: Path) -> None:
        runtime = folder / "cuda_runtime.o"
        source = str(HOST / "cuda_runtime.cpp")
        builds.run("nvcc", "-std=c++20", "-Xcompiler=-fPIC", "-c", source, "-o", str(runtime))
        made = [str(path) for path in (*sorted(objects.rglob("*.o")), runtime)]
        library = str(folder / f"_C{builds.SUFFIX}")
        builds.run("g++", "-shared", "-Wl,-Bsymbolic", *made, "-o", library)
        units = sorted(builds.CSRC.glob("lora_linear/*.cu"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_compile, units, (folder / f"{path.stem}.ptx" for path in units)))

    sources = (*builds.sources(), Path(__file__), HOST / "cuda_runtime.cpp")
    return builds.build("ptx", sources, build)


def _compile(source: Path, target: Path) -> None:
    builds.run("nvcc", "-ptx", *_flags(), str(source), "-o", str(target))


def _flags() -> list[str]:
    """Return the flags of setup.py that decide what the PTX is."""
    tree = ast.parse((builds.ROOT / "setup.py").read_text())
    (flags,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS"
    )
    kept = [flag for flag in flags if not flag.startswith("-X")]
    return [flag.replace("code=sm_", "code=compute_") for flag in kept]
