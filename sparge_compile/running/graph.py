"""The opening of every backend: a graph of Dynamo, what was found in it, and where it stands in the user's model.

The backend, the observers and the teacher of a distillation begin here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch.fx import GraphModule, Node

from ..naming import module_base, numbered
from ..options import Options
from ..passes import pipeline
from ..passes.find import Match
from ..passes.read.fx_utils import clone
from ..passes.work import Work, analyse, sheltered
from ..thresholds.buffers import Attached, attached_to
from .fine_tuning import as_to_run
from .numbers import Part, part_of, sites_before, start_of
from .places import Frame, Locator, Names, Place


@dataclass(frozen=True)
class Slot:
    """A site as part of a graph that several modules run: its module's path below the base, its number there.

    ``part`` is set where the number depends on who calls the graph's function: then ``number`` counts from the start of
    this part of the module, which has ``size`` sites.
    """

    locator: Locator
    path: str
    number: int
    part: Part | None = None
    size: int = 0

    def number_at(self, place: Place) -> int:
        """The site's number in its module, where and when a place runs the graph."""
        if self.part is None:
            return self.number
        return self.number + start_of(place.module(self.path), self.part.now(), self.size)

    def name(self, place: Place) -> str:
        """The site's full name where a place runs the graph."""
        return numbered(place.name(self.path), self.number_at(place))

    def at(self, place: Place, match: Match) -> Match:
        """The match under its full name there."""
        return replace(match, site=replace(match.site, name=self.name(place)))

    def attached(self, place: Place) -> Attached | None:
        """The child module that holds thresholds for this site there. A graph break may hide its marker."""
        held = attached_to(place.module(self.path))
        return held if held is not None and held.get(self.number_at(place)) is not None else None

    def planned(self, place: Place, match: Match) -> Match:
        """The match as what is attached there plans it: dense in every step, or not, in which tiles, what is kept."""
        held = self.attached(place)
        if held is None:
            return replace(match, by_plan=False, tile=None, keeps=False)
        number = self.number_at(place)
        planned = bool(held.is_planned(number))
        return replace(match, by_plan=planned, tile=held.tile_of(number), keeps=held.keeps(number))

    def is_dense_layer(self, place: Place, options: Options) -> bool:
        """Whether the site is dense in every step there, as the options plan it or what is attached does."""
        held, number = self.attached(place), self.number_at(place)
        planned = held is not None and bool(held.is_planned(number)) and held.is_dense(number)
        return planned or options.is_dense_layer(self.name(place))

    def others(self) -> Iterator[Place]:
        """The other modules that may run the graph."""
        return (place for place in self.locator.places() if place is not self.locator.first)


@dataclass
class OpenGraph(Work):
    """A graph of Dynamo in work: also the slot of each match, by its node, and the names of the model."""

    slots: dict[Node, Slot] = field(default_factory=dict)
    names: Names | None = None

    @cached_property
    def attached(self) -> set[Node]:
        """The nodes of the matches whose thresholds are on the model, in the place that is compiled."""
        return {
            node
            for node, slot in self.slots.items()
            if node in self.markers or slot.attached(slot.locator.first) is not None
        }

    @cached_property
    def wide(self) -> bool:
        """Whether thresholds that are attached to a place of the graph have room for kept tokens."""
        held = (slot.attached(place) for slot in self.slots.values() for place in (slot.locator.first, *slot.others()))
        return any(each is not None and each.wide for each in held)

    def alike(self, match: Match) -> Iterator[tuple[Match, bool]]:
        """The match in the other modules that may run the graph, and whether its thresholds are attached there."""
        slot = self.slots[match.node]
        return (
            (slot.planned(place, slot.at(place, match)), slot.attached(place) is not None) for place in slot.others()
        )


def decide_sites(work: OpenGraph, options: Options) -> None:
    """Sparse or dense, for each match, under what is attached to the model and in the other places of the graph."""
    work.matches = as_to_run(work.matches, work.names)
    slots = ((match, work.slots[match.node]) for match in work.matches)
    work.matches = [slot.planned(slot.locator.first, match) for match, slot in slots]
    pipeline.decide_sites(work, options, work.attached, work.alike)


def open_graph(graph_module: GraphModule, names: Names | Callable[[], Names | None] | None) -> OpenGraph:
    """A copy of Dynamo's graph with its matches, each named as its first place in a model.

    Dynamo goes on reading the graph that it gave; the copy is ours to change. A fault of ours gives a graph without
    matches and the failure.

    Args:
        graph_module: Dynamo's.
        names: those of the model, or what finds them; None: nobody knows which model it is.
    """
    graph = OpenGraph(graph_module)
    with sheltered(graph.failures, "copy"):
        graph.graph_module = clone(graph_module)
    analyse(graph, pipeline.find, partial(place, given=graph_module, names=names))
    return graph


def place(work: OpenGraph, given: GraphModule, names: Names | Callable[[], Names | None] | None) -> None:
    """The slot of each match; the match has its full name in the first place from here on."""
    frame = Frame(given)
    names = work.names = names() if callable(names) else names
    locators: dict[str | None, Locator] = {}
    parts: dict[tuple[str | None, str], tuple[Part, int, int]] = {}  # with the part's first number and its size
    seen = sites_before()
    paths = [
        frame.rebased(module_base(match.node), match.path if names is None else names.below(match.path), names)
        for match in work.matches
    ]
    here = Counter(path for match, path in zip(work.matches, paths, strict=True) if match.is_attention)
    for i, (match, (base, path)) in enumerate(zip(work.matches, paths, strict=True)):
        if base not in locators:
            locators[base] = frame.locator(base, path, names)
        locator = locators[base]
        full = locator.first.name(path)
        if (base, path) not in parts:
            part = part_of(match.node, locator.first.module(path), frame.tensors)
            size = seen[full] + here[base, path]
            starts = [start_of(each.module(path), part, size) for each in (locator.first, *locator.places())]
            parts[base, path] = part, starts[0], size
        part, start, size = parts[base, path]
        if not match.is_attention:
            slot = Slot(locator, path, 0)
        elif part.calls:  # who else calls the function of this graph is known when they do
            slot = Slot(locator, path, seen[full], part, size)
        else:
            slot = Slot(locator, path, start + seen[full])
        seen[full] += match.is_attention
        work.slots[match.node] = slot
        work.matches[i] = slot.at(locator.first, match)
