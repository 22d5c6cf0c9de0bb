"""Fine-tune a language model with LoRA twice, by plain PEFT and fused, and compare the two.

Both runs start from the same adapters and see the same batches. Two loss curves in one picture,
a table and an adapter in PEFT's format are the result; plain PEFT then checks the adapter. Under
torchrun every process takes its share of each batch, and the result is the same.
"""

import argparse
import copy
import functools
import itertools
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, NamedTuple

import common
import parallel
import torch
import torch.distributed as dist
from torch import Tensor, nn


class Run(NamedTuple):
    """What one training run measured: loss per step, validation loss before and after, memory."""

    losses: list[float]
    validation: tuple[float, float]
    peak_mib: float | None


class Speeds(NamedTuple):
    """Tokens per second, forward and backward, as they are printed."""

    plain: str
    separate: str  # fused, with a dx for each layer
    fused: str


def main() -> None:
    """Run the comparison."""
    # So long that the demo's layers share their dx (shared_dx.FEW_BYTES).
    parser = common.Parser(__doc__, steps=24, length=128, out="runs/finetune")
    parser.add_argument(
        "--dropout",
        type=common.PROBABILITY,
        default=0.0,
        help="on the adapters' input; above 0 the runs draw different masks, so losses differ",
    )
    parser.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="QLoRA: the frozen weights in NF4 (bitsandbytes)",
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="under torchrun: shard the model instead of copying it"
    )
    args = parser.parse()
    if args.fsdp and not dist.is_torchelastic_launched():
        common.fail("argument --fsdp: start several processes, by torchrun", status=2)

    base, tokenizer = common.load_model(args, args.load_in_4bit)
    batches, validation = common.split(tokenizer, args)
    pristine = copy.deepcopy(base)  # for the last check
    if args.load_in_4bit:
        pristine.dequantize()
    model = common.add_adapters(base, args, args.dropout).to(args.device)
    describe(model, batches, validation, args)
    qualify(model, batches, args)

    from lora_kernels import peft

    trained = parallel.wrap(model, args.fsdp)
    prompt = make_prompt(tokenizer, validation)
    before = complete(model, tokenizer, prompt)
    start = trainable_state(model)
    plain = measure("plain PEFT", trained, batches, validation, args)
    restore(model, start)
    report = peft.fuse(model)
    if not report.fused:
        common.fail(f"nothing could be fused:\n{report}")
    fused = measure("fused", trained, batches, validation, args)
    ran = str(report.calls())  # as far as training and validation go
    after = complete(model, tokenizer, prompt)
    speeds, calls = compare_speed(trained, batches[0])

    print(f"\nlora_kernels.peft.fuse:\n{report}\n\nIts calls:\n{ran}\n")
    print(table(plain, fused, speeds, backends(trained, calls, batches[0]), args))
    print_completions(prompt, before, after)
    picture, adapter = args.out / "losses.png", args.out / "adapter"
    state, logits = parallel.trained_state(model), logits_of(model, validation[:1])
    if parallel.RANK == 0:
        draw(plain, fused, picture)
        model.save_pretrained(adapter, state_dict=state, save_embedding_layers=False)
        check_adapter(logits, pristine.to(args.device), adapter, validation[:1])
        print(f"\nLoss curves: {picture}\nAdapter:     {adapter}")
    parallel.leave()


def describe(
    model: nn.Module, batches: Tensor, validation: Tensor, args: argparse.Namespace
) -> None:
    """Say what is about to happen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    steps, batch, length = batches.shape
    print(
        f"Model: {args.model}, {frozen / 1e6:.1f} M frozen parameters ({args.dtype}), "
        f"{trained / 1e6:.2f} M trained ones (LoRA, rank {args.rank}), on {args.device}\n"
        f"Text:  {args.text}; {steps} steps of "
        f"{batch} x {length} tokens, validation on {validation.numel()} tokens held out\n"
    )


def qualify(model: nn.Module, batches: Tensor, args: argparse.Namespace) -> None:
    """On a GPU, let it vouch for the kernels first, on this model's sizes: minutes, once."""
    if args.device.type != "cuda" or parallel.RANK > 0:  # whose record all use
        return
    layers = [layer.base_layer for layer in model.modules() if hasattr(layer, "lora_A")]
    shapes = {f"{layer.out_features},{layer.in_features}" for layer in layers}
    command = [sys.executable, "-m", "lora_kernels.qualify"]
    command += ["--shapes", *sorted(shapes), "--rank", str(args.rank)]
    command += ["--tokens", str(batches[0].numel())]
    command += ["--dropout", *map(str, sorted({0.0, args.dropout}))]
    command += ["--dtype", str(args.dtype).removeprefix("torch.")]
    print(" ".join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=False)  # what it found bad, "auto" leaves alone
    print()


def measure(
    label: str, model: nn.Module, batches: Tensor, validation: Tensor, args: argparse.Namespace
) -> Run:
    """Train, with a progress bar, and evaluate before and after."""
    loss_before = common.evaluate(model, validation)
    read_peak_mib = watch_peak(args.device)
    losses = common.train(model, batches, args.learning_rate, f"{label:<10}")
    peak_mib = read_peak_mib()
    return Run(losses, (loss_before, common.evaluate(model, validation)), peak_mib)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every trainable parameter."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Write back what `trainable_state` copied."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])


def watch_peak(device: torch.device) -> Callable[[], float | None]:
    """Return a function that reads the peak memory from now on in MiB, None where it is unknown.

    On a GPU it is what PyTorch allocates there; on the CPU what the process occupies (Linux only).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 2**20
    process = Path("/proc/self")
    try:
        (process / "clear_refs").write_text("5")  # restarts VmHWM, the high-water mark
    except OSError:
        return lambda: None
    return lambda: int(re.findall(r"VmHWM:\s+(\d+)", (process / "status").read_text())[0]) / 2**10


def compare_speed(
    model: nn.Module, tokens: Tensor, rounds: int = 9
) -> tuple[Speeds, dict[str, dict[str, int]]]:
    """Return the tokens/s of forward and backward, and the calls of a fused one.

    Plain, fused with a dx for each layer, and fused with one for all that read one x. They take
    turns, each the first as often, so that all meet the same state of the machine, after one turn
    that does not count; of the times the median is taken, and half the distance of the quartiles.
    `model` is left fused.
    """
    from lora_kernels import peft

    model.train()
    share = parallel.own_share(tokens[None])[0]
    apart = functools.partial(peft.fuse, share_inputs=False)
    seconds: dict[Callable[[nn.Module], Any], list[float]]
    seconds = {peft.unfuse: [], apart: [], peft.fuse: []}
    turns = list(seconds.items())
    for _ in range(1 + rounds):
        for switch, times in turns:
            switch(model)
            start = time.perf_counter()
            loss = model(input_ids=share, labels=share, use_cache=False).loss
            loss.backward()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - start)
            model.zero_grad()
        turns.append(turns.pop(0))
    speeds = Speeds(*(_per_second(tokens.numel(), times[1:]) for times in seconds.values()))
    return speeds, peft.fuse(model).calls()


def _per_second(count: int, seconds: list[float]) -> str:
    low, middle, high = quantiles((count / s for s in seconds), n=4)
    return f"{middle:.0f} ± {(high - low) / 2:.0f}"


def backends(model: nn.Module, calls: dict[str, dict[str, int]], tokens: Tensor) -> str:
    """Return what ran the calls of a training step: backends, forward and backward, or PEFT."""
    from lora_kernels.dispatch import select
    from lora_kernels.ops.lora_linear import BACKENDS, Problem

    chosen = set()
    for name, outcomes in calls.items():
        if "fused" not in outcomes:
            chosen.add("PEFT")
            continue
        layer = model.get_submodule(name)
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        adapter = layer.active_adapters[0]
        dropout_p = getattr(layer.lora_dropout[adapter], "p", 0.0)
        problem = Problem.of(tokens.numel(), weight, layer.lora_A[adapter].weight, bias, dropout_p)
        chosen |= {select(BACKENDS, problem, backward=b).name for b in (False, True)}
    return ", ".join(sorted(chosen))


def table(plain: Run, fused: Run, speeds: Speeds, backend: str, args: argparse.Namespace) -> str:
    """Return the comparison as text."""
    few = min(5, args.steps)

    def column(run: Run, speed: str, separate: str, runs_on: str) -> list[str]:
        return [
            *(f"{loss:.4f}" for loss in run.validation),
            *(f"{mean(losses):.4f}" for losses in (run.losses[:few], run.losses[-few:])),
            speed,
            separate,
            "unknown" if run.peak_mib is None else f"{run.peak_mib:.0f} MiB",
            runs_on,
        ]

    labels = [
        "validation loss at the start",
        "validation loss at the end",
        f"training loss, first {few} steps",
        f"training loss, last {few} steps",
        "tokens/s, forward and backward",
        "  with share_inputs=False",
        f"peak memory ({'GPU' if args.device.type == 'cuda' else 'whole process'})",
        "LoRA layers computed by",
    ]
    columns = (
        column(plain, speeds.plain, "", "PEFT"),
        column(fused, speeds.fused, speeds.separate, backend),
    )
    rows = [("", "plain PEFT", "fused"), *zip(labels, *columns, strict=True)]
    lines = [f"{label:<32}{left:>12}{right:>12}" for label, left, right in rows]
    apart = max(abs(a - b) for a, b in zip(plain.losses, fused.losses, strict=True))
    lines.append(f"{'largest difference in loss':<32}{apart:>24.1e}")
    if args.dropout:
        lines.append("(dropout: the runs draw different masks, so their losses are not the same)")
    return "\n".join(lines)


def make_prompt(tokenizer: Any, validation: Tensor, words: int = 12) -> str:
    """Return the beginning of the first whole paragraph in the held-out windows."""
    windows = [tokenizer.decode(tokens) for tokens in validation]
    # A window begins in the middle of a paragraph: that one is left out.
    paragraphs = [p.split() for window in windows for p in window.split("\n\n")[1:]]
    return " ".join(next((p for p in paragraphs if len(p) > words), windows[0].split())[:words])


@torch.no_grad()
def complete(model: nn.Module, tokenizer: Any, prompt: str) -> str:
    """Return the most likely continuation of `prompt`."""
    model.eval()
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(
        **tokens, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def print_completions(prompt: str, before: str, after: str) -> None:
    """Print a prompt from the held-out text and how the model goes on."""
    texts = {"Prompt": prompt, "Before training": before, "After training": after}
    for label, text in texts.items():
        lines = (textwrap.wrap(line, 88) or [""] for line in text.strip("\n").split("\n"))
        print(f"\n{label}:", *itertools.chain(*lines), sep="\n    ")


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of `model` in evaluation mode for token ids [batch, length]."""
    return model.eval()(input_ids=tokens).logits.double()


def check_adapter(fused: Tensor, pristine: nn.Module, folder: Path, tokens: Tensor) -> None:
    """Load the saved adapter into the untouched base model by plain PEFT, merge, compare `fused`.

    The fused model's logits may be at most twice as far from the merged one's as unmerged PEFT's:
    `max|fused - merged| <= 2 (max|PEFT - merged| + eps max|merged|)`.
    """
    from peft import PeftModel

    base = logits_of(pristine, tokens)
    reloaded = PeftModel.from_pretrained(pristine, folder)
    unmerged = logits_of(reloaded, tokens)
    merged = logits_of(reloaded.merge_and_unload(), tokens)
    error, peft_error = ((x - merged).abs().max() for x in (fused, unmerged))
    allowed = 2 * (peft_error + torch.finfo(pristine.dtype).eps * merged.abs().max())
    print(
        "\nThe saved adapter, loaded by plain PEFT into the untouched base model and merged:\n"
        f"    it moves the logits by up to     {(merged - base).abs().max():.3g}\n"
        f"    fused and merged logits differ by {error:.2e}  (allowed: {allowed:.2e})"
    )
    if not error <= allowed:
        common.fail("the merged adapter does not reproduce the fused model")


def draw(plain: Run, fused: Run, path: Path) -> None:
    """Write both loss curves and their difference to a PNG file."""
    pyplot = common.load_pyplot()
    steps = range(1, len(plain.losses) + 1)
    figure, (curves, apart) = pyplot.subplots(
        2, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    curves.plot(steps, plain.losses, color="tab:orange", lw=5, alpha=0.45, label="plain PEFT")
    curves.plot(steps, fused.losses, color="tab:blue", lw=1.3, label="fused (lora_kernels)")
    smooth = [mean(fused.losses[max(i - 8, 0) : i]) for i in steps]
    curves.plot(steps, smooth, color="tab:blue", lw=1, ls=":", label="fused, mean of 8 steps")
    curves.plot((0, len(steps)), fused.validation, "kD", ms=6, label="validation before, after")
    curves.set(
        ylabel="loss (nats per token)", title="The same fine-tuning, by plain PEFT and fused"
    )
    curves.legend(frameon=False)
    difference = [b - a for a, b in zip(plain.losses, fused.losses, strict=True)]
    apart.axhline(0, color="grey", lw=0.8)
    apart.plot(steps, difference, color="tab:blue", lw=1.3)
    apart.set(xlabel="step", ylabel="fused − plain")
    apart.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
