"""Taps: calls in a graph that hand an attention's operands to whoever listens, and change nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..find import Match
from ..mha.open import copy_inside
from ..order import SiteOrder
from .emit import Emitter
from .orders import write_grids

# Called with the number of a match, its query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv], its mask, and
# where its packed sequences begin, in queries and in keys, int32 [N + 1] each, if there are any; with ``parts``, the
# sizes of the parts of its sequence, and ``grids``, those of its queries and keys (write/orders.py), where these are
# wanted and known.
Listener = Callable[..., None]

_listener: ContextVar[Listener] = ContextVar("sparge_tap")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have the taps of graphs that run meanwhile call this."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def hand_over(
    number: int, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *starts: Tensor, **known: Any
) -> None:
    """Give the operands of an attention to the listener: a tap calls this."""
    _listener.get()(number, query, key, value, attn_mask, *starts, **known)


def put_taps(
    graph_module: GraphModule,
    matches: Iterable[tuple[int, Match]],
    with_parts: bool = False,
    orders: Mapping[Node, SiteOrder] = MappingProxyType({}),
) -> None:
    """Write a tap before the result of each of these matches of a graph; every other node stays as it is.

    Args:
        graph_module: the outermost graph.
        matches: with the number that each tap tells.
        with_parts: it tells the parts of the sequence.
        orders: by the node of a match: it tells the grids of its tokens.
    """
    touched = {graph_module}
    matches = list(matches)
    grids = write_grids(graph_module, [match for _, match in matches], orders)
    for number, match in matches:
        attention = match.attention
        assert attention is not None
        graph = match.graph_module.graph
        copies = copy_inside(match.node, match.inside, match.reader)[0] if match.inside is not None else {}
        emitter = Emitter(graph, attention, lambda node, copies=copies: copies.get(node, node))  # type: ignore[misc]
        with graph.inserting_before(match.node if copies else attention.output):
            packing = emitter.packing()
            starts = [packing[name] for name in ("cu_seqlens_q", "cu_seqlens_k") if packing]
            operands = (*emitter.operands(), emitter.mask(), *starts)
            parts = match.parts if with_parts and not isinstance(match.parts, str) else ()
            known: dict[str, Any] = {"parts": [emitter.size(part) for part in parts]} if parts else {}
            if match.node in grids:
                known["grids"] = grids[match.node]
            graph.call_function(hand_over, (number, *operands), known)
        for inner, copy in reversed(list(copies.items())):  # of an opened call, only its operands are wanted
            if inner.op != "placeholder" and not copy.users:
                graph.erase_node(copy)
        touched |= {match.graph_module, *(caller.graph_module for caller in match.callers)}
    for module in touched:
        module.graph.lint()
        module.recompile()
