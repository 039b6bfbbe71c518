"""What is dense by plan: some steps of a denoising run, some layers. In: what a user says. Out: answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .errors import type_error, value_error

Steps = tuple[int, "int | None"]

_STEPS = "n (the first n steps), -n (the last n), (start, stop) with None for the end, or None"
_LAYERS = "n (blocks 0 to n - 1), a name or pattern of sites, a list of them, or None"


class Schedule(NamedTuple):
    """``dense_steps`` is a range of a run's steps, negative ones from its end; ``dense_layers`` are names and patterns,
    or a number: the sites whose first number in their name is below it."""

    dense_steps: Steps | None = None
    dense_layers: tuple[str, ...] | int = ()

    def is_dense_layer(self, name: str) -> bool:
        """Whether a site is dense in every step."""
        if isinstance(self.dense_layers, int):
            number = re.search(r"(?:^|\.)(\d+)(?=\.|#|$)", name)
            return number is not None and int(number[1]) < self.dense_layers
        return any(_means(entry, name) for entry in self.dense_layers)

    def unmet_layers(self, names: Iterable[str]) -> list[str]:
        """The entries of ``dense_layers`` that mean none of these sites or modules; a number is ``0:n``."""
        names = list(names)
        if isinstance(self.dense_layers, int):
            return [] if any(map(self.is_dense_layer, names)) else [f"0:{self.dense_layers}"]
        return [entry for entry in self.dense_layers if not any(_means(entry, name) for name in names)]

    def is_dense_step(self, step: int, steps: int | None) -> bool:
        """Whether all sites are dense in a step of a run of so many; None: it is not known how many."""
        if self.dense_steps is None:
            return False
        start, stop = self.dense_steps
        if steps is None and min(start, stop or 0) < 0:
            return False
        first = start if start >= 0 else start + (steps or 0)
        last = math.inf if stop is None else stop if stop >= 0 else stop + (steps or 0)
        return first <= step < last

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        layers = self.dense_layers if isinstance(self.dense_layers, int) else list(self.dense_layers)
        return {"dense_steps": self.dense_steps and list(self.dense_steps), "dense_layers": layers}

    def __str__(self) -> str:
        """What is dense, in words."""
        said = []
        if self.dense_steps is not None:
            start, stop = self.dense_steps
            said.append(f"steps {start}:{'' if stop is None else stop}")
        if isinstance(self.dense_layers, int):
            said.append(f"blocks 0:{self.dense_layers}")
        elif self.dense_layers:
            said.append(", ".join(self.dense_layers))
        return "; ".join(said) or "nothing"


ALWAYS_SPARSE = Schedule()


def parse_schedule(dense_steps: Any = None, dense_layers: Any = None, where: str = "schedule") -> Schedule:
    """What ``dense_steps`` and ``dense_layers`` mean.

    Raises:
        TypeError: one of them has another type. ValueError: a range that holds no step, or a negative number of blocks.
            The messages begin with ``where``.
    """
    return Schedule(_steps(dense_steps, where), _layers(dense_layers, where))


def _steps(given: Any, where: str) -> Steps | None:
    if given is None:
        return None
    pair: Any = given
    if type(given) is int:
        pair = (0, given) if given >= 0 else (given, None)
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or type(pair[0]) is not int
        or not (pair[1] is None or type(pair[1]) is int)
    ):
        raise type_error(f"{where}: dense_steps cannot be read", given=repr(given), allowed=_STEPS, todo=_TODO)
    start, stop = pair
    if given == 0:
        return None
    if stop is not None and (start < 0) == (stop < 0) and stop <= start:
        raise value_error(f"{where}: dense_steps holds no step", given=repr(given), allowed=_STEPS, todo=_TODO)
    return start, stop


def _layers(given: Any, where: str) -> tuple[str, ...] | int:
    if given is None:
        return ()
    if type(given) is int:
        if given < 0:
            raise value_error(f"{where}: dense_layers is negative", given=given, allowed=_LAYERS, todo=_TODO)
        return given or ()
    entries = (given,) if isinstance(given, str) else given
    if not isinstance(entries, Sequence) or not all(isinstance(entry, str) and entry for entry in entries):
        raise type_error(f"{where}: dense_layers cannot be read", given=repr(given), allowed=_LAYERS, todo=_TODO)
    return tuple(entries)


def _means(entry: str, name: str) -> bool:
    """Whether an entry means a site: by its name, that of a module around it, or a pattern of either."""
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(fnmatchcase(each, entry) for each in (name, name.partition("#")[0], *around))


_TODO = (
    "dense_steps=10 keeps the first ten steps dense, dense_layers=2 the blocks 0 and 1, dense_layers='blocks.5' one."
)
