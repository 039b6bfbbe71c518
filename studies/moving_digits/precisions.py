"""What eight bits cost the trained video model, beside what sparsity costs it.

    python studies/moving_digits/precisions.py                         # three seeds; on a GPU, or long on a CPU
    python studies/moving_digits/precisions.py --frames 4 --clips 1 --seeds 1

For each share of key blocks: the velocity error ‖u − v‖² ÷ ‖v‖² against the dense model in the operands' dtype, with
sparse attention in that dtype and in eight bits, a mean over clips of held-out digits, ± its standard deviation over
seeds; and the relative error ‖O₈ − O‖ ÷ ‖O‖ that eight bits add to the attention outputs at equal block maps, a mean
over layers, and of the worst. On a CPU the weights of the keys are not rounded; the attention outputs are those of the
oracle, which rounds them.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from distil import held_out, precision
from measures import velocity_error
from tabulate import tabulate
from torch import Tensor, nn
from transformer import load

from sparge_compile.kernels import reference

PRECISIONS = (None, "fp8")


def compiled(model: nn.Module, share: float, kind: str | None, device: torch.device) -> nn.Module:
    torch._dynamo.reset()
    inner = "inductor" if device.type == "cuda" else "eager"
    options = {"min_seq_len": 0, "inner": inner, "topk": share, "topp": 0.0, "precision": kind}
    return torch.compile(model, backend="sparge", options=options)


@torch.no_grad()
def velocity_errors(model: nn.Module, share: float, kind: str | None, args: argparse.Namespace) -> list[float]:
    """The mean of each seed."""
    student, found = compiled(model, share, kind, args.device), []
    for seed in range(args.seeds):
        errors = []
        for mixed, when, _, classes in held_out(args.clips, args.batch, args.device, seed, frames=args.frames):
            with precision(args.device):
                errors.append(velocity_error(student(mixed, when, classes), model(mixed, when, classes)))
        found.append(torch.cat(errors).mean().item())
    return found


@torch.no_grad()
def attention_errors(model: nn.Module, share: float, args: argparse.Namespace) -> list[float]:
    """What eight bits add to the output of each layer, of one clip and some of its heads, at the map of the rule."""
    dense, found = F.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x[:1, : args.heads].to(torch.bfloat16).float() for x in (query, key, value))
        blocks = reference.block_map(q, k, torch.tensor([[share, 0.0]] * q.shape[1], device=q.device))
        exact, _ = reference.attention(q, k, v, blocks)
        rounded, _ = reference.attention_in_eight_bits(q, k, v, blocks)
        found.append(((rounded - exact).norm() / exact.norm()).item())
        return dense(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        for mixed, when, _, classes in held_out(1, 1, args.device, frames=args.frames):
            model(mixed, when, classes)
    finally:
        F.scaled_dot_product_attention = dense
    return found


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1e}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2e}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=4, help="batches of each seed")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--heads", type=int, default=1, help="whose attention outputs are compared")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, rows = load("teacher", args.device), []
    for sparsity in args.sparsities:
        share = 1 - sparsity
        errors = attention_errors(model, share, args)
        velocities = (shown(velocity_errors(model, share, kind, args)) for kind in PRECISIONS)
        rows.append([f"{sparsity:.0%}", *velocities, f"{statistics.mean(errors):.4f}, {max(errors):.4f}"])
        print(rows[-1], flush=True)
    columns = ("sparsity", "velocity error", "in eight bits", "attention outputs: mean, worst layer")
    print(tabulate(rows, columns, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
