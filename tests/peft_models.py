"""Small PEFT models and the two ways to compare them: to the tolerance rule, and to the bit."""

import copy
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_kernels import lora_linear
from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate

K, H, N = 12, 20, 9
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run every test of a module that imports this on one thread.

    Handing out such small tensors costs more than computing on them, and what is timed would wait
    for threads that other tests displaced.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """Two layers that LoRA adapts, with and without bias, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(K, H)
        self.down = nn.Linear(H, K, bias=False)
        self.head = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.tanh(self.up(x))))


class WithBiases(Block):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(H, K)


class Gpt2Block(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(H, K), Conv1D(K, H)


class AddsInPlace(nn.Module):
    """A residual whose sum overwrites what the layer that LoRA adapts has read."""

    def __init__(self, view: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.view, self.down = view, nn.Linear(K, K)

    def forward(self, x: Tensor, write: bool = True, **kwargs: Any) -> Tensor:
        h = self.view(x * 1.5)
        y = self.down(h)
        return (h.add_(y) if write else h + y).sin()


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def peft_model(
    base: nn.Module | None = None, seed: int = 0, dtype: torch.dtype = fp32, **options: Any
) -> PeftModel:
    """A PEFT model whose adapters are all away from their zero start."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | options
    model = get_peft_model((base or Block()).to(dtype), LoraConfig(**options))
    return randomise(model)


def randomise(model: nn.Module, seed: int = 1, adapter: str = "") -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.4
    return model


def add_other(model: PeftModel, **options: Any) -> None:
    """Add a second adapter and make it the active one."""
    model.add_adapter("other", LoraConfig(**{"r": 3, "target_modules": ["up", "down"]} | options))
    randomise(model, seed=3, adapter=".other.").set_adapter("other")


def x_for(model: nn.Module, *shape: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (3, 5, K)), generator=generator, dtype=fp64).to(dtype)


def run(model: nn.Module, x: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Return y and the gradient of x and of every trainable parameter."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x, **inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=fp64).reshape(y.shape)
    (y.to(fp64) * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def assert_close_to_peft(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    got, eager = run(fused, x), run(plain, x)
    reference = run(copy.deepcopy(plain).to(fp64), x.to(fp64))
    assert got.keys() == eager.keys() == reference.keys()
    assert got["y"].dtype == eager["y"].dtype
    for name, expected in reference.items():
        assert got[name].dtype == eager[name].dtype, name
        assert_accurate(name, got[name], expected, eager[name])


def assert_right(
    fused: nn.Module,
    plain: nn.Module,
    reference: nn.Module,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    within: torch.dtype | None = None,
) -> None:
    """As `assert_close_to_peft`, under autocast to `within`, and every call runs fused.

    Over several draws of x eager's error is what the tolerance takes it for (tests/test_op.py).
    """
    draws = [x, x.flip(-1), x.roll(5, -1)]
    exact = runs(reference, [x.to(fp64) for x in draws])
    with torch.autocast("cpu", within, within is not None):
        with calls_of_lora_linear(monkeypatch) as calls:
            got = runs(fused, draws)
        eager = runs(plain, draws)
    assert len(calls) == 2 * len(draws)
    assert got.keys() == eager.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].dtype == eager[name].dtype, name
        assert_accurate(name, got[name], expected, eager[name].to(within or eager[name].dtype))


def runs(model: nn.Module, draws: list[Tensor], **inputs: Any) -> dict[str, Tensor]:
    """Do as `run` for several x."""
    results = [run(model, x, **inputs) for x in draws]
    return {key: torch.stack([result[key] for result in results]) for key in results[0]}


def assert_nothing_dense_is_kept(layer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each direction makes the dense weight of a quantised layer, and nothing holds it between."""
    made: list[weakref.ref[Tensor]] = []
    saved: dict[int, int] = {}

    def remember(frozen: Any) -> Any:
        def dense(dtype: torch.dtype) -> Tensor:
            made.append(weakref.ref(weight := frozen.dense(dtype)))
            return weight

        return frozen._replace(dense=dense)

    original = type(layer).frozen
    monkeypatch.setattr(type(layer), "frozen", lambda *inputs: remember(original(*inputs)))
    pack = lambda t: saved.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t
    x = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert [ref() for ref in made] == [None]
    m = len(x)
    assert sum(saved.values()) == (m * K + 4 * K + H * 4 + m * 4) * x.itemsize  # x, A, B, P
    y.sum().backward()
    assert [ref() for ref in made] == [None, None]


def assert_same_as_peft(fused: nn.Module, plain: nn.Module, x: Tensor, **inputs: Any) -> None:
    got, expected = run(fused, x, **inputs), run(plain, x, **inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@contextmanager
def calls_of_lora_linear(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count what really reaches the operator: a fallback would pass every comparison with PEFT."""
    calls: list[int] = []
    with monkeypatch.context() as patch:
        counted = lambda *a, **k: calls.append(1) or lora_linear(*a, **k)
        for module in ("layer", "dora"):
            patch.setattr(f"lora_kernels.peft.{module}.lora_linear", counted)
        yield calls


def pair(**options: Any) -> tuple[PeftModel, PeftModel]:
    """A fused model and its unfused twin."""
    plain = peft_model(**options)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    return fused, plain


def contents(file: Path) -> bytes | dict[str, Any]:
    """A saved file's bytes; a configuration's values, since PEFT writes the modules it adapts from
    a set, and a copied set may run in another order than its original (PYTHONHASHSEED=6 does)."""
    if file.name != "adapter_config.json":
        return file.read_bytes()
    values: dict[str, Any] = json.loads(file.read_text())
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    return values


def assert_saves_as_peft(fused: PeftModel, plain: PeftModel, folder: Path) -> None:
    """Both models leave the same files; the fused one's stay in folder / "fused"."""
    saved = []
    for name, model in (("fused", fused), ("plain", plain)):
        model.save_pretrained(folder / name)
        files = sorted(file for file in (folder / name).rglob("*") if file.is_file())
        saved.append({file.relative_to(folder / name): contents(file) for file in files})
    assert {file.suffix for file in saved[1]} >= {".safetensors", ".json"}
    assert saved[0] == saved[1]


def assert_compiles(model: PeftModel, x: Tensor) -> None:
    """Compiled in one graph, the model gives what it gives eagerly."""
    expected = run(model, x)
    torch._dynamo.reset()
    got = run(torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True), x)
    assert len(got) == len(expected)
    for name in got:
        same = expected[name.replace("_orig_mod", "base_model.model")]
        torch.testing.assert_close(got[name], same)


def llama(bias: bool = False, **options: Any) -> PeftModel:
    """A causal language model of 14 layers that LoRA adapts, with or without biases in them."""
    torch.manual_seed(0)
    adapters = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, **options)
    return get_peft_model(LlamaForCausalLM(llama_config(bias)), adapters)


def llama_config(bias: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
    )
