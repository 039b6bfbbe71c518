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


def on_the_mesh_of(query: Any, *values: Any) -> list[Any]:
    """Plain tensors as DTensors on the query's mesh, whole on every device; registers the rules below.

    What is no tensor stays as it is; a tensor that is given twice is the same one.
    """
    from torch.distributed.tensor import DTensor, Replicate

    _register()
    whole = [Replicate()] * query.device_mesh.ndim
    made = {
        id(x): DTensor.from_local(x, query.device_mesh, whole, run_check=False)
        for x in values
        if isinstance(x, Tensor) and not is_sharded(x)
    }
    return [made.get(id(x), x) for x in values]


def placed(x: Any, dims: Sequence[int]) -> Any:
    """A DTensor brought into another form: the dimension that each dimension of its mesh shards, -1 for none."""
    from torch.distributed.tensor import Replicate, Shard

    return x.redistribute(placements=[Replicate() if dim < 0 else Shard(dim) for dim in dims])


def dims_of(x: Any) -> list[int]:
    """The dimension of a DTensor that each dimension of its mesh shards, -1 where it is whole."""
    return [placement.dim if placement.is_shard() else -1 for placement in x.placements]


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.sparge

    def forms(op: Any, key: Any, attn_mask: Any, others: Sequence[Any]) -> list[tuple[Any, Any, Any, list[Any]]]:
        """Placements of what has batch and heads, of thresholds [H, 2 or 6], of a mask, and of the other arguments: one
        for each form."""
        whole, batch, heads = Replicate(), Shard(0), Shard(1)
        rest = [whole if hasattr(x, "placements") else None for x in others]

        def of_mask(dim: int) -> Any:
            if attn_mask is None:
                return None
            at = attn_mask.ndim - 4 + dim
            return Shard(at) if at >= 0 and attn_mask.shape[at] > 1 else whole

        found: list[tuple[Any, Any, Any, list[Any]]] = [(whole, whole, None if attn_mask is None else whole, rest)]
        names = [x.name for x in op.default._schema.arguments]
        given = dict(zip(names[names.index("attn_mask") + 1 :], others, strict=False))  # the last defaults are left out
        if given.get("cu_seqlens_q") is None:  # a packed call has the sequences where its map has a batch
            found.append((batch, whole, of_mask(0), rest))
        if all(key.shape[1] % size == 0 for size in key.mesh.shape):  # the query heads of a key head stay together
            found.append((heads, Shard(0), of_mask(1), rest))
        return found

    def attend(query, key, value, thresholds, attn_mask, *others):
        return [([x], [x, x, x, t, m, *rest]) for x, t, m, rest in forms(ops.attend, key, attn_mask, others)]

    def attend_for_backward(query, key, value, thresholds, attn_mask, *others):
        return [
            ([x] * 3, [x, x, x, t, m, *rest])
            for x, t, m, rest in forms(ops.attend_for_backward, key, attn_mask, others)
        ]

    def block_map(query, key, thresholds, attn_mask, *others):
        return [([x, x], [x, x, t, m, *rest]) for x, t, m, rest in forms(ops.block_map, key, attn_mask, others)]

    def forward(query, key, value, counts, indices, attn_mask, *others):
        return [([x, x], [x] * 5 + [m, *rest]) for x, _, m, rest in forms(ops.forward, key, attn_mask, others)]

    def pack(counts, indices):
        return [([x], [x, x]) for x in (Replicate(), Shard(0), Shard(1))]

    def backward(grad_out, query, key, value, out, lse, grad_lse, bits, attn_mask, *others):
        return [
            ([x] * 3, [x] * 6 + [None if grad_lse is None else x, x, m, *rest])
            for x, _, m, rest in forms(ops.backward, key, attn_mask, others)
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
