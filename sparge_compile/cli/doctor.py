"""``sparge doctor``: what is installed, and whether it works."""

from __future__ import annotations

import argparse

from .source import device

HELP = "what is installed, which kernels run here, right or wrong, how fast"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to look, and what to time."""
    parser.add_argument("--device", type=device, help="where to look (cuda if there is one)")
    parser.add_argument("--shape", type=_shape, metavar="B,H,L,D", help="attention to time (a moderate one)")
    parser.add_argument("--sparsity", type=float, default=0.95, help="of what is timed (0.95)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of what is timed (bfloat16; float32 on a CPU)"
    )
    parser.add_argument("--causal", action="store_true", help="time causal attention")
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(args: argparse.Namespace) -> int:
    """Look, print, and return 0 where nothing is wrong."""
    import torch

    from ..doctor import as_json, examine

    where = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    found = examine(where, args.shape, args.sparsity, dtype, args.causal)
    print(as_json(found) if args.json else found)
    return 0 if found.healthy else 1


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(",") if size.isdecimal())
    if len(sizes) != 4 or text.count(",") != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,L,D, as 1,12,32760,128")
    return sizes
