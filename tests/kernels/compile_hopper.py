"""Compile Hopper kernels for sm_90 on a machine without a GPU; print a JSON object of what came out of each.

Run by test_hopper_compiles.py in a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparge_compile.kernels.block_map import KEY_BLOCK
from sparge_compile.kernels.eight_bits import LANES
from sparge_compile.kernels.triton import (
    backward_key_hopper,
    backward_query_hopper,
    forward_hopper,
    forward_hopper_8,
    schedule,
)
from sparge_compile.kernels.triton.hopper import COLUMNS, ROWS

KERNELS = {
    "forward": (forward_hopper, forward_hopper._forward_hopper_kernel),
    "forward_8": (forward_hopper_8, forward_hopper_8._forward_hopper_8_kernel),
    "dq": (backward_query_hopper, backward_query_hopper._dq_hopper_kernel),
    "dkv": (backward_key_hopper, backward_key_hopper._dkv_hopper_kernel),
}
FLOATS = ("scale", "scale_log2")
FLOAT_POINTERS = ("lse_ptr", "dlse_ptr", "delta_ptr", "q_scale_ptr", "lift_ptr", "v_scale_ptr")


def tile_of(direction: str, name: str, head_pad: int, packed: bool) -> tuple[str, gl.dtype, list[int]]:
    """The dtype of a descriptor, by two names, and its tile."""
    lead = [1] * (3 if packed else 2)
    if name == "out_desc" and direction.startswith("forward"):
        return "bf16", gl.bfloat16, [*lead, ROWS, head_pad // 2 if direction == "forward_8" else head_pad]
    if direction != "forward_8":
        return "bf16", gl.bfloat16, [*lead, ROWS, COLUMNS]
    tiles = {
        "k_scale_desc": ("fp32", gl.float32, [1, LANES]),
        "v_desc": ("fp8e4nv", gl.float8e4nv, [head_pad, KEY_BLOCK]),
    }
    text, dtype, tile = tiles.get(name, ("i8", gl.int8, [ROWS, head_pad]))
    return text, dtype, [*lead, *tile]


def main(direction: str, head_pad: int, causality: int, packed: bool) -> None:
    module, kernel = KERNELS[direction]
    stages = module.STAGES[head_pad]
    rings = {"Q_STAGES": stages[0], "DOUT_STAGES": stages[1]} if direction == "dkv" else {"STAGES": stages}
    constants = {"HEAD_SIZE": head_pad, "HEAD_PAD": head_pad, "KEYS": KEY_BLOCK, "HALF": ROWS, "COLUMNS": COLUMNS}
    constants |= {"HEAD": head_pad, "LANES": LANES}
    constants |= {"TAIL": schedule.TAIL}
    constants |= {"CAUSAL": causality, "PACKED": packed, "WITH_DLSE": True} | rings
    constants |= {"LOADER_REGS": module.LOADER_REGISTERS, "CONSUMER_REGS": module.CONSUMER_REGISTERS}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_desc"):
            text, dtype, shape = tile_of(direction, name, head_pad, packed)
            layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
            types[name] = f"tensordesc<{text}{shape},{layout!r}>"
        elif name in FLOAT_POINTERS:
            types[name] = "*fp32"
        elif name in ("dq_ptr", "dk_ptr", "dv_ptr"):
            types[name] = "*bf16"
        else:
            types[name] = "*i32" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, types, values, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    words = ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor", "st.local", "ld.local")
    print(json.dumps({word: ptx.count(word) for word in words} | {"shared": compiled.metadata.shared}))


if __name__ == "__main__":
    for case in sys.argv[1:]:
        direction, head_pad, *kind = case.split("-")
        main(direction, int(head_pad), 2 if "corner" in kind else int("causal" in kind), "packed" in kind)
