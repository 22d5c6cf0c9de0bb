"""One case, every provider: accuracy first, then the clock, then what else a row reports."""

import statistics
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.cases import BenchCase, short
from bench.providers import AGAIN, FROZEN, Layer, Provider, problem
from bench.timing import Call, interleave
from lora_kernels.dispatch import BackendUnavailable, select
from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.testing import (
    Case,
    Inputs,
    assert_accurate,
    expected,
    fp64,
    make_inputs,
    poisoned_memory,
)

CPU_CACHE_BYTES = 1 << 25  # of the last level, as servers share it out
MAX_SETS = 32
GATE_ELEMENTS = 1 << 20
OUT_OF_TIME = "absent: the time budget is spent"
References = dict[tuple[float, bool], tuple[dict[str, Tensor], dict[str, Tensor]]]
T = TypeVar("T")


class Row(NamedTuple):
    """What one provider did in one direction: its seconds, or the reason there are none."""

    info: dict[str, Any]
    seconds: list[float]
    reason: str | None = None  # "absent: …", "wrong: …" or "broken: …"


def measure(
    bench_case: BenchCase,
    providers: Sequence[Provider],
    directions: Collection[str],
    device: torch.device,
    seconds: float,
) -> dict[tuple[str, str], Row]:
    """Return a row for every direction and provider; `seconds` of timing for each direction.

    `providers` must include the frozen layer, twice: it is the yardstick of every row.
    """
    case = bench_case.case
    torch.compiler.reset()  # or the recompilation limit turns compiled providers into eager ones
    sets = operand_sets(case, device)
    reasons: dict[str, str] = {}
    errors: dict[str, float] = {}
    layers: dict[str, list[Layer]] = {}
    references: References = {}
    for provider in providers:
        if absent := provider.why_not(case, device):
            reasons[provider.name] = f"absent: {absent}"
            continue
        outcome = attempt(_prepare, provider, case, sets, references)
        if isinstance(outcome, str):
            reasons[provider.name] = outcome
        else:
            errors[provider.name], layers[provider.name] = outcome
    references.clear()

    chosen = _auto(case, device)
    rows = {}
    for direction in directions:
        calls = {name: call_of(direction, built, sets) for name, built in layers.items()}
        timed = time_calls(calls, device, seconds)
        for provider in providers:
            name = provider.name
            facts = _facts(bench_case, direction, name) | {"auto": name == chosen}
            if name in reasons:
                rows[direction, name] = Row(facts, [], reasons[name])
            else:
                facts |= {"error": errors[name]} | timed[name].info
                facts |= _rates(provider, case, direction, timed[name].info)
                rows[direction, name] = Row(facts, timed[name].seconds)
    return rows


def _prepare(
    provider: Provider, case: Case, sets: Sequence[Inputs], references: References
) -> tuple[float, list[Layer]]:
    error = gate(provider, case, sets[0], references)
    layers = [provider.build(operands, case) for operands in sets]
    torch.autograd.grad(layers[0].forward(), layers[0].leaves, sets[0].dy)  # compiles what does
    return error, layers


def time_calls(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, Row]:
    """Time the calls side by side, the frozen ones among them, and put each beside the frozen."""
    samples = dict(zip(calls, interleave(list(calls.values()), device, seconds), strict=True))
    frozen_s, again_s = (statistics.median(samples[name].device) for name in (FROZEN, AGAIN))
    rows = {}
    for name, sample in samples.items():
        median_s = statistics.median(sample.device)
        p20_s, _, _, p80_s = statistics.quantiles(sample.device, n=5)
        info = {
            "median_us": median_s * 1e6,
            "p20_us": p20_s * 1e6,
            "p80_us": p80_s * 1e6,
            "host_us": statistics.median(sample.host) * 1e6,
            "frozen_us": frozen_s * 1e6,
            "x_frozen": median_s / frozen_s,
            "noise": abs(again_s / frozen_s - 1),
        }
        rows[name] = Row(info | device_facts(calls[name], device), sample.device)
    return rows


def unmeasured(
    bench_case: BenchCase, providers: Sequence[Provider], directions: Collection[str], reason: str
) -> dict[tuple[str, str], Row]:
    """Return the rows of a case that could not be measured at all."""
    return {
        (direction, provider.name): Row(_facts(bench_case, direction, provider.name), [], reason)
        for direction in directions
        for provider in providers
    }


def gate(provider: Provider, case: Case, inputs: Inputs, references: References) -> float:
    """Return the largest error relative to the largest element of the float64 result.

    Judges y, dx, da and db on poisoned memory by `lora_kernels.testing.assert_accurate`.

    Raises:
        AssertionError: a result is not accurate.
    """
    if provider.own_mask:
        case, inputs = case._replace(dropout_p=0.0), inputs._replace(seed=None)
    if provider.frozen:
        inputs = inputs._replace(lora_b=torch.zeros_like(inputs.lora_b))
    key = case.dropout_p, provider.frozen
    if key not in references:
        references[key] = expected(case, inputs, fp64), expected(case, inputs, case.dtype)
    reference64, same_dtype = references[key]
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operators without a deterministic form
        layer = provider.build(inputs, case)
        y = layer.forward()
        shape, wanted = tuple(y.shape), tuple(reference64["y"].shape)
        assert shape == wanted, f"y: shape {shape}, expected {wanted}"
        gradients = torch.autograd.grad(y, layer.leaves, inputs.dy)
    error = 0.0
    for name, got in zip(("y", "dx", "da", "db"), (y, *gradients), strict=False):
        want = reference64[name].detach()
        difference = (got.detach().to(fp64) - want).abs().max() / want.abs().max()
        error = max(error, difference.item())
        assert torch.isfinite(difference), f"{name}: not finite"
        # The rule itself runs on the CPU: for large results on rows an odd number apart.
        step = max(1, want.numel() // GATE_ELEMENTS) | 1
        assert_accurate(name, got[::step], want[::step].cpu(), same_dtype[name][::step])
    return error


def call_of(direction: str, layers: Sequence[Layer], sets: Sequence[Inputs]) -> Call:
    """Time a direction, on the next set of operands at every launch."""

    def forward(i: int) -> Tensor:
        return layers[i % len(sets)].forward()

    def backward(state: tuple[Tensor, int]) -> tuple[Tensor, ...]:
        y, i = state
        return torch.autograd.grad(y, layers[i % len(sets)].leaves, sets[i % len(sets)].dy)

    if direction == "forward":
        return Call(lambda i: i, forward)
    if direction == "backward":
        return Call(lambda i: (forward(i), i), backward)
    return Call(lambda i: i, lambda i: backward((forward(i), i)))


def _facts(bench_case: BenchCase, direction: str, provider: str) -> dict[str, Any]:
    case = bench_case.case
    return {
        "case": bench_case.name,
        "shape": bench_case.shape,
        **{"M": case.m, "N": case.n, "K": case.k, "R": case.r},
        "dtype": short(case.dtype),
        "adapter_dtype": short(case.adapter_dtype or case.dtype),
        "dropout": case.dropout_p,
        "direction": direction,
        "provider": provider,
    }


def _rates(
    provider: Provider, case: Case, direction: str, timed: dict[str, Any]
) -> dict[str, float]:
    frozen_flops, _ = work(case, direction, adapter=False)
    all_flops, _ = work(case, direction, adapter=True)
    flops, moved = work(case, direction, adapter=not provider.frozen)
    floor_us = timed["frozen_us"] * all_flops / frozen_flops
    return {
        "floor_us": floor_us,
        "x_floor": timed["median_us"] / floor_us,
        "flops": flops,
        "bytes": moved,
        "tflops": flops / timed["median_us"] * 1e-6,
        "gbs": moved / timed["median_us"] * 1e-3,
    }


def work(case: Case, direction: str, *, adapter: bool) -> tuple[int, int]:
    """Return the floating-point operations and the fewest bytes of a direction."""
    sizes = case.problem() if adapter else case._replace(r=0).problem()
    passes = {"forward": (False,), "backward": (True,), "both": (False, True)}[direction]
    return (
        sum(sizes.flops(backward=backward) for backward in passes),
        sum(sizes.bytes(backward=backward) for backward in passes)
        - (0 if adapter or direction == "forward" else case.m * case.k * case.dtype.itemsize),
    )


def device_facts(call: Call, device: torch.device) -> dict[str, Any]:
    """Return the launches, and the peak memory beyond what was there before; None off CUDA."""
    if device.type != "cuda":
        return {"launches": None, "peak_mib": None}
    state = call.prepare(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.run(state)
    peak = torch.cuda.max_memory_allocated() - before
    state = call.prepare(0)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call.run(state)
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    launches = sum(event.device_type == on_device for event in profile.events())
    return {"launches": launches, "peak_mib": peak / 2**20}


def _auto(case: Case, device: torch.device) -> str | None:
    """Return the provider that `backend="auto"` runs."""
    try:
        return f"lora_kernels.{select(BACKENDS, problem(case, device)).name}"
    except BackendUnavailable:
        return None


def operand_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Return random operands, and copies of them that outgrow the last-level cache twice over."""
    inputs = make_inputs(case, device)
    cache = CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(t.nbytes for t in inputs if t is not None)
    count = min(max(2, -(-2 * cache // size) + 1), MAX_SETS)
    copies = (
        inputs._make(None if t is None else t.clone() for t in inputs) for _ in range(count - 1)
    )
    return [inputs, *copies]


def attempt(function: Callable[..., T], *arguments: Any) -> T | str:
    """Return what the function returns, or in one line how the provider it runs failed."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever a provider raises is its result
        words = " ".join(str(error).split())[:300]
        if isinstance(error, AssertionError):
            return f"wrong: {words}"
        return f"broken: {type(error).__name__}: {words}"
