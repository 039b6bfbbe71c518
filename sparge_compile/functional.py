"""Block-sparse attention as functions, for those who call it themselves: of a batch, and of packed sequences."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from . import ops
from .errors import type_error, value_error
from .keeping import NOTHING, Kept, parse_kept
from .kernels import capability
from .kernels.attend import visible_in_sequences
from .kernels.block_map import BlockMap, visible_blocks
from .kernels.how import How
from .kernels.order import TILE, Grid, Orders, Tile, parse_grid, parse_tile
from .kernels.reorder import out_of_order
from .kernels.rule import default_scale, pool_mask
from .kernels.sizes import surely


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    topk: float | Tensor | None = None,
    topp: float | Tensor | None = None,
    keep_keys: int | tuple[int, int | None] | None = None,
    dense_queries: bool = False,
    grid: Grid | tuple[int, ...] | None = None,
    tile: Tile | None = None,
    block_map: BlockMap | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    return_sparsity: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention over the key blocks that the hybrid Top-k + Top-p rule keeps.

    The signature of ``torch.nn.functional.scaled_dot_product_attention``, and:

    Args:
        query: [B, H, L, D] in bfloat16, float16 or float32, D at most 256.
        key: [B, Hk, S, D]; with ``enable_gqa`` H may be a multiple of Hk.
        value: [B, Hk, S, Dv], Dv at most 256.
        attn_mask: bool (True attends) or float (added to the scores; what is below half of the dtype's minimum hides a
            key, as -inf does), broadcastable to [B, H, L, S]. Unlike in SDPA it may be combined with ``is_causal``. A
            block without a visible key is never read.
        dropout_p: must be 0.
        is_causal: mask the keys after each query, aligned to the top left; diagonal blocks are always kept.
        topk: share of the visible key blocks in (0, 1], a number or a tensor [H]. Default: 1, unless topp is given.
        topp: probability mass in [0, 1], a number or a tensor [H]. Default 0. The longer prefix of the two counts.
        keep_keys: tokens whose key blocks are always kept and do not count against topk and topp: n for the first n, -n
            for the last n, or (start, stop), where None is the end and negative positions count from it.
        dense_queries: keep every visible block for the query rows of these tokens, too, if L = S.
        grid: the tokens are a grid of space and time, raster by raster: (frames, height, width), or
            ``Grid(prefix, frames, height, width, suffix)`` with the numbers of tokens before and behind it, of which
            one may be -1, what is left. A block is then compact in space and time; the result has the order of the
            tokens as ever. Keys that are as many as the queries have the same grid; others (a text) keep their order.
            Not with ``is_causal``.
        tile: with a grid, the shape that blocks come close to: frames, rows and columns, at most 64 tokens together;
            4 x 4 x 4 by default. A grid of whole tiles of 64 is cut into just these. Three numbers more say by how many
            tokens the borders of tiles are moved along each axis.
        block_map: which key blocks to read instead of the rule: ``BlockMap.from_dense(bool [B, H, Nq, Nk])``. With a
            grid, of blocks of 64 rows in the order of ``torch.ops.sparge.order``.
        precision: ``"fp8"`` for a forward in eight bits: int8 scores, e4m3 weights and values (docs/kernel-notes.md has
            its error). On NVIDIA GPUs of compute capability 8.9 or newer, and on a CPU, which rounds the operands
            and not the weights. Head sizes must be multiples of 16, and there is no mask. The backward is that of
            attention over the rounded operands, in their own dtype, and these count as the given ones. None: the
            operands' dtype.
        return_lse: also return the log-sum-exp (natural) of the scaled scores of the kept keys, masks added, float32
            [B, H, L]; −inf for a row that sees no key; differentiable. Two calls over parts of the keys, as in ring
            attention, merge as ``lse = torch.logaddexp(lse1, lse2)`` and ``out = out1 · exp(lse1 − lse) + out2 ·
            exp(lse2 − lse)``; each part keeps its share of its own blocks.
        return_sparsity: also return 1 − kept ÷ visible key blocks, a float32 scalar on the query's device.

    Returns:
        [B, H, L, Dv] in the query's dtype and stride order; with ``return_lse`` or ``return_sparsity`` a tuple that
        holds them in this order. A row that sees no key gives zeros. topk = 1 equals dense attention to rounding.

    Raises:
        ValueError: shapes, dtypes, devices or thresholds that do not fit; the message says what is allowed.
        TypeError: operands or a mask that are no tensors, a scale that is no number, a block map that is none.

    Source: SpargeAttention2 (arXiv 2602.13515), Eq. 9.
    """
    _check_kinds(query, key, value, attn_mask, scale)
    if dropout_p != 0:
        raise value_error(
            "dropout is not supported",
            given=dropout_p,
            allowed="dropout_p=0",
            todo="Call model.eval(), or use SDPA.",
        )
    capability.check_qkv(query, key, value)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise value_error(
            "query and key have different numbers of heads",
            given=f"{query.shape[1]} and {key.shape[1]}",
            allowed="equal numbers, unless enable_gqa=True",
            todo="Pass enable_gqa=True.",
        )
    thresholds, kept = None, parse_kept(keep_keys, dense_queries, "attention")
    if kept.of_graph:
        raise value_error(
            "attention: keep_keys without a graph to find them in",
            given=repr(keep_keys),
            allowed="a number of tokens, or (start, stop)",
            todo="The backend finds the text of a model: torch.compile(…, options={'keep_keys': 'text'}).",
        )
    if block_map is None:
        thresholds = _thresholds(topk, topp, query, kept)
    elif topk is not None or topp is not None or kept != NOTHING:
        raise value_error(
            "two ways to select blocks",
            given="block_map and thresholds or kept keys",
            allowed="one of them",
            todo="Drop one.",
        )
    if precision not in (None, "fp8"):
        raise value_error(
            "attention: precision",
            given=repr(precision),
            allowed='None or "fp8"',
            todo="None is the operands' own dtype.",
        )
    how = How(attn_mask, is_causal, default_scale(query.shape[-1], scale), eight_bits=precision == "fp8")
    if grid is None and tile is not None:
        raise value_error(
            "attention: a tile without a grid",
            given=f"tile={tile!r}",
            allowed="tile with grid=(frames, height, width)",
            todo="Give the grid of the tokens, or drop the tile.",
        )
    orders = Orders() if grid is None else _orders(query, key, grid, TILE if tile is None else tile)
    if orders.given:
        query, key, value, how = ops.in_order(query, key, value, how, orders)
    if block_map is None and return_sparsity:
        assert thresholds is not None
        block_map = ops.build_map(query, key, value, thresholds, how)
    if block_map is None:
        assert thresholds is not None
        out, lse = ops.attend_by_rule(query, key, value, thresholds, how, with_lse=return_lse)
    else:
        out, lse = ops.attend_listed(query, key, value, block_map, how)
    extra: tuple[Tensor, ...] = (out_of_order(lse, orders),) if return_lse and lse is not None else ()
    if return_sparsity and block_map is not None:
        extra += (sparsity(block_map, query, key, how),)
    out = out_of_order(out, orders)
    return (out, *extra) if extra else out


def _check_kinds(
    query: object, key: object, value: object, attn_mask: object, scale: object, who: str = "attention"
) -> None:
    for name, given in {"query": query, "key": key, "value": value, "attn_mask": attn_mask}.items():
        if not isinstance(given, Tensor) and not (name == "attn_mask" and given is None):
            raise type_error(
                f"{who}: {name} is no tensor",
                given=type(given).__name__,
                allowed="torch.Tensor",
                todo="torch.as_tensor(…) makes one of an array or a list.",
            )
    if not isinstance(scale, (Real, Tensor, torch.SymFloat, torch.SymInt, type(None))):
        raise type_error(
            f"{who}: scale is no number",
            given=repr(scale)[:80],
            allowed="a number; None: 1 / sqrt(head size)",
            todo="Give float(scale).",
        )


def _orders(query: Tensor, key: Tensor, grid: Grid | tuple[int, ...], tile: Tile) -> Orders:
    """The orders of queries that are a grid, and of keys that are as many."""
    length, keys = query.shape[2], key.shape[2]
    found, of_tile = parse_grid(grid, "attention").within(length), parse_tile(tile, "attention")
    if surely(found.tokens != length) or surely(found.prefix < 0) or surely(found.suffix < 0):
        raise value_error(
            "attention: grid has not the query's tokens",
            given=f"{found}, {found.tokens} tokens, for {length} queries",
            allowed="prefix + frames × height × width + suffix = queries",
            todo="Count what stands before and behind the grid: Grid(prefix, frames, height, width, suffix).",
        )
    order = torch.ops.sparge.order(*found, of_tile, query.device)
    return Orders(*order, *(order if surely(length == keys) else ()))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    topk: float | Tensor | None = None,
    topp: float | Tensor | None = None,
    causal: str = "",
    scale: float | None = None,
    return_lse: bool = False,
    return_sparsity: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention of N packed sequences, each over the key blocks that the hybrid Top-k + Top-p rule keeps.

    The arguments are those of flash-attn's ``flash_attn_varlen_func``. The sequences lie one after the other in one
    buffer, blocks never cross from one to the next, and the result is that of :func:`attention` of each by itself.
    Nothing waits for the host, so the lengths may change between replays of a CUDA graph.

    Args:
        query: [T, H, D], the rows of all sequences, in bfloat16, float16 or float32, D at most 256.
        key: [Tk, Hk, D]; H is a multiple of Hk.
        value: [Tk, Hk, Dv], Dv at most 256.
        cu_seqlens_q, cu_seqlens_k: contiguous int32 [N + 1] on the query's device: the row where each sequence begins,
            and where the last one ends. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: no sequence is longer than these (1 or more). On a GPU, rows beyond them are not
            computed: nothing there may read the lengths.
        topk, topp: as in :func:`attention`; of the visible key blocks of each sequence.
        causal: ``""``; ``"top_left"``, where row i of a sequence sees the keys up to i; or ``"bottom_right"``, up to
            i + S - L for L queries over S keys, as flash-attn's ``causal=True`` has it.
        scale: of the scores; 1 / sqrt(D) by default.
        return_lse: also return the log-sum-exp of the scaled scores, float32 [H, T]; differentiable.
        return_sparsity: also return 1 - kept / visible key blocks, a float32 scalar on the query's device.

    Returns:
        [T, H, Dv] in the query's dtype and stride order; with ``return_lse`` or ``return_sparsity`` a tuple that holds
        them in this order. A row that sees no key, and a row of no sequence, gives zeros.

    Raises:
        ValueError: shapes, dtypes, devices or thresholds that do not fit; the message says what is allowed.
        TypeError: operands that are no tensors, a scale that is no number.

    Source: SpargeAttention2 (arXiv 2602.13515), Eq. 9; packed sequences as in FlashAttention-2 (arXiv 2307.08691).
    """
    _check_kinds(query, key, value, None, scale, "varlen_attention")
    if causal not in ("", "top_left", "bottom_right"):
        raise value_error(
            "causal is not an alignment",
            given=repr(causal),
            allowed='"", "top_left" or "bottom_right"',
            todo='flash-attn\'s causal=True is "bottom_right".',
        )
    if not query.dim() == key.dim() == value.dim() == 3:
        raise value_error(
            "packed sequences have the wrong rank",
            given=f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
            allowed="[rows of all sequences, heads, head size]",
            todo="Put the sequences one after the other.",
        )
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    how = How(
        None, causal != "", default_scale(query.shape[-1], scale), causal == "bottom_right",
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    thresholds = _thresholds(topk, topp, query)
    extra: tuple[Tensor, ...] = ()
    lse: Tensor | None
    if return_sparsity:
        block_map = ops.build_map(query, key, value, thresholds, how)
        out, lse = ops.attend_listed(query, key, value, block_map, how)
        n_query, n_key = block_map.indices.shape[-2:]
        visible = visible_in_sequences(n_query, n_key, how).sum() * query.shape[1]
        extra = (1 - block_map.counts.sum() / visible.clamp(min=1),)
    else:
        out, lse = ops.attend_by_rule(query, key, value, thresholds, how, with_lse=return_lse)
    if return_lse and lse is not None:
        extra = (lse.squeeze(0), *extra)
    out = out.squeeze(0).transpose(0, 1)
    return (out, *extra) if extra else out


def _thresholds(
    topk: float | Tensor | None, topp: float | Tensor | None, query: Tensor, kept: Kept = NOTHING
) -> Tensor:
    """float32 [H, 2 or 6]: all blocks where nothing is given."""
    if topk is None:
        # Top-p alone needs the smallest Top-k there is: one block.
        topk = 1.0 if topp is None else torch.finfo(torch.float32).tiny
    topp = 0.0 if topp is None else topp
    given = isinstance(topk, Tensor) or isinstance(topp, Tensor) or type(query) is not Tensor
    make = capability.make_thresholds if given else capability.constant_thresholds
    return make(topk, topp, query.shape[1], query.device, kept)  # type: ignore[arg-type]


def sparsity(block_map: BlockMap, query: Tensor, key: Tensor, how: How) -> Tensor:
    """1 − kept ÷ visible key blocks over the whole tensor: a float32 scalar, computed on the query's device."""
    visible = visible_in(block_map, query, key, how)
    kept = block_map.counts.expand(visible.shape[:3]).sum()
    return 1 - kept / visible.sum().clamp(min=1)


def visible_in(block_map: BlockMap, query: Tensor, key: Tensor, how: How) -> Tensor:
    """Which key blocks the map of a call that is not packed could keep: bool [B, H, Nq, Nk]."""
    batch, heads, length = query.shape[:3]
    n_query, n_key = block_map.indices.shape[-2:]
    diagonal = how.diagonal(length, key.shape[2])
    visible = visible_blocks(n_query, n_key, length, how.is_causal, query.device, diagonal)
    if how.attn_mask is not None:
        bias, _ = pool_mask(
            capability.normal_mask(how.attn_mask, key.shape[2]), length, how.is_causal, diagonal=diagonal
        )
        visible = visible & (bias != float("-inf"))
    return visible.expand(batch, heads, n_query, n_key)
