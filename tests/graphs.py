"""Graphs of a few nodes, built by hand: each node gets the fake value that tracing would leave on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg

from sparge_compile.passes.read.calls import Value
from sparge_compile.passes.read.fx_utils import value_of
from sparge_compile.passes.read.reader import Reader

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Builder:
    """One graph in the making. A graph nested in another is built with ``of=`` the outer one, in its fake mode."""

    def __init__(self, of: Builder | None = None) -> None:
        self.graph = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.mode = of.mode if of is not None else FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.stack: dict[str, Any] = {}

    def input(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        dynamic: tuple[int, ...] = (),
        requires_grad: bool = False,
        device: str = "cpu",
    ) -> Node:
        """A graph input; the dimensions ``dynamic`` have symbols of their own as sizes."""
        sizes = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(len(shape))]
        real = torch.empty(shape, dtype=dtype, device="meta")
        if dynamic:
            context = StatelessSymbolicContext(dynamic_sizes=sizes)
            fake = self.mode.from_tensor(real, source=ConstantSource(name), symbolic_context=context)
            with self.mode:
                fake = torch.empty_strided(fake.shape, fake.stride(), dtype=dtype, device=device)
        else:
            with self.mode:
                fake = torch.empty(shape, dtype=dtype, device=device)
        return self._note(self.graph.placeholder(name), fake.requires_grad_(requires_grad))

    def qkv(
        self,
        batch: int = 1,
        heads: int = 2,
        length: int = 6,
        keys: int = 10,
        head_size: int = 4,
        *,
        kv_heads: int | None = None,
        value_size: int | None = None,
        **options: Any,
    ) -> tuple[Node, Node, Node]:
        """Three inputs: q [B, H, L, D], k [B, Hk, S, D], v [B, Hk, S, Dv]."""
        kv_heads = heads if kv_heads is None else kv_heads
        return (
            self.input("q", batch, heads, length, head_size, **options),
            self.input("k", batch, kv_heads, keys, head_size, **options),
            self.input("v", batch, kv_heads, keys, value_size or head_size, **options),
        )

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of a function; its value is what the function gives for the fake values of its arguments."""
        return self._note(self.graph.call_function(function, args, kwargs), self._run(function, args, kwargs))

    def method(self, name: str, x: Node, *args: Any, **kwargs: Any) -> Node:
        """A call of a tensor's method."""
        value = self._run(getattr(Tensor, name), (x, *args), kwargs)
        return self._note(self.graph.call_method(name, (x, *args), kwargs), value)

    def module_call(self, name: str, module: torch.nn.Module, *args: Any) -> Node:
        """A call of a module, which the graph's owner holds under ``name``."""
        self.root.add_module(name, module)
        return self._note(self.graph.call_module(name, args), self._run(module, args, {}))

    def attribute(self, name: str, value: Any) -> Node:
        """A read of an attribute of the graph's owner: a tensor or a nested graph. It carries no value."""
        setattr(self.root, name, value)
        return self._note(self.graph.get_attr(name), None)

    def nested(self, operator: Any, body: GraphModule, *args: Node, name: str = "body") -> Node:
        """A call of a higher-order operator that runs a graph; the value is a tuple, like the graph's own output."""
        attribute = self.attribute(name, body)
        (end,) = body.graph.find_nodes(op="output")
        value = tuple(value_of(x) for x in end.args[0])
        return self._note(self.graph.call_function(operator, (attribute, *args)), value)

    def opaque(self, function: Any, *args: Any, value: Any = None) -> Node:
        """A call that is not run; its value is given."""
        return self._note(self.graph.call_function(function, args), value)

    def output(self, *nodes: Node) -> Node:
        """End the graph: it returns a tuple."""
        return self.graph.output(tuple(nodes))

    @contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """Nodes that are made meanwhile stand in the module with this path."""
        before, self.stack = self.stack, {**self.stack, path: (path, torch.nn.Module)}
        try:
            yield
        finally:
            self.stack = before

    def module(self, *outputs: Node) -> GraphModule:
        """The graph as a module; ``outputs`` end it first, where some are given."""
        if outputs:
            self.output(*outputs)
        self.graph.lint()
        return GraphModule(self.root, self.graph)

    def reader(self, *outputs: Node) -> Reader:
        """A reader of the finished graph."""
        return Reader(self.module(*outputs))

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        values = map_arg((args, kwargs), value_of)
        with self.mode, enable_python_dispatcher():  # as Dynamo runs a call
            return function(*values[0], **values[1])

    def _note(self, node: Node, value: Any) -> Node:
        if value is not None:
            node.meta["example_value"] = value
        if self.stack:
            node.meta["nn_module_stack"] = dict(self.stack)
        return node


def leaf(node: Node) -> Value:
    """A node's tensor, as a value that some other node reads."""
    fake = value_of(node)
    return Value(tuple(fake.shape), fake.dtype, fake.device, node=node)


def end_of(reader: Reader) -> Node:
    """The output node of a reader's graph: what reads last."""
    return reader.owner.graph.find_nodes(op="output")[0]


def targets(graph_module: GraphModule) -> list[Any]:
    """The targets of a graph's calls, in order."""
    return [node.target for node in graph_module.graph.nodes if node.op.startswith("call")]


def written_out(b: Builder, q: Node, k: Node, v: Node, scale: float | None = 0.5) -> Node:
    """softmax(scale · q kᵀ) v, in the words of torch."""
    scores = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    scores = scores if scale is None else b.call(torch.mul, scores, scale)
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)
