"""Ring attention: queries stay, keys and values go round, and what each part of the keys gave is put together.

The block map is that of the whole sequence: each rank pools its keys, and the means, 1/64 of them, are gathered, so
that every rank ranks all key blocks for its queries. A list of key blocks is then cut where the keys of a rank end.
Attention over each part gives a log-sum-exp, by which the parts are merged; the gradients take the one of the whole,
so that they add up. While one part is computed, the next is under way.

In: q [B, H, R, D], k [B, Hk, R', D], v [B, Hk, R', Dv], the parts of one rank of P; R' is the same on all of them.
Blocks begin at the first row of each part: where R is whole query blocks and R' whole key blocks, they are those of one
GPU, and so is the map, up to rounding. Without thresholds every block is kept. Left out: masks and causality.

Source: Ring Attention (arXiv 2310.01889); the merge is that of FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..keeping import PLAIN_WIDTH
from ..kernels import allocate, cpu
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap, ceil_div
from ..kernels.how import How
from ..kernels.rule import default_scale
from .exchange import autocast, library

_RANKS = "float scale, int rank, int ranks, str group"
library.define(
    "ring(Tensor query, Tensor key, Tensor value, Tensor? thresholds, float? scale, int rank, int ranks, str group) "
    "-> Tensor"
)
library.define(
    f"ring_attend(Tensor query, Tensor key, Tensor value, Tensor? thresholds, {_RANKS}) "
    "-> (Tensor out, Tensor lse, Tensor bits)"
)
library.define(
    f"ring_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor bits, "
    f"{_RANKS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor | None,
    scale: float | None,
    rank: int,
    ranks: int,
    group: str,
) -> Tensor:
    """Attention [B, H, R, Dv] of a rank's queries over the keys of all. Of thresholds it reads the first two columns:
    the others say which tokens are kept, and a site that keeps some is not made sparse in a ring."""
    thresholds = None if thresholds is None else thresholds[:, :PLAIN_WIDTH].float().detach()
    scale = default_scale(query.shape[-1], scale)
    return torch.ops.sparge.ring_attend.default(query, key, value, thresholds, scale, rank, ranks, group)[0]


def ring_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor | None,
    scale: float,
    rank: int,
    ranks: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, R, Dv], lse [B, H, R], the map of each part as bits [P, B, H, Nq, words])."""
    maps = _maps(query, key, thresholds, scale, ranks, group)
    bits = torch.stack([torch.ops.sparge.pack.default(*lists) for lists in maps])
    how = How(None, False, scale)
    found: tuple[Tensor, Tensor] | None = None
    for part, (k, v) in _rounds([key, value], rank, ranks, group):
        some = torch.ops.sparge.forward.default(query, k, v, *maps[part], *how)
        found = some if found is None else _merged(*found, *some)
    assert found is not None
    return allocate.new_out(query, value).copy_(found[0]), found[1], bits


def _maps(
    query: Tensor, key: Tensor, thresholds: Tensor | None, scale: float, ranks: int, group: str
) -> list[BlockMap]:
    """The lists of each rank's key blocks, [B, H, Nq] and [B, H, Nq, Nk'], numbered from its first."""
    batch, heads = query.shape[:2]
    n_query, n_key = ceil_div(query.shape[2], QUERY_BLOCK), ceil_div(key.shape[2], KEY_BLOCK)
    blocks = torch.arange(n_key, dtype=torch.int32, device=query.device)
    if thresholds is None:
        counts = torch.full((batch, heads, n_query), n_key, dtype=torch.int32, device=query.device)
        return [BlockMap(counts, blocks.expand(*counts.shape, n_key))] * ranks
    face = _face(query)
    q_mean, k_mean = face.means(query, key)
    counts, indices = face.select(q_mean, _gathered(k_mean, ranks, group), thresholds, scale)
    live = torch.arange(indices.shape[-1], device=query.device) < counts.unsqueeze(-1)
    indices = torch.where(live, indices, ranks * n_key).contiguous()
    edges = torch.arange(ranks + 1, dtype=torch.int32, device=query.device) * n_key
    starts = torch.searchsorted(indices, edges.expand(*counts.shape, -1).contiguous(), out_int32=True)
    lists = []
    for part in range(ranks):
        first, last = starts[..., part], starts[..., part + 1]
        places = (first.unsqueeze(-1) + blocks).clamp(max=indices.shape[-1] - 1)
        lists.append(BlockMap(last - first, indices.gather(-1, places.long()) - part * n_key))
    return lists


def _face(x: Tensor) -> Any:
    """The functions of a device; Triton is imported when a kernel runs."""
    return cpu if x.device.type == "cpu" else import_module("...kernels.triton", __name__)


def _gathered(k_mean: Tensor, ranks: int, group: str) -> Tensor:
    """The means of all ranks' key blocks, [B, Hk, P · Nk', D], from those of one."""
    collectives = torch.ops._c10d_functional
    came = collectives.wait_tensor(collectives.all_gather_into_tensor(k_mean.contiguous(), ranks, group))
    return came.unflatten(0, (ranks, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, in float32, from (out, lse) over each."""
    both = torch.logaddexp(lse, other_lse)
    base = both.masked_fill(both == -torch.inf, 0.0)
    weight, other_weight = ((x - base).exp().unsqueeze(-1) for x in (lse, other_lse))
    return out * weight + other * other_weight, both


def _rounds(tensors: list[Tensor], rank: int, ranks: int, group: str) -> Iterator[tuple[int, list[Tensor]]]:
    """Each rank's part of some tensors, with the number of the rank, its own first; the next is sent meanwhile."""
    held = torch.cat([x.flatten() for x in tensors])
    sizes = [x.numel() for x in tensors]
    for step in range(ranks):
        coming = _sent_on(held, rank, ranks, group) if step + 1 < ranks else None
        parts = [part.view(x.shape) for part, x in zip(held.split(sizes), tensors, strict=True)]
        yield (rank - step) % ranks, parts
        if coming is not None:
            held = torch.ops._c10d_functional.wait_tensor(coming)


def _sent_on(x: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    """Begin to send x to the next rank; what waits for the result gets that of the rank before."""
    to, come = [0] * ranks, [0] * ranks
    to[(rank + 1) % ranks], come[(rank - 1) % ranks] = x.numel(), x.numel()
    return torch.ops._c10d_functional.all_to_all_single(x, come, to, group)


def ring_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    scale: float,
    rank: int,
    ranks: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a rank's query, key and value; those of keys and values are summed on their way round."""
    how = How(None, False, scale)
    wait = torch.ops._c10d_functional.wait_tensor
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.zeros(query.shape, dtype=wide, device=query.device)
    coming: Tensor | None = None  # the sums so far, of the part that is computed next
    for part, (k, v) in _rounds([key, value], rank, ranks, group):
        some = torch.ops.sparge.backward.default(grad_out, query, k, v, out, lse, None, bits[part], *how)
        grad_query += some[0]
        sums = torch.cat([x.flatten().to(wide) for x in some[1:]])
        if coming is not None:
            sums += wait(coming)
        coming = _sent_on(sums, rank, ranks, group)
    assert coming is not None
    sums = wait(coming).split([key.numel(), value.numel()])
    grads = allocate.dense_like(query), allocate.dense_like(key), allocate.dense_like(value)
    for grad, found in zip(grads, (grad_query, *sums), strict=True):
        grad.copy_(found.view(grad.shape))
    return grads


@torch.library.register_fake("sparge::ring_attend", lib=library)
def _(query, key, value, thresholds, scale, rank, ranks, group):
    words = ceil_div(ceil_div(key.shape[2], KEY_BLOCK), WORD_BITS)
    bits = query.new_empty((ranks, *query.shape[:2], ceil_div(query.shape[2], QUERY_BLOCK), words), dtype=torch.int32)
    return allocate.new_out(query, value), allocate.new_lse(query), bits


@torch.library.register_fake("sparge::ring_backward", lib=library)
def _(grad_out, query, key, value, *others):
    return allocate.dense_like(query), allocate.dense_like(key), allocate.dense_like(value)


class _Ring(torch.autograd.Function):
    """``ring_attend``, and ``ring_backward`` behind it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor | None, *others: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            given = torch.ops.sparge.ring_attend.default(query, key, value, thresholds, *others)
        ctx.save_for_backward(query, key, value, *given)
        ctx.others = others
        ctx.mark_non_differentiable(*given[1:])
        return given

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> Any:
        return *torch.ops.sparge.ring_backward.default(grad_out, *ctx.saved_tensors, *ctx.others), None, *[None] * 4


def _under_autograd(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _Ring.apply(query, key, value, *others)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sparge.ring_attend.default(query, key, value, *others)


library.impl("ring", ring, "CompositeImplicitAutograd")
for _device, _autocast in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    library.impl("ring", autocast(torch.ops.sparge.ring.default, 3, _device), _autocast)
library.impl("ring_attend", _under_autograd, "Autograd")
for _key in ("CPU", "CUDA"):
    library.impl("ring_attend", ring_attend, _key)
    library.impl("ring_backward", ring_backward, _key)
