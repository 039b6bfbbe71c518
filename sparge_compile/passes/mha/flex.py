"""``flex_attention`` written out: its score_mod, its mask_mod and its block lists in plain torch, over whole tensors.

What a ``score_mod`` and a ``mask_mod`` compute for one (batch, head, query, key) is mapped over all of them, so that it
is read as any other attention that is written out. The lists of a ``BlockMask`` count beside its mask_mod: the compiled
kernel skips blocks that are not listed, and asks no mask_mod in those that are listed as full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ...kernels.sizes import surely
from ...report import Reason
from ..match.attention import Attention, Refusal
from ..read.formulas import number
from ..read.fx_utils import bind, signature_of, size_text, value_of
from ..read.reader import Reader

NO_MASK = 1 << 30  # a call without a mask has one block of so many queries and keys


class Lists(NamedTuple):
    """Which key blocks each query block sees: counts [B or 1, H or 1, Nq] and indices [B or 1, H or 1, Nq, Nk], int32.

    Of the blocks in ``full`` all is seen. The blocks have ``size`` queries and keys, which is not our block size.
    """

    counts: Any
    indices: Any
    full_counts: Any
    full_indices: Any
    query_size: Any
    key_size: Any


def _flex(
    query,
    key,
    value,
    score_mod,
    block_mask,
    scale,
    kernel_options,
    score_mod_other_buffers=(),
    mask_mod_other_buffers=(),
):  # the argument names of the higher-order operator
    raise AssertionError("only its signature is used")


_SIGNATURE = signature_of(_flex)


def is_flex(node: Node) -> bool:
    """Whether a node is a call of flex_attention."""
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "flex_attention"


def flex_arguments(node: Node, reader: Reader) -> Mapping[str, Any]:
    """The arguments of :func:`written_out`: nodes of the graph, the two functions as graphs, and numbers."""
    given = bind(_SIGNATURE, node)
    # (queries, keys, counts, indices, full counts, full indices, ..., query block, key block, mask_mod)
    blocks = given["block_mask"]
    lists = Lists(*blocks[2:6], *blocks[-3:-1])
    return {
        **{name: given[name] for name in ("query", "key", "value", "scale")},
        "score_mod": reader.fake(given["score_mod"]),
        "mask_mod": reader.fake(blocks[-1]),
        "lists": None if _lists_all(lists, given, node, reader) else lists,
        "score_buffers": given["score_mod_other_buffers"],
        "mask_buffers": given["mask_mod_other_buffers"],
    }


def flex_refusal(node: Node, reader: Reader) -> Refusal | None:
    """Why a call of flex_attention is not looked into, or None."""
    given = flex_arguments(node, reader)
    if any(user.args[1] != 0 and user.users and not reader.is_dead(user) for user in node.users):
        return Refusal(Reason.OUTPUTS_USED, "the log-sum-exp or the maxima")
    if not all(isinstance(given[name], GraphModule) for name in ("score_mod", "mask_mod")):
        return Refusal(Reason.OPAQUE, "score_mod or mask_mod is no graph")
    for name in ("score", "mask"):
        captured = [value_of(x) for x in tree_leaves(given[f"{name}_buffers"])]
        if any(isinstance(x, Tensor) and x.requires_grad for x in captured):
            return Refusal(Reason.LEARNED_BIAS, f"captured by the {name}_mod")
    return None


def in_words_of_flex(found: Attention | Refusal | None, node: Node, reader: Reader) -> Attention | Refusal:
    """What was found inside a call; a refusal of what its score_mod does, in the words of the call."""
    if found is None:
        return Refusal(Reason.FLEX, "it could not be traced")
    if isinstance(found, Attention) or found.reason not in (Reason.NOT_ATTENTION, Reason.SCORES_CHANGED):
        return found
    calls = [n for n in flex_arguments(node, reader)["score_mod"].graph.nodes if n.op.startswith("call")]
    names = dict.fromkeys(str(getattr(n.target, "__name__", n.target)).split(".")[0] for n in calls)
    return Refusal(Reason.SCORES_CHANGED, f"by a score_mod: {', '.join(names)}") if names else found


def flex_site(node: Node) -> dict[str, Any]:
    """What the report says of a call that is not looked into."""
    query, key = (value_of(x) for x in node.args[:2])
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (query, key)):
        return {}
    names = ("batch", "heads", "length", "head_size")
    known: dict[str, Any] = {name: size_text(size) for name, size in zip(names, query.shape, strict=True)}
    known |= {"kv_heads": size_text(key.shape[1]), "keys": size_text(key.shape[2])}
    known |= {"dtype": str(query.dtype).removeprefix("torch."), "device": query.device.type}
    return known | {"mask": "none" if NO_MASK in bind(_SIGNATURE, node)["block_mask"] else "block"}


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    score_mod: Callable[..., Tensor],
    mask_mod: Callable[..., Tensor],
    lists: Lists | None,
    score_buffers: Sequence[Any],
    mask_buffers: Sequence[Any],
) -> Tensor:
    """What flex_attention computes, [B, H, L, Dv]; rows that see no key give 0.

    query [B, H, L, D]; key [B or 1, Hk, S, D]; value [B or 1, Hk, S, Dv].
    """
    batch, heads, length = query.shape[:3]
    key, value = (_for_each_head(x, batch, heads) for x in (key, value))
    scores = query @ key.mT
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores * scale
    grid = [torch.arange(n, device=query.device) for n in (batch, heads, length, key.shape[2])]
    scores = _over_all(score_mod, 1, len(score_buffers))(scores, *grid, *score_buffers)
    visible = _small(_over_all(mask_mod, 0, len(mask_buffers))(*grid, *mask_buffers))
    if lists is not None:
        listed = _listed(lists.counts, lists.indices, lists, grid)
        visible = visible & listed
        if lists.full_counts is not None:
            visible = visible | _listed(lists.full_counts, lists.full_indices, lists, grid)
    weights = torch._safe_softmax(torch.where(visible, scores, -torch.inf), -1)
    return weights.to(value.dtype) @ value


def _lists_all(lists: Lists, given: Mapping[str, Any], node: Node, reader: Reader) -> bool:
    """Whether the lists name one block with everything in it, as they do for a call without a block mask."""
    query, key = value_of(given["query"]), value_of(given["key"])
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (query, key)):
        return False
    whole = surely(query.shape[2] <= lists.query_size) and surely(key.shape[2] <= lists.key_size)
    return whole and [_number(x, node, reader) for x in lists[:2]] == [1, 0] and lists.full_counts is None


def _number(x: Any, at: Node, reader: Reader) -> float | None:
    value = reader.value(x) if isinstance(x, Node) else None
    return None if value is None else number(reader, value, at)


def _for_each_head(x: Tensor, batch: Any, heads: int) -> Tensor:
    """A key or value [B or 1, Hk, S, D] as [B, H, S, D]."""
    if isinstance(x.shape[0], int) and x.shape[0] == 1 and not (isinstance(batch, int) and batch == 1):
        x = x.expand(batch, *x.shape[1:])
    kv_heads, group = x.shape[1], heads // x.shape[1]
    if group == 1:
        return x
    return x[:, :, None].expand(-1, kv_heads, group, -1, -1).flatten(1, 2)


def _over_all(function: Callable[..., Tensor], elements: int, buffers: int) -> Callable[..., Tensor]:
    """A function of scalars over all batches, heads, queries and keys.

    It takes ``elements`` tensors [B, H, L, S], the indices of the four dimensions, and what it captured.
    """
    for axis in (3, 2, 1, 0):
        index = [0 if axis == i else None for i in range(4)]
        function = torch.vmap(function, in_dims=(*[0] * elements, *index, *[None] * buffers))
    return function


def _small(x: Tensor) -> Tensor:
    """A tensor without its repetitions: of size 1 where it is the same all along a dimension."""
    for dim in range(x.dim()):
        x = x.narrow(dim, 0, 1) if isinstance(x.stride(dim), int) and x.stride(dim) == 0 else x
    return x


def _listed(counts: Tensor, indices: Tensor, lists: Lists, grid: Sequence[Tensor]) -> Tensor:
    """Whether the block of a key is listed for the block of a query: bool [B or 1, H or 1, L, S]."""
    rows, keys = grid[2] // lists.query_size, grid[3] // lists.key_size
    columns = torch.sym_max(indices.shape[-1], -(-grid[3].shape[0] // lists.key_size))
    live = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    places = torch.where(live, indices, columns).long()  # one column more, which nobody reads
    dense = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter(-1, places, True)[:, :, rows][:, :, :, keys]
