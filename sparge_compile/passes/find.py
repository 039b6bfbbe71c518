"""Find attention: graph in, matches out. Nothing is changed and nothing is decided here.

Understood are calls of SDPA (:mod:`.match.sdpa`) and of other libraries (:mod:`.match.dialects`), and attention written
out around a softmax (:mod:`.match.decomposed`), in Dynamo graphs, ``torch.export`` programs and plain FX graphs; larger
calls are opened (:mod:`.mha.open`, :mod:`.mha.autograd_function`), and what attends by other means
(:mod:`.match.foreign`) is named, so that the report is whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ..kernels.order import Tile
from ..naming import SiteNames, code_of, join, module_path
from ..report import Reason, Site
from .match.attention import Attention, Refusal
from .match.decomposed import match_softmax
from .match.dialects import match_spoken, spoken
from .match.foreign import known_of, match_foreign
from .match.joint import Parts, joint_parts
from .match.ranks import exchanged, is_ring, match_ring
from .match.scope import TRANSPARENT, Scope
from .match.sdpa import is_sdpa, match_sdpa
from .match.softmax import is_softmax
from .mha.autograd_function import is_autograd_function, open_function
from .mha.flex import flex_refusal, flex_site, in_words_of_flex, is_flex
from .mha.open import OPENABLE, holds_attention, open_up, why_closed
from .read.fx_utils import size_text, submodule_of, value_of
from .read.reader import Reader

# torch.func.grad, vjp and jvp; our autograd formulas are not written for them (vmap is decomposed and works).
_ENTER_TRANSFORM = {"_grad_increment_nesting", "_jvp_increment_nesting"}
_LEAVE_TRANSFORM = {"_grad_decrement_nesting", "_jvp_decrement_nesting"}


@dataclass(frozen=True)
class Caller:
    """A node that runs a nested graph, and the graph it stands in."""

    graph_module: GraphModule
    node: Node


@dataclass(frozen=True)
class Match:
    """A site and where it stands.

    ``node`` belongs to ``graph_module``, which the ``callers`` (outermost first) run. Where attention is inside a
    larger call, ``inside`` is that call as a graph. ``attention`` is None where it cannot be replaced; ``refusal`` says
    why, or names what is around it that forbids a rewrite. ``path`` is the module that it belongs to. ``by_plan``: the
    thresholds that are attached for it say that it is dense; ``tile``: they are for blocks that are such tiles;
    ``keeps``: they have room for kept tokens.
    """

    site: Site
    path: str
    graph_module: GraphModule
    node: Node
    scope: Scope
    callers: tuple[Caller, ...] = ()
    inside: GraphModule | None = None
    attention: Attention | None = None
    refusal: Refusal | None = None
    by_plan: bool = False
    tile: Tile | None = None
    keeps: bool = False

    @property
    def reader(self) -> Reader:
        """The graph that it stands in, to be read."""
        return self.scope.reader

    @cached_property
    def parts(self) -> Parts | str:
        """The parts that the attention's sequence is put together of, or why there are none."""
        if self.attention is None or self.inside is not None:
            return "nothing is known of what is inside a larger call"
        return joint_parts(self.attention, self.scope)

    def gathering(self) -> Match:
        """The match as one whose operands are brought into an order of tokens, and its result back, where it stands."""
        return self if self.attention is None else replace(self, attention=replace(self.attention, gathers=True))

    @property
    def graphs(self) -> list[GraphModule]:
        """The graphs in which it stands: the outermost one first, its own last."""
        return [*(caller.graph_module for caller in self.callers), self.graph_module]

    @property
    def is_attention(self) -> bool:
        """Whether this is attention, replaceable or not; a softmax that is none is listed too."""
        return self.site.kind != "softmax"


def find(graph_module: GraphModule, stored: Collection[Node] = ()) -> list[Match]:
    """Every attention computation of a graph and of the graphs nested in it, in order; and every other softmax.

    ``stored`` are the inputs that are parameters, buffers or constants; graphs of Dynamo tell themselves.
    """
    return list(_find(Scope(Reader(graph_module, stored)), SiteNames(), (), None))


def _find(scope: Scope, names: SiteNames, callers: tuple[Caller, ...], obstacle: Reason | None) -> Iterator[Match]:
    reader = scope.reader
    owner = reader.owner
    transforms = 0  # of torch.func, entered and not yet left
    for node in owner.graph.nodes:
        target = getattr(node.target, "__name__", "")
        transforms += (target in _ENTER_TRANSFORM) - (target in _LEAVE_TRANSFORM)
        around = Reason.TRANSFORM if transforms > 0 else obstacle
        where: dict[str, Any] = {"graph_module": owner, "node": node, "scope": scope, "callers": callers}
        where["path"] = module_path(node)
        if is_sdpa(node):
            yield _match(names, "sdpa", match_sdpa(node, reader), around, where)
        elif is_ring(node):
            yield _match(names, "ring", match_ring(node, reader), around, where)
        elif is_softmax(node, reader):
            found = match_softmax(node, reader)
            where["node"] = found.output if isinstance(found, Attention) else found.node or node
            where["path"] = module_path(where["node"])
            kind = "softmax" if isinstance(found, Refusal) and found.reason is Reason.NOT_ATTENTION else "decomposed"
            yield _match(names, kind, found, around, where)
        elif node.target in OPENABLE:
            where["path"] = join(where["path"], OPENABLE[node.target].child)
            where["inside"] = inside = open_up(node, reader)
            yield _match(names, "mha", _opened(inside) or _closed(node, reader), around, where)
        elif is_flex(node):
            refused = flex_refusal(node, reader)
            where["inside"] = inside = open_up(node, reader) if refused is None else None
            found = refused or in_words_of_flex(_opened(inside), node, reader)
            yield _match(names, "flex", found, around, where, **flex_site(node))
        elif holds_attention(node):
            yield _match(names, "mha", _closed(node, reader), around, where)
        elif (call := spoken(node)) is not None:
            yield _match(names, *match_spoken(call, reader), around, where)
        elif is_autograd_function(node) and (opened := open_function(node, owner)) is not None:
            where["inside"], called = opened
            reading = scope.into(opened[0], node).reader
            kind, found = ("op", called) if isinstance(called, Refusal) else match_spoken(called, reading)
            yield _match(names, kind, found, around, where)
        elif (foreign := match_foreign(node)) is not None:
            yield _match(names, foreign.kind, foreign.refusal, around, where, **foreign.known)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            caller = Caller(owner, node)
            for argument in node.all_input_nodes:
                nested = submodule_of(argument, owner)
                if nested is not None:
                    once = node.target.name() in TRANSPARENT and len(argument.users) == 1
                    inner = around if once else Reason.CONTROL_FLOW
                    inner_scope = scope.nested(node) or scope.into(nested, node)
                    yield from _find(inner_scope, names, (*callers, caller), inner)


def _opened(inside: GraphModule | None) -> Attention | Refusal | None:
    """The attention in an opened call; None where there is none."""
    if inside is None:
        return None
    reader = Reader(inside)
    for node in inside.graph.nodes:
        if is_sdpa(node):
            return match_sdpa(node, reader)
        if is_softmax(node, reader):
            return match_softmax(node, reader)
    return None


def _closed(node: Node, reader: Reader) -> Refusal:
    """Why a larger call could not be looked into."""
    reason = why_closed(node, reader) or Reason.OPAQUE
    target = str(getattr(node.target, "__name__", node.target))
    return Refusal(reason, target if reason is Reason.OPAQUE else "")


def _match(
    names: SiteNames, kind: str, found: Attention | Refusal, around: Reason | None, where: dict[str, Any], **known: Any
) -> Match:
    # What is no attention takes no number from the sites of its module.
    name = where["path"] if kind == "softmax" else names.name(where["path"])
    if isinstance(found, Refusal):
        known = known or known_of(where["node"])
        return Match(Site(name, kind, code=code_of(where["node"]), **known), refusal=found, **where)
    site = Site(
        name,
        kind,
        batch=size_text(found.batch),
        heads=size_text(found.heads),
        kv_heads=size_text(found.kv_heads),
        length=size_text(found.length),
        keys=size_text(found.keys),
        head_size=size_text(found.head_size),
        dtype=str(found.dtype).removeprefix("torch."),
        device=found.device.type,
        mask=found.mask_kind,
        is_causal=found.is_causal,
        code=code_of(where["node"]),
    )
    found = replace(exchanged(found, where["node"]), trains=_trains(where["node"], found))
    return Match(site, attention=found, refusal=Refusal(around) if around else None, **where)


def _trains(node: Node, found: Attention) -> bool:
    """Whether a backward will follow: by the result as it was traced, or by the operands where nothing computed it."""
    values = (value_of(x.node) for x in (found.query, found.key, found.value))
    results = tree_leaves(value_of(node))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in values)
    return wanted or any(isinstance(x, Tensor) and x.requires_grad for x in results)
