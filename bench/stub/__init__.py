"""A GPU that does nothing: Triton's own driver and launchers, and the CUDA extension, run on it.

`install()` gives this process an NVIDIA GPU of some compute capability. A driver library of our own
(libcuda.c, built with the system's C compiler) accepts every launch and records it. Memory stays on
the CPU, so torch need not be a CUDA build: it allocates CPU tensors that say they are on cuda:0.
What is replaced in Python is

- what says where a tensor is: `Tensor.device` and `is_cuda` (a seed that the operator makes of an
  int or draws stays on the CPU, as it would with a GPU);
- the functions of torch.cuda that tell the current device, stream and capture;
- the zeroing of a workspace on a side stream, and the record of qualification: there is none.

All between the public function and the driver is the real code.
"""

import ctypes
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import builds

HERE = Path(__file__).parent
LAUNCHES, PARAMETER_BYTES = 64, 4096  # as in record.h


class Launch(ctypes.Structure):
    """One kernel launch; `parameters` holds `parameter_bytes` as the kernel would read them."""

    _fields_ = (
        ("kernel", ctypes.c_char * 128),
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("parameter_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_uint8 * PARAMETER_BYTES),
    )


class Map(ctypes.Structure):
    """What a tensor map was made of; it fills the first of its 128 bytes."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 2),
        ("pitch_bytes", ctypes.c_uint64),
        ("box", ctypes.c_uint32 * 2),
        ("rank", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("zero", ctypes.c_uint32),
    )


class Record(ctypes.Structure):
    """Counts (of modules, those loaded now), and the latest launches: i is at i modulo LAUNCHES."""

    _fields_ = (
        ("launches", ctypes.c_uint64),
        ("maps", ctypes.c_uint64),
        ("pointer_queries", ctypes.c_uint64),
        ("modules", ctypes.c_uint64),
        ("last", Launch * LAUNCHES),
    )


def why_not() -> str | None:
    """Return why there can be no stub driver here."""
    if torch.version.cuda is not None:
        return "torch is a CUDA build"
    if shutil.which("gcc") is None:
        return "gcc was not found"
    return None


def _driver(include: Path) -> Path:
    """Return the folder with the driver library, compiled against the cuda.h in `include`."""
    flags = ("-O2", "-std=gnu11", "-Wall", "-Werror", "-shared", "-fPIC")

    def make(folder: Path) -> None:
        output = ("-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"))
        builds.run("gcc", *flags, f"-I{include}", str(HERE / "libcuda.c"), *output)

    return builds.build(
        "stub-driver", (Path(__file__), *HERE.glob("*.[ch]"), include / "cuda.h"), make
    )


def _extension(driver: Path) -> Path:
    """Return lora_kernels._C with the host code of csrc/ on a stub runtime, linked to `driver`."""
    source = HERE / "libcudart.c"

    def make(folder: Path) -> None:
        runtime = str(folder / "libcudart.o")
        flags = ("-O2", "-Xcompiler=-fPIC,-std=gnu11,-Wall,-Werror")
        builds.run("nvcc", *flags, "-c", str(source), "-o", runtime)
        objects = (builds.extension() / "objects").rglob("*.o")
        linked = (*map(str, objects), runtime, f"-L{driver}", "-l:libcuda.so.1")
        library = str(folder / f"_C{builds.SUFFIX}")
        builds.run("nvcc", "-shared", "--cudart=none", *linked, "-o", library)

    inputs = (*builds.sources(), Path(__file__), *HERE.glob("*.[ch]"))
    return builds.build("stub-extension", inputs, make) / f"_C{builds.SUFFIX}"


class Gpu:
    """The GPU that is not there: its record, and what is current on it."""

    def __init__(self, arch: int, folder: Path) -> None:
        driver = ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)
        self.folder, self.arch, self.multiprocessors = folder, arch, 132
        self.device, self.stream, self.capturing = 0, 0, False
        self.record = Record.in_dll(driver, "stub_record")
        ctypes.c_int.in_dll(driver, "stub_arch").value = arch

    def load_extension(self) -> str | None:
        """Let lora_kernels load csrc/ built on a stub runtime; return why it cannot be built."""
        if shutil.which("nvcc") is None:
            return "nvcc was not found"
        from lora_kernels import extension

        path = _extension(self.folder)
        module = builds.load("lora_kernels._C", path)
        extension.load, extension.why_absent = lambda: module, lambda: None
        # A host object does not tell the size of its kernels' one parameter, a struct by value.
        self.struct_bytes = ctypes.c_uint32.in_dll(ctypes.CDLL(str(path)), "stub_struct_bytes")
        return None

    @property
    def last(self) -> Launch:
        """The latest launch."""
        return self.record.last[(self.record.launches - 1) % LAUNCHES]

    def properties(self, device: Any = None) -> SimpleNamespace:
        """Return what torch.cuda.get_device_properties would."""
        major, minor = divmod(self.arch, 10)
        return SimpleNamespace(major=major, minor=minor, multi_processor_count=self.multiprocessors)


def install(arch: int = 90) -> Gpu:
    """Give this process a GPU; before Triton's first launch, and for good.

    Raises:
        RuntimeError: there can be none here; `why_not` says so too.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(f"no stub driver: {reason}")
    import triton

    folder = _driver(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    gpu = Gpu(arch, folder)

    on_gpu = torch.device("cuda", 0)

    torch.Tensor.device, torch.Tensor.is_cuda = on_gpu, True
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: gpu.device
    cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=gpu.stream)
    cuda.is_current_stream_capturing = lambda: gpu.capturing
    cuda.get_device_properties = gpu.properties
    cuda.get_device_capability = lambda device=None: divmod(gpu.arch, 10)
    torch._C._cuda_getCurrentRawStream = lambda device: gpu.stream

    from lora_kernels.ops.lora_linear import op, workspace
    from lora_kernels.qualify import choose

    def seed_tensor(seed: Any, x: torch.Tensor) -> torch.Tensor:
        made = real_seed_tensor(seed, x)
        if not isinstance(seed, torch.Tensor):
            made.device, made.is_cuda = torch.device("cpu"), False
        return made

    real_seed_tensor, op.seed_tensor = op.seed_tensor, seed_tensor
    choose.KEPT_FOR = ()
    workspace._zeroed = lambda length, device: torch.zeros(length, dtype=torch.int32)
    return gpu
