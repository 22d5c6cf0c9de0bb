"""Two gloo processes that run the cases of the distributed tests, each case under a time limit.

They live as long as the test session, for their imports cost more than any case. A case that hangs,
fails or dies is named and ends them; the next one gets new ones.
"""

import contextlib
import io
import multiprocessing as mp
import os
import re
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import peft_models
import pytest
import torch
import torch.distributed as dist
from peft_models import fp32, fp64
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate

RANKS = 2
START_S = 300  # what the imports may take on a loaded machine
LAYERS = 14  # that LoRA adapts in `peft_models.llama`
TOKENS = (6, 16)  # a batch: 96 rows, 48 on each rank
ROWS = TOKENS[0] // RANKS


class Cluster:
    """Two processes in one group, started when the first case comes."""

    def __init__(self, folder: str) -> None:
        self.folder, self.starts = folder, 0
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *arguments: Any, limit_s: float = 90) -> list[Any]:
        """Return what `case(rank, *arguments)` returns on each rank; a module-level function."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((case, arguments))
        answers = self._answers(f"{case.__name__}{arguments}", limit_s)
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            self.stop()  # the other rank may still wait for this one
            pytest.fail("\n".join(failed), pytrace=False)
        return [value for _, value in answers]

    def stop(self) -> None:
        for process in self.processes:
            if process.pid is not None:
                process.kill()
                process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        self.starts += 1
        context = mp.get_context("spawn")
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            store = os.path.join(self.folder, f"store{self.starts}")
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)
        self._answers("starting two processes", START_S)

    def _answers(self, what: str, limit_s: float) -> list[tuple[bool, Any]]:
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if answers and not answers[0][0]:
                limit_s = min(limit_s, 5)  # one that failed leaves the other waiting
            try:
                if not pipe.poll(limit_s):
                    answers.append((False, f"{what}: no answer within {limit_s} s"))
                    continue
                answers.append(pipe.recv())
            except (EOFError, OSError):
                code = self.processes[rank].exitcode
                answers.append((False, f"{what}: the process died, exit code {code}"))
        return answers


def _serve(rank: int, store: str, pipe: Connection) -> None:
    """Run case after case until the other end closes."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
        )
        pipe.send((True, None))
        while True:
            case, arguments = pipe.recv()
            try:
                # What libraries print once in every process is of no case.
                with contextlib.redirect_stdout(io.StringIO()):
                    answer = True, case(rank, *arguments)
            except Exception:
                answer = False, traceback.format_exc()
            pipe.send(answer)
    except (EOFError, KeyboardInterrupt):
        pass


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The two processes of this session; daemons, they end with it."""
    if not _SHARED:  # each module that imports the fixture would start two of its own
        _SHARED.append(Cluster(str(tmp_path_factory.mktemp("distributed"))))
    return _SHARED[0]


_SHARED: list[Cluster] = []


# --- What runs in a case -------------------------------------------------------------------------


def tokens(step: int = 0) -> Tensor:
    """The whole batch of a step, the same on every rank."""
    return torch.randint(64, TOKENS, generator=torch.Generator().manual_seed(100 + step))


def shard(rank: int, step: int = 0) -> Tensor:
    """A rank's half of the batch."""
    return tokens(step)[rank * ROWS : (rank + 1) * ROWS]


def llama(dtype: torch.dtype = fp64, adapters: torch.dtype | None = None, **options: Any) -> Any:
    """Two decoder layers whose adapters are away from their zero start."""
    model = peft_models.randomise(peft_models.llama(**options)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapters is not None:
            parameter.data = parameter.data.to(adapters)
    return model.train()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a batch, backward done."""
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Count the forward calls of `lora_linear`: a fallback would pass every comparison."""
    patch = pytest.MonkeyPatch()
    try:
        with peft_models.calls_of_lora_linear(patch) as calls:
            yield calls
    finally:
        patch.undo()


def clean(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return re.sub(r"\b(module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient, whole, by the name it has without wrappers."""
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=True)
    else:
        whole = contextlib.nullcontext()
    with whole:
        return {
            clean(name): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }


def compare(
    rank: int,
    make: Callable[[bool], nn.Module],
    *,
    calls: int,
    steps: int = 2,
    exact: Callable[[], nn.Module] | None = None,
    run: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> None:
    """Assert that fused and unfused PEFT have the same losses and gradients under one wrapping.

    `make(fused)` returns the wrapped model; `calls` is how often one step reaches the operator.
    Models narrower than float64 are held against `exact()`, wrapped alike, in float64.
    """
    results = []
    for build in (lambda: make(True), lambda: make(False), exact):
        if build is None:
            continue
        torch.manual_seed(5)
        model, found = build(), {}
        with counted() as seen:
            for step in range(steps):
                model.zero_grad()
                found[f"loss {step}"] = run(model, shard(rank, step))
                found |= {f"{name} {step}": g for name, g in gradients(model).items()}
        results.append(found)
        expected = calls * steps if len(results) == 1 else 0
        assert len(seen) == expected, f"{len(seen)} fused calls, expected {expected}"
    got, eager, *rest = results
    reference = rest[0] if rest else eager
    assert got.keys() == eager.keys() == reference.keys()
    assert sum("lora_" in name for name in got) == 2 * LAYERS * steps
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        if not rest:
            assert_accurate(name, value, reference[name], eager[name])
    if rest:
        # Each gradient has been through a whole model in bf16, and so is a draw of its own from
        # PEFT's errors: only all of them together can be held against PEFT's.
        assert_accurate("all", *(_joined(found) for found in (got, reference, eager)))


def _joined(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1).to(fp32) for value in found.values()])


def fuse_all(model: nn.Module) -> None:
    """Fuse, and accept no reason."""
    report = fuse(model)
    assert len(report.fused) == LAYERS, str(report)
