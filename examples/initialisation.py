"""Why LoRA starts from a random A and a zero B: train all four combinations and compare.

Every run repeats one batch, so that a curve shows learning and not the luck of the batch.
"""

from pathlib import Path
from typing import NamedTuple

import common
import parallel
import torch
from torch import Tensor, nn

COMBINATIONS = {  # whether A is random, whether B is random
    "A random, B zero": (True, False),
    "A zero, B random": (False, True),
    "both zero": (False, False),
    "both random": (True, True),
}


class Run(NamedTuple):
    """One combination: step-0 shift of the logits, gradient norms there, loss before each step."""

    shift: float
    da_norm: float
    db_norm: float
    losses: list[float]


def main() -> None:
    """Run the four combinations."""
    parser = common.Parser(__doc__, steps=12, length=64, out="runs/initialisation")
    args = parser.parse()
    if parallel.SIZE > 1:
        common.fail("this example runs in one process", status=2)
    base, tokenizer = common.load_model(args)
    batches, _ = common.split(tokenizer, args)
    batches = batches[:1].expand_as(batches)
    model = common.add_adapters(base, args).to(args.device)

    from lora_kernels import peft

    peft.fuse(model)
    runs = {}
    for label, (random_a, random_b) in COMBINATIONS.items():
        torch.manual_seed(args.seed)
        initialise(model, "lora_A", random_a)
        initialise(model, "lora_B", random_b)
        probe = probe_step_0(model, batches[0])
        losses = common.train(model, batches, args.learning_rate, f"{label:<16}")
        runs[label] = Run(*probe, losses)

    print(f"\n{'':<18}{'output shift':>13}{'|dA|':>11}{'|dB|':>11}{'loss, start':>13}{'end':>9}")
    for label, run in runs.items():
        print(
            f"{label:<18}{run.shift:>13.3g}{run.da_norm:>11.3g}{run.db_norm:>11.3g}"
            f"{run.losses[0]:>13.4f}{run.losses[-1]:>9.4f}"
        )
    print(EXPLANATION)
    path = args.out / "initialisation.png"
    draw(runs, path)
    print(f"Loss curves: {path}")


EXPLANATION = """
The gradients are da = s·(dy·B)ᵀ·x and db = s·dyᵀ·(x·Aᵀ): each factor passes the other's through.
  A random, B zero   is LoRA: the output is the pretrained model's, exactly, and B learns at once.
  A zero, B random   starts as exactly, and A learns at once: the mirror image, and as sound; it
                     moves faster here because the entries of B, N x R, are drawn larger.
  both zero          is dead: neither factor ever gets a gradient, the loss never moves.
  both random        disturbs the pretrained model before it has learnt anything.
"""


@torch.no_grad()
def initialise(model: nn.Module, factor: str, random: bool) -> None:
    """Fill `factor`, "lora_A" or "lora_B", of every layer: zero, or normal, σ = 1/√(fan-in)."""
    for name, parameter in model.named_parameters():
        if f".{factor}." in name:
            parameter.normal_(std=parameter.shape[1] ** -0.5) if random else parameter.zero_()


def probe_step_0(model: nn.Module, tokens: Tensor) -> tuple[float, float, float]:
    """Return max|logits - pretrained logits| and the norms of dA and dB over all layers."""
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    with torch.no_grad(), model.disable_adapter():
        pretrained = model(input_ids=tokens, use_cache=False).logits
    out.loss.backward()
    squares = {"lora_A": 0.0, "lora_B": 0.0}
    for name, parameter in model.named_parameters():
        for factor in squares:
            if f".{factor}." in name and parameter.grad is not None:
                squares[factor] += parameter.grad.double().square().sum().item()
    model.zero_grad()
    shift = (out.logits.detach() - pretrained).abs().max().item()
    return shift, squares["lora_A"] ** 0.5, squares["lora_B"] ** 0.5


def draw(runs: dict[str, Run], path: Path) -> None:
    """Write the loss curves to a PNG file."""
    pyplot = common.load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    styles = ("tab:blue", "-"), ("tab:green", "--"), ("tab:grey", "-"), ("tab:red", "-")
    for (label, run), (color, style) in zip(runs.items(), styles, strict=True):
        axes.plot(run.losses, style, color=color, lw=2, label=label)
        axes.plot(0, run.losses[0], "o", color=color)
    axes.set(
        xlabel="steps taken",
        ylabel="loss (nats per token)",
        title="Four ways to start a LoRA adapter: loss on one batch, repeated",
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
