"""One rank of a process group that asks for its record: run by torchrun, it plays every scene.

torchrun ... tests/ranks_agree.py FOLDER (one JSON file for each rank comes to lie there)

Scenes follow one another in the same processes, each in a group of its own; the first is the one
that torchrun itself sets up.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from qualified import HERE, PROBLEM, a_record, measured, proven

from lora_kernels import dispatch
from lora_kernels.ops.lora_linear import reference
from lora_kernels.qualify import choose, ranks, record
from lora_kernels.qualify.record import Record

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[1])
BACKENDS = (proven("mine"), reference.BACKEND)
Result = dict[str, Any]


def record_of(rank: int) -> Record:
    """A record that names its rank by the backend's time."""
    return a_record(measured(time_us=float(10 + rank)))


def keeps(found: Record | None, **environment: Any) -> None:
    """Let this rank's machine be `environment` and have `found`, or no record."""
    here = {**HERE, **environment}
    record.environment = lambda device_type: dict(here)
    os.environ["LORA_KERNELS_CACHE"] = str(FOLDER / f"cache-{RANK}-{time.monotonic_ns()}")
    if found is not None:
        record.save(Record(here, found.backends, found.created))
    choose.forget()


def asked() -> Result:
    """What this rank obeys: whose record, or the reason or error; and how long it took to say."""
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = choose.known("cpu")
            said = found if isinstance(found, str) else found.backends["mine"].measured[0].time_us
        except RuntimeError as error:
            said = f"error: {error}"
    texts = [str(w.message) for w in warned]
    return {"said": said, "took": time.monotonic() - start, "warned": texts}


def in_group(size: int, name: str, scene: Callable[[], Result]) -> Result | None:
    """Play a scene in a fresh group of the first `size` ranks; the others have nothing to say."""
    if size <= RANK:
        return None
    store = dist.FileStore(str(FOLDER / f"store-{name}"), size)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=size)
    try:
        result = scene()
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def alike() -> Result:
    keeps(record_of(7))
    return asked()


def different() -> Result:
    keeps(record_of(RANK))
    return asked()


def only_others_have_one() -> Result:
    keeps(None if RANK == 0 else record_of(RANK))
    return asked()


def only_rank_0_has_one() -> Result:
    keeps(record_of(0) if RANK == 0 else None)
    return asked()


def rank_0_is_late() -> Result:
    keeps(record_of(RANK))
    time.sleep(1.0 * (RANK == 0))
    return asked()


def rank_0_asks_after_all_others() -> Result:
    """As one that waits for what the others compute; it would never be asked in time."""
    ranks.WAIT_S = 0.5
    keeps(record_of(RANK))
    try:
        if RANK == 0:
            dist.barrier()
            return asked()
        result = asked()
        dist.barrier()
        return result
    finally:
        ranks.WAIT_S = 30.0


def pinned() -> Result:
    """Each rank to a record of its own; rank 0 does not ask, and nobody waits."""
    keeps(None)
    path = record.save(record_of(RANK), FOLDER / f"pinned-{RANK}.json")
    os.environ["LORA_KERNELS_RECORD"] = str(path)
    try:
        return asked() if RANK else {}
    finally:
        del os.environ["LORA_KERNELS_RECORD"]


def pinned_on_rank_0() -> Result:
    keeps(record_of(RANK))
    if RANK == 0:
        path = record.save(record_of(9), FOLDER / "pinned.json")
        os.environ["LORA_KERNELS_RECORD"] = str(path)
    try:
        return asked()
    finally:
        os.environ.pop("LORA_KERNELS_RECORD", None)


def another_kind_of_gpu() -> Result:
    keeps(record_of(RANK), **({"name": "other"} if RANK == 1 else {}))
    return asked()


def another_kind_without_records() -> Result:
    keeps(None, **({"name": "other"} if RANK == 1 else {}))
    return asked()


def mixed_gpus_in_sight() -> Result:
    keeps(record_of(RANK), **({"mixed": True} if RANK == 1 else {}))
    return asked()


def a_shipped_record() -> Result:
    """It was made on a GPU of another name; the ranks' own are alike."""
    keeps(None)
    record.SHIPPED = FOLDER / "shipped"
    shipped = a_record(measured(time_us=50.0), name="the lab's")
    record.save(shipped, record.SHIPPED / f"{RANK}.json")
    try:
        return asked()
    finally:
        record.SHIPPED = FOLDER / "none"


def a_choice_from_before_the_group() -> Callable[[], Result]:
    """It gives way to rank 0's word at the first new problem; nothing is asked again after that."""
    keeps(record_of(0) if RANK == 0 else None)
    before = dispatch.select(BACKENDS, PROBLEM).name

    def scene() -> Result:
        new = dispatch.select(BACKENDS, PROBLEM._replace(m=1025)).name
        again = dispatch.select(BACKENDS, PROBLEM).name
        real, dist.is_initialized = dist.is_initialized, None  # whoever asks, fails
        try:
            for _ in range(3):
                dispatch.select(BACKENDS, PROBLEM)
        finally:
            dist.is_initialized = real
        return {"before": before, "new": new, "again": again}

    return scene


def made_anew() -> Result:
    """Rank 0 has another record by the time of the second group; nobody calls forget()."""
    keeps(record_of(RANK))
    first = in_group(2, "made-anew-1", asked)
    if RANK == 0:
        record.save(Record(dict(HERE), record_of(5).backends, ""))
    second = in_group(2, "made-anew-2", asked)
    return {"first": first and first["said"], "second": second and second["said"]}


def main() -> None:
    record.SHIPPED = FOLDER / "none"
    choose.KEPT_FOR = ("cpu",)
    keeps(record_of(RANK))
    results: dict[str, Any] = {"no group": asked()}
    dist.init_process_group("gloo")
    choose.forget()
    results["torchrun"] = asked()
    dist.barrier()
    dist.destroy_process_group()
    scenes = (
        alike, different, only_others_have_one, only_rank_0_has_one, rank_0_is_late,
        rank_0_asks_after_all_others, pinned, pinned_on_rank_0, another_kind_of_gpu,
        another_kind_without_records, mixed_gpus_in_sight, a_shipped_record,
    )  # fmt: skip
    for size in (2, 3):
        for scene in scenes:
            name = f"{scene.__name__} {size}"
            results[name] = in_group(size, name, scene)
    results["before"] = in_group(3, "before", a_choice_from_before_the_group())
    results["anew"] = made_anew()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
