"""Reading and writing results files: what pytest-benchmark wrote, as a list of flat rows."""

import json
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
ASKING_US = 2.0  # of Python, at every call of a layer that is left to PEFT
_PACKAGES = ("torch", "triton", "peft", "transformers")


class Results(NamedTuple):
    """A results file: `rows` were timed, `pairs` beside PEFT, and `untimed` say why not."""

    path: Path
    machine: dict[str, Any]
    commit: str
    datetime: str
    rows: list[dict[str, Any]]
    untimed: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        ValueError: it was not written by this suite.
    """
    try:
        raw = json.loads(path.read_text())
        commit = raw["commit_info"]
        timed = [b["extra_info"] | {"rounds": b["stats"]["rounds"]} for b in raw["benchmarks"]]
        return Results(
            path,
            raw["machine_info"],
            f"{commit['id'][:12]}{'-dirty' if commit.get('dirty') else ''}",
            raw["datetime"][:19],
            [row for row in timed if "x_peft" not in row],
            raw["untimed"],
            [row for row in timed if "x_peft" in row],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a results file of this suite: {error!r}") from error


def newest(device_type: str, folder: Path = RESULTS) -> Results | None:
    """Return the newest results of any machine with this kind of device, "cpu" or "cuda"."""
    found = (load(path) for path in folder.glob("*/*.json"))
    return max(
        (results for results in found if results.machine["device_type"] == device_type),
        key=lambda results: results.datetime,
        default=None,
    )


def too_slow(pair: dict[str, Any]) -> str | None:
    """Return in what a pair breaks the promise to be never slower than PEFT, or None.

    Slower by more than its noise; where PEFT's own code ran, asking whether to fuse is allowed for.
    """
    allowed = pair["noise"] + (ASKING_US / pair["peft_us"] if pair["left"] else 0.0)
    if pair["x_peft"] <= 1 + allowed:
        return None
    return f"slower: {pair['x_peft']:.3f} of PEFT's time, beyond the noise of {allowed:.1%}"


def machine() -> dict[str, Any]:
    """Return what times depend on: the device, its driver, and the packages' versions."""
    facts: dict[str, Any] = {"device_type": "cpu", "device": "cpu", "driver": None}
    if torch.cuda.is_available():
        facts = {
            "device_type": "cuda",
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    facts["threads"] = torch.get_num_threads()
    return facts | {"packages": {name: _version(name) for name in _PACKAGES}}


def device_folder(device: str) -> str:
    """Return the name of a device's folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
