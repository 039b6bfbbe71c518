"""Block-sparse kernels of other libraries beside ours, at equal maps: those of cuDNN, FlashAttention-4, FlexAttention.

    pip install "nvidia-cudnn-frontend>=1.32" "flash-attn-4[cu13]"   # kernels in CuTe DSL; what is missing is left out
    python benchmarks/peers.py --shapes A B

Three maps of one density: "ours" are blocks of 128 queries x 64 keys, as many in a row as the thresholds of its head
say; "even" the same with equally many in each row, as cuDNN's kernels in 8 bits want it; "squares" blocks of 128 x 128,
equally many in each row. Kernels with squares of 64 get each row of lists twice. Lengths are those of attention.py
rounded up to whole blocks. Each library has a process of its own, so that a crash loses its rows alone: all compile at
once, then they are timed one after the other. Every result is checked before its time is printed; one that fails gets
"wrong".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import gate
import harness
import torch
from attention import SHAPES
from methods import Inputs, Measured, Method, Problem, autograd_methods, flex_map, measure, rows_of, thresholds_for
from torch import Tensor

from sparge_compile.kernels import eight_bits
from sparge_compile.kernels.block_map import QUERY_BLOCK, BlockMap, ceil_div
from sparge_compile.kernels.how import How

PACKAGES = ("nvidia-cudnn-frontend", "flash-attn-4", "nvidia-cutlass-dsl")
CODES = "codes in 8 bits"
FORWARD_8 = "forward in 8 bits, codes given"
COARSE = 0.1  # relative error; codes of other libraries are their own: this tells a wrong result from a rounded one
Attend = Callable[[], tuple[Tensor, Tensor]]  # (out, lse), [B, H, L, D] and [B, H, L]
Backward = Callable[[Tensor, Tensor], Sequence[Tensor]]  # from them, gradients [B, H, L, D] of q, k and v
Rows = Iterator[tuple[str, Method]]  # the name of a map, and a method over it


class Maps(NamedTuple):
    """The maps of one comparison, as our lists; ``mask`` is "squares" as FlexAttention has it."""

    ours: BlockMap
    even: BlockMap
    squares: BlockMap
    mask: object

    @staticmethod
    def of(inputs: Inputs, density: float) -> Maps:
        q, k, heads = inputs.q, inputs.k, inputs.problem.heads
        find = harness.kernels(q.device).block_map
        even = torch.tensor([[density, 0.0]] * heads, device=q.device)
        found = (find(q, k, thresholds, *inputs.options) for thresholds in (thresholds_for(density, inputs), even))
        mask = flex_map(inputs, density)
        return Maps(*found, BlockMap.from_dense(mask.to_dense().bool().repeat_interleave(2, -1)), mask)


def whole_blocks(problem: Problem) -> Problem:
    return problem._replace(length=ceil_div(problem.length, QUERY_BLOCK) * QUERY_BLOCK)


def lists(block_map: BlockMap, repeats: int = 1) -> BlockMap:
    """Each row of lists ``repeats`` times, no longer than the longest; what follows the counts is 0."""
    longest = int(block_map.counts.max())
    dead = torch.arange(longest, device=block_map.counts.device) >= block_map.counts.unsqueeze(-1)
    indices = block_map.indices[..., :longest].masked_fill(dead, 0)
    return BlockMap(*(x.repeat_interleave(repeats, 2) for x in (block_map.counts, indices)))


def squares(mask) -> BlockMap:
    """The lists of a BlockMask of whole blocks."""
    return lists(BlockMap(mask.full_kv_num_blocks, mask.full_kv_indices))


# ---- the libraries


def ours(inputs: Inputs, maps: Maps) -> Rows:
    kernels, (q, k, v, dout, problem) = harness.kernels(inputs.q.device), inputs
    for name, block_map in (("ours", maps.ours), ("squares", maps.squares)):
        bits = kernels.pack(*block_map)

        def attend(block_map: BlockMap = block_map) -> tuple[Tensor, Tensor]:
            return kernels.forward(q, k, v, *block_map, *inputs.options)

        def backward(out: Tensor, lse: Tensor, bits: Tensor = bits) -> Sequence[Tensor]:
            return kernels.backward(dout, q, k, v, out, lse, None, bits, *inputs.options)

        yield from checked(name, "ours", inputs, block_map, attend, backward)
    if eight_bits.refusal(q.device, problem.head_size, problem.head_size):
        return
    how = How(*inputs.options, eight_bits=True)
    codes, _ = kernels.code(q, k, v, how)
    yield "even", Method(f"ours: {CODES}", "map", lambda: kernels.code(q, k, v, how))
    for name, block_map in (("even", maps.even), ("squares", maps.squares)):

        def attend_8(block_map: BlockMap = block_map) -> tuple[Tensor, Tensor]:
            return kernels.forward(q, k, v, *block_map, *how, codes=codes)

        def check(block_map: BlockMap = block_map, attend: Attend = attend_8) -> None:
            error = gate.check_in_eight_bits(q, k, v, block_map, how, *attend())
            print(f"ours: relative error {error:.1e}", file=sys.stderr)

        yield name, Method(f"ours: {FORWARD_8}", "forward", attend_8, check=check)


def cudnn(inputs: Inputs, maps: Maps, size: int) -> Rows:
    """Squares of 64 or 128 rows. The backward turns the lists around within its time, as ours does."""
    from cudnn.block_sparse_attention import _interface, api
    from cudnn.block_sparse_attention._fp8_quant import _quantize_sage_bhsd

    q, k, v, dout, problem = inputs
    label, small = f"cuDNN {size}x{size}", size == 64
    name, (counts, indices) = ("ours", lists(maps.ours, 2)) if small else ("squares", squares(maps.mask))
    given = {"q2k_block_index": indices, "q2k_block_nums": counts, "sparse_block_size": size}

    def attend() -> tuple[Tensor, Tensor]:
        found = api.block_sparse_attention_forward(q, k, v, **given)
        return found["o_tensor"], found["lse_tensor"]

    def backward(out: Tensor, lse: Tensor) -> Sequence[Tensor]:
        found = api.block_sparse_attention_backward(dout, q, k, v, out, lse, **given)
        return found["dq_tensor"], found["dk_tensor"], found["dv_tensor"]

    whole = problem.head_size == 128  # what its backward and its 8 bits are written for
    yield from checked(name, label, inputs, getattr(maps, name), attend, backward if whole else None)
    if not whole:
        return
    name, (_, even) = ("even", lists(maps.even, 2)) if small else ("squares", squares(maps.mask))
    # The public function makes the codes at each call; ours are given, so that the two parts are told apart.
    forward = getattr(_interface, f"_bsa_attn_fwd_sm90_fp8_blk{size}")
    codes = _quantize_sage_bhsd(q, k, v, v_layout="bhds")

    def attend_8() -> tuple[Tensor, Tensor]:
        return forward(*codes, even, even.shape[-1])

    yield name, Method(f"{label}: {CODES}", "map", lambda: _quantize_sage_bhsd(q, k, v, v_layout="bhds"))
    check = near(label, inputs, getattr(maps, name), lambda: attend_8()[0])
    yield name, Method(f"{label}: {FORWARD_8}", "forward", attend_8, check=check)


def flash4(inputs: Inputs, maps: Maps) -> Rows:
    """Its backward has squares alone, and is given the lists by key as well, out of its time."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    def tensors(counts: Tensor, indices: Tensor, keys: int) -> BlockSparseTensorsTorch:
        partial = torch.zeros_like(counts), torch.zeros_like(indices[..., :1])
        return BlockSparseTensorsTorch(*partial, counts, indices, block_size=(QUERY_BLOCK, keys))

    def attend(x: Sequence[Tensor], **given: BlockSparseTensorsTorch) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(*(y.transpose(1, 2) for y in x), return_lse=True, **given)
        return out.transpose(1, 2), lse

    by_ours = tensors(*lists(maps.ours), 64)
    forward = torch.no_grad()(lambda: attend(inputs[:3], block_sparse_tensors=by_ours))
    yield from checked("ours", "FlashAttention-4 128x64", inputs, maps.ours, forward, None)

    by_query = tensors(*squares(maps.mask), 128)
    by_key = tensors(*lists(BlockMap(maps.mask.full_q_num_blocks, maps.mask.full_q_indices)), 128)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    forward = torch.no_grad()(lambda: attend(inputs[:3], block_sparse_tensors=by_query))
    trained, _ = attend(leaves, block_sparse_tensors=by_query, block_sparse_tensors_bwd=by_key)

    def backward(out: Tensor, lse: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(trained, leaves, inputs.dout, retain_graph=True)

    yield from checked("squares", "FlashAttention-4 128x128", inputs, maps.squares, forward, backward)


def flex(inputs: Inputs, maps: Maps) -> Rows:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*x: Tensor) -> Tensor:
        return compiled(*x, block_mask=maps.mask)

    for method in autograd_methods("FlexAttention 128x128", attend, inputs, kept=True):
        is_forward = method.direction == "forward"
        yield (
            "squares",
            method._replace(check=near(method.name, inputs, maps.squares, method.call)) if is_forward else method,
        )


PEERS: dict[str, Callable[[Inputs, Maps], Rows]] = {
    "ours": ours,
    "cudnn64": lambda inputs, maps: cudnn(inputs, maps, 64),
    "cudnn128": lambda inputs, maps: cudnn(inputs, maps, 128),
    "flash4": flash4,
    "flex": flex,
}


def checked(
    name: str, label: str, inputs: Inputs, block_map: BlockMap, attend: Attend, backward: Backward | None
) -> Rows:
    """Forward and backward over one map, held against the definition as ours are."""
    q, k, v, dout, _ = inputs
    out, lse = attend()
    yield name, Method(label, "forward", attend, check=lambda: gate.check_forward(q, k, v, block_map, False, out, lse))
    if backward is None:
        return

    def check() -> None:
        gate.check_backward(q, k, v, out, lse, dout, block_map, False, backward(out, lse))

    yield name, Method(label, "backward", lambda: backward(out, lse), check=check)


def near(label: str, inputs: Inputs, block_map: BlockMap, attend: Callable[[], object]) -> Callable[[], None]:
    """A check of all rows beside our forward over the same blocks, which has been held against the definition."""

    def check() -> None:
        true, _ = harness.kernels(inputs.q.device).forward(*inputs[:3], *block_map, *inputs.options)
        error = ((attend().float() - true.float()).norm() / true.float().norm()).item()
        print(f"{label}: relative error {error:.1e}", file=sys.stderr)
        if not error < COARSE:
            raise gate.WrongResult(f"relative error {error:.1e}")

    return check


# ---- a library's process: it prepares all shapes, then times one whenever a line comes


def serve(peer: str, names: Sequence[str], density: float, dtype: torch.dtype, device: torch.device) -> None:
    prepared = [prepare(peer, name, density, dtype, device) for name in names]
    say({"ready": peer})
    for name, (inputs, maps, methods) in zip(names, prepared, strict=True):
        if not sys.stdin.readline():
            return  # nobody asks any more
        for map_name, method in methods:
            say({"shape": name, "map": map_name, **row(method, inputs, getattr(maps, map_name))})
        say({"done": name})


def prepare(
    peer: str, name: str, density: float, dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, Maps, list[tuple[str, Method]]]:
    """Inputs, maps, and methods; each has run once, and one that raised ends the list."""
    torch.manual_seed(0)
    inputs = Inputs.of(whole_blocks(SHAPES[name]), dtype, device)
    maps, methods = Maps.of(inputs, density), []
    torch.cuda.empty_cache()  # the libraries share the GPU
    try:
        for map_name, method in PEERS[peer](inputs, maps):
            method.call()
            harness.extra_memory(lambda: None, device)  # waits for the GPU
            methods.append((map_name, method))
    except Exception as error:  # whatever another library raises becomes a row
        methods.append(("ours", Method(peer, "", raising(error))))
    torch.cuda.empty_cache()
    return inputs, maps, methods


def raising(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def row(method: Method, inputs: Inputs, block_map: BlockMap) -> dict[str, object]:
    try:
        measured = measure([method], inputs.q.device, budget=0.1)[0]
    except Exception as error:
        measured = Measured(method, None, trouble=f"not run: {type(error).__name__}: {error}".splitlines()[0][:150])
    found = rows_of([measured], inputs.problem, "", block_map)[0]
    return {key: found[key] for key in ("method", "direction", "ms", "TFLOP/s", "trouble") if key in found}


def say(what: dict[str, object]) -> None:
    print(json.dumps(what), flush=True)


# ---- the process that asks them


def ask(peers: Sequence[str], names: Sequence[str], arguments: Sequence[str], patience: float) -> Iterator[list[dict]]:
    """The rows of each library over each shape; one that ends early or is late leaves a row that says so."""
    command, start = [sys.executable, __file__, *arguments, "--shapes", *names, "--serve"], time.monotonic()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    asked = {peer: subprocess.Popen([*command, peer], **pipes) for peer in peers}
    for peer, process in asked.items():
        list(read(process, "ready", 3 * patience))
        print(f"{peer} is ready after {time.monotonic() - start:.0f} s", flush=True)
    for name in names:
        for peer, process in asked.items():
            with suppress(BrokenPipeError):
                print(file=process.stdin, flush=True)
            rows = list(read(process, "done", patience))
            if process.poll() not in (None, 0):
                rows.append({"method": peer, "trouble": f"not run: the process ended with {process.returncode}"})
            yield [{"shape": name, **row} for row in rows]


def read(process: subprocess.Popen, last: str, patience: float) -> Iterator[dict]:
    """What a process says before its line ``last``; it is killed when that is late."""
    watch = threading.Timer(patience, process.kill)
    watch.start()
    for line in process.stdout:
        if not line.startswith("{"):
            continue  # a library's own words
        said = json.loads(line)
        if last in said:
            break
        yield said
    else:
        process.wait()
    watch.cancel()


def beside_ours(rows: Sequence[dict]) -> list[dict]:
    """The rows with what each takes over what ours takes for the same."""

    def key(one: dict) -> tuple:
        return one["shape"], one.get("map"), one.get("direction"), one["method"].partition(": ")[2]

    times = {key(one): one["ms"] for one in rows if one["method"].partition(":")[0] == "ours" and "ms" in one}
    ratios = [{"x ours": one["ms"] / times[key(one)]} if "ms" in one and key(one) in times else {} for one in rows]
    return [one | ratio for one, ratio in zip(rows, ratios, strict=True)]


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["A", "B"], help="(A B)")
    parser.add_argument("--density", type=float, default=0.05, help="share of key blocks to keep (0.05)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="(all)")
    parser.add_argument(
        "--patience", type=float, default=30, help="seconds for a library's shape, a third of compiling"
    )
    parser.add_argument("--csv", help="write all rows to this file as well")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        device = harness.require(args.device)
        dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        serve(args.serve, args.shapes, args.density, dtype, device)
        return
    harness.start(args)
    print(" | ".join(map(installed, PACKAGES)), f"| sparsity wanted {1 - args.density:.0%}", flush=True)
    given = ["--device", args.device, "--density", str(args.density), *(["--dtype", args.dtype] if args.dtype else [])]
    rows: list[dict] = []
    for more in ask(args.peers, args.shapes, given, args.patience):
        rows = beside_ours([*rows, *more])
        if args.csv:  # after each, so that an end before the last loses no more
            harness.write_csv(args.csv, rows)
    print(harness.table(rows))


if __name__ == "__main__":
    main()
