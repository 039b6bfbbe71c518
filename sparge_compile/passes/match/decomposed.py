"""Attention written out: from a softmax forwards to the product with V, and backwards to that of Q and K.

One walk in each direction (:mod:`.weights`, :mod:`.scores`) understands every spelling. Here both ends are joined, and
softmaxes that are no attention are told from attention that is not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Node

from ...report import Reason
from ..read.axes import Dim, Layout, new_layout, settle, settle_dim
from ..read.calls import Value, reads_number
from ..read.fx_utils import value_of
from ..read.reader import Reader
from .attention import Attention, Refusal
from .compose import Part, compose
from .filled import fills_what_is_hidden
from .scores import ADDED_PRODUCTS, Scores, scores_of
from .softmax import softmax_of
from .weights import OTHER_AXIS, PRODUCTS, Product, may_hold_tensor, product_of

MAX_LOOK = 12  # graph nodes that are searched for a product where the way to it is not understood


def match_softmax(node: Node, reader: Reader) -> Attention | Refusal:
    """The attention around a softmax, or why it is none or cannot be replaced."""
    if getattr(reader.fake(node), "is_nested", False):
        return Refusal(Reason.NESTED)
    softmax = softmax_of(node, reader)
    if softmax is None:
        return Refusal(Reason.NO_SHAPES)
    node, scores, user, dim = softmax
    dim %= max(len(scores.shape), 1)
    if len(scores.shape) < 2:
        return Refusal(Reason.NOT_ATTENTION, "over a vector")
    layout = new_layout(scores.shape)
    if not layout[dim]:
        return Refusal(Reason.NOT_ATTENTION, "over one entry")
    keys = layout[dim]
    product = product_of(reader, node, layout, keys)
    traced = scores_of(reader, scores, user, layout, keys)
    if isinstance(traced, Refusal) or isinstance(product, Refusal):
        return _why(reader, node, traced, product)
    if _looks_up(reader, traced, product):
        return Refusal(Reason.NOT_ATTENTION, "no input reaches its keys and values")
    held = reader.holders(scores, user, layout)
    if not fills_what_is_hidden(reader, product.filled, traced.terms, held, product.weights):
        return Refusal(Reason.SCORES_CHANGED, "weights are filled where a key may be seen")
    return _assemble(reader, node, layout, keys, traced, product)


def _assemble(
    reader: Reader, softmax: Node, layout: Layout, keys: Dim, scores: Scores, product: Product
) -> Attention | Refusal:
    region = _region(reader, softmax, scores, product)
    if isinstance(region, Refusal):
        return region
    factors = [
        (Part(f, node, layout) if isinstance(f, Value) else f, inverse) for f, node, layout, inverse in scores.factors
    ]
    found = compose(
        reader,
        query=scores.query,
        key=scores.key,
        value=product.other,
        weights=settle(layout),
        keys=settle_dim(keys),
        output=product.node,
        output_layout=settle(product.layout),
        terms=scores.terms,
        scale=scores.scale,
        factors=factors,
        region=region,
        scores_dtype=value_of(scores.node).dtype,
    )
    if isinstance(found, Attention):
        made = [x.node for x in (found.query, found.key, found.value, *(m.operand for m in found.masks))]
        if any(node in region for node in made):
            return Refusal(Reason.SCORES_USED, "an operand is made of them")
    return found


def _region(reader: Reader, softmax: Node, scores: Scores, product: Product) -> tuple[Node, ...] | Refusal:
    """The nodes from the first product to the second, and who reads them for nobody; nobody else may read them."""
    order, written = reader.position, reader.written
    start, end = order(scores.node), order(product.node)
    nodes = list(reader.owner.graph.nodes)[start : end + 1]
    inside = {scores.node}
    for node in nodes:
        if any(given in inside for given in (*node.all_input_nodes, *written(node))):
            inside.add(node)
    region = {product.node}
    for node in reversed(nodes):
        if node in inside and (any(user in region for user in node.users) or set(written(node)) & inside):
            region.add(node)
    dead = {each for node in region if node is not product.node for each in reader.dead_readers(node)}
    for node in nodes:
        if _changes_context(node):
            return Refusal(Reason.CONTEXT, f"{node.name}")
        if node in region and any(w not in region for w in written(node)):
            return Refusal(Reason.IN_PLACE, f"by {node.name}")
        if node in region and node is not product.node:
            users = [user for user in node.users if user not in region and user not in dead]
            others = [user for user in users if user.op == "output" or may_hold_tensor(user, reader)]
            if others:
                weights = order(node) >= order(softmax)
                return Refusal(
                    Reason.WEIGHTS_USED if weights else Reason.SCORES_USED, ", ".join(u.name for u in others)
                )
    return tuple(sorted(region | dead, key=order))


def _why(reader: Reader, softmax: Node, scores: Scores | Refusal, product: Product | Refusal) -> Refusal:
    makes = isinstance(scores, Scores) or _near_product(softmax, attrgetter("all_input_nodes"), reader)
    reads = isinstance(product, Product) or _near_product(softmax, attrgetter("users"), reader)
    refusals = [x for x in (scores, product) if isinstance(x, Refusal)]
    if makes and reads:
        other_axis = [x for x in refusals if x.detail == OTHER_AXIS]
        named = [x for x in refusals if x.reason is not Reason.NOT_ATTENTION]
        node = next((x.node for x in (scores, product) if not isinstance(x, Refusal)), None)
        return replace((other_axis or named or refusals)[0], node=node)
    if not makes:
        return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys")
    return Refusal(Reason.NOT_ATTENTION, "no product with values")


def _looks_up(reader: Reader, scores: Scores, product: Product) -> bool:
    """Whether inputs meet rows that the module stores: a codebook, a vocabulary, and no attention between tokens.

    Of learned tokens alone it is attention, as in the first layer of a decoder of learned queries.
    """
    query, key, value = (reader.is_stored(part.value) for part in (scores.query, scores.key, product.other))
    return key and value and not query


def _near_product(start: Node, onwards: Callable[[Node], Iterable[Node]], reader: Reader) -> bool:
    """Whether a product of two computed tensors (not a projection by weights) is a few nodes away."""
    seen: set[Node] = set()
    edge = list(onwards(start))
    while edge and len(seen) < MAX_LOOK:
        node = edge.pop(0)
        if node in seen or node.op in ("placeholder", "output", "get_attr") or _is_number(value_of(node)):
            continue
        seen.add(node)
        value = reader.value(node)
        if value is not None and _has_product(value):
            return True
        edge += list(onwards(node))
    return False


def _is_number(held: Any) -> bool:
    """Whether a node holds a number, or a tensor of one: no product is behind it, and masks are made of many."""
    return reads_number(held) or (isinstance(held, torch.Tensor) and not held.dim())


def _has_product(value: Value) -> bool:
    call = value.call
    if call is None:
        return False
    if call.name in PRODUCTS | ADDED_PRODUCTS:
        return "bmm" in call.name
    return any(_has_product(x) for x in call.inputs)


def _changes_context(node: Node) -> bool:
    """Whether a node switches autocast, gradients or a functorch level."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (
        name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled") or name.endswith("crement_nesting")
    )
