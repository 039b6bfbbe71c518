"""The thresholds of one call of a compiled graph: whichever block runs it, its own.

Equal blocks share a graph, and what is compiled for the first is run by all. So the thresholds that a graph gets as
inputs are looked up at each call, by the place that a parameter among the inputs tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..attached import Attached, attached_to
from ..config import Options
from ..cost import cost_model
from ..naming import ROOT, join, module_base, numbered
from ..thresholds import Pair
from .decide import MARGIN, expected_density, shape_of
from .find import Match
from .places import Frame, Locator, Names, Place


@dataclass(frozen=True)
class Slot:
    """A site as part of a graph that several modules run: its module's path below the base, its number there."""

    locator: Locator
    path: str
    number: int

    def name(self, place: Place) -> str:
        """The site's full name where a place runs the graph."""
        return numbered(place.name(self.path), self.number)

    def at(self, place: Place, match: Match) -> Match:
        """The match under its full name there."""
        return replace(match, site=replace(match.site, name=self.name(place)))

    def attached(self, place: Place) -> Attached | None:
        """What holds thresholds for this site there. A graph break may hide its marker from the graph."""
        root = place.root
        if root is None or place.prefix is None:
            return None
        full = join(place.prefix, self.path)
        try:
            module = root.get_submodule("" if full == ROOT else full)
        except AttributeError:  # there are wrappers on the way
            module = Names(root).by_name.get("" if full == ROOT else full)  # type: ignore[assignment]
        held = attached_to(module)
        return held if held is not None and held.get(self.number) is not None else None

    def others(self) -> Iterator[Place]:
        """The other modules that may run the graph."""
        return (place for place in self.locator.places() if place is not self.locator.first)


def slots_of(matches: Iterable[Match], frame: Frame, names: Names | None) -> dict[Node, Slot]:
    """A slot for each match, by its node, in a frame that runs in a model (None: nobody knows which)."""
    locators: dict[str | None, Locator] = {}
    seen: Counter[str] = Counter()
    slots = {}
    for match in matches:
        base, path = module_base(match.node), match.path
        if base not in locators:
            locators[base] = frame.locator(base, path, names)
        full = locators[base].first.name(path)
        slots[match.node] = Slot(locators[base], path, seen[full] if match.is_attention else 0)
        seen[full] += match.is_attention
    return slots


@dataclass(frozen=True)
class Input:
    """A threshold input of a graph: its slot, its size, and whether pairs would make its site slower than dense."""

    slot: Slot
    heads: int
    device: torch.device
    loses: Callable[[tuple[Pair, ...]], bool]


def input_for(match: Match, slot: Slot, options: Options) -> Input:
    """What a site needs for the thresholds of other places; to be asked for before the graph is rewritten."""
    assert match.attention is not None
    return Input(slot, int(match.attention.heads), match.attention.device, _loser(match, options))


def _loser(match: Match, options: Options) -> Callable[[tuple[Pair, ...]], bool]:
    assert match.attention is not None
    shape = shape_of(match.attention)
    if options.min_seq_len is not None or shape is None:
        return lambda pairs: False
    costs = options.costs or cost_model(match.attention.device)
    return lambda pairs: costs.predict(shape, expected_density(pairs)).speedup < MARGIN


class RunTime:
    """What to append to the inputs of a call: one tensor [H, 2] for each threshold input of the graph.

    The tensors of a place are made when it first runs the graph, and stay the same ones after that.
    """

    def __init__(
        self, inputs: Sequence[Input], given: Sequence[Tensor], options: Options, report: Callable[[list[str]], None]
    ) -> None:
        """``given`` are the thresholds of the place that was compiled; ``report`` hears of every later place."""
        self._inputs = inputs
        self._options = options
        self._report = report
        self._locators = list(dict.fromkeys(x.slot.locator for x in inputs))
        for locator in self._locators:
            mine = [(x, values) for x, values in zip(inputs, given, strict=True) if x.slot.locator is locator]
            locator.first.row = [self._attached(x, locator.first) or values for x, values in mine]

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        if len(self._locators) == 1:
            return self._row(self._locators[0], args)
        rows = {locator: iter(self._row(locator, args)) for locator in self._locators}
        return [next(rows[x.slot.locator]) for x in self._inputs]

    def _row(self, locator: Locator, args: Sequence[Any]) -> list[Tensor]:
        place = locator.place(args)
        if place.row is None:
            mine = [x for x in self._inputs if x.slot.locator is locator]
            place.row = [self._attached(x, place) or self._made(x, place) for x in mine]
            self._report(
                [x.slot.name(place) for x, row in zip(mine, place.row, strict=True) if isinstance(row, Tensor)]
            )
        return [x if isinstance(x, Tensor) else x() for x in place.row]

    def _attached(self, x: Input, place: Place) -> Callable[[], Tensor] | None:
        """Read at each call, since moving a model replaces its buffers."""
        held = x.slot.attached(place)
        return None if held is None else partial(_read, held, x.slot.number, x.heads)

    def _made(self, x: Input, place: Place) -> Tensor:
        options, name = self._options, x.slot.name(place)
        found = options.calibration.lookup(name, x.heads) if options.calibration else None
        pairs = found or ((options.topk, options.topp),) * x.heads
        # A block that would be dense alone is so in the graph of the others: all of its key blocks are kept.
        pairs = ((1.0, 0.0),) * x.heads if x.loses(pairs) else pairs
        return torch.tensor(pairs, dtype=torch.float32, device=x.device)


def _read(held: Attached, number: int, heads: int) -> Tensor:
    values = held.get(number)
    assert values is not None
    return values if values.shape[0] == heads else values.expand(heads, 2)
