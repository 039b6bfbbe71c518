"""What block selection costs in real attention: the two terms of its error, and how much better another ranking does.

``record`` takes every layer's q, k and v from one forward of the model, ``error_split`` divides the error of the output
into what was dropped and what renormalising added, ``ranking_gaps`` compares ways to rank key blocks at equal counts.
``synthetic`` makes inputs of known structure. All in float32 and one head at a time; lengths are multiples of 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformer
from torch import Tensor, nn

from sparge_compile import Grid
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from sparge_compile.kernels.order import make_order
from sparge_compile.kernels.reference import CEIL_SLACK, pool


class Site(NamedTuple):
    """What one attention call saw, each [B, H, L, D] in float32; ``q_flat`` and ``k_flat`` are before RoPE."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    q_flat: Tensor
    k_flat: Tensor
    grid: tuple[int, int, int] = (24, 16, 16)  # frames, rows, columns of tokens


@torch.no_grad()
def record(model: nn.Module, video: Tensor, time: Tensor, classes: Tensor) -> list[Site]:
    """The attention calls of one forward of the uncompiled model, in order, for clips [B, T, 64, 64]."""
    grid = (video.shape[1], *(side // model.patch for side in video.shape[2:]))
    attend, rotate = F.scaled_dot_product_attention, transformer.rotate
    sites: list[Site] = []
    flat: list[Tensor] = []  # q, then k, of the layer that runs

    def watched_rotate(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        flat.append(x)
        return rotate(x, places)

    def watched_attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        tensors = (each.float() for each in (q, k, v, *flat))
        sites.append(Site(f"blocks.{len(sites)}.attention", *tensors, grid=grid))
        flat.clear()
        return attend(q, k, v, **options)

    try:
        F.scaled_dot_product_attention, transformer.rotate = watched_attend, watched_rotate
        model(video, time, classes)
    finally:
        F.scaled_dot_product_attention, transformer.rotate = attend, rotate
    return sites


class Head(NamedTuple):
    """One head of one clip, in some order of its tokens, with its dense attention split by key block.

    Any choice of key blocks is a softmax over ``lse`` away from its output, without underflow however little it keeps.
    """

    q: Tensor  # [L, D], as the three below
    k: Tensor
    q_flat: Tensor
    k_flat: Tensor
    scale: float
    lse: Tensor  # [Nq, 128, Nk], of each row's scores in each key block
    out: Tensor  # [Nq, 128, Nk, D], each row's attention to each key block alone
    seed: int

    @property
    def mass(self) -> Tensor:
        """The dense softmax summed over each key block, [Nq, 128, Nk]."""
        return self.lse.softmax(-1)

    def output(self, kept: Tensor) -> Tensor:
        """Attention [Nq, 128, D] over the blocks in bool [Nq, Nk], renormalised over their keys."""
        weights = self.lse.masked_fill(~kept[:, None], -math.inf).softmax(-1)
        return (weights.unsqueeze(-2) @ self.out).squeeze(-2)


def one_head(site: Site, batch: int, head: int, order: Tensor | slice = slice(None), seed: int = 0) -> Head:
    """A head of a site with its tokens in ``order``; the length must be a multiple of 128."""
    q, k, v, q_flat, k_flat = (x[batch, head][order].float() for x in site[1:6])
    length, size = q.shape
    if length % QUERY_BLOCK or k.shape[0] % KEY_BLOCK:
        raise ValueError(f"{length} queries, {k.shape[0]} keys: not multiples of {QUERY_BLOCK} and {KEY_BLOCK}")
    scale = size**-0.5
    scores = (q * scale @ k.T).unflatten(1, (-1, KEY_BLOCK))  # [L, Nk, 64]
    lse = scores.logsumexp(-1)
    scores.sub_(lse.unsqueeze(-1)).exp_()
    out = (scores.transpose(0, 1) @ v.unflatten(0, (-1, KEY_BLOCK))).transpose(0, 1)  # [L, Nk, D]
    lse, out = (x.unflatten(0, (-1, QUERY_BLOCK)) for x in (lse, out))
    return Head(q, k, q_flat, k_flat, scale, lse, out, seed)


def block_count(density: float, blocks: int) -> int:
    return max(1, math.ceil(density * blocks - CEIL_SLACK))


def leading(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best key blocks of each query block, bool [Nq, Nk]; the lower index first on a tie."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


@torch.no_grad()
def error_split(site: Site, density: float) -> dict[str, Tensor]:
    """The error of the pooled rule's Top-k, in its two terms, each entry [H].

    With p the dense softmax and m the mass of it that a row keeps,
    o_sparse − o = −Σ_dropped p v + (1 / m − 1) Σ_kept p v. ``error``, ``dropped`` and ``renormalised`` are the L1 norms
    of the whole and of the two terms over that of o (``dropped`` is also the error without renormalising),
    ``lost_mass`` the mean of 1 − m, ``cosine`` the one between the two terms of a head, a mean over clips.
    """
    batch, heads = site.q.shape[:2]
    columns = []
    for h in range(heads):
        norms, lost_mass, cosine = 0, 0, 0
        for b in range(batch):
            head = one_head(site, b, h)
            kept = leading(pooled(head, 0), block_count(density, head.lse.shape[-1]))
            dense, sparse = head.output(torch.ones_like(kept)), head.output(kept)
            missed = head.mass * ~kept[:, None]  # [Nq, 128, Nk]
            lost = missed.sum(-1, keepdim=True)
            dropped = -(missed.unsqueeze(-2) @ head.out).squeeze(-2)
            renormalised = lost * sparse  # (1 / m − 1) Σ_kept p v, as Σ_kept p v = m o_sparse
            norms = norms + torch.stack([x.abs().sum() for x in (sparse - dense, dropped, renormalised, dense)])
            lost_mass = lost_mass + lost.mean() / batch
            cosine = cosine + F.cosine_similarity(dropped.flatten(), renormalised.flatten(), 0) / batch
        columns.append(torch.cat((norms[:3] / norms[3], torch.stack((lost_mass, cosine)))))
    names = ("error", "dropped", "renormalised", "lost_mass", "cosine")
    return dict(zip(names, torch.stack(columns, -1), strict=True))


# Ways to rank: from a head and the number of blocks that will be kept to scores [Nq, Nk]. Only their order counts.


def pooled(head: Head, count: int) -> Tensor:
    return head.scale * pool(head.q, QUERY_BLOCK) @ pool(head.k, KEY_BLOCK).T


def pooled_before_rope(head: Head, count: int) -> Tensor:
    return head.scale * pool(head.q_flat, QUERY_BLOCK) @ pool(head.k_flat, KEY_BLOCK).T


def oracle(head: Head, count: int) -> Tensor:
    """The true mass: no choice of as many blocks keeps more."""
    return head.mass.mean(1)


def at_random(head: Head, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(head.seed)
    n_query, _, n_key = head.lse.shape
    return torch.rand(n_query, n_key, generator=generator).to(head.q.device)


def sub_blocks(head: Head, count: int) -> Tensor:
    """Means of quarters of the blocks, 32 queries and 16 keys; log-sum-exp over the 16 pairs."""
    scores = head.scale * pool(head.q, QUERY_BLOCK // 4) @ pool(head.k, KEY_BLOCK // 4).T
    return scores.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).logsumexp((1, 3))


def key_representatives(head: Head, count: int) -> Tensor:
    """Four centroids of each key block by k-means, weighted by how many keys they stand for.

    They start as the mean and three keys far from it and from each other. By Jensen's inequality the score is between
    the pooled one and the block's true log-sum-exp for the mean query.
    """
    keys = head.k.unflatten(0, (-1, KEY_BLOCK))  # [Nk, 64, D]
    centres = keys.mean(1, keepdim=True)
    for _ in range(3):
        farthest = torch.cdist(keys, centres).amin(-1).argmax(-1)
        centres = torch.cat((centres, keys[torch.arange(len(keys), device=keys.device), farthest, None]), 1)
    for _ in range(4):
        member = F.one_hot(torch.cdist(keys, centres).argmin(-1), 4).to(keys.dtype)  # [Nk, 64, 4]
        size = member.sum(1)  # [Nk, 4]; an empty cluster has a weight of exp(-inf)
        centres = member.mT @ keys / size.clamp(min=1).unsqueeze(-1)
    scores = head.scale * pool(head.q, QUERY_BLOCK) @ centres.flatten(0, 1).T
    return (scores.unflatten(1, (-1, 4)) + size.log()).logsumexp(-1)


def variance(head: Head, count: int) -> Tensor:
    """The log of the mean exponential as if scores were Gaussian: half the variances over keys and queries are added.

    Keys are taken from their mean over all blocks, which changes no softmax but would count in the queries' variance.
    """
    q, k = head.scale * head.q, head.k - head.k.mean(0)
    q_mean, k_mean = pool(q, QUERY_BLOCK), pool(k, KEY_BLOCK)
    over_keys = (q_mean @ k.T).unflatten(1, (-1, KEY_BLOCK)).var(-1, correction=0)
    over_queries = (q @ k_mean.T).unflatten(0, (-1, QUERY_BLOCK)).var(1, correction=0)
    return q_mean @ k_mean.T + 0.5 * (over_keys + over_queries)


def second_look(head: Head, count: int) -> Tensor:
    """Of the 2 ``count`` blocks best by the pooled rule, the true mass among them for 8 of the 128 queries."""
    candidates = leading(pooled(head, count), 2 * count)
    eighth = torch.arange(8, device=head.q.device)
    rows = 16 * eighth + (7 * eighth + 3) % 16  # one of every 16, each in another column of a grid of 16
    lse = head.lse[:, rows].masked_fill(~candidates[:, None], -math.inf)
    return lse.softmax(-1).mean(1).masked_fill(~candidates, -math.inf)


class Way(NamedTuple):
    scores: Callable[[Head, int], Tensor]
    tiled: bool = False  # whether tokens are in tile order rather than in raster order


WAYS = {
    "pooled": Way(pooled),
    "pooled before RoPE": Way(pooled_before_rope),
    "oracle": Way(oracle),
    "random": Way(at_random),
    "sub-blocks 4": Way(sub_blocks),
    "key representatives": Way(key_representatives),
    "variance": Way(variance),
    "second look": Way(second_look),
    "tiles 2x4x8": Way(pooled, tiled=True),
    "tiles oracle": Way(oracle, tiled=True),
}


def tile_order(frames: int, rows: int, columns: int) -> Tensor:
    """The permutation int64 [L] of raster tokens to tiles of 2 × 4 × 8, or what comes nearest to them."""
    return make_order(Grid(0, frames, rows, columns), (2, 4, 8), torch.device("cpu")).slots.long()


@torch.no_grad()
def ranking_gaps(
    site: Site, densities: Sequence[float], ways: Sequence[str] = tuple(WAYS), seed: int = 0
) -> list[dict[str, str | int | float]]:
    """Kept mass and relative L1 error of the output, a row for each head, density and way of ranking.

    All ways keep the same number of blocks for each query block. A row has ``site``, ``head``, ``density``, ``blocks``,
    ``way``, ``mass`` (a mean over query rows and clips) and ``error``.
    """
    batch, heads = site.q.shape[:2]
    orders: dict[bool, Tensor | slice] = {False: slice(None), True: slice(None)}
    used = sorted({WAYS[name].tiled for name in ways})
    if True in used:
        orders[True] = tile_order(*site.grid).to(site.q.device)
        if len(orders[True]) != site.q.shape[2]:
            raise ValueError(f"the grid {site.grid} does not have {site.q.shape[2]} tokens")
    rows = []
    for h in range(heads):
        sums: dict[tuple[float, str], Tensor] = {}  # [3]: mass, error and output
        for b in range(batch):
            for tiled in used:
                head = one_head(site, b, h, orders[tiled], seed + b * heads + h)
                n_key = head.lse.shape[-1]
                mass, dense = head.mass, head.output(head.lse.new_ones(len(head.lse), n_key, dtype=torch.bool))
                for density in densities:
                    count = block_count(density, n_key)
                    for name in (name for name in ways if WAYS[name].tiled == tiled):
                        kept = leading(WAYS[name].scores(head, count), count)
                        kept_mass = (mass * kept[:, None]).sum(-1).mean() / batch
                        error = (head.output(kept) - dense).abs().sum()
                        found = torch.stack((kept_mass, error, dense.abs().sum()))
                        sums[density, name] = sums.get((density, name), 0) + found
        for density in densities:
            for name in ways:
                kept_mass, error, output = sums[density, name].tolist()
                row = {"site": site.name, "head": h, "density": density, "blocks": block_count(density, n_key)}
                rows.append(row | {"way": name, "mass": kept_mass, "error": error / output})
    return rows


def synthetic(
    kind: str,
    length: int = 6144,
    heads: int = 4,
    head_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, heads, length, head_size] of one structure; equal on all devices.

    ``uniform``: near-equal masses. ``skewed``: 4 sinks and, in the run of 128 to 384 tokens that a query is in, one key
    in 16 have most of the mass. ``local``: the score falls with the distance along the sequence, over 64 tokens in the
    first head and twice as many in each later one. ``clustered``: 16 clusters, in runs of 64 to 256 tokens each.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def directions(count: int) -> Tensor:
        return F.normalize(normal(heads, count, head_size), dim=-1)

    def runs(low: int, high: int) -> Tensor:
        """The number of the run that each token is in, [length]."""
        sizes = torch.randint(low, high + 1, (length // low + 1,), generator=generator)
        return torch.arange(len(sizes)).repeat_interleave(sizes)[:length]

    q, k, v = (normal(heads, length, head_size) for _ in range(3))
    root = head_size**0.5  # q · k is this many times the score
    if kind == "uniform":
        q, k = 0.3 * q, 0.3 * k
    elif kind == "skewed":
        run = runs(128, 384)
        content, sink = directions(int(run[-1]) + 1)[:, run], directions(1)
        strength = torch.where(torch.rand(heads, length, 1, generator=generator) < 1 / 16, 7.0, 3.0)
        is_sink = torch.zeros(length, 1, dtype=torch.bool)
        is_sink[torch.randperm(length, generator=generator)[:4]] = True
        q = 0.5 * q + root * (content + sink)
        k = 0.5 * k + torch.where(is_sink, 7 * sink, strength * content)
        v = 0.5 * v + root * content
    elif kind == "local":
        reach = 64 * 2 ** torch.arange(heads).view(-1, 1, 1)
        angles = torch.arange(length).view(-1, 1) * normal(heads, 1, head_size // 2) / reach
        waves = torch.cat((angles.cos(), angles.sin()), -1)  # random Fourier features of a Gaussian of the distance
        amplitude = (8 * root / (head_size // 2)) ** 0.5
        q, k = 0.3 * q + amplitude * waves, 0.3 * k + amplitude * waves
        v = 0.5 * v + waves @ normal(heads, head_size, head_size) / root
    elif kind == "clustered":
        run = runs(64, 256)
        cluster = torch.randint(16, (int(run[-1]) + 1,), generator=generator)[run]
        centre = (6 * root) ** 0.5 * directions(16)[:, cluster]
        q, k = 0.3 * q + centre, 0.3 * k + centre
        v = 0.5 * v + normal(heads, 16, head_size)[:, cluster]
    else:
        raise ValueError(f"{kind!r} is none of uniform, skewed, local and clustered")
    q, k, v = (x[None].to(device) for x in (q, k, v))
    return q, k, v
