"""Kernels of a few lines of PTX, and how the tests of the machine launch them."""

import torch
from ptx_machine.launch import Grid, Memory, Run, pack, run
from ptx_machine.parse import Kernel, parse

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 window[];
.visible .entry kernel({parameters}) .maxntid {threads}, 1, 1
{{
.reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<64>; .reg .b64 %d<64>;
.reg .f64 %g<8>;
{body}
ret;
}}
"""


def program(body: str, parameters: int = 1, threads: int = 32) -> Kernel:
    """Return a kernel of `body` whose 64-bit parameters are p0, p1, ..."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    return parse(HEAD.format(body=body, parameters=names, threads=threads))


def launch(
    body: str, *tensors: torch.Tensor, ctas: int = 1, threads: int = 32, shared: int = 4096,
    **options: int,
) -> Run:  # fmt: skip
    memory = Memory()
    addresses = [memory.add(tensor, writable=True) for tensor in tensors]
    kernel = program(body, len(tensors), threads)
    grid = Grid(ctas, shared_bytes=shared, **options)
    return run(kernel, pack(kernel, addresses), memory, grid)


def store_lane(value: str, kind: str, size: int) -> str:
    """Return code that stores `value` at p0[lane]."""
    return f"""
    ld.param.u64 %d0, [p0];
    mov.u32 %r0, %laneid;
    mul.wide.u32 %d1, %r0, {size};
    add.s64 %d2, %d0, %d1;
    st.global.{kind} [%d2], {value};
    """
