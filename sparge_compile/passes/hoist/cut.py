"""A minimum cut of a graph with capacities, by shortest augmenting paths (Edmonds and Karp)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable

NEVER = 1 << 80  # the capacity of what must not be cut


class Cut:
    """Vertices and edges between a source and a sink. Vertices are whatever can be hashed."""

    def __init__(self, source: Hashable, sink: Hashable) -> None:
        self._source, self._sink = source, sink
        self._left: dict[Hashable, dict[Hashable, int]] = defaultdict(dict)  # capacity that is not used

    def join(self, one: Hashable, other: Hashable, capacity: int, back: int = 0) -> None:
        """Add an edge, and one of the capacity ``back`` the other way."""
        self._left[one][other] = self._left[one].get(other, 0) + capacity
        self._left[other][one] = self._left[other].get(one, 0) + back

    def near_source(self) -> set[Hashable]:
        """The side of the source in the minimum cut whose side is smallest; no edges can be added afterwards."""
        while True:
            came = self._search()
            if self._sink not in came:
                return set(came)
            path = [self._sink]
            while path[-1] != self._source:
                path.append(came[path[-1]])
            edges = list(zip(path[1:], path, strict=False))
            flow = min(self._left[a][b] for a, b in edges)
            for a, b in edges:
                self._left[a][b] -= flow
                self._left[b][a] += flow

    def _search(self) -> dict[Hashable, Hashable]:
        """What can be reached from the source, and from where."""
        came: dict[Hashable, Hashable] = {self._source: None}
        waiting = deque([self._source])
        while waiting and self._sink not in came:
            one = waiting.popleft()
            for other, capacity in self._left[one].items():
                if capacity > 0 and other not in came:
                    came[other] = one
                    waiting.append(other)
        return came
