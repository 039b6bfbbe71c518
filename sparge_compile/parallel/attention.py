"""Attention of a sequence that several processes share, with the signature of SDPA: what a model calls instead of it.

What it puts into a graph is found by the backend and made sparse there; by itself it is dense. Ulysses exchanges parts
of the sequence for parts of the heads, a ring sends keys and values round, and both together are a mesh of the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import value_error
from . import engines
from . import exchange as _exchange  # noqa: F401  which define the ops
from . import ring as _ring  # noqa: F401


class Ranks(NamedTuple):
    """The processes that share something: this one's number, how many there are, and the name of their group.

    The name alone travels in a graph: it is one constant for all blocks of a model.
    """

    rank: int
    size: int
    group: str

    @staticmethod
    def of(group: Any = None, copy_engines: bool = False) -> Ranks:
        """Those of a process group, or of a mesh of one dimension; None: of all processes.

        ``copy_engines``: heads are exchanged by the GPUs' copy engines, not by NCCL's kernels, which take processors
        from what is computed meanwhile, as long as the group lives. All its processes call it, on GPUs of one host.

        Raises:
            ValueError: ``copy_engines`` where processes do not share memory.
        """
        if hasattr(group, "get_group"):
            group = group.get_group()
        group = dist.group.WORLD if group is None else group
        engines.drop_of_a_group_before(group)
        if copy_engines:
            engines.use(group)
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group.group_name)


def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    heads: Ranks | None = None,
    ring: Ranks | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Softmax attention of this process's part of the queries over the keys of all processes.

    Under ``torch.compile(backend="sparge")`` it is sparse by the site's thresholds, forward and backward, with the
    block map of the whole sequence; elsewhere it is dense. Every process has R consecutive rows of L, R the same on
    all; with both ``heads`` and ``ring``, those of one ring step lie in the ranks of ``heads``.

    Args:
        query: [B, H, R, D].
        key: [B, Hk, R', D].
        value: [B, Hk, R', Dv].
        attn_mask: bool or float, broadcastable to [B, H / P, L, S]: of the whole sequence. Not in a ring.
        dropout_p, is_causal, scale, enable_gqa: as in SDPA; no dropout and no causality in a ring.
        heads: who exchanges parts of the sequence for parts of the heads (Ulysses); their number divides Hk.
        ring: who sends keys and values round.
        order: int64 [Hk]: the key heads of the first of ``heads``, then of the second, and so on, so that all have as
            much to do (:func:`heads.balanced`). The result has the heads as they were.

    Returns:
        [B, H, R, Dv] in the query's dtype.

    Raises:
        ValueError: heads that the ranks do not divide; a mask, causality or dropout in a ring.
    """
    if heads is not None and heads.size > 1:
        query, key, value = torch.ops.sparge.to_heads(query, key, value, order, *heads)
    key_heads = key.shape[1] * (1 if heads is None else heads.size)
    if ring is not None and ring.size > 1:
        if attn_mask is not None or is_causal or dropout_p != 0:
            raise value_error(
                "attention in a ring",
                given="a mask" if attn_mask is not None else "is_causal" if is_causal else f"dropout_p={dropout_p}",
                allowed="every query sees every key, without dropout",
                todo="Exchange heads alone (ulysses), which takes masks and causality.",
            )
        if key.shape[1] not in (1, query.shape[1]) and not enable_gqa:
            raise value_error(
                "attention in a ring",
                given=f"{query.shape[1]} query heads and {key.shape[1]} key heads",
                allowed="as many of both, or a multiple with enable_gqa=True",
                todo="Pass enable_gqa=True.",
            )
        out = torch.ops.sparge.ring(query, key, value, None, scale, *ring)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if heads is not None and heads.size > 1:
        out = torch.ops.sparge.to_rows(out, key_heads, order, *heads)
    return out
