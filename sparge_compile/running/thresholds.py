"""The thresholds of one call of a compiled graph: whichever block runs it, its own.

Equal blocks share a graph, and what is compiled for the first is run by all. So the thresholds that a graph gets as
inputs are looked up at each call, by the place that a parameter among the inputs tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import value_error
from ..keeping import WIDTH
from ..options import Options
from ..passes.decide import expected_density, verdict
from ..passes.write.threshold_inputs import ThresholdInput
from ..thresholds.buffers import Attached
from .graph import Slot
from .places import Locator, Place
from .rehearsals import is_rehearsal

Row = list["Tensor | Callable[[], Tensor]"]  # thresholds of a place, or what reads them off the model


class RunTime:
    """Tells what to append to the inputs of a call: one tensor [H, 2 or 6] for each threshold input of the graph.

    The tensors of a place are made when it first runs the graph, and stay the same ones after that.
    """

    def __init__(
        self,
        inputs: Sequence[ThresholdInput],
        slots: Mapping[Node, Slot],
        options: Options,
        report: Callable[[list[str]], None],
    ) -> None:
        """``inputs`` hold the thresholds of the place that was compiled; ``report`` hears of every later place."""
        self._inputs = [(x, slots[x.match.node]) for x in inputs]
        self._options = options
        self._report = report
        self._locators = list(dict.fromkeys(slot.locator for _, slot in self._inputs))
        # The rows of a place, by the numbers of its sites: those of a function depend on who calls it.
        self._rows: WeakKeyDictionary[Place, dict[tuple[int, ...], Row]] = WeakKeyDictionary()
        for locator in self._locators:
            first = locator.first
            row: Row = [_attached(x, slot, first) or x.values for x, slot in self._of(locator)]
            self._rows[first] = {self._numbers(locator, first): row}

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        if is_rehearsal(args):
            return [x.values for x, _ in self._inputs]
        if len(self._locators) == 1:
            return self._row(self._locators[0], args)
        rows = {locator: iter(self._row(locator, args)) for locator in self._locators}
        return [next(rows[slot.locator]) for _, slot in self._inputs]

    def constants(self) -> list[tuple[ThresholdInput, Tensor]]:
        """The thresholds of each input, for a graph that is to be stored and takes none at run time.

        Raises:
            ValueError: they are attached where the graph cannot read them, or several modules with thresholds of their
                own may run the graph.
        """
        for x, slot in self._inputs:
            for place in (slot.locator.first, *slot.others()):
                own = x.values if place is slot.locator.first else self._made(x, slot, place)
                if _attached(x, slot, place) is not None or not torch.equal(own, x.values):
                    raise value_error(
                        f"sparge: the thresholds of {slot.name(place)!r} cannot be stored with the graph",
                        given="a graph that equal modules share, each with thresholds of its own, or a graph break "
                        "between a module and its attached thresholds",
                        allowed="one pair of thresholds for the graph, or attached ones that it reads itself",
                        todo="Attach the calibration (sparge_compile.attach) and compile with fullgraph=True, or leave "
                        "out aot_compile and torch._dynamo.config.caching_precompile.",
                    )
        return [(x, x.values) for x, _ in self._inputs]

    def _of(self, locator: Locator) -> list[tuple[ThresholdInput, Slot]]:
        return [(x, slot) for x, slot in self._inputs if slot.locator is locator]

    def _numbers(self, locator: Locator, place: Place) -> tuple[int, ...]:
        return tuple(slot.number_at(place) for _, slot in self._of(locator))

    def _row(self, locator: Locator, args: Sequence[Any]) -> list[Tensor]:
        place = locator.place(args)
        rows = self._rows.setdefault(place, {})
        numbers = self._numbers(locator, place)
        row = rows.get(numbers)
        if row is None:
            mine = self._of(locator)
            row = rows[numbers] = [_attached(x, slot, place) or self._made(x, slot, place) for x, slot in mine]
            fixed = zip(mine, row, strict=True)
            self._report([slot.name(place) for (_, slot), values in fixed if isinstance(values, Tensor)])
        return [x if isinstance(x, Tensor) else x() for x in row]

    def _made(self, x: ThresholdInput, slot: Slot, place: Place) -> Tensor:
        attention = x.match.attention
        assert attention is not None
        pairs = self._options.thresholds_of(slot.name(place), x.heads, int(attention.head_size))
        # A block that would be dense alone is so in the graph of the others: all of its key blocks are kept.
        density = expected_density(pairs, self._options.kept_of(slot.name(place)), x.match)
        if verdict(attention, density, self._options).status == "dense":
            pairs = ((1.0, 0.0),) * x.heads
        rows = self._options.rows_of(slot.name(place), pairs, wide=x.values.shape[1] == WIDTH)
        return torch.tensor(rows, dtype=torch.float32, device=x.values.device)


def _attached(x: ThresholdInput, slot: Slot, place: Place) -> Callable[[], Tensor] | None:
    """A reader of attached thresholds, asked at each call, since moving a model replaces its buffers; else None."""
    held = slot.attached(place)
    return None if held is None else partial(read_attached, held, slot.number_at(place), x)


def read_attached(held: Attached, number: int, x: ThresholdInput) -> Tensor:
    """The thresholds that are attached for an attention, as its threshold input takes them."""
    values = held.get(number, x.values.device)
    assert values is not None
    if values.shape[1] < x.values.shape[1]:  # of another place, where nothing is kept
        values = torch.nn.functional.pad(values, (0, x.values.shape[1] - values.shape[1]))
    # Inductor's code asserts the strides that it was compiled for.
    return values if values.shape[0] == x.heads else values.expand(x.heads, -1).contiguous()
