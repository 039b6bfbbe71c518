"""Whether a call of a graph is dense by plan: then the graph as it was runs instead of the rewritten one.

Thresholds are run-time tensors, so no look at them tells without waiting for the device. Who writes them by plan notes
it beside the buffers (``Attached.is_dense``), and a second graph, compiled with the first one, is the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.fx import GraphModule

from ..errors import value_error
from ..options import Options
from ..passes.pipeline import check, erase_markers, find, return_dense
from ..passes.read.fx_utils import clone
from ..passes.work import Work, run
from ..thresholds.steps import step_of
from .graph import OpenGraph, Slot
from .places import Place
from .rehearsals import is_rehearsal


class DenseCalls:
    """Tells, of each call of a graph, whether all of its sparse sites are dense by plan where and when it runs."""

    def __init__(self, slots: Sequence[Slot], options: Options) -> None:
        self._slots, self._options, self._schedule = slots, options, options.schedule
        self._locators = list(dict.fromkeys(slot.locator for slot in slots))

    @property
    def there_are_some(self) -> bool:
        """Whether there may be such a call, as far as is known while the graph is compiled."""
        if self._slots and self._schedule.dense_steps is not None:
            return True
        every = [(slot, (slot.locator.first, *slot.others())) for slot in self._slots]
        return bool(every) and all(any(self._may_be_dense(slot, each) for each in places) for slot, places in every)

    def __call__(self, args: Sequence[Any]) -> bool:
        if is_rehearsal(args):
            return False
        places = {locator: locator.place(args) for locator in self._locators}
        if self._schedule.dense_steps is not None:
            root = next((place.root for place in places.values()), None)
            if self._schedule.is_dense_step(*step_of(root)):
                return True
        return all(self._is_dense(slot, places[slot.locator]) for slot in self._slots)

    def _may_be_dense(self, slot: Slot, place: Place) -> bool:
        held = slot.attached(place)
        if held is not None and held.is_planned(slot.number_at(place)) is not None:
            return True
        return self._options.is_dense_layer(slot.name(place))

    def _is_dense(self, slot: Slot, place: Place) -> bool:
        held = slot.attached(place)
        if held is not None and held.is_dense(slot.number_at(place)):
            return True
        return self._options.is_dense_layer(slot.name(place))


def dense_copy(graph: OpenGraph, with_outputs: bool) -> GraphModule:
    """The graph as it was given, without the markers of attached thresholds.

    ``with_outputs``: it returns also what those sites give that are sparse in the other graph, in their order.
    """
    copy = Work(clone(graph.graph_module))
    if with_outputs:  # the same sites, found anew: a match belongs to the nodes of one graph
        run(copy, find)
        sites = [match for match, step in zip(copy.matches, graph.steps, strict=True) if step.is_sparse]
        run(copy, partial(return_dense, matches=sites))
    run(copy, erase_markers, check)
    return copy.graph_module


def refuse_steps(options: Options) -> None:
    """Refuse to store a graph that is dense in some steps: nobody tells it where it runs which step it is.

    Raises:
        ValueError: the options have dense steps.
    """
    if options.schedule.dense_steps is not None:
        raise value_error(
            "sparge: a graph that is dense in some steps cannot be stored",
            given=f"dense_steps={options.dense_steps!r}, and aot_compile or torch._dynamo.config.caching_precompile",
            allowed="one of the two",
            todo="Attach the thresholds with their plan: sparge_compile.attach(model, calibration, dense_steps=…).",
        )


def by_plan(
    sparse: Callable[..., Any], dense: Callable[..., Any], is_dense: Callable[[Sequence[Any]], bool], inputs: int
) -> Callable[..., Any]:
    """What runs the dense graph where a call is dense by plan; its inputs are the first of the sparse one's."""

    def call(*args: Any) -> Any:
        return dense(*args[:inputs]) if is_dense(args) else sparse(*args)

    return call
