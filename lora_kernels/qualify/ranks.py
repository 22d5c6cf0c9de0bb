"""One record for all ranks of a process group, so that they choose alike: that of rank 0.

Rank 0 publishes its record in the group's store when it first asks; every other rank uses that one
instead of its own. It waits for rank 0's word, but not for ever: rank 0 may have no LoRA layer (a
pipeline's first stage), or ask only once it has heard from the very rank that waits for it. After
`WAIT_S` a rank speaks in its place, with a warning. The store's compare-and-set lets one word in,
so that all obey the same one, whoever spoke and whenever they come; there is no collective that a
rank could be missing from.

`LORA_KERNELS_RECORD` is the user's own word: a rank that has it obeys it and waits for nobody.
"""

import contextlib
import json
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from lora_kernels.qualify import record
from lora_kernels.qualify.record import Record

WAIT_S = 30.0  # for rank 0's word; ranks come to their first layer within seconds
_SAME = ("kernels", "extension", "triton", "name", "arch", "mixed")  # or a record says nothing
_WITHOUT_STORE = ("fake", "mpi")  # nothing to agree by: each rank obeys its own record


def group() -> Any:
    """Return the process group whose ranks must choose alike, or None."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return None if distributed.get_backend() in _WITHOUT_STORE else distributed.group.WORLD


def agreed(own: Record | str, here: Mapping[str, Any]) -> Record | str:
    """Return the record that all ranks use, or why they use none.

    Args:
        own: this rank's record, or why it has none.
        here: this rank's environment.

    Raises:
        RuntimeError: the record speaks for another GPU or other kernels than this rank's; the
            message says what to do.
    """
    rank = torch.distributed.get_rank()
    pinned = record.pinned() is not None
    if pinned and rank != 0:
        return own
    text = own.to_json() if isinstance(own, Record) else None
    word = json.dumps({"rank": rank, "environment": here, "record": text})
    said = json.loads(_said(word, rank, str(here.get("device"))))
    if pinned or said["rank"] == rank:
        return own
    if said["record"] is None:
        return f"rank {said['rank']}, whose word all ranks obey, has no record for its GPU"
    for key in _SAME:
        theirs, mine = said["environment"].get(key), here.get(key)
        if theirs != mine:
            raise RuntimeError(
                f"lora_kernels: all ranks must choose alike, but {key} is {mine!r} on rank {rank} "
                f"and {theirs!r} on rank {said['rank']}; make them equal, or set "
                "LORA_KERNELS_RECORD on every rank to a record of its own GPU"
            )
    return record.from_json(said["record"])


def _said(word: str, rank: int, device_type: str) -> str:
    """Return the word that all ranks obey: `word`, if nobody was first."""
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"lora_kernels/record/{device_type}"
    if rank != 0:
        with contextlib.suppress(RuntimeError):  # of a wait without success
            store.wait([key], timedelta(seconds=WAIT_S))
    said: str = store.compare_set(key, "", word).decode()
    if rank != 0 and said == word:
        warnings.warn(
            f"lora_kernels: rank 0 has not chosen a backend within {WAIT_S:g} s, so rank {rank} "
            "speaks in its place; LORA_KERNELS_RECORD=path pins a record without delay",
            stacklevel=2,
        )
    return said
