"""The part of a graph that runs in the order of blocks, so that the sites in it gather nothing: a minimum cut.

Where two that disagree about the order meet, rows are gathered: which costs as many bytes as the tensor has, once for
all who read it. The gathers that cost least in sum are a minimum cut between the sites and what needs the order of the
tokens. The graph is only read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from torch.fx import Node

from .cut import NEVER, Cut
from .graphs import Gather, cost_of, maker
from .spread import BLOCKS, TOKENS, Spread


def gathers_of(spread: Spread) -> list[Gather] | None:
    """The gathers that cost least; None where something would have to be in both orders."""
    cut = Cut(BLOCKS, TOKENS)
    for actor, end in spread.ends.items():
        cut.join(actor, end, NEVER, NEVER)
    for one, other in spread.alike:
        cut.join(one, other, NEVER, NEVER)
    for value in spread.places:
        _join_readers(cut, value, spread)
    inside = cut.near_source()
    is_torn = spread.is_torn or any((actor in inside) is not (end is BLOCKS) for actor, end in spread.ends.items())
    is_torn |= any((one in inside) is not (other in inside) for one, other in spread.alike)
    return None if is_torn else [gather for value in spread.places for gather in _gathered(value, spread, inside)]


def _join_readers(cut: Cut, value: Node, spread: Spread) -> None:
    """Edges between who makes a tensor and who reads it, that cost what a gather of it does."""
    size = cost_of(value)
    readers = [*spread.readers[value], *[TOKENS] * bool(spread.in_tokens[value])]
    if len(readers) == 1 or not _is_shared(value, spread):
        for reader in readers:
            cut.join(maker(value), reader, size, size)
        return
    out, into = ("out", value), ("into", value)
    cut.join(maker(value), out, size)
    cut.join(into, maker(value), size)
    for reader in readers:
        cut.join(out, reader, NEVER)
        cut.join(reader, into, NEVER)


def _gathered(value: Node, spread: Spread, inside: set[Hashable]) -> Iterator[Gather]:
    is_inside = maker(value) in inside
    uses = [use for actor, use in spread.readers[value].items() if (actor in inside) != is_inside]
    uses += spread.in_tokens[value] if is_inside else []
    if uses:
        yield Gather(value, spread.places[value], not is_inside, tuple(uses), _is_shared(value, spread))


def _is_shared(value: Node, spread: Spread) -> bool:
    """Whether one gather serves all readers: not of what is written to, nor across a change of the gradient mode."""
    if spread.graphs.writers(value):
        return False
    return spread.order.is_known(value) or not spread.graphs.changes_modes(value.graph)
