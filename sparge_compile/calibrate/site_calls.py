"""Hear of each attention of a model that may become sparse, call by call: its site and its operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from ..errors import value_error
from ..notices import warn_of_failures
from ..options import Options
from ..passes.decide import least_keys, refusal
from ..passes.work import sheltered
from ..passes.write.taps import listening
from ..running.observe import Observer, Watched
from ..running.places import Place
from .measuring import Operands, longest_sequence


class SiteCalls(Observer):
    """Base of observers of a model's sites. ``options`` say which may become sparse.

    Attributes:
        turns: how often each site was met; to be cleared with each call of the model.
        codes: for each site the names of those that may run its graph, as equal blocks do that are compiled apart.
    """

    def __init__(self, model: Module, options: Options) -> None:
        super().__init__(model)
        self._options = options
        self.turns: Counter[str] = Counter()
        self.codes: dict[str, frozenset[str]] = {}

    @property
    def wants_grids(self) -> bool:
        """Whether the grids of tokens shall be told, where they are known."""
        raise NotImplementedError

    def heard(self, name: str, turn: int, operands: Operands) -> None:
        """A site is about to compute, in this call of the model for the ``turn``-th time, from 0 on."""
        raise NotImplementedError

    def ran(self, graph: Watched, places: list[Place], args: Sequence[Any]) -> Any:
        """Run a graph, and tell of its sites; see ``running.observe.Observer``."""
        wanted: dict[int, str] = {}
        with sheltered(graph.failures, "refusal"):
            wanted = {
                number: graph.slots[number].name(places[number])
                for number, match in enumerate(graph.matches)
                if match.is_attention and refusal(match, self._options) is None
            }
        warn_of_failures(graph.failures)
        if not wanted:
            return graph.run(args)
        for number, name in wanted.items():
            slot = graph.slots[number]
            self.codes[name] = frozenset({name, *map(slot.name, (slot.locator.first, *slot.others()))})
            attention = graph.matches[number].attention
            if attention is not None and attention.is_shared:
                raise value_error(
                    f"attention of site {name!r} cannot be measured in parts",
                    given="a sequence that several processes share",
                    allowed="whole attention, of all heads",
                    todo="Measure the model before its attention is shared; processes may share the batches.",
                )

        def listen(
            number: int, query: Tensor, key: Tensor, value: Tensor, *masks_and_starts: Any, **known: Any
        ) -> None:
            attention = graph.matches[number].attention
            mask, *starts = masks_and_starts
            query, key, value = longest_sequence(query, key, value, *starts)
            if attention is None or key.shape[2] < least_keys(self._options):
                return
            name = wanted[number]
            turn = self.turns[name]
            self.turns[name] += 1
            self.heard(name, turn, Operands.of(attention, query, key, value, mask, **known))

        with listening(listen):
            grids = self._options if self.wants_grids else None
            return graph.run_tapped(args, wanted, with_parts=self._options.keeps, grids=grids)
