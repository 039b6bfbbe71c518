"""The gate before a speed-up: some blocks of a result against the definition in float64, or :class:`WrongResult`.

Heads may be grouped and attention causal; there is no other mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparge_compile.kernels import eight_bits, reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div
from sparge_compile.kernels.how import How

ERROR_FACTOR = 4  # a result may err this many times as much as dense attention of the same dtype over the same keys
ERROR_FLOOR = 1e-6  # where dense attention errs by nearly nothing, as over one key
E4M3_STEP = 2**-4  # half of the step between two numbers, relative
MAP_DIFFERENCE = 1e-3  # share of blocks that may change places: scores tie to rounding


class WrongResult(Exception):
    """A kernel's result differs from the definition: its time means nothing."""


def check_map(q: Tensor, k: Tensor, thresholds: Tensor, is_causal: bool, found: BlockMap) -> None:
    """Compare the map of the first heads, those of one key head or two of their own, with the definition."""
    group = q.shape[1] // k.shape[1]
    key_heads = min(k.shape[1], 2 if group == 1 else 1)
    some = slice(0, key_heads * group)
    true = reference.block_map(q[:, some], k[:, :key_heads], thresholds[some], None, is_causal).to_dense()
    differ = (true != BlockMap(*(x[:, some] for x in found)).to_dense()).float().mean().item()
    if differ > MAP_DIFFERENCE:
        raise WrongResult(f"the map differs from the definition in {differ:.1%} of its blocks")


def check_forward(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, is_causal: bool, out: Tensor, lse: Tensor
) -> None:
    """Compare some query blocks with the definition."""
    group = q.shape[1] // k.shape[1]
    for head, i in samples(q, ceil_div(q.shape[2], QUERY_BLOCK)):
        rows = torch.arange(i * QUERY_BLOCK, min((i + 1) * QUERY_BLOCK, q.shape[2]), device=q.device)
        lists = BlockMap(block_map.counts[:1, head, i].view(1, 1, 1), block_map.indices[:1, head, i][:, None, None])
        keys = torch.nonzero(lists.to_dense().view(-1).repeat_interleave(KEY_BLOCK)[: k.shape[2]]).view(-1)
        mask = (keys <= rows[:, None])[None, None] if is_causal else None
        some = q[:1, head, rows][:, None], k[:1, head // group, keys][:, None], v[:1, head // group, keys][:, None]
        true, true_lse = reference.attention(*(x.double() for x in some), all_blocks(some[0], len(keys)), mask)
        dense = torch.nn.functional.scaled_dot_product_attention(*some, attn_mask=mask)
        compare("forward", out[:1, head, rows], dense[:, 0], true[:, 0])
        if not torch.allclose(lse[:1, head, rows].double(), true_lse[:, 0], atol=1e-3, rtol=1e-4):
            raise WrongResult(f"lse of head {head}, query block {i} is not the definition's")


def check_in_eight_bits(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, how: How, out: Tensor, lse: Tensor
) -> float:
    """Compare some query blocks with attention over the rounded operands: weights are rounded besides.

    Returns their relative error beside the definition over the operands themselves.
    """
    group, error, size = q.shape[1] // k.shape[1], 0.0, 0.0
    for head, i in samples(q, ceil_div(q.shape[2], QUERY_BLOCK)):
        rows = slice(i * QUERY_BLOCK, (i + 1) * QUERY_BLOCK)
        kept = BlockMap(block_map.counts[:1, head, i].view(1, 1, 1), block_map.indices[:1, head, i][:, None, None])
        keys = torch.nonzero(kept.to_dense().view(-1).repeat_interleave(KEY_BLOCK)[: k.shape[2]]).view(-1)
        given = q[:1, head, None], k[:1, head // group, None], v[:1, head // group, None]
        row = torch.arange(rows.start, min(rows.stop, q.shape[2]), device=q.device)
        mask = (keys <= row[:, None])[None, None] if how.is_causal else None
        true = []
        for x, y, z in (given, eight_bits.rounded(*given, how)):
            some = x[:, :, rows].double(), y[:, :, keys].double(), z[:, :, keys].double()
            true.append(reference.attention(*some, all_blocks(some[0], len(keys)), mask))
        found, rounded = out[:1, head, None, rows].double(), true[1][0]
        error, size = error + (found - true[0][0]).norm().item() ** 2, size + true[0][0].norm().item() ** 2
        off = ((found - rounded).norm() / rounded.norm()).item()
        if not off <= E4M3_STEP / 3**0.5:
            raise WrongResult(f"eight bits: error {off:.1e} beside rounded operands, the weights explain less")
        if not torch.allclose(lse[:1, head, None, rows].double(), true[1][1], atol=2e-2):
            raise WrongResult(f"eight bits: lse of head {head}, query block {i} is not that of rounded operands")
    return (error / size) ** 0.5


def check_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    block_map: BlockMap,
    is_causal: bool,
    grads: Sequence[Tensor],
) -> None:
    """Compare dq of some query blocks, dk and dv of some key blocks, with the formulas."""
    group = q.shape[1] // k.shape[1]
    every = torch.arange(max(q.shape[2], k.shape[2]), device=q.device)

    def allowed(head: int, rows: slice, keys: slice) -> Tensor:
        """1 where a row attends to a key, else 0."""
        lists = BlockMap(block_map.counts[:1, head], block_map.indices[:1, head])
        kept = lists.to_dense()[0, rows.start // QUERY_BLOCK : ceil_div(rows.stop, QUERY_BLOCK)]
        kept = kept.repeat_interleave(KEY_BLOCK, 1)[:, keys].repeat_interleave(QUERY_BLOCK, 0)[: rows.stop - rows.start]
        return (kept & (every[keys] <= every[rows, None]) if is_causal else kept).double()

    for head, i in samples(q, min(ceil_div(q.shape[2], QUERY_BLOCK), ceil_div(k.shape[2], KEY_BLOCK))):
        rows = slice(i * QUERY_BLOCK, min((i + 1) * QUERY_BLOCK, q.shape[2]))
        keys = slice(i * KEY_BLOCK, min((i + 1) * KEY_BLOCK, k.shape[2]))
        one_k, one_v = k[0, head // group].double(), v[0, head // group].double()

        def whole(head: int) -> tuple[Tensor, ...]:
            return (*(x[0, head].double() for x in (q, out, dout)), lse[0, head].double().unsqueeze(-1))

        here = allowed(head, rows, slice(0, k.shape[2]))
        _, ds, size = score_gradients(*(x[rows] for x in whole(head)), one_k, one_v, here)
        compare_sum("dq", grads[0][0, head, rows], ds, one_k, size)

        parts = []  # of the query heads that read this key head
        for other in range(head // group * group, (head // group + 1) * group):
            one = whole(other)
            here = allowed(other, slice(0, q.shape[2]), keys)
            parts.append((*score_gradients(*one, one_k[keys], one_v[keys], here), one[0], one[2]))
        p, ds, size, some_q, some_dout = (torch.cat(x) for x in zip(*parts, strict=True))
        compare_sum("dk", grads[1][0, head // group, keys], ds.mT, some_q, size.mT)
        compare_sum("dv", grads[2][0, head // group, keys], p.mT, some_dout, p.mT)


def score_gradients(
    q: Tensor, out: Tensor, dout: Tensor, lse: Tensor, k: Tensor, v: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights p [rows, keys], the gradients ds of the scores, and the size of what ds is a difference of."""
    scale = q.shape[-1] ** -0.5
    # Where nothing is attended to, the exponent may be anything.
    p = (q @ k.mT * scale - lse).masked_fill(allowed == 0, -torch.inf).exp()
    dp, delta = dout @ v.mT, (dout * out).sum(-1, keepdim=True)
    return p, p * (dp - delta) * scale, p * (dp.abs() + delta.abs()) * scale


def samples(q: Tensor, blocks: int) -> list[tuple[int, int]]:
    """(head, block): the first, one in the middle, the last."""
    return [(0, 0), (q.shape[1] // 2, blocks // 2), (q.shape[1] - 1, blocks - 1)]


def all_blocks(q: Tensor, keys: int) -> BlockMap:
    shape = (1, 1, ceil_div(q.shape[2], QUERY_BLOCK), ceil_div(keys, KEY_BLOCK))
    return BlockMap.from_dense(torch.ones(shape, dtype=torch.bool, device=q.device))


def compare(what: str, found: Tensor, dense: Tensor, true: Tensor) -> None:
    error, allowed = ((x.double() - true).abs().amax().item() for x in (found, dense))
    if not error <= ERROR_FACTOR * allowed + ERROR_FLOOR:
        raise WrongResult(f"{what}: error {error:.1e}, dense attention over the same keys {allowed:.1e}")


def compare_sum(what: str, found: Tensor, left: Tensor, right: Tensor, size: Tensor) -> None:
    """found should be left @ right, where each entry of left was rounded at the magnitude ``size``, independently.

    Products and sums are in float32, whose scores are near 10: an exponential then errs by near 10 float32 roundings.
    """
    rounding = 2 * torch.finfo(found.dtype).eps + 16 * torch.finfo(torch.float32).eps
    error, true = (found.double() - left @ right).norm().item(), (left @ right).norm().item()
    allowed = ERROR_FACTOR * rounding * (size.square() @ right.square()).sum().sqrt().item() + ERROR_FLOOR
    if not error <= allowed:
        raise WrongResult(f"{what}: error {error:.1e} of {true:.1e}, rounding explains {allowed:.1e}")
