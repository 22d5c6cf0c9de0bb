"""What this machine has shown of each backend: one JSON file for each environment.

A record belongs to exactly one environment: the versions, the kernels' own sources, the GPU. A file
that is torn, foreign or of another schema is a miss with a reason, never an exception. It lies in
`LORA_KERNELS_CACHE`, else in the user's cache folder; `LORA_KERNELS_RECORD` pins one file instead.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import stat
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "records"
_MOST_BYTES = 1 << 26  # a thousand times what a record has
_SOURCES = ("ops/lora_linear/*.py", "ops/lora_linear/triton/*.py")

RIGHT, WRONG, HUNG, CRASHED, MEMORY, UNTRIED = (
    "right", "wrong", "hung", "crashed", "no memory", "not tried",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One direction of a backend on one size, beside the composition and the bare frozen layer.

    Times in microseconds, medians; `x_composition` of the host's clock in eager mode, `noise` the
    composition against itself in the same rounds. `x_graph` is the same in a replayed CUDA graph,
    where only the device's time counts; None off CUDA.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool
    backward: bool
    time_us: float
    composition_us: float
    frozen_us: float
    noise: float
    x_graph: float | None = None

    @property
    def x_composition(self) -> float:
        """The backend's time over the composition's."""
        return self.time_us / self.composition_us

    @property
    def slower(self) -> bool:
        """Whether it is slower than the composition beyond the noise, eager or replayed."""
        limit = 1 + min(self.noise, 0.05)
        return self.x_composition > limit or (self.x_graph or 0) > limit


@dataclass(frozen=True)
class Verdict:
    """What became of a backend: the outcome of its checks, and what it took on each size.

    `outcome` is RIGHT if every check passed, else the first that did not decides; `detail` says
    which. `worst_error` is the largest error over its tolerance. `timed` names the timings that
    were tried, too little memory included; `unreached` the steps that the budget left out.
    """

    outcome: str
    detail: str = ""
    checks: int = 0
    worst_error: float = 0.0
    measured: tuple[Measured, ...] = ()
    timed: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()


def summary(verdict: Verdict) -> str:
    """Return a verdict in a line."""
    if verdict.outcome != RIGHT:
        return f"{verdict.outcome}{': ' * bool(verdict.detail)}{verdict.detail}"
    error = f"{verdict.worst_error:.2f} of the tolerance"
    text = f"right in {verdict.checks} checks, largest error {error}"
    if verdict.measured:
        good = sum(not size.slower for size in verdict.measured)
        usual = statistics.median(size.x_composition for size in verdict.measured)
        text += (
            f"; {usual:.2f} x the time of plain PyTorch (median), not slower on {good} of "
            f"{len(verdict.measured)} sizes"
        )
    if verdict.unreached:
        text += f"; {len(verdict.unreached)} more were not reached in the budget"
    return text


@dataclass(frozen=True)
class Record:
    """The verdicts on all backends in one environment, and when they were found (ISO date)."""

    environment: Mapping[str, Any]
    backends: Mapping[str, Verdict]
    created: str = ""

    def to_json(self) -> str:
        """Return the file's text."""
        body = {"schema": SCHEMA, "digest": digest(self.environment), **dataclasses.asdict(self)}
        return json.dumps(body, indent=1) + "\n"


class Unreadable(ValueError):  # noqa: N818 (reads as what happened)
    """A text is no record of this schema; the message says why, in one line."""


def from_json(text: str) -> Record:
    """Read a record.

    Raises:
        Unreadable: for anything but a whole record of this schema.
    """
    try:
        body = json.loads(text)
        if body["schema"] != SCHEMA:
            raise Unreadable(f"its schema is {body['schema']!r}, not {SCHEMA}")
        environment = dict(body["environment"])
        if body["digest"] != digest(environment):
            raise Unreadable("its digest is not that of its environment")
        backends = {}
        for name, entry in body["backends"].items():
            sizes = tuple(map(measured, entry.pop("measured")))
            names = {key: tuple(map(str, entry.pop(key))) for key in ("timed", "unreached")}
            verdict = _typed(Verdict, entry)
            backends[name] = dataclasses.replace(verdict, measured=sizes, **names)
        return Record(environment, backends, str(body["created"]))
    except Unreadable:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise Unreadable(f"it is torn or no record ({what[:120]})") from error


def _typed(kind: Any, fields: Mapping[str, Any]) -> Any:
    """Build a dataclass of plain numbers and strings, and see that they are."""
    built = kind(**fields)
    for field in dataclasses.fields(kind):
        value, wanted = getattr(built, field.name), field.type
        if wanted is float and type(value) is int:
            continue
        if wanted in (int, float, bool, str) and type(value) is not wanted:
            raise TypeError(f"{field.name} is {value!r}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field.name} is {value}")
    return built


def measured(fields: Mapping[str, Any]) -> Measured:
    """Build a measurement; raise TypeError or ValueError for what cannot be one."""
    built: Measured = _typed(Measured, fields)
    if built.x_graph is not None and type(built.x_graph) is not float:
        raise TypeError(f"x_graph is {built.x_graph!r}")
    sizes, times = (built.m, built.n, built.k, built.r), (built.composition_us, built.frozen_us)
    if not all(0 <= s < 2**62 for s in sizes) or not all(t > 0 for t in times):
        raise ValueError(f"sizes {sizes}, times {times}")
    return built


# --- Environment ----------------------------------------------------------------------------------


def digest(environment: Mapping[str, Any]) -> str:
    """Return what names the file of an environment."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]


def environment(device_type: str) -> dict[str, Any]:
    """Return all that a verdict may depend on; on CUDA this asks the driver for the device."""
    facts: dict[str, Any] = {
        "lora_kernels": _version("lora-kernels"),
        "kernels": _digest_of(_kernel_sources()),
        "extension": _digest_of(_extension()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "device": device_type,
    }
    if device_type != "cuda":
        return facts | {"name": platform.processor() or platform.machine(), "arch": None}
    kinds = [
        {
            "name": p.name,  # a MIG slice has a name of its own
            "arch": 10 * p.major + p.minor,
            "multiprocessors": p.multi_processor_count,
        }
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    versions = {"cuda": torch.version.cuda, "driver": _driver_version()}
    mixed = any(kind != kinds[0] for kind in kinds)
    return facts | versions | kinds[0] | {"mixed": mixed}


def _driver_version() -> int | None:
    """Return the version of CUDA that the driver speaks, 13000 say; torch has no public name."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _kernel_sources() -> Iterator[Path]:
    for pattern in _SOURCES:
        yield from sorted(PACKAGE.glob(pattern))


def _extension() -> list[Path]:
    """Find the extension's binary without loading it."""
    found = find_spec("lora_kernels._C")
    return [] if found is None or found.origin is None else [Path(found.origin)]


@functools.cache
def _digest_of_files(paths: tuple[Path, ...]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def _digest_of(paths: Any) -> str | None:
    found = tuple(paths)
    return _digest_of_files(found) if found else None


# --- Files ----------------------------------------------------------------------------------------


def folder() -> Path:
    """Return where records are kept; nothing is created.

    Raises:
        RuntimeError: there is neither `LORA_KERNELS_CACHE` nor a home folder.
    """
    if path := os.environ.get("LORA_KERNELS_CACHE"):
        return Path(path).expanduser()
    path = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(path):  # else it is to be ignored, says the specification
        return Path(path) / "lora_kernels"
    if sys.platform == "win32" and (path := os.environ.get("LOCALAPPDATA")):
        return Path(path) / "lora_kernels"
    home = Path.home()  # raises RuntimeError where there is none
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "lora_kernels"
    return home / ".cache" / "lora_kernels"


def save(record: Record, path: Path | None = None) -> Path:
    """Write `record` under its digest, or at `path`, replacing what was there in one step.

    Raises:
        OSError, RuntimeError: there is no place to write to.
    """
    path = path or folder() / f"{digest(record.environment)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(record.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def prepare() -> None:
    """See that records can be kept, before minutes are spent on finding one.

    Raises:
        OSError, RuntimeError: there is no place to write to.
    """
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder(), suffix=".tmp"):
        pass


def pinned() -> Path | None:
    """Return the file that `LORA_KERNELS_RECORD` names, if it names one."""
    path = os.environ.get("LORA_KERNELS_RECORD")
    return Path(path).expanduser() if path else None


def find(here: Mapping[str, Any]) -> Record | str:
    """Return the record for the environment `here`, or why there is none.

    Raises:
        RuntimeError: `LORA_KERNELS_RECORD` pins a file that cannot serve here.
    """
    if (path := pinned()) is not None:
        return _read_pinned(path, here)
    record = kept(here)
    if isinstance(record, Record):
        return record
    shipped = (_shipped_for(here, path) for path in sorted(SHIPPED.glob("*.json")))
    return next((r for r in shipped if r is not None), record)


def kept(here: Mapping[str, Any]) -> Record | str:
    """Return what this machine itself found in the environment `here`, or why there is nothing."""
    try:
        path = folder() / f"{digest(here)}.json"
    except RuntimeError as error:
        return f"there is no cache folder ({error})"
    record = _read(path)
    if isinstance(record, Record) and record.environment != here:
        return f"{path} cannot be used: it is of another environment"
    return record


def _read(path: Path) -> Record | str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return f"{path} cannot be used: it is no regular file"
        if status.st_size > _MOST_BYTES:
            return f"{path} cannot be used: it has {status.st_size} bytes"
        return from_json(path.read_text())
    except FileNotFoundError:
        return "it has not been tried on this machine"
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        return f"{path} cannot be used: {error}"


def _read_pinned(path: Path, here: Mapping[str, Any]) -> Record:
    if not path.is_file():
        raise RuntimeError(f"LORA_KERNELS_RECORD={path} is no file")
    record = _read(path)
    if not isinstance(record, Record):
        raise RuntimeError(f"LORA_KERNELS_RECORD={path}: {record}")
    for key in ("kernels", "device", "name", "arch"):
        if record.environment.get(key) != here.get(key):
            got, own = record.environment.get(key), here.get(key)
            raise RuntimeError(f"LORA_KERNELS_RECORD={path} is for {key} {got}, this is {own}")
    return record


def _shipped_for(here: Mapping[str, Any], path: Path) -> Record | None:
    """Return what a record from elsewhere says of this machine too: the same kernels, the same
    kind of GPU, the same minor version of the compiler; of a compiled backend, the same binary."""

    def minor(version: Any) -> list[str]:
        return str(version).split(".")[:2]

    record = _read(path)
    if not isinstance(record, Record):
        return None
    there = record.environment
    same = all(there.get(key) == here.get(key) for key in ("kernels", "device", "arch"))
    if not same or minor(there.get("triton")) != minor(here.get("triton")):
        return None
    own_binary = there.get("extension") == here.get("extension")
    backends = {k: v for k, v in record.backends.items() if k != "cuda" or own_binary}
    return dataclasses.replace(record, backends=backends)
