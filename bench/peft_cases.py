"""Every kind of PEFT layer that `fuse` takes, as a pair to measure: the rows of the table `peft`.

A kind is a line in `CASES`, built of a frozen layer and an adapter. Names are keys of results
files, so they never change.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.cases import bf16, fp32, short

R = 16


class Sizes(NamedTuple):
    """Rows of x, and the weight's sizes (n, k)."""

    m: int
    n: int
    k: int


class PeftCase(NamedTuple):
    """A PEFT layer and how it is called.

    `dtype` is x's and the frozen layer's, `adapters` the adapters' where it is another one; `m` and
    `width` replace the table's M, and its N and K; x is cut into a batch of `batch`; `beside` and
    `keywords` make what is handed over beside x.
    """

    kind: str
    base: Callable[[Sizes], nn.Module]
    options: Sequence[dict[str, Any]] = ({},)
    dtype: torch.dtype = fp32
    adapters: torch.dtype | None = None
    autocast: bool = False
    train: bool = True
    merged: bool = False
    m: int | None = None
    width: int | None = None
    batch: int | None = None
    needs: tuple[str, ...] = ()
    beside: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: ()
    keywords: Callable[[Tensor], dict[str, Any]] = lambda x: {}

    @property
    def name(self) -> str:
        """What distinguishes the case in every results file, without its sizes."""
        words = [self.kind, short(self.dtype)]
        words += ["fp32adapters"] if self.adapters else []
        words += ["autocast"] if self.autocast else []
        words += [f"m{self.m}"] if self.m else []
        words += [f"k{self.width}"] if self.width else []
        words += [] if self.train else ["inference"]
        return "-".join(words)

    @property
    def directions(self) -> tuple[str, ...]:
        """Return what is measured."""
        return ("forward", "both") if self.train else ("forward",)

    def sizes(self, table: Sizes) -> Sizes:
        """Return this case's sizes in a table of those."""
        return Sizes(self.m or table.m, self.width or table.n, self.width or table.k)

    def layer(self, sizes: Sizes, device: torch.device) -> Any:
        """Return PEFT's layer, unfused, every factor away from its zero start."""
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(0)
        base = self.base(sizes).requires_grad_(False)
        if self.dtype != fp32:
            base = base.to(self.dtype)
        holder: Any = nn.Sequential(base.to(device))  # where bitsandbytes quantises
        holder.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
        holder.is_loaded_in_8bit = type(base).__name__ == "Linear8bitLt"
        names = ["default", *(f"other{i}" for i in range(1, len(self.options)))]
        for name, options in zip(names, self.options, strict=True):
            chosen = {"r": R, "lora_alpha": 2 * R, "target_modules": ["0"]} | options
            inject_adapter_in_model(LoraConfig(**chosen), holder, name)
        layer: Any = holder[0]
        layer.set_adapter(names)
        for name, parameter in layer.named_parameters():
            if "lora_" not in name:
                continue
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(self.adapters or self.dtype)
        if self.options[0].get("bias") == "all":
            layer.base_layer.bias.requires_grad_()
        layer.train(self.train)
        if self.merged:
            layer.merge()
        return layer

    def x(self, sizes: Sizes, device: torch.device) -> Tensor:
        """Return x[M,K], or x[B,M/B,K]."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sizes.m, sizes.k, generator=generator).to(device, self.dtype)
        return x if self.batch is None else x.view(self.batch, -1, sizes.k)

    def why_not(self) -> str | None:
        """Return why the case cannot be built here."""
        for package in ("peft", "transformers", *self.needs):
            if find_spec(package) is None:
                return f"{package} is not installed"
        return None


def _linear(sizes: Sizes) -> nn.Module:
    return nn.Linear(sizes.k, sizes.n, bias=False)


def _with_bias(sizes: Sizes) -> nn.Module:
    return nn.Linear(sizes.k, sizes.n)


def _conv1d(sizes: Sizes) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(sizes.n, sizes.k)


def _falcon(sizes: Sizes) -> nn.Module:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(sizes.k, sizes.n, bias=False)


def _experts(sizes: Sizes) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=sizes.k, intermediate_size=sizes.n // 3, num_local_experts=_EXPERTS
    )
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.05)
    return experts


def _two_experts_each(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices [M,2] and the weights [M,2] of the experts of each row."""
    scores = torch.randn(len(x), _EXPERTS, generator=torch.Generator().manual_seed(2))
    weights, indices = scores.softmax(-1).topk(2)
    return indices.to(x.device), weights.to(x.device, x.dtype)


def _acting(share: float) -> Callable[[Tensor], dict[str, Any]]:
    """Return what makes an aLoRA act on that share of each sequence's positions, the last ones."""
    return lambda x: {"alora_offsets": [int(share * x.shape[1])] * len(x)}


def _names(x: Tensor) -> dict[str, Any]:
    """Return an adapter for each of a batch, one of them none."""
    names = ["default", "other1"] * (len(x) // 2)
    return {"adapter_names": [*names[:-1], "__base__"]}


def _4bit(quant_type: str, nested: bool = False) -> Callable[[Sizes], nn.Module]:
    def build(sizes: Sizes) -> nn.Module:
        import bitsandbytes as bnb

        options: dict[str, Any] = {"quant_type": quant_type, "compress_statistics": nested}
        return bnb.nn.Linear4bit(sizes.k, sizes.n, bias=False, **options)

    return build


def _8bit(sizes: Sizes) -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear8bitLt(sizes.k, sizes.n, bias=False, has_fp16_weights=False)


def _torchao(sizes: Sizes) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(_linear(sizes))
    quantize_(holder, Int8WeightOnlyConfig(version=2))
    return holder[0]


def _hqq(sizes: Sizes) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(_linear(sizes), how, compute_dtype=fp32, device="cpu")


def _peft_config(name: str, *arguments: Any, **options: Any) -> Any:
    """Return a configuration of PEFT's, or None without PEFT: then no case is built."""
    if find_spec("peft") is None:
        return None
    from peft.tuners.lora import config

    return getattr(config, name)(*arguments, **options)


_EXPERTS = 8
_BNB = ("bitsandbytes",)
_ROUTED = ({"target_modules": [], "target_parameters": ["0.gate_up_proj", "0.down_proj"]},)
_ALORA = ({"alora_invocation_tokens": [1]},)
_DROPOUT = ({"lora_dropout": 0.05},)
CASES = (
    PeftCase("lora", _linear),
    PeftCase("lora", _linear, dtype=bf16),
    PeftCase("lora", _linear, dtype=bf16, adapters=fp32),
    PeftCase("lora", _linear, dtype=bf16, adapters=fp32, autocast=True),
    PeftCase("lora.dropout", _linear, _DROPOUT),
    PeftCase("lora.dropout", _linear, _DROPOUT, dtype=bf16),
    PeftCase("lora.dropout", _linear, _DROPOUT, dtype=bf16, adapters=fp32),
    PeftCase("lora.dropout", _linear, _DROPOUT, dtype=bf16, adapters=fp32, autocast=True),
    PeftCase("lora", _linear, m=1),
    PeftCase("lora", _linear, dtype=bf16, m=1),
    PeftCase("lora.dropout", _linear, _DROPOUT, m=1),
    PeftCase("lora", _linear, m=1, train=False),
    PeftCase("lora", _linear, dtype=bf16, m=1, train=False),
    *(
        case._replace(m=m, width=576)
        for m in (16, 128, 512)  # on both sides of where operators are composed on a CPU
        for case in (
            PeftCase("lora", _linear),
            PeftCase("lora", _linear, dtype=bf16),
            PeftCase("lora", _linear, dtype=bf16, adapters=fp32, autocast=True),
            PeftCase("lora.dropout", _linear, _DROPOUT),
            PeftCase("lora.dropout", _linear, _DROPOUT, dtype=bf16),
        )
    ),
    PeftCase("merged", _linear, train=False, merged=True),
    PeftCase("nf4", _4bit("nf4"), needs=_BNB),
    PeftCase("nf4.nested", _4bit("nf4", nested=True), needs=_BNB),
    PeftCase("nf4", _4bit("nf4"), dtype=bf16, adapters=fp32, autocast=True, needs=_BNB),
    PeftCase("nf4.dropout", _4bit("nf4"), _DROPOUT, needs=_BNB),
    PeftCase("nf4.dropout", _4bit("nf4"), _DROPOUT, bf16, adapters=fp32, autocast=True, needs=_BNB),
    PeftCase("nf4", _4bit("nf4"), train=False, needs=_BNB),
    PeftCase("fp4", _4bit("fp4"), needs=_BNB),
    PeftCase("int8", _8bit, needs=_BNB),
    PeftCase("torchao.int8", _torchao, needs=("torchao",)),
    PeftCase("hqq4", _hqq, needs=("hqq",)),
    PeftCase("dora", _linear, ({"use_dora": True},)),
    PeftCase("dora.dropout", _linear, ({"use_dora": True, "lora_dropout": 0.05},)),
    PeftCase("adapters2", _linear, ({}, {})),
    PeftCase("adapters2.dropout", _linear, ({"lora_dropout": 0.05}, {"lora_dropout": 0.05})),
    PeftCase("adapters4", _linear, ({}, {"lora_alpha": R}, {}, {})),
    PeftCase("conv1d", _conv1d, ({"fan_in_fan_out": True},)),
    PeftCase("lora_bias", _with_bias, ({"lora_bias": True},)),
    PeftCase("trained_bias", _with_bias, ({"bias": "all"},)),
    PeftCase("kasa", _linear, ({"kasa_config": _peft_config("KasaConfig")},)),
    PeftCase("mica", _linear, ({"init_lora_weights": "mica"},)),
    PeftCase("bdlora", _linear, ({"use_bdlora": _peft_config("BdLoraConfig", ["0"], nblocks=2)},)),
    PeftCase("falcon", _falcon),
    PeftCase("alora", _linear, _ALORA, batch=8, keywords=_acting(1.0)),
    PeftCase("alora.most", _linear, _ALORA, batch=8, keywords=_acting(0.7)),
    PeftCase("alora.nearly", _linear, _ALORA, dtype=bf16, batch=8, keywords=_acting(0.85)),
    PeftCase("alora.half", _linear, _ALORA, dtype=bf16, batch=8, keywords=_acting(0.5)),
    PeftCase("alora.tenth", _linear, _ALORA, batch=8, keywords=_acting(0.1)),
    PeftCase("names2", _linear, ({"r": 8}, {"r": 8}), batch=8, keywords=_names),
    PeftCase("names2", _linear, ({"r": 8}, {"r": 8}), dtype=bf16, batch=8, keywords=_names),
    PeftCase("names2.r16", _linear, ({}, {}), batch=8, keywords=_names),
    PeftCase("experts", _experts, _ROUTED, beside=_two_experts_each),
    PeftCase("experts", _experts, _ROUTED, dtype=bf16, beside=_two_experts_each),
)
SIZES = {
    "cpu": Sizes(512, 1536, 576),
    "gpu": Sizes(8192, 4096, 4096),
    "smoke": Sizes(64, 48, 32),
}
SIZES["full"] = SIZES["gpu"]
