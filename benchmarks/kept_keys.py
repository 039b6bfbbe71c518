"""A joint sequence of text and image: error and time with the text kept, beside the plain rule at equal sparsity.

The inputs are synthetic, in the shape of a joint attention of image models (Flux: text 512, image 4096, 24 heads of
128): the image is smooth in its grid, so its blocks have telling means; each image token looks at its neighbours and at
one text token, of which block means say little. Both ways keep as many blocks over all. Errors are of dense attention
in float32.

    python benchmarks/kept_keys.py --device cuda
    python benchmarks/kept_keys.py --text 128 --side 16 --heads 2 --head-size 32 --budget 0.2

Each row: the share of blocks skipped, the relative L1 error of the image's and of the text's rows, milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import harness
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from sparge_compile import attention

TOPK = (0.05, 0.1, 0.2)  # of the other blocks, where the text is kept


def joint_inputs(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, text + side², D]: text first."""
    numbers = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, args.heads, *shape, generator=numbers)

    def smooth() -> Tensor:
        coarse = noise(args.head_size, max(2, args.side // 8), max(2, args.side // 8)).flatten(0, 1)
        fine = F.interpolate(coarse, size=(args.side, args.side), mode="bicubic").flatten(2)
        return fine.mT.unflatten(0, (1, args.heads))

    place, text = smooth(), noise(args.text, args.head_size)
    of_text = torch.randint(0, args.text, (args.side**2,), generator=numbers)
    image_q = 1.2 * place + 0.9 * text[:, :, of_text] + 0.3 * noise(args.side**2, args.head_size)
    image_k = 1.2 * place + 0.3 * noise(args.side**2, args.head_size)
    q, k = torch.cat([text + 0.5 * noise(args.text, args.head_size), image_q], 2), torch.cat([text, image_k], 2)
    v = torch.cat([noise(args.text, args.head_size), smooth()], 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return tuple(x.to(device, dtype) for x in (q, k, v))  # type: ignore[return-value]


def topk_of_sparsity(q: Tensor, k: Tensor, v: Tensor, sparsity: float, **kept: Any) -> float:
    """The Top-k share with which as much is skipped, whatever is kept."""
    low, high = 1e-4, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        found = float(attention(q, k, v, topk=middle, return_sparsity=True, **kept)[1])
        low, high = (low, middle) if found < sparsity else (middle, high)
    return high


def errors(out: Tensor, dense: Tensor, text: int) -> tuple[float, float]:
    """Relative L1 error of the image's rows and of the text's."""
    wrong, size = (out.float() - dense.float()).abs(), dense.float().abs()
    return tuple(float(wrong[:, :, at].sum() / size[:, :, at].sum()) for at in (slice(text, None), slice(0, text)))  # type: ignore[return-value]


def main(given: Sequence[str] | None = None) -> list[list[Any]]:
    """Measure, print and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--side", type=int, default=64, help="of the image in tokens")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each time")
    args = parser.parse_args(given)
    device = torch.device(args.device)
    q, k, v = joint_inputs(args, device)
    dense = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    ways: dict[str, Any] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
    skipped = {"dense": 0.0}
    for topk in TOPK:
        kept = {"topk": topk, "keep_keys": args.text, "dense_queries": True}
        sparsity = float(attention(q, k, v, **kept, return_sparsity=True)[1])
        plain = {"topk": topk_of_sparsity(q, k, v, sparsity)}
        keys = {"topk": topk_of_sparsity(q, k, v, sparsity, keep_keys=args.text), "keep_keys": args.text}
        for name, how in (("text kept, its queries dense", kept), ("text kept", keys), ("plain rule", plain)):
            ways[f"{name}, topk {how['topk']:.4f}"] = lambda how=how: attention(q, k, v, **how)
            skipped[list(ways)[-1]] = float(attention(q, k, v, **how, return_sparsity=True)[1])
    times = harness.seconds_each(ways, device, args.budget)
    rows = [[name, skipped[name], *errors(way(), dense, args.text), times[name] * 1e3] for name, way in ways.items()]
    print(harness.header(device))
    print(f"text {args.text}, image {args.side}², H {args.heads}, D {args.head_size}, {str(q.dtype)[6:]}")
    headers = ("", "sparsity", "error of the image", "error of the text", "ms")
    print(tabulate(rows, headers=headers, floatfmt=("", ".3f", ".4f", ".4f", ".3f")))
    return rows


if __name__ == "__main__":
    main()
