"""The passes in the order in which they run: find, (place,) decide_sites, substitute, return_outputs, hoist, in_turns,
in_parts, erase_markers, check.

The first three only read the graph and are run by :func:`analyse`. A pass takes the :class:`Work` and notes in it what
it found or made; its settings are bound when a list is put together. ``place`` belongs to graphs of Dynamo
(:mod:`sparge_compile.running.graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import eight_bits
from ..options import Options
from ..report import Decision, Reason
from . import find as finding
from .decide import decide, thresholds_for
from .find import Match
from .hoist.hoist import Plan, plan_gathers, write_gathers
from .match.joint import Parts
from .order import order_sites
from .read.fx_utils import clone
from .substitute import substitute_match
from .work import Pass, Step, Work, graphs_of, run, sheltered
from .write.few_keys import take_in_parts
from .write.orders import write_orders
from .write.outputs import dense_outputs, return_also
from .write.threshold_inputs import Marker, attached_thresholds, markers_of, new_input
from .write.threshold_inputs import erase_markers as erase_all_markers
from .write.turns import take_turns

# For a match, the same site in other modules that may run the graph, and whether its thresholds are attached there.
Alike = Callable[[Match], Iterable[tuple[Match, bool]]]

# Attached thresholds may be changed at any time, so what they hold now decides nothing: a site is replaced if it would
# pay with a tenth of the blocks.
_ATTACHED_TOPK = 0.1


def find(work: Work) -> None:
    """Every attention of the graph, and the markers that ``attach`` left for them."""
    work.matches = finding.find(work.graph_module, work.stored)
    work.markers = markers_of(work.graph_module, work.matches)
    work.matches = [_as_marked(match, work.markers.get(match.node)) for match in work.matches]


def _as_marked(match: Match, marker: Marker | None) -> Match:
    return match if marker is None else replace(match, tile=marker.tile, keeps=marker.keeps)


def decide_sites(
    work: Work,
    options: Options,
    attached: Container[Node] = (),
    alike: Alike = lambda match: (),
) -> None:
    """Sparse or dense, for each match, and in which order of its tokens.

    Args:
        work: with its matches.
        options: the backend's options.
        attached: the nodes of those matches whose thresholds are attached to the model.
        alike: for a match, the same site in other modules that may run the same graph, and whether its thresholds are
            attached. Whichever comes first, the site becomes sparse if it does in one of them; where it would not
            alone, all key blocks are kept.
    """
    work.steps = decided(work.matches, options, attached, alike)
    work.orders = order_sites(work.graph_module, work.sparse, options, attached, work.markers, alike)
    _charge_gathers(work, options, attached, alike)
    texts = {node: str(order) for node, order in work.orders.items()}
    work.steps = [Step(m, replace(decision, order=texts.get(m.node, ""))) for m, decision in work.steps]
    if options.precision == "fp8":
        work.steps = [Step(m, replace(decision, precision=_precision(m, decision))) for m, decision in work.steps]


def _charge_gathers(work: Work, options: Options, attached: Container[Node], alike: Alike) -> None:
    """Decide anew about sites that pay for an order of tokens, unless it is made elsewhere."""
    made = {node for node, order in work.orders.items() if not order.is_raster}
    if not made or options.costs is not None or options.min_seq_len is not None:
        return
    gathering = [match.gathering() if match.node in made else match for match in work.matches]
    charged = decided(gathering, options, attached, alike)
    pairs = list(zip(work.steps, charged, strict=True))
    in_doubt = any((a.is_sparse, a.decision.limit) != (b.is_sparse, b.decision.limit) for a, b in pairs)
    free: set[Node] = set()
    with sheltered([], "hoist"):  # a fault there is told of where the graph is rewritten
        free = _hoisted(work, options, attached, alike) if in_doubt else set()
    work.steps = [step if step.match.node in free else other for step, other in pairs]
    work.orders = {match.node: work.orders[match.node] for match in work.sparse if match.node in work.orders}


def _hoisted(work: Work, options: Options, attached: Container[Node], alike: Alike) -> set[Node]:
    """The nodes of the sites that would gather nothing, as things stand; found by a rewrite of a copy."""
    copy = clone(work.graph_module)
    old, new = (each.graph.find_nodes(op="placeholder") for each in (work.graph_module, copy))
    trial = Work(copy, stored=[x for x, given in zip(new, old, strict=True) if given in work.stored])
    find(trial)
    own = {copied.node: match for copied, match in zip(trial.matches, work.matches, strict=True)}
    trial.matches = [replace(x, site=own[x.node].site, tile=own[x.node].tile) for x in trial.matches]
    trial.steps = [Step(x, step.decision) for x, step in zip(trial.matches, work.steps, strict=True)]
    there = [node for node, match in own.items() if match.node in attached]
    trial.orders = order_sites(copy, trial.sparse, options, there, trial.markers, lambda match: alike(own[match.node]))
    run(trial, partial(substitute, options=options, as_input=lambda values: values), hoist)
    return {own[match.node].node for match, op in trial.substituted if op.kwargs.get("reordered")}


def decided(
    matches: Iterable[Match],
    options: Options,
    attached: Container[Node] = (),
    alike: Alike = lambda match: (),
) -> list[Step]:
    """Decide as :func:`decide_sites` does, for matches without a graph in work."""
    steps = []
    for match in matches:
        decision = _decide(match, options, match.node in attached)
        if decision.reason in (Reason.SLOWER, Reason.BY_PLAN):
            for other, other_attached in alike(match):
                there = _decide(other, options, other_attached)
                if there.status == "sparse":
                    decision = Decision(Reason.SHARED, f"as {other.site.name}", decision.prediction, there.limit)
                    break
        steps.append(Step(match, decision))
    return steps


def _precision(match: Match, decision: Decision) -> str:
    """In what a site attends that shall attend in eight bits."""
    attention = match.attention
    if decision.status == "dense" or attention is None:
        return ""
    what = "a mask" if attention.masks else "packed sequences" if attention.packing else ""
    what = "a ring" if attention.ring is not None else what
    what = what or eight_bits.refusal(attention.device, attention.head_size, attention.value_head_size)
    return f"{str(attention.dtype).removeprefix('torch.')}: {what}" if what else "fp8"


def _decide(match: Match, options: Options, attached: bool) -> Decision:
    if not attached:
        return decide(match, options)
    if options.is_dense_layer(match.site.name):
        match = replace(match, by_plan=True)
    order = options.token_order if options.tile_of(match.tile) is None else "tiles"
    decision = decide(match, replace(options.with_thresholds(_ATTACHED_TOPK, 0.0), token_order=order))
    detail = "; ".join(filter(None, (decision.detail, "thresholds attached")))
    return replace(decision, detail=detail)


def substitute(work: Work, options: Options, as_input: Callable[[Tensor], Any]) -> None:
    """The op in the place of each sparse site, its thresholds from a marker or from a new last input of the graph.

    ``as_input`` turns the thresholds of a site, float32 [H, 2 or 6], into what a graph input of this graph carries (a
    fake tensor).
    """
    replaced: dict[Node, Node] = {}
    # Before anything is replaced: what they are read from may lie behind another site.
    parts = {match.node: _parts(work, match, options) for match in work.sparse}
    orders = write_orders(work.graph_module, work.sparse, work.orders)
    for match, decision in filter(lambda step: step.is_sparse, work.steps):
        if match.node in work.markers:
            thresholds = attached_thresholds(match, work.markers[match.node])
        else:
            assert match.attention is not None
            pairs = thresholds_for(match, options)
            pairs = ((1.0, 0.0),) * len(pairs) if decision.reason is Reason.SHARED else pairs
            rows = options.rows_of(match.site.name, pairs, work.wide)
            values = torch.tensor(rows, dtype=torch.float32, device=match.attention.device)
            made, thresholds = new_input(match, work.graph_module, values, as_input(values))
            work.threshold_inputs.append(made)
        op = substitute_match(
            match,
            thresholds,
            replaced,
            decision.limit,
            parts=parts[match.node],
            order=orders.get(match.node, {}),
            eight_bits=decision.precision == "fp8",
        )
        work.substituted.append((match, op))
    work.changed |= bool(work.substituted)


def _parts(work: Work, match: Match, options: Options) -> Parts:
    """What a site's sequence is put together of, where its thresholds have room for kept tokens; else nothing."""
    marker = work.markers.get(match.node)
    wide = options.keeps or work.wide if marker is None else marker.keeps
    return match.parts if wide and not isinstance(match.parts, str) else ()


def return_outputs(work: Work) -> None:
    """Return the result of each substituted site, [B, H, L, D], from the graph, after its own outputs."""
    return_also(work.graph_module, work.substituted)


def return_dense(work: Work, matches: Iterable[Match]) -> None:
    """Return the dense result of each of these matches, [B, H, L, D], from the graph, after its own outputs."""
    outputs = dense_outputs(matches)
    return_also(work.graph_module, outputs)
    work.changed |= bool(outputs)


def hoist(work: Work) -> None:
    """The order of tokens made once for many sites, where that gathers less than each of them by itself."""
    done: set[Node] = set()
    texts: dict[Node, str] = {}
    while (plan := _planned(work, done)) is not None:
        write_gathers(plan)
        texts |= dict.fromkeys((site.node for site in plan.sites), f", {plan}")
    said = {match.node: texts.get(op, "") for match, op in work.substituted}
    work.steps = [Step(m, replace(d, order=d.order + said.get(m.node, ""))) for m, d in work.steps]


def foretell_orders(works: list[Work], options: Options) -> None:
    """Say what would become of the orders in these works of one graph, which is rewritten and of no more use then."""
    first = works[0]
    if first.orders:
        run(first, partial(substitute, options=options, as_input=lambda values: values), hoist)
        found = {step.match.node: step.decision.order for step in first.steps}
        for work in works[1:]:
            work.steps = [Step(m, replace(d, order=found.get(m.node, d.order))) for m, d in work.steps]


def _planned(work: Work, done: set[Node]) -> Plan | None:
    """The next order that is better made elsewhere. To be without it is slower, not wrong."""
    if work.orders:
        with sheltered(work.failures, "hoist"):
            return plan_gathers(work.graph_module, done)
    return None


def in_turns(work: Work) -> None:
    """Where heads are exchanged among processes, some are exchanged while others are attended to."""
    take_turns(op for _, op in work.substituted)


def in_parts(work: Work) -> None:
    """Beside sparse sites, dense attention to few keys has its queries in parts, where a backward gains by it."""
    dense = [match for match, decision in work.steps if decision.status == "dense"]
    if work.substituted:
        take_in_parts(dense)


def erase_markers(work: Work) -> None:
    """Remove the markers that ``attach`` left, those without a site too."""
    work.changed |= erase_all_markers(work.graph_module)


def check(work: Work) -> None:
    """Lint and recompile the graph and those nested in it, if something changed."""
    for module in graphs_of(work.graph_module) if work.changed else ():
        module.graph.lint()
        module.recompile()


def rewriting_passes(options: Options, as_input: Callable[[Tensor], Any], with_outputs: bool = False) -> list[Pass]:
    """The passes that change a graph, after ``decide_sites``."""
    passes: list[Pass] = [partial(substitute, options=options, as_input=as_input)]
    turns = [in_turns] * bool(options.inductor.get("reorder_for_compute_comm_overlap", True))
    return [*passes, *[return_outputs] * with_outputs, hoist, *turns, in_parts, erase_markers, check]
