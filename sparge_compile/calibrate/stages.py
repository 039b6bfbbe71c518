"""How far a calibration run is, and how long its stages took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any


class Stages:
    """Seconds by stage, and what is to be said of one. Its text is a line with the share of each."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._notes: dict[str, str] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time that a block takes as a stage's, but for that of stages inside it."""
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            inside = sum(self._seconds.values()) - before
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start - inside

    def note(self, stage: str, text: str) -> None:
        """Have something said of a stage."""
        self._notes[stage] = text

    def __str__(self) -> str:
        total = sum(self._seconds.values())
        parts = [
            f"{stage} {seconds:.1f} s, {seconds / total if total else 0:.0%}"
            + (f" ({self._notes[stage]})" if stage in self._notes else "")
            for stage, seconds in self._seconds.items()
        ]
        return f"time: {total:.1f} s: " + "; ".join(parts)


def bar_of(batches: Iterable[Any], done: int, shown: bool) -> Any:
    """Return a bar of progress over batches, some of which are done."""
    from tqdm import tqdm

    total = len(batches) if isinstance(batches, Sized) else None
    return tqdm(total=total, initial=done, desc="calibrating", unit="batch", disable=not shown)
