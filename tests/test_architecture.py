"""What the source tree promises: one direction of imports, light imports, documented names."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lora_kernels

PACKAGE = Path(lora_kernels.__file__).parent
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
OP = "lora_kernels.ops.lora_linear"
QUALIFY = "lora_kernels.qualify"
BACKENDS = {f"{OP}.reference", f"{OP}.triton", f"{OP}.cuda"}
UNITS = {*BACKENDS, "lora_kernels.audit", "lora_kernels.peft"}  # a folder counts as one module

# Each layer may import the ones below it; data flows one way.
LAYERS = (
    {"lora_kernels.info", f"{QUALIFY}.__main__"},
    {f"{QUALIFY}.parent"},
    {f"{QUALIFY}.child"},
    {f"{QUALIFY}.checks"},
    {f"{QUALIFY}.timing", f"{QUALIFY}.guard"},
    {"lora_kernels"},
    {"lora_kernels.audit"},
    {"lora_kernels.layers", "lora_kernels.peft", "lora_kernels.testing"},
    {"lora_kernels.distributed", "lora_kernels.saved_input"},
    {OP},
    {f"{OP}.op"},
    {*BACKENDS, f"{OP}.composition", f"{OP}.flops", f"{OP}.shared_dx"},
    {f"{OP}.operands"},
    {
        *(f"{OP}.{name}" for name in ("config", "schedule", "validate", "philox", "problem")),
        f"{OP}.workspace",
        f"{OP}.device",
    },
    {f"{QUALIFY}.choose"},
    {f"{QUALIFY}.ranks"},
    {f"{QUALIFY}.record"},
    {
        *(f"lora_kernels.{name}" for name in ("dispatch", "extension", "output", "redzone")),
        QUALIFY,
    },
)
# Names of one layer that may know one another, the reader first.
BESIDE = {
    ("lora_kernels.peft", "lora_kernels.layers"),
    ("lora_kernels.testing", "lora_kernels.audit"),  # which it offers by its own name
    (f"{OP}.config", f"{OP}.problem"),
    (f"{OP}.schedule", f"{OP}.problem"),
    (f"{OP}.config", f"{OP}.schedule"),
    (f"{OP}.schedule", f"{OP}.config"),
    (f"{OP}.validate", f"{OP}.problem"),
    (f"{OP}.validate", f"{OP}.philox"),
    (f"{OP}.workspace", f"{OP}.device"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules if submodules else {node.module or ""}
    return {name for name in found if name in MODULES}


def unit(module: str) -> str:
    return next((u for u in UNITS if module == u or module.startswith(u + ".")), module)


def layer(module: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if unit(module) in names), None)


def test_every_module_has_its_layer() -> None:
    assert [m for m in MODULES if layer(m) is None and m != "lora_kernels.ops"] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    mine = layer(module)
    for other in imports(MODULES[module]) - {module}:
        if mine is None or unit(other) == unit(module):
            continue
        theirs = layer(other)
        allowed = theirs is not None and (theirs > mine or (unit(module), unit(other)) in BESIDE)
        assert allowed, f"{module} imports {other}"


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_backends_never_import_one_another(backend: str) -> None:
    for module in (m for m in MODULES if unit(m) == backend):
        others = {unit(name) for name in imports(MODULES[module])} & BACKENDS - {backend}
        assert not others, f"{module} imports {others}"


def fresh(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_works_with_torch_alone() -> None:
    fresh(
        """
import sys
for name in ("triton", "peft", "transformers", "accelerate", "numpy", "lora_kernels._C"):
    sys.modules[name] = None
import torch
import lora_kernels
from lora_kernels import LoRALinear, lora_linear
layer = LoRALinear(5, 6, r=2, lora_dropout=0.5)
layer(torch.ones(3, 5)).sum().backward()
assert layer.lora_B.grad.abs().sum() > 0
"""
    )


def test_importing_is_light() -> None:
    """No GPU is touched; Triton, PEFT and the extension stay where they are."""
    loaded = fresh(
        """
import sys, torch
before = set(sys.modules)
import lora_kernels
assert not torch.cuda.is_initialized()
print(*(set(sys.modules) - before))
"""
    ).split()
    heavy = {"triton", "peft", "transformers", "numpy", "accelerate"}
    assert {name.split(".")[0] for name in loaded} & heavy == set()
    assert "lora_kernels._C" not in loaded
    assert {"lora_kernels.peft", "lora_kernels.testing"} & set(loaded) == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source)), "no module docstring"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented_and_typed(module: str) -> None:
    for node in ast.parse(MODULES[module].read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not _is_kernel(node):
            arguments = (*node.args.args, *node.args.kwonlyargs)
            untyped = [a.arg for a in arguments if a.annotation is None]
            assert not untyped, f"{module}.{node.name}: {untyped} have no type"
            assert node.returns is not None, f"{module}.{node.name} has no return type"


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(
        "triton" in ast.unparse(d) or "jit" in ast.unparse(d) for d in function.decorator_list
    )


def test_the_public_names_are_these() -> None:
    assert lora_kernels.__all__ == ["BackendUnavailable", "LoRALinear", "lora_linear"]
    for name in lora_kernels.__all__:
        assert inspect.getdoc(getattr(lora_kernels, name))
    assert lora_kernels.__version__.count(".") == 2
    assert (PACKAGE / "py.typed").exists()
