"""How DTensor may shard the ops: along the batch, and along heads, where a device computes its heads alone.

What comes sharded otherwise is brought into one of these forms by DTensor: along the sequence, an all-to-all over heads
(Ulysses). Registered when the first DTensor arrives, so that nobody else pays for the import.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor. Dynamo and AOTAutograd see the type, too."""
    return type(x).__name__ == "DTensor"


def on_the_mesh_of(query: Any, *tensors: Tensor | None) -> list[Any]:
    """Plain tensors as DTensors on the query's mesh, whole on every device; registers the rules below."""
    from torch.distributed.tensor import DTensor, Replicate

    _register()
    whole = [Replicate()] * query.device_mesh.ndim
    return [
        x if x is None or is_sharded(x) else DTensor.from_local(x, query.device_mesh, whole, run_check=False)
        for x in tensors
    ]


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.sparge

    def forms(key: Any, attn_mask: Any) -> list[tuple[Any, Any, Any]]:
        """The placements of what has batch and heads, of thresholds [H, 2], and of a mask: one for each form."""
        whole, batch, heads = Replicate(), Shard(0), Shard(1)

        def of_mask(dim: int) -> Any:
            if attn_mask is None:
                return None
            at = attn_mask.ndim - 4 + dim
            return Shard(at) if at >= 0 and attn_mask.shape[at] > 1 else whole

        found: list[tuple[Any, Any, Any]] = [
            (whole, whole, None if attn_mask is None else whole),
            (batch, whole, of_mask(0)),
        ]
        if all(key.shape[1] % size == 0 for size in key.mesh.shape):  # the query heads of a key head stay together
            found.append((heads, Shard(0), of_mask(1)))
        return found

    def attend(query, key, value, thresholds, attn_mask, *how):
        return [([x], [x, x, x, t, m, *[None] * len(how)]) for x, t, m in forms(key, attn_mask)]

    def attend_for_backward(query, key, value, thresholds, attn_mask, *how):
        return [([x] * 3, [x, x, x, t, m, *[None] * len(how)]) for x, t, m in forms(key, attn_mask)]

    def block_map(query, key, thresholds, attn_mask, is_causal, scale):
        return [([x, x], [x, x, t, m, None, None]) for x, t, m in forms(key, attn_mask)]

    def forward(query, key, value, counts, indices, attn_mask, is_causal, scale):
        return [([x, x], [x] * 5 + [m, None, None]) for x, _, m in forms(key, attn_mask)]

    def pack(counts, indices):
        return [([x], [x, x]) for x in (Replicate(), Shard(0), Shard(1))]

    def backward(grad_out, query, key, value, out, lse, grad_lse, bits, attn_mask, is_causal, scale):
        return [
            ([x] * 3, [x] * 6 + [None if grad_lse is None else x, x, m, None, None])
            for x, _, m in forms(key, attn_mask)
        ]

    placed: Sequence[tuple[Any, Any]] = (
        (ops.attend.default, attend),
        (ops.attend_for_backward.default, attend_for_backward),
        (ops.block_map.default, block_map),
        (ops.forward.default, forward),
        (ops.pack.default, pack),
        (ops.backward.default, backward),
    )
    for op, place in placed:
        register_sharding(op)(place)
