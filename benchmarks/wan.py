"""A whole Wan2.1-1.3B-shaped diffusers transformer: backend "sparge" against backend "inductor", in one run.

    python benchmarks/wan.py                                   # an H200: 480p × 81 frames, L = 32,760
    python benchmarks/wan.py --by-block                        # blocks compiled one by one, the dense ones too
    python benchmarks/wan.py --device cpu --tiny --inner eager

The weights are random and so is the input, whose pooled scores are flat: every head keeps its Top-k share, and shares
differ between heads. First the sparse model with all blocks kept is compared with the dense one; then both are timed,
with raster blocks and with tiles, and the profiler says what of each time is attention. Rows are printed as they come,
and once more in a table. Needs diffusers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor, nn

import sparge_compile

LAYERS, HEADS, HEAD_SIZE, FFN = 30, 12, 128, 8960
LATENTS = (21, 60, 104)  # frames, height, width; the patch is 1 × 2 × 2
TEXT, TEXT_DIM = 512, 4096
MIN_LENGTH = 1024  # keys below which attention stays dense: the text
SPREAD = (0.5, 1.5)  # of a head's share of key blocks, around the mean
ATTENTION_KERNELS = ("_forward", "_pool", "_score", "_select", "flash", "fmha", "sdpa", "attention")
OURS = ("_forward_kernel", "_forward_hopper_kernel", "_pool_kernel", "_score_kernel", "_select_kernel")
ALL_BUT_NONE = 0.99999  # a Top-k share that keeps all blocks; 1 would leave the site dense
LARGEST_ERROR = 0.05  # relative, of the model with all blocks kept against the dense one, in bfloat16


def build(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any], int, int]:
    """(model, its inputs, heads, tokens)."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise SystemExit("This benchmark needs diffusers: pip install diffusers.") from error
    heads, head_size, ffn = (2, 64, 128) if args.tiny else (HEADS, HEAD_SIZE, FFN)
    frames, height, width = (4, 32, 32) if args.tiny else LATENTS
    text, text_dim = (16, 32) if args.tiny else (TEXT, TEXT_DIM)
    layers = args.layers or (2 if args.tiny else LAYERS)
    torch.manual_seed(0)
    with device:
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_size,
            in_channels=16,
            out_channels=16,
            text_dim=text_dim,
            ffn_dim=ffn,
            num_layers=layers,
        )
        inputs = {
            "hidden_states": torch.randn(1, 16, frames, height, width, dtype=dtype),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, text, text_dim, dtype=dtype),
            "return_dict": False,
        }
    model = model.to(dtype).eval().requires_grad_(False)
    return model, inputs, heads, frames * (height // 2) * (width // 2)


def compile_with(
    model: nn.Module, inner: str, options: dict[str, Any] | None = None, by_block: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """With ``inner`` alone, or with the sparse backend over it; the whole model, or each of its blocks."""
    torch.compiler.reset()
    how: dict[str, Any] = {"backend": inner}
    if options is not None:
        how = {"backend": "sparge", "options": options | {"inner": inner}}
    if not by_block:
        return torch.compile(model, **how)
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(**how)
    return model


def grid_of(hidden_states: Tensor, **others: object) -> tuple[int, ...]:
    """Frames, rows and columns of the tokens: the patch is 1 × 2 × 2."""
    _, _, frames, height, width = hidden_states.shape
    return frames, height // 2, width // 2


def calibration_of(density: float, heads: int) -> sparge_compile.Calibration:
    """Thresholds of which each head keeps another share, ``density`` in the mean."""
    shares = [density * (SPREAD[0] + (SPREAD[1] - SPREAD[0]) * h / (heads - 1)) for h in range(heads)]
    return sparge_compile.Calibration({"blocks.*.attn1": [(share, 0.0) for share in shares]})


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def profile(call: Callable[[], object]) -> tuple[float, float, float]:
    """ms of the GPU in all kernels, in attention of any kind, and in this package's kernels."""
    times = [(name, 1000 * seconds) for name, seconds in harness.kernel_seconds(call).items()]
    return (
        sum(t for _, t in times),
        sum(t for name, t in times if any(word in name for word in ATTENTION_KERNELS)),
        sum(t for name, t in times if name in OURS),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--layers", type=int, help="(30)")
    parser.add_argument("--inner", default="inductor", help="what compiles the graphs, the rival too (inductor)")
    parser.add_argument(
        "--density", type=float, nargs="+", default=[0.05], help="mean shares of key blocks to keep (0.05)"
    )
    parser.add_argument("--by-block", action="store_true", help="compile the blocks one by one")
    parser.add_argument("--csv", help="write the rows to this file as well")
    args = parser.parse_args()
    device, dtype = harness.start(args)
    model, inputs, heads, tokens = build(args, device, dtype)
    dense = compile_with(model, args.inner, by_block=args.by_block)
    want = dense(**inputs)[0].clone()
    rows: list[dict[str, Any]] = []

    def measure(call: Callable[[], object], **what: Any) -> None:
        """Add a row, and print it: a run that is cut off has said what it knew."""
        ms = 1000 * harness.seconds_each({"": call}, device, 3.0)[""]
        rows.append({**what, "ms": ms, "x": rows[0]["ms"] / ms if rows else 1.0})
        print(*what.values(), f"{ms:.1f} ms, {rows[-1]['x']:.3f}x", flush=True)
        if device.type == "cuda":
            rows[-1] |= dict(zip(("GPU ms", "attention ms", "ours ms"), profile(call), strict=True))

    measure(partial(dense, **inputs), backend=args.inner)
    whole = compile_with(model, args.inner, {"topk": ALL_BUT_NONE, "min_seq_len": MIN_LENGTH}, args.by_block)
    error = relative(whole(**inputs)[0], want)
    print(f"L {tokens}: all blocks kept, error against dense {error:.2g}")
    if not error < LARGEST_ERROR:
        raise SystemExit("The rewritten model with all blocks kept is not the dense model: no time counts.")

    calibrations = {density: calibration_of(density, heads) for density in args.density}
    first = calibrations[args.density[0]]
    for order in ("raster", "tiles"):
        options = {"calibration": first, "min_seq_len": MIN_LENGTH, "token_order": order}
        with sparge_compile.attach(model, first, grid=grid_of) as attached:
            sparse = compile_with(model, args.inner, options, args.by_block)
            for density, calibration in calibrations.items():
                attached.set(calibration)
                measure(partial(sparse, **inputs), backend=f"sparge, {order}", density=density)
    report = sparge_compile.explain(model, {"calibration": first, "min_seq_len": MIN_LENGTH})(**inputs)
    print(f"{len(report.sparse)} of {len(report)} attentions sparse; mean shares of key blocks {args.density}")
    print(harness.table(rows))
    if args.csv:
        harness.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
