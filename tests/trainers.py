"""A short run of `transformers.Trainer`, for the tests and for the processes they start."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

LAYERS, STEPS = 14, 4


def tokens(count: int = 16, length: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 64, (count, length), generator=generator).tolist()


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
    } | options
    return kind(**options)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    return Trainer(model, arguments(folder, **options), train_dataset=data)


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def train(model: nn.Module, folder: Path, **options: Any) -> list[float]:
    """Return the losses of six steps."""
    run = trainer(model, folder, max_steps=6, **options)
    run.train()
    return losses(run)
