"""The trainers people use, with one line more: `fuse(trainer.model)`."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft.utils.hotswap
from peft import LoraConfig, PeftModel
from peft_models import calls_of_lora_linear, llama
from peft_models import one_thread as one_thread
from torch._dynamo.utils import counters
from torchrun import torchrun
from trainers import LAYERS, STEPS, arguments, losses, tokens, trainer
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from lora_kernels.peft import fuse


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<end>": 0, "<unknown>": 1} | {f"w{i}": i for i in range(2, 64)}
    words_of = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    words_of.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_of, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )


def sft(model: nn.Module, folder: Path, tokenizer: Any, **options: Any) -> Trainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"input_ids": row} for row in tokens()])
    options = {"max_length": 24, "bf16": False} | options
    return trl.SFTTrainer(
        model,
        arguments(folder, trl.SFTConfig, **options),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def dpo(model: nn.Module, folder: Path, tokenizer: Any, **options: Any) -> Trainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    text = [" ".join(f"w{token}" for token in row) for row in tokens(count=48, length=6)]
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, text[i : i + 3], strict=True)) for i in range(0, 48, 3)]
    return trl.DPOTrainer(
        model,
        args=arguments(folder, trl.DPOConfig, max_length=24, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def base_of_llama() -> nn.Module:
    """The model of `llama()` before PEFT."""
    return llama().unload()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(got: Trainer, expected: Trainer, rtol: float = 1e-4) -> None:
    assert len(losses(got)) == len(losses(expected)) > 0
    assert losses(got) == pytest.approx(losses(expected), rel=rtol)
    # Adam divides by |gradient|: where that is tiny, rounding decides a step of the learning rate.
    torch.testing.assert_close(adapters(got.model), adapters(expected.model), rtol=1e-2, atol=2e-3)


CHECKPOINTING: tuple[dict[str, Any], ...] = (
    {},
    *(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": each}}
        for each in (False, True)
    ),
)


@pytest.mark.parametrize(
    ("kind", "options"),
    [*itertools.product((sft, dpo), CHECKPOINTING), (sft, {"packing": True})],
)
def test_fused_and_plain_learn_the_same(
    kind: Callable[..., Trainer],
    options: dict[str, Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, fused = (kind(base_of_llama(), tmp_path, tokenizer, **options) for _ in range(2))
    assert len(fuse(fused.model).fused) == LAYERS
    with calls_of_lora_linear(monkeypatch) as calls:
        fused.train()
    again = 2 if "gradient_checkpointing" in options else 1
    # DPO's reference model is this one with its adapters disabled: PEFT's own forward.
    assert len(calls) == LAYERS * STEPS * again
    plain.train()
    assert_same(fused, plain)


def test_compiled_trainer_breaks_no_graph_and_recompiles_as_often_as_peft(tmp_path: Path) -> None:
    frames = {}
    done = {}
    for label in ("plain", "fused"):
        torch._dynamo.reset()
        counters.clear()
        model = llama()
        if label == "fused":
            assert len(fuse(model).fused) == LAYERS
        done[label] = trainer(
            model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager"
        )
        done[label].train()
        frames[label] = counters["frames"]["total"], sum(counters["graph_break"].values())
    assert frames["fused"] == frames["plain"]
    assert frames["fused"][1] == 0
    assert_same(done["fused"], done["plain"])


class Killed(TrainerCallback):
    """Ends the training in the middle of a step, as a crash would."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_run_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = trainer(llama(), tmp_path / "whole", **saving)
    fuse(whole.model)
    whole.train()
    killed = trainer(llama(), tmp_path / "killed", **saving)
    fuse(killed.model)
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    # What was saved is PEFT's format: a plain model resumes from it as well.
    for fused in (True, False):
        resumed = trainer(llama(), tmp_path / "killed", **saving)
        if fused:
            fuse(resumed.model)
        resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
        assert_same(resumed, whole)


def test_a_rank_killed_in_mid_step_ends_the_run_which_then_resumes(tmp_path: Path) -> None:
    script = Path(__file__).parent / "trained_by_ranks.py"
    died = torchrun(2, script, tmp_path, "die")
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL) received" in died.stderr, died.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = torchrun(2, script, tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    # Of the steps before the checkpoint the resumed run has the losses that were saved.
    got, whole = json.loads((tmp_path / "losses.json").read_text())
    assert len(got) == STEPS
    assert got == pytest.approx(whole, rel=1e-6)


def test_hot_swapped_and_merged_after_training(tmp_path: Path) -> None:
    done = trainer(llama(), tmp_path)
    fuse(done.model)
    done.train()
    done.model.save_pretrained(tmp_path / "adapter")
    x = torch.tensor(tokens(2))

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return model.eval()(input_ids=x).logits

    trained = logits(done.model)
    swapped = llama()
    fuse(swapped)
    assert not torch.allclose(logits(swapped), trained, atol=1e-2)
    peft.utils.hotswap.hotswap_adapter(swapped, tmp_path / "adapter", "default")
    torch.testing.assert_close(logits(swapped), trained)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(llama().unload()), tmp_path / "adapter")
    torch.testing.assert_close(logits(done.model.merge_and_unload()), trained)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), trained)
