"""Measure one call of a site, in some order of its tokens. In: operands. Out: a sample, or the error of several orders.

What is looked at depends on the seed, the site's name and the number of the batch and of the call in it, and on nothing
else: not on what ran before, nor in which process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import value_error
from ..keeping import NOTHING, beside_longest
from ..kernels import capability, eight_bits
from ..kernels.block_map import QUERY_BLOCK, ceil_div
from ..kernels.kept import Always, always_read
from ..kernels.order import Grid, Tile, copy_of_order, tile_of
from ..kernels.rule import default_scale
from ..options import Options
from ..passes.match.attention import Attention
from .curves import Sums, measure, measure_prefixes
from .orders import FEWER, Scores


@dataclass(frozen=True)
class Sample:
    """One call of one site. ``call`` counts the calls of the model in a batch; ``blocks`` is the number of query blocks
    that the sampled ones of a head stand for. ``plain``: of the first sample of a site that keeps tokens, the sums
    without them. ``tile``: in whose tokens blocks were measured; None: in raster order."""

    site: str
    call: int
    head_size: int
    blocks: float
    sums: Sums
    plain: Sums | None = None
    tile: Tile | None = None


class SiteCall(NamedTuple):
    """Which call it is: of a site, in a batch, in a call of the model, the how manieth there."""

    name: str
    batch: int
    call: int
    turn: int


@dataclass(frozen=True)
class Operands:
    """One attention call: query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv], a mask as the ops take it; the
    sizes of the parts of its sequence; the grids of its queries and keys, where they are known.

    ``slots``: the tokens of their rows, where these are in another order.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    bottom_right: bool
    scale: float
    parts: Sequence[int] = ()
    grids: tuple[Grid | None, Grid | None] = (None, None)
    slots: tuple[Tensor | None, Tensor | None] = (None, None)

    @staticmethod
    def of(
        attention: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        parts: Sequence[int] = (),
        grids: Sequence[Tensor | None] = (None, None),
    ) -> Operands:
        """What a tap gave, as dense attention has it."""
        kind = query.device.type
        if attention.autocast and torch.is_autocast_enabled(kind):  # what it does to the arguments of dense attention
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        queries, keys = (None if x is None else Grid(*x.shape[1:]) for x in grids)
        return Operands(
            query,
            key,
            value,
            None if attn_mask is None else capability.normal_mask(attn_mask, key.shape[2]),
            attention.is_causal,
            attention.bottom_right,
            default_scale(query.shape[-1], attention.scale),
            parts,
            (queries, keys),
        )

    def in_tiles(self, tile: Tile) -> Operands:
        """The same with its rows in the order of tiles, as far as their grid is known."""
        query, key, value, mask = self.query, self.key, self.value, self.attn_mask
        slots_q, slots_k = (None if grid is None else _tokens(grid, tile, query.device) for grid in self.grids)
        if slots_q is not None:
            query = query.index_select(2, slots_q)
            mask = mask if mask is None or mask.shape[2] == 1 else mask.index_select(2, slots_q)
        if slots_k is not None:
            key, value = (x.index_select(2, slots_k) for x in (key, value))
            mask = None if mask is None else mask.index_select(3, slots_k)
        return replace(self, query=query, key=key, value=value, attn_mask=mask, slots=(slots_q, slots_k))


def _tokens(grid: Grid, tile: Tile, device: torch.device) -> Tensor:
    """The token of each row, int32 [L], where blocks are tiles of a grid."""
    return copy_of_order(grid, tile_of(tile, grid), device).slots


class Measuring:
    """How calls are measured. ``tiles`` are those of sites; ``candidates`` and ``shares`` (of blocks) are tried."""

    def __init__(self, options: Options, query_blocks: int, memory: int, seed: int, tile: Tile | None = None) -> None:
        self._tile = tile  # of sites that have none of their own
        self._options, self._query_blocks, self._memory, self._seed = options, query_blocks, memory, seed
        self.tiles: Mapping[str, Tile | None] = {}
        self.candidates: Sequence[Tile | None] = ()
        self.shares: Sequence[float] = ()

    @property
    def in_tiles(self) -> bool:
        """Whether some site may be in tiles."""
        return any((*self.tiles.values(), *self.candidates, self._tile))

    def sample(self, site: SiteCall, operands: Operands) -> Sample:
        """Measure every pair of the grid, in the order of the site."""
        tile = self.tiles.get(site.name, self._tile)
        if tile is not None and any(operands.grids):
            operands = operands.in_tiles(tile)
        else:
            tile = None
        chosen = self._choose(site, operands, self._query_blocks)
        always = self._always(site.name, operands)
        sums = self._measure(operands, chosen, always)
        first = site[1:] == (0, 0, 0)
        plain = self._measure(operands, chosen, None) if first and always is not None else None
        stands_for = ceil_div(operands.query.shape[2], QUERY_BLOCK) / max(1, chosen.shape[-1])
        return Sample(site.name, site.call, operands.query.shape[3], stands_for, sums, plain, tile)

    def try_orders(self, site: SiteCall, operands: Operands) -> Scores:
        """The squared error of each head, float64 [1, H, shares], in each order; of operands with a grid."""
        found: Scores = {}
        alike: dict[object, Tensor] = {}
        for tile in self.candidates:
            key = None if tile is None else tuple(tile_of(tile, grid) for grid in operands.grids if grid is not None)
            if key not in alike:
                ordered = operands if tile is None else operands.in_tiles(tile)
                chosen = self._choose(site, ordered, max(1, self._query_blocks // FEWER))
                with torch.autocast(ordered.query.device.type, enabled=False):
                    error, norm = measure_prefixes(
                        ordered.query,
                        ordered.key,
                        ordered.value,
                        ordered.attn_mask,
                        ordered.scale,
                        chosen,
                        self._memory,
                        self.shares,
                        self._always(site.name, ordered),
                    )
                relative = error.double() / norm.double().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
                alike[key] = relative.square().unsqueeze(0).cpu()
            found[tile] = alike[key]
        return found

    def _measure(self, operands: Operands, chosen: Tensor, always: Always | None) -> Sums:
        with torch.autocast(operands.query.device.type, enabled=False):
            return measure(
                operands.query,
                operands.key,
                operands.value,
                operands.attn_mask,
                operands.is_causal,
                operands.scale,
                chosen,
                self._memory,
                operands.bottom_right,
                always,
                self._in_eight_bits(operands),
            )

    def _in_eight_bits(self, operands: Operands) -> bool:
        """Whether the forward of a call will be in eight bits, so that its error is measured with theirs."""
        query, value = operands.query, operands.value
        asked = self._options.precision == "fp8" and operands.attn_mask is None
        return asked and not eight_bits.refusal(query.device, query.shape[-1], value.shape[-1])

    def _always(self, name: str, operands: Operands) -> Always | None:
        """What a site keeps beside the rule."""
        kept = self._options.kept_of(name)
        if kept == NOTHING:
            return None
        query, key = operands.query, operands.key
        numbers = torch.tensor([(1.0, 0.0, *kept.numbers)]).to(query.device, non_blocking=True)
        return always_read(numbers, query.shape[2], key.shape[2], beside_longest(operands.parts), *operands.slots)

    def _choose(self, site: SiteCall, operands: Operands, most: int) -> Tensor:
        """Query blocks int64 [B, H, n]: all where there are few, else one at random out of each of n equal parts."""
        batch, heads, length, _ = operands.query.shape
        n_query = ceil_div(length, QUERY_BLOCK)
        n = min(n_query, most)
        seed = f"{self._seed} {site.name} {site.batch} {site.call} {site.turn}"
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
        )
        within = torch.rand(batch, heads, n, generator=generator, dtype=torch.float64)
        within = torch.zeros_like(within) if n == n_query else within
        blocks = ((torch.arange(n) + within) * n_query / max(1, n)).long().clamp(max=max(0, n_query - 1))
        return blocks.to(operands.query.device, non_blocking=True)


def longest_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of packed sequences that with the most pairs of queries and keys; others are one sequence."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return query, key, value
    n = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).argmax())  # more pairs than 32 bits count
    rows, keys = (slice(*x[n : n + 2].tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    return query[:, :, rows], key[:, :, keys], value[:, :, keys]


def to_host(sample: Sample) -> Sample:
    """Return the sample in CPU memory. Numbers that are none are an error of the model or its inputs."""
    sums = Sums(*(x.cpu() for x in sample.sums))
    plain = None if sample.plain is None else Sums(*(x.cpu() for x in sample.plain))
    if not all(bool(torch.isfinite(x).all()) for x in sums):
        raise value_error(
            f"the attention of site {sample.site!r} is not finite",
            given="NaN or inf among its queries, keys, values or outputs",
            allowed="finite numbers",
            todo="Run the model on this batch without calibration and see where they come from.",
        )
    return replace(sample, sums=sums, plain=plain)
