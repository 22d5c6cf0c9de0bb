"""One rank of a `transformers.Trainer` run under torchrun that dies, or goes on where that ended.

torchrun ... tests/trained_by_ranks.py FOLDER die | resume

`resume` then trains again without an interruption, and writes the losses of both.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft_models import llama
from torch import Tensor
from trainers import LAYERS, losses, trainer
from transformers import Trainer

from lora_kernels.peft import fuse

RANK, FOLDER, WHAT = int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2]
DIES_AT = 3  # the checkpoint before is that of step 2


def trained(folder: Path, *, dies: bool = False, resume: bool = False) -> Trainer:
    """Train under dropout, saving every second step; every call runs fused."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    run: Any = trainer(llama(lora_dropout=0.2), folder, **saving)
    report = fuse(run.model)

    def die(_: Tensor) -> None:
        if run.state.global_step == DIES_AT and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if dies:  # in the middle of a backward pass, in which the other rank then waits for this one
        layer = run.model.base_model.model.model.layers[1].self_attn.q_proj
        layer.lora_A["default"].weight.register_hook(die)
    run.train(resume_from_checkpoint=resume or None)
    calls = report.calls()
    assert len(calls) == LAYERS
    assert all(counts.keys() == {"fused"} for counts in calls.values()), str(calls)
    return run


torch.set_num_threads(1)
if WHAT == "die":
    trained(FOLDER, dies=True)
else:
    runs = trained(FOLDER, resume=True), trained(FOLDER / "whole")
    if RANK == 0:
        (FOLDER / "losses.json").write_text(json.dumps([losses(run) for run in runs]))
