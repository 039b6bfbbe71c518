"""Compile the Hopper forward for sm_90 on a machine without a GPU; print a JSON object of what came out.

Run by test_hopper_compiles.py in a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparge_compile.kernels.triton import forward_hopper as hopper


def main(head_pad: int, causality: int, packed: bool) -> None:
    constants = {
        "HEAD_PAD": head_pad,
        "KEYS": hopper.KEY_BLOCK,
        "HALF": hopper.ROWS,
        "COLUMNS": hopper.COLUMNS,
        "STAGES": hopper.STAGES[head_pad],
        "CAUSAL": causality,
        "PACKED": packed,
        "LOADER_REGS": hopper.LOADER_REGISTERS,
        "CONSUMER_REGS": hopper.CONSUMER_REGISTERS,
    }
    kernel = hopper._forward_hopper_kernel
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_desc"):
            shape = [1] * (3 if packed else 2) + [hopper.ROWS, head_pad if name == "out_desc" else hopper.COLUMNS]
            layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
            types[name] = f"tensordesc<bf16{shape},{layout!r}>"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name == "lse_ptr" else "*i32"
        else:
            types[name] = "fp32" if name == "scale_log2" else "i32"
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, types, values, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    words = ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor", "st.local", "ld.local")
    print(json.dumps({word: ptx.count(word) for word in words} | {"shared": compiled.metadata.shared}))


if __name__ == "__main__":
    kind = sys.argv[2].split("-")
    main(int(sys.argv[1]), 2 if "corner" in kind else int("causal" in kind), "packed" in kind)
