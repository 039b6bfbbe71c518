"""Kept tokens: what a user says of them, and the four numbers by which it travels beside a head's thresholds.

The key blocks of kept tokens are always read and do not count against the thresholds; the query blocks of dense rows
read every visible block (docs/design.md, The rule). Thresholds [H, 6] hold for each head (topk, topp, key_start,
key_stop, query_start, query_stop): ranges of tokens of each sequence, of which negative positions count from its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .errors import type_error, value_error

TEXT = "text"  # the tokens that the graph puts beside a longer part of the sequence

PLAIN_WIDTH, WIDTH = 2, 6  # numbers of a head: its thresholds, and these with two ranges
LAST = 1 << 24  # positions are float32, which count up to here
END = float(LAST)  # a stop behind every token
OF_GRAPH = float(LAST << 1)  # a start that says: the range that was found in the graph

Range = tuple[float, float]
NONE: Range = (0.0, 0.0)


class Kept(NamedTuple):
    """What is kept of a site's tokens: ``keys`` is None, (start, stop) with None for the end, or ``"text"``."""

    keys: tuple[int, int | None] | str | None = None
    dense_queries: bool = False

    @property
    def of_graph(self) -> bool:
        """Whether the graph says which tokens these are."""
        return self.keys == TEXT

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """The two ranges, as thresholds [H, 6] hold them."""
        if self.keys is None:
            return (*NONE, *NONE)
        start, stop = (OF_GRAPH, OF_GRAPH) if isinstance(self.keys, str) else self.keys
        tokens = (float(start), END if stop is None else float(stop))
        return (*tokens, *(tokens if self.dense_queries else NONE))

    def tokens(self, length: int, parts: Sequence[int] = ()) -> tuple[int, int]:
        """(start, stop) of the tokens in a sequence of this length, put together of these parts."""
        if self.keys is None or isinstance(self.keys, str):
            return beside_longest(parts) if self.of_graph else (0, 0)
        start, stop = (length if x is None else x + length if x < 0 else x for x in self.keys)
        start, stop = max(0, start), min(stop, length)
        return (start, stop) if start < stop else (0, 0)

    @staticmethod
    def of(numbers: Sequence[float]) -> Kept:
        """What four numbers of thresholds [H, 6] say."""
        start, stop, *queries = numbers
        if (start, stop) == NONE:
            return NOTHING
        keys: Any = TEXT if start == OF_GRAPH else (int(start), None if stop >= END else int(stop))
        return Kept(keys, tuple(queries) != NONE)

    def __str__(self) -> str:
        """What is kept, in words."""
        if self.keys is None:
            return "nothing"
        if isinstance(self.keys, str):
            tokens = self.keys
        else:
            start, stop = self.keys
            tokens = f"tokens {start}:{'' if stop is None else stop}"
        return f"{tokens} with dense queries" if self.dense_queries else tokens


NOTHING = Kept()

_ALLOWED = f'None, n (the first n tokens), -n (the last n), (start, stop), or "{TEXT}"'


def parse_kept(keep_keys: Any, dense_queries: Any, where: str) -> Kept:
    """What ``keep_keys`` and ``dense_queries`` mean.

    Raises:
        TypeError: one of them has another type. ValueError: a range that holds no token in any sequence, a position
            that is out of range, or dense queries of no tokens. The messages begin with ``where``.
    """
    if not isinstance(dense_queries, bool):
        raise type_error(
            f"{where}: dense_queries has the wrong type",
            given=repr(dense_queries),
            allowed="True or False",
            todo="True keeps every visible key block for the query rows of the kept tokens.",
        )
    if keep_keys is None:
        if dense_queries:
            raise value_error(
                f"{where}: dense_queries without kept keys",
                given="dense_queries=True, keep_keys=None",
                allowed="dense_queries beside keep_keys: it means the query rows of these tokens",
                todo=f"Give keep_keys as well: {_ALLOWED}.",
            )
        return NOTHING
    if isinstance(keep_keys, str) and keep_keys == TEXT:
        return Kept(TEXT, dense_queries)
    tokens = _tokens(keep_keys)
    if tokens is None:
        refuse = value_error if isinstance(keep_keys, str) else type_error
        raise refuse(f"{where}: keep_keys cannot be read", given=repr(keep_keys), allowed=_ALLOWED, todo=_TODO)
    start, stop = tokens
    same_side = stop is not None and (start < 0) == (stop < 0)
    if (same_side and stop <= start) or max(abs(start), abs(stop or 0)) > LAST:  # type: ignore[operator]
        raise value_error(
            f"{where}: keep_keys holds no token",
            given=repr(keep_keys),
            allowed=f"start before stop, and positions up to {LAST}",
            todo=_TODO,
        )
    return Kept(tokens, dense_queries)


_TODO = "keep_keys=512 keeps the first 512 tokens, -512 the last, (512, 1024) those between; leave it out for none."


def _tokens(keep_keys: Any) -> tuple[int, int | None] | None:
    """(start, stop) of a number or a pair; None where it is neither."""
    if type(keep_keys) is int:
        return (0, keep_keys) if keep_keys >= 0 else (keep_keys, None)
    if isinstance(keep_keys, (tuple, list)) and len(keep_keys) == 2:
        start, stop = keep_keys
        if type(start) is int and (stop is None or type(stop) is int):
            return start, stop
    return None


def beside_longest(parts: Sequence[int] | None) -> tuple[int, int]:
    """The range of the tokens of a sequence, put together of ``parts``, that are not of its longest part.

    Empty where no part is the longest, and where tokens stand on both sides of it.
    """
    if not parts or sorted(parts)[-1:] == sorted(parts)[-2:-1]:
        return 0, 0
    longest = max(range(len(parts)), key=parts.__getitem__)
    first, last = sum(parts[:longest]), sum(parts[longest + 1 :])
    whole = sum(parts)
    if bool(first) == bool(last):
        return 0, 0
    return (0, first) if first else (whole - last, whole)
