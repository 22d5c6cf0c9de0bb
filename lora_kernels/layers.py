"""`LoRALinear`: owns the frozen weight and the adapter, and calls the operator."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.distributed import dropout_seed, if_trained
from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.saved_input import needs_a_copy, on_a_copy

Initialisation = bool | Literal["gaussian"]


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable rank-R adapter.

    `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ (+ bias)` with `s = lora_alpha / r`, or `lora_alpha / √r` with
    `use_rslora`. weight (N, K) and bias (N,) are frozen; lora_A (R, K) and lora_B (N, R) train.

    Args:
        in_features: K.
        out_features: N.
        r: rank R, at least 1.
        lora_alpha: numerator of the scaling s.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while
            training.
        bias: whether the frozen layer has a bias.
        use_rslora: scale by `lora_alpha / √r`, so that updates do not shrink with the rank.
        init_lora_weights: True for Kaiming-uniform A and zero B, "gaussian" for normal A
            (σ = 1/r) and zero B; both start as the frozen layer, bit for bit. False leaves both
            random, which disturbs the layer from the first step.
        device, dtype: of all parameters.
        adapter_dtype: of A and B, if not dtype: fp32 keeps master copies beside a bf16 base.

    Raises:
        ValueError: r below 1, lora_dropout outside [0, 1) or an unknown init_lora_weights.

    Source: Hu et al., "LoRA", 2021; Kalajdzievski, "A Rank Stabilization Scaling Factor for
    Fine-Tuning with LoRA", 2023.
    """

    weight: Tensor
    bias: Tensor | None
    _frozen_weight: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init_lora_weights: Initialisation = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"LoRALinear: r must be an integer of at least 1, got {r!r}")
        if not isinstance(lora_alpha, (int, float)):
            raise ValueError(f"LoRALinear: lora_alpha must be a number, got {lora_alpha!r}")
        if not isinstance(lora_dropout, (int, float)) or not 0 <= lora_dropout < 1:
            raise ValueError(f"LoRALinear: lora_dropout must be in [0, 1), got {lora_dropout!r}")
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)

        frozen = nn.Linear(in_features, out_features, bias, device, dtype).requires_grad_(False)
        self.weight, self.bias = frozen.weight, frozen.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(r, in_features, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(out_features, r, dtype=adapter_dtype))
        self.reset_lora_parameters(init_lora_weights)
        # What `weight` was before merge(): the same object, so that whatever shares it stays tied.
        self.register_parameter("_frozen_weight", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, **options: Any) -> "LoRALinear":
        """Adapt an existing layer, whose very weight and bias parameters it shares and freezes.

        They stay the same objects: what is tied to them stays so, through `half()` and `deepcopy`.

        Args:
            linear: the layer to adapt; W (N, K), bias (N,) or None.
            r: rank R.
            options: the keyword arguments of `LoRALinear`, less bias, device and dtype.

        Raises:
            TypeError: `linear` is not a plain `nn.Linear`, or an option that it decides.
            ValueError: as `LoRALinear`.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes a plain nn.Linear, got {type(linear).__qualname__}")
        fixed = {"bias", "device", "dtype"} & options.keys()
        if fixed:
            raise TypeError(f"from_linear takes {', '.join(sorted(fixed))} from the linear layer")
        layer = cls(
            linear.in_features,
            linear.out_features,
            r,
            bias=linear.bias is not None,
            device="meta",  # nothing is allocated for what is replaced below
            dtype=linear.weight.dtype,
            **options,
        )
        layer.weight, layer.bias = linear.weight.requires_grad_(False), linear.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        layer.lora_A = nn.Parameter(torch.empty_like(layer.lora_A, device=linear.weight.device))
        layer.lora_B = nn.Parameter(torch.empty_like(layer.lora_B, device=linear.weight.device))
        layer.reset_lora_parameters(options.get("init_lora_weights", True))
        return layer.train(linear.training)

    def reset_lora_parameters(self, init_lora_weights: Initialisation = True) -> None:
        """Draw A and B anew, as the class describes."""
        if init_lora_weights != "gaussian" and not isinstance(init_lora_weights, bool):
            raise ValueError(
                "LoRALinear: init_lora_weights must be True, False or 'gaussian', "
                f"got {init_lora_weights!r}"
            )
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) for x (..., K); dropout only while training."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        dropout_p = self.lora_dropout if self.training else 0.0
        if needs_a_copy(self, x, self.lora_A, dropout_p > 0):
            return on_a_copy(self, x, self._adapted)
        return self._adapted(x)

    def _adapted(self, x: Tensor) -> Tensor:
        dropout_p = self.lora_dropout if self.training else 0.0
        return lora_linear(
            x,
            if_trained(self.weight, self, "weight"),
            self.lora_A,
            self.lora_B,
            self.scaling,
            if_trained(self.bias, self, "bias"),
            dropout_p=dropout_p,
            seed=dropout_seed(self, x) if dropout_p else None,
        )

    @property
    def merged(self) -> bool:
        """Whether `weight` currently holds `W + s·B·A`."""
        return self._frozen_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the weight by `W + s·B·A`, so that inference costs no more than the frozen layer.

        The frozen weight is kept aside, never written to: modules that share it see no change.

        Raises:
            ValueError: the merged weight would hold NaN or Inf; the layer is left as it was.
        """
        if self.merged:
            return
        merged = self._merged_weight()
        self._frozen_weight = self.weight  # type: ignore[assignment]
        self.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit and the same parameter."""
        if self._frozen_weight is None:
            return
        self.weight, self._frozen_weight = self._frozen_weight, None

    @torch.no_grad()
    def merge_and_unload(self) -> nn.Linear:
        """Return an `nn.Linear` of its own with weight `W + s·B·A`; this layer is left as it is.

        Raises:
            ValueError: the merged weight would hold NaN or Inf.
        """
        weight = self.weight.clone() if self.merged else self._merged_weight()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", weight.dtype
        )
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def _merged_weight(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.to(wide) @ self.lora_A.to(wide) * self.scaling
        merged = (self.weight.to(wide) + delta).to(self.weight.dtype)
        if not merged.isfinite().all():
            raise ValueError("LoRALinear: merging would write NaN or Inf; nothing was changed")
        return merged

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A checkpoint always holds the frozen weight: loading a merged one beside A and B would
        # apply the adapter twice.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._frozen_weight is not None:
            destination[prefix + "weight"] = destination.pop(prefix + "_frozen_weight")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the sizes and settings that `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout}" + (", merged" if self.merged else "")
        )
