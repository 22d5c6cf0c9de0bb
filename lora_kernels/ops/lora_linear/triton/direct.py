"""A launch of a compiled kernel without Triton's Python in between, which costs more than the rest.

`kernel[grid](...)` classifies every argument to find the compiled kernel and encodes every tensor
map anew; this calls the C function below with what the first launch has found. That function is not
public, so it is known by version: where it is not, `Direct.of` returns None, and every launch goes
the public way. Triton's own knobs count when a kind of launch is made for the first time. Importing
this module imports Triton.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton import __version__, knobs, runtime
from triton.backends.nvidia import driver

VERSION = tuple(int(part) for part in __version__.split(".")[:2])
NEWEST = (3, 9)  # whose C function has been read


_Map = Callable[[int], tuple[Any, ...]]  # an address to a tensor map, as a kernel takes it


class Direct(NamedTuple):
    """A compiled kernel, on its grid."""

    run: Callable[[int, list[Any]], None]  # (stream, every argument, tensor maps expanded)
    maps: tuple[_Map | None, ...]

    @classmethod
    def of(cls, compiled: Any, ctas: int, descriptors: Sequence[Any]) -> "Direct | None":
        """Return the launch that `kernel[(ctas,)](...)` made with these among its arguments.

        `compiled` is what it returned; None where the launch cannot be made without it.
        """
        if VERSION > NEWEST or not isinstance(getattr(compiled, "run", None), driver.CudaLauncher):
            return None  # an interpreter, another vendor's launcher, or one that nobody has read
        launcher, metadata = compiled.run, compiled.metadata
        scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        if scratch or getattr(launcher, "gsan_enabled", False):
            return None
        layouts = iter(metadata.tensordesc_meta or ())
        maps = tuple(
            None if d is None else _map(tuple(d.shape), tuple(d.strides), _frozen(next(layouts)))
            for d in descriptors
        )
        bind = _bind_generated if VERSION == (3, 6) else _bind
        return cls(bind(launcher, compiled, ctas), maps)

    @staticmethod
    def hooked() -> bool:
        """Return whether somebody, a profiler say, wants to hear of every launch from Triton."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        return bool(enter.calls or leave.calls)

    def described(self, addresses: Sequence[int]) -> list[Any]:
        """Return what the descriptors are expanded to, with the matrices at `addresses`."""
        arguments: list[Any] = []
        for address, encoded in zip(addresses, self.maps, strict=False):
            if encoded is None:
                arguments.append(None)
            else:
                arguments += encoded(address)
        return arguments


def _bind(launcher: Any, compiled: Any, ctas: int) -> Callable[[int, list[Any]], None]:
    """Triton 3.7 to 3.9: one C function for all kernels, which takes the arguments as a list."""
    launch = runtime.driver.active.utils.launch
    nothing = (None,) * 5  # launch metadata, two hooks, two scratch buffers
    options = (
        launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata, *nothing,
        launcher.arg_annotations, launcher.kernel_signature,
    )  # fmt: skip

    def run(stream: int, arguments: list[Any]) -> None:
        # Held here, `compiled` keeps its module loaded.
        launch(ctas, 1, 1, stream, compiled.function, *options, arguments)

    return run


def _bind_generated(launcher: Any, compiled: Any, ctas: int) -> Callable[[int, list[Any]], None]:
    """Triton 3.6: a C function generated for the kernel's signature."""
    launch = launcher.launch
    if inspect.isfunction(launch):  # Python that expands descriptors, around the C function
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    # Two scratch buffers before the kernel's metadata; the launch's and two hooks after it.
    options = (
        launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip

    def run(stream: int, arguments: list[Any]) -> None:
        launch(ctas, 1, 1, stream, compiled.function, *options, *arguments)

    return run


@functools.lru_cache(maxsize=1024)
def _map(
    shape: tuple[int, ...], strides: tuple[int, ...], layout: tuple[tuple[str, Any], ...]
) -> _Map:
    """Return what makes a tensor map, shape and strides of a matrix that may lie anywhere.

    layout: of its blocks in shared memory, in Triton's words. A map is a pure function of these
    facts and the address, so one that is kept is never out of date, whatever becomes of the memory;
    and it keeps no tensor alive. It is looked up by the address alone, as the rest is slow to hash.
    """

    @functools.lru_cache(maxsize=4096)
    def encoded(address: int) -> tuple[Any, ...]:
        descriptor = SimpleNamespace(
            base=SimpleNamespace(data_ptr=lambda: address), padding="zero",
            round_f32_to_tf32=False, shape=shape, strides=strides,
        )  # fmt: skip
        place = () if VERSION < (3, 8) else (None,)
        return tuple(driver.make_tensordesc_arg(descriptor, dict(layout), *place))

    return encoded


def _frozen(layout: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in layout.items())
