"""Compile every Triton kernel for GPUs that are not here; print a JSON line for each: shared memory, registers, spills.

    python compile_kernels.py cuda:86 64,128,192/128 bfloat16 none,causal,mask

A head size may be two, D/Dv: of queries and keys, and of values.

The launches are the real ones: the kernels' own callers run on a CPU that says it is the GPU, and what they would have
launched is compiled for it instead. Run by test_kernels_compile.py in a process of its own, without the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sparge_compile.kernels import launch
from sparge_compile.kernels import triton as face
from sparge_compile.kernels.how import How

KINDS = {"cuda": 32, "hip": 64}  # threads of a warp
L, S, H, HK = 700, 830, 4, 2


def target_of(name: str) -> GPUTarget:
    kind, arch = name.split(":")
    return GPUTarget(kind, int(arch) if arch.isdigit() else arch, KINDS[kind])


def compile_launch(kernel: JITFunction, target: GPUTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a launch with these arguments would compile, for the target."""
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    packed = kernel._pack_args(backend, kwargs, bound, specialization, options)
    options, signature, constants, attributes = packed
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)


def resources(compiled: Any) -> dict[str, Any]:
    """Bytes of shared memory, and for NVIDIA registers and the stack that spills take, as cuobjdump reads them."""
    found: dict[str, Any] = {"shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        tool = triton.knobs.nvidia.cuobjdump.path
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        for key, word in (("registers", "REG"), ("stack", "STACK")):
            numbers = [int(n) for n in re.findall(rf"{word}:(\d+)", text)]
            found |= {key: max(numbers)} if numbers else {}
    return found


def main(name: str, head_sizes: list[tuple[int, int]], dtypes: list[torch.dtype], kinds: list[str]) -> None:
    target = target_of(name)
    major = target.arch // 10 if target.backend == "cuda" else 0
    case: dict[str, Any] = {}
    launch.architecture = lambda device: major
    launch.multiprocessors = lambda device: 100
    torch.cuda.device_of = lambda x: nullcontext()

    def launched(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        done = compile_launch(self, target, args, kwargs)
        print(json.dumps(case | {"kernel": self.__name__} | resources(done)), flush=True)

    JITFunction.run = launched
    # The kernels in Gluon have a test of their own: compile_hopper.py.
    for module in ("forward", "forward_8", "backward"):
        import_module(f"sparge_compile.kernels.triton.{module}").hopper_refusal = lambda *device: "left out"
    device = torch.device("cpu")
    for dtype in dtypes:
        for head_size, value_size in head_sizes:
            for kind in kinds:
                case |= {"head_size": head_size, "value_size": value_size, "dtype": str(dtype)[6:], "kind": kind}
                keys = L if kind == "order" else S
                shapes = ((H, L, head_size), (HK, keys, head_size), (HK, keys, value_size), (H, L, value_size))
                q, k, v, dout = (torch.randn(1, *shape).to(dtype) for shape in shapes)
                mask = torch.ones(1, 1, L, S, dtype=torch.bool) if kind == "mask" else None
                how = How(mask, kind in ("causal", "packed"), head_size**-0.5)
                if kind == "packed":
                    starts = [torch.tensor([0, n // 3, n], dtype=torch.int32) for n in (L, S)]
                    how = How(*how[:3], True, *starts, L, S)
                thresholds = torch.ones(H, 2, device=device)
                if kind == "order":
                    slots, thresholds = torch.zeros(L, dtype=torch.int32), torch.ones(H, 6)
                    how = How(*how[:3], slots_q=slots, slots_k=slots)
                if kind == "fp8":
                    how = how._replace(eight_bits=True)
                codes, pooled = face.code(q, k, v, how) if how.eight_bits else (None, None)
                counts, indices = face.block_map(q, k, thresholds, *how, pooled=pooled)
                # lists of whole blocks, since no kernel ran
                indices.copy_(torch.arange(indices.shape[-1]).expand_as(indices))
                counts.fill_(indices.shape[-1])
                out, lse = face.forward(q, k, v, counts, indices, *how, codes=codes)
                if how.eight_bits:
                    q, k, v, lse = face.centred(q, k, v, lse, how)
                face.backward(dout, q, k, v, out, lse, None, face.pack(counts, indices), *how)


if __name__ == "__main__":
    main(
        sys.argv[1],
        [(int(n.split("/")[0]), int(n.split("/")[-1])) for n in sys.argv[2].split(",")],
        [getattr(torch, name) for name in sys.argv[3].split(",")],
        sys.argv[4].split(","),
    )
