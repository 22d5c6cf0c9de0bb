"""Every kind of PEFT layer, fused beside PEFT's own code: forward, and forward + backward.

Both run on the same parameters in the same rounds, twice each. A row is the median of the rounds'
own ratios, its noise what either differs from itself by. Fused and slower by more than that is a
failure of the run: then `fuse` has to leave the kind to PEFT.
"""

import contextlib
import copy
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases import short
from bench.compare import LEAST
from bench.measure import OUT_OF_TIME, Row, attempt, device_facts
from bench.peft_cases import CASES, SIZES, PeftCase, Sizes
from bench.results import too_slow
from bench.timing import Call, interleave
from lora_kernels.testing import assert_accurate, fp64

PEFT, FUSED = ("peft", "peft.again"), ("lora_kernels", "lora_kernels.again")


def measure_pair(
    case: PeftCase, sizes: Sizes, device: torch.device, seconds: float
) -> dict[str, Row]:
    """Return the row of every direction, after the accuracy gate."""
    from lora_kernels.peft import why_not

    if (absent := case.why_not()) is not None:
        return {d: Row(facts(case, sizes, d), [], f"absent: {absent}") for d in case.directions}
    sizes = case.sizes(sizes)
    plain, x = case.layer(sizes, device), case.x(sizes, device)
    layers = copies(plain)
    fused = layers[FUSED[0]]
    with torch.no_grad():  # by a copy: its first call changes an 8-bit layer
        dy = torch.randn_like(call(case, copy.deepcopy(plain), x), dtype=x.dtype)
    with _context(case, device):
        left = why_not(fused, x, *case.beside(x), **case.keywords(x))
    error = gate(case, plain, fused, x, dy)

    def row(direction: str, layers: dict[str, nn.Module]) -> Row:
        timed = functools.partial(run, case, direction, x=x, dy=dy)
        calls = {name: Call(lambda i, layer=layer: layer, timed) for name, layer in layers.items()}
        samples = dict(zip(calls, interleave(list(calls.values()), device, seconds), strict=True))
        info = facts(case, sizes, direction) | {"error": error, "left": left}
        info |= beside({name: sample.device for name, sample in samples.items()})
        info |= {"peak_mib": device_facts(calls[FUSED[0]], device)["peak_mib"]}
        info |= {"peft_peak_mib": device_facts(calls[PEFT[0]], device)["peak_mib"]}
        return Row(info, samples[FUSED[0]].device)

    rows = {}
    for direction in case.directions:
        rows[direction] = row(direction, layers)
        if too_slow(rows[direction].info):  # maybe for where its objects lie: the middle of three
            three = [rows[direction], *(row(direction, copies(plain)) for _ in range(2))]
            rows[direction] = sorted(three, key=lambda row: row.info["x_peft"])[1]
    return rows


def copies(plain: Any) -> dict[str, nn.Module]:
    """Return two copies of PEFT's layer and two fused ones, which multiply by the same memory.

    On a CPU a copy was seen to take 1.02 of the original's time with every attribute the same
    object, and Python's caches side with the class that is called more often.
    """
    from lora_kernels.peft import fuse

    shared: dict[int, Any] = {id(p): p for p in plain.parameters()}
    state = getattr(plain.base_layer, "state", None)  # where bitsandbytes keeps an int8 weight
    layers = {}
    for name in (*PEFT, *FUSED):
        holder = copy.deepcopy(nn.Sequential(plain), shared | {id(state): state})
        if name in FUSED:
            fuse(holder)
        layers[name] = holder[0]
    return layers


def run(
    case: PeftCase, direction: str, layer: nn.Module, x: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """Run a direction; return y and, after a backward, the gradients of x and what trains."""
    with _context(case, x.device):
        x = x.detach().requires_grad_(case.train)
        y = call(case, layer, x)
    if direction == "forward":
        return (y,)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y, (x, *trained), dy.to(y.dtype))


def call(case: PeftCase, layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer as the case does."""
    y: Tensor = layer(x, *case.beside(x), **case.keywords(x))
    return y


def _context(case: PeftCase, device: torch.device) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    if case.autocast:
        stack.enter_context(torch.autocast(device.type, case.dtype))
    if not case.train:
        stack.enter_context(torch.no_grad())
    return stack


def gate(case: PeftCase, plain: nn.Module, fused: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Judge y and every gradient by PEFT's in float64; dropout is off, for PEFT draws its own mask.

    Raises:
        AssertionError: a result is not accurate.
    """
    results = []
    for layer in (fused, in_float64(plain), plain):
        dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout)]
        exact = layer is not fused and layer is not plain
        operands = (x.double(), dy.double()) if exact else (x, dy)
        kept = [m.p for m in dropouts]
        for m in dropouts:
            m.p = 0.0
        how = case._replace(autocast=False) if exact else case
        results.append(run(how, case.directions[-1], layer, *operands))
        for m, p in zip(dropouts, kept, strict=True):
            m.p = p
    error = 0.0
    for i, (got, want, eager) in enumerate(zip(*results, strict=True)):
        assert got.dtype == eager.dtype, f"result {i}: {got.dtype}, PEFT's is {eager.dtype}"
        # Autocast rounds to 16 bits what it then hands over in fp32.
        assert_accurate(f"result {i}", got, want.detach().cpu(), eager.detach().to(x.dtype))
        error = max(error, ((got.to(fp64) - want).abs().max() / want.abs().max()).item())
    return error


def in_float64(layer: Any) -> Any:
    """Return a PEFT layer in float64, a quantised base as the dense weight that it stands for."""
    from peft.tuners.lora import layer as peft_layers

    twin = copy.deepcopy(layer)
    base = twin.base_layer
    for module in twin.modules():
        if hasattr(module, "config"):  # experts: a grouped product takes no float64
            module.config._experts_implementation = "eager"
    library = type(base if type(base) is not nn.Linear else base.weight).__module__.split(".")[0]
    if library in ("bitsandbytes", "torchao", "hqq"):
        device = next(layer.parameters()).device
        identity = torch.eye(base.in_features, device=device, requires_grad=True)
        dense = nn.Linear(base.in_features, base.out_features, bias=False)
        dense.weight = nn.Parameter(base(identity).detach().t().contiguous(), requires_grad=False)
        twin.base_layer = dense
        twin.__class__ = peft_layers.Linear
    return twin.double()


def beside(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the fused layer's time over PEFT's, round by round, and how far it can be believed."""
    rounds = list(zip(*(seconds[name] for name in (*PEFT, *FUSED)), strict=True))
    ratios = [(fused + once_more) / (peft + again) for peft, again, fused, once_more in rounds]
    p20, _, _, p80 = statistics.quantiles(ratios, n=5)
    median = statistics.median(ratios)
    # What two of a side differ by varies as much as the ratio of two means of two.
    same = max(
        abs(statistics.median(round[i + 1] / round[i] for round in rounds) - 1) for i in (0, 2)
    )
    standard_error = 1.253 * (p80 - p20) / 1.683 / math.sqrt(len(ratios))
    return {
        "median_us": statistics.median(seconds[FUSED[0]] + seconds[FUSED[1]]) * 1e6,
        "peft_us": statistics.median(seconds[PEFT[0]] + seconds[PEFT[1]]) * 1e6,
        "x_peft": median,
        "x_peft_p20": p20,
        "x_peft_p80": p80,
        "noise": max(same, 2 * standard_error, LEAST),
    }


def facts(case: PeftCase, sizes: Sizes, direction: str) -> dict[str, Any]:
    """Return what names a row."""
    sizes = case.sizes(sizes)
    return {
        "case": f"peft.{case.name}",
        "shape": "peft",
        **{"M": sizes.m, "N": sizes.n, "K": sizes.k},
        "dtype": short(case.dtype),
        "direction": direction,
        "provider": FUSED[0],
    }


_PAIRS = [(case, direction) for case in CASES for direction in case.directions]


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest,
    device: torch.device,
    seconds: float,
    out_of_time: Callable[[], bool],
) -> Callable[[PeftCase], dict[str, Row]]:
    """Measure a case once for its directions."""
    sizes = SIZES[request.config.getoption("--table")]
    measured: dict[str, dict[str, Row]] = {}

    def rows(case: PeftCase) -> dict[str, Row]:
        if case.name not in measured:
            outcome: dict[str, Row] | str = OUT_OF_TIME
            if not out_of_time():
                outcome = attempt(measure_pair, case, sizes, device, seconds)
            if isinstance(outcome, str):
                outcome = {d: Row(facts(case, sizes, d), [], outcome) for d in case.directions}
            measured[case.name] = outcome
        return measured[case.name]

    return rows


@pytest.mark.parametrize(
    ("case", "direction"), _PAIRS, ids=[f"{case.name}-{direction}" for case, direction in _PAIRS]
)
def test_never_slower_than_peft(
    case: PeftCase,
    direction: str,
    pair: Callable[[PeftCase], dict[str, Row]],
    record: Callable[[str, Row, bool], None],
) -> None:
    """Report one row, and fail where the fused layer is slower than PEFT's."""
    row = pair(case)[direction]
    record(f"{row.info['case']} {direction}", row, True)
    reason = too_slow(row.info)
    assert reason is None, reason
