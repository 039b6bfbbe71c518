"""A graph with those nested in it, as they are read here, and the words for it: sites, uses, places, gathers."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..match.carried import Origin, Rows
from ..match.scope import Scope, runs_once
from ..read.axes import same
from ..read.fx_utils import as_number, size_hint, value_of
from ..read.reader import Reader

LAUNCH = 1 << 20  # bytes that are gathered in the time of a launch


class Use(NamedTuple):
    """Where a node reads a tensor: in its arguments at these positions or of these names; None: in all of them.

    Of the end of a graph, the positions of its results.
    """

    node: Node
    places: tuple[int | str, ...] | None = None


class Place(NamedTuple):
    """Where a tensor has the tokens of an order: along which dimension, and which of them is the first there."""

    dim: int
    start: Any = 0

    def before(self, origin: Origin) -> Place:
        """The place in what a tensor with its tokens here is made of."""
        return Place(origin.dim, as_number(self.start - origin.shift))

    def after(self, origin: Origin, dim: int) -> Place:
        """The place in what is made of a tensor with its tokens here."""
        return Place(dim, as_number(self.start + origin.shift))

    def equals(self, other: Place) -> bool:
        """Whether two places are the same for certain."""
        return self.dim == other.dim and same(self.start, other.start)


class Gather(NamedTuple):
    """A tensor that is gathered along its tokens for those who read it so: into the order of blocks, or out of it.

    ``shared``: one gather behind the tensor serves all; else each has its own, which sees what was written until then.
    """

    value: Node
    place: Place
    into: bool
    uses: tuple[Use, ...]
    shared: bool

    @property
    def times(self) -> int:
        """How often it is gathered."""
        return 1 if self.shared else len(self.uses)

    @property
    def cost(self) -> int:
        """What that takes, in bytes."""
        return cost_of(self.value) * self.times


class Site(NamedTuple):
    """A node that attends in an order, that of its queries and its result, that of its keys and values, or both."""

    node: Node
    queries: bool
    keys: bool

    @property
    def gathered(self) -> list[Any]:
        """The tensors that it gathers by itself."""
        query, key, value = self.node.args[:3]
        return [*[query, self.node] * self.queries, *[key, value] * self.keys]

    @property
    def cost(self) -> int:
        """What that takes, in bytes."""
        return sum(map(cost_of, self.gathered))


class Graphs:
    """A graph and those that it runs once, which are read together."""

    def __init__(self, root: GraphModule) -> None:
        scopes = list(Scope(Reader(root)).below())
        self.scopes: dict[Graph, Scope] = {scope.reader.owner.graph: scope for scope in scopes}
        self._rows = {graph: Rows(scope.reader) for graph, scope in self.scopes.items()}

    def rows(self, node: Node) -> Rows:
        """What tells of which rows a node's are made."""
        return self._rows[node.graph]

    def fake(self, node: Any) -> Any:
        """What stands on a node."""
        return self.scopes[node.graph].reader.fake(node)

    def rank(self, node: Any) -> int:
        """The number of dimensions of a node's tensor; 0 where it holds none."""
        fake = self.fake(node)
        return fake.dim() if isinstance(fake, Tensor) else 0

    def writers(self, value: Node) -> list[Node]:
        """The nodes that write to a tensor."""
        return [node for node in self.scopes[value.graph].reader.writers(value) if not self._only_reads(node)]

    def changes_modes(self, graph: Graph) -> bool:
        """Whether gradients are switched on or off in a graph."""
        names = (str(getattr(node.target, "__name__", "")) for node in graph.nodes if node.op == "call_function")
        return any("grad_enabled" in name or "inference_mode" in name for name in names)

    def inside(self, call: Node) -> Scope | None:
        """The graph that a call runs once."""
        scope = self.scopes[call.graph].nested(call) if call.op == "call_function" and runs_once(call) else None
        return scope if scope is not None and scope.reader.owner.graph in self.scopes else None

    def _only_reads(self, call: Node) -> bool:
        """Whether a call runs a graph that writes to none of its inputs."""
        scope = self.inside(call)
        inputs = [] if scope is None else scope.reader.owner.graph.find_nodes(op="placeholder")
        return scope is not None and not any(map(self.writers, inputs))


def cost_of(value: Any) -> int:
    """What it takes to gather a node's tensor, as it was traced: its bytes, and as many as the launch of a kernel."""
    fake = value_of(value)
    size = int(fake.element_size())
    for x in fake.shape:
        size *= size_hint(x) or 0
    return size + LAUNCH


def maker(value: Node) -> Node:
    """The node that computes a value: of one of several results, the call that gives them all."""
    source = value.args[0] if value.target is operator.getitem else None
    if not isinstance(source, Node) or runs_once(source):
        return value
    return source if isinstance(value_of(source), (tuple, list)) else value
