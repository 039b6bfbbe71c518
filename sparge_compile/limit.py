"""From which sizes on a site is sparse: what the op asks at each call, where tracing cannot know the answer.

A comparison of symbolic sizes would be a guard, and each of its sides a graph. So the limit goes into the graph as
numbers, and the op asks it of the sizes that it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_FORM = 4  # numbers of a linear form


class Limit(NamedTuple):
    """Sparse from ``least_keys`` keys on, where no predicted gain is negative.

    ``gain`` are linear forms, one after the other, in seconds: a constant, and what each multiplication of a dense
    score, or as well of a value (B·H·L·S·(D + Dv)/2), each number that is pooled (B(H·L + Hk·S)D) and each pair
    (B·H·L·S) adds. Empty: no gain is asked for.
    """

    least_keys: int = 0
    gain: tuple[float, ...] = ()

    def gained(
        self, batch: Any, heads: Any, kv_heads: Any, length: Any, keys: Any, head_size: Any, value_head_size: Any
    ) -> list[Any]:
        """Return the predicted seconds, one for each form; sizes may be numbers or symbols."""
        pairs = batch * heads * length * keys
        numbers = batch * (heads * length + kv_heads * keys) * head_size
        found = []
        for i in range(0, len(self.gain), _FORM):
            constant, multiplied, pooled, paired = self.gain[i : i + _FORM]
            products = multiplied / 2 * (pairs * (head_size + value_head_size))
            found.append(constant + products + pooled * numbers + paired * pairs)
        return found

    def holds(
        self, batch: int, heads: int, kv_heads: int, length: int, keys: int, head_size: int, value_head_size: int
    ) -> bool:
        """Whether a problem of these sizes is sparse."""
        if keys < self.least_keys:
            return False
        return all(s >= 0 for s in self.gained(batch, heads, kv_heads, length, keys, head_size, value_head_size))


NO_LIMIT = Limit()
