"""The numbers of a module's sites, over all the graphs that its forward falls into.

A graph break, or the splitter of DDP, parts a forward into several graphs. Each goes on counting where those before it
ended: graphs are before one another in the order in which they were first compiled. A graph that is compiled anew, for
other sizes, has the numbers that it had.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch.fx import Node
from torch.nn import Module

from .stack import Call, calls_in_module, forward_code, plain_name

_TRACE = re.compile(r'File "(.*)", line \d+, in (.*)')


@dataclass(frozen=True)
class Part:
    """A part of a module's forward that is a graph: the function, or what of it follows a break, and who calls it.

    ``tensors`` are the names of the parameters that the graph reads: they tell the turns of a loop from each other.
    """

    function: str
    calls: tuple[Call, ...]
    tensors: frozenset[str] = frozenset()

    def is_same(self, other: Part) -> bool:
        """Whether two graphs are one part of a module, compiled twice."""
        shared = not self.tensors.isdisjoint(other.tensors) or not (self.tensors and other.tensors)
        return self.function == other.function and self.calls == other.calls and shared

    def now(self) -> Part:
        """The part that is compiled or run now: the same function may be called from several places."""
        return replace(self, calls=_callers(self.function)) if self.calls else self


BEGINNING = Part("", ())  # the forward itself, from its first line on

_sizes: WeakKeyDictionary[Module, dict[Part, int]] = WeakKeyDictionary()
_seen: WeakKeyDictionary[object, Counter[str]] = WeakKeyDictionary()


def part_of(node: Node, module: Module | None, tensors: frozenset[str]) -> Part:
    """The part of a module's forward in which a node of Dynamo's graph stands; for use while the graph is compiled."""
    trace = _TRACE.findall(node.meta.get("stack_trace") or "")
    forward = forward_code(module)
    if node.meta.get("nn_module_stack") or not trace or forward is None:
        return BEGINNING
    if (forward.co_filename, forward.co_name) in trace:
        return BEGINNING
    function = trace[0][1]
    return Part(function, _callers(function), tensors)


def _callers(function: str) -> tuple[Call, ...]:
    """The calls that led to a function. It is on the stack itself when it runs, and when it goes on behind a break."""
    calls = calls_in_module()
    return tuple(calls[:-1] if calls and calls[-1].function == plain_name(function) else calls)


def start_of(module: Module | None, part: Part, size: int) -> int:
    """The number of the first site of a part of a module: how many the parts before it have. It has ``size``."""
    if module is None:
        return 0
    sizes = _sizes.setdefault(module, {})
    known = next((known for known in sizes if known.is_same(part)), part)
    sizes[known] = size
    before = list(sizes)
    return sum(sizes[each] for each in before[: before.index(known)])


def sites_before() -> Counter[str]:
    """The number of sites by module in the graphs that were cut out of the same frame before; to be counted on.

    Dynamo has one context for each frame that it traces, also where DDP compiles its graph in pieces.
    """
    context = torch._guards.TracingContext.try_get()
    return Counter() if context is None else _seen.setdefault(context, Counter())
