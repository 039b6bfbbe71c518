"""From which sizes on a site is sparse: what the op asks at each call, where tracing cannot know the answer.

A comparison of symbolic sizes would be a guard, and each of its sides a graph. So the limit goes into the graph as
numbers, and the op asks it of the sizes that it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Limit(NamedTuple):
    """Sparse from ``least_keys`` keys on, where the predicted gain is not negative.

    ``gain`` is a linear form, in seconds: a constant, and what each multiplication of a dense score, or as well of a
    value (B·H·L·S·(D + Dv)/2), each number that is pooled (B(H·L + Hk·S)D) and each pair (B·H·L·S) adds. Empty: no
    gain is asked for.
    """

    least_keys: int = 0
    gain: tuple[float, ...] = ()

    def gained(
        self, batch: Any, heads: Any, kv_heads: Any, length: Any, keys: Any, head_size: Any, value_head_size: Any
    ) -> Any:
        """Return the predicted seconds; sizes may be numbers or symbols. 0 where no gain is asked for."""
        if not self.gain:
            return 0.0
        constant, multiplied, pooled, paired = self.gain
        pairs = batch * heads * length * keys
        numbers = batch * (heads * length + kv_heads * keys) * head_size
        return constant + multiplied / 2 * (pairs * (head_size + value_head_size)) + pooled * numbers + paired * pairs

    def holds(
        self, batch: int, heads: int, kv_heads: int, length: int, keys: int, head_size: int, value_head_size: int
    ) -> bool:
        """Whether a problem of these sizes is sparse."""
        gained = self.gained(batch, heads, kv_heads, length, keys, head_size, value_head_size)
        return keys >= self.least_keys and gained >= 0


NO_LIMIT = Limit()
