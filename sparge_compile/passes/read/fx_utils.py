"""Small tools on FX graphs: values behind nodes, arguments by name, new graph inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node


def value_of(node: Any) -> Any:
    """The fake tensor or number that tracing left on a node, or None. Whatever is not a node stands for itself."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def asserts_metadata(node: Node) -> bool:
    """Whether a node asserts the dtype and device of a tensor, as torch.export does before casts, and reads no more."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def bind(signature: inspect.Signature, node: Node) -> Mapping[str, Any]:
    """A call's arguments by name, with defaults filled in."""
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a Python function, to be given to :func:`bind`."""
    return inspect.signature(function)


@contextmanager
def without_guards(graph_module: GraphModule) -> Iterator[None]:
    """Leave the shape environment of a graph as it is: nothing that is asked of sizes meanwhile becomes a guard.

    What tracing has guarded already is known anyway; what it has not is no condition of the model, and must become none
    because somebody looked. Whoever compiles the graph afterwards guards what the nodes that are in it then need.
    """
    with ExitStack() as stack:
        for environment in _shape_environments(graph_module):
            stack.enter_context(environment.suppress_guards())
            stack.enter_context(environment.ignore_fresh_unbacked_symbols())
        yield


def _shape_environments(graph_module: GraphModule) -> list[Any]:
    found: dict[int, Any] = {}
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            value = value_of(node)
            if isinstance(value, FakeTensor):
                environment = value.fake_mode.shape_env
            else:
                environment = value.node.shape_env if isinstance(value, torch.SymInt) else None
            if environment is not None:
                found[id(environment)] = environment
    return list(found.values())


def size_hint(size: Any) -> int | None:
    """The size that was traced with, without a guard on it; None for a size that depends on data."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return None if hint is None else int(hint)
    return int(size)


def as_number(size: Any) -> Any:
    """A size, as an int where its symbols cancel out."""
    constant = isinstance(size, torch.SymInt) and size.node.expr.is_number
    return int(size) if constant else size


def size_text(size: Any) -> int | str:
    """An int, or a symbolic size as text."""
    return str(size) if isinstance(size, torch.SymInt) else int(size)


def submodule_of(node: Any, owner: GraphModule) -> GraphModule | None:
    """The graph module that a get_attr node names, if it is one."""
    if isinstance(node, Node) and node.op == "get_attr":
        try:
            target = owner.get_submodule(str(node.target))
        except AttributeError:
            return None
        return target if isinstance(target, GraphModule) else None
    return None


def calls_of(owner: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """The calls of a graph, and of the graphs that its higher-order operators run, in order; with the graph of each."""
    for node in owner.graph.nodes:
        if node.op != "call_function":
            continue
        yield owner, node
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for argument in node.all_input_nodes:
                nested = submodule_of(argument, owner)
                if nested is not None:
                    yield from calls_of(nested)


def clone(graph_module: GraphModule) -> GraphModule:
    """A copy of a graph and of the graphs nested in it; parameters and other tensors are shared.

    Dynamo goes on reading the inputs of the graph that it gave to a backend, so new inputs may only enter a copy.
    """
    copies: dict[Node, Node] = {}
    graph = torch.fx.Graph()
    output = graph.graph_copy(graph_module.graph, copies)
    (end,) = graph_module.graph.find_nodes(op="output")
    graph.output(output, type_expr=end.type)
    graph._codegen = copy.copy(graph_module.graph._codegen)
    new = GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
    for name, value in graph_module.__dict__.items():
        new.__dict__.setdefault(name, value)  # what Dynamo noted on the module
    new.meta = dict(graph_module.meta)
    for old, copied in copies.items():
        copied.name = old.name  # a copy would not be named as a Python builtin (input, id), as export names inputs
        if old.op == "placeholder":
            copied.meta.pop("grapharg", None)  # it holds the user's tensors
            if hasattr(old, "_dynamo_source"):
                copied._dynamo_source = old._dynamo_source
        elif old.op == "get_attr" and (nested := submodule_of(old, graph_module)) is not None:
            new.add_submodule(str(old.target), clone(nested))
    return new


def add_input(graph_module: GraphModule, name: str, value: Any) -> Node:
    """A new last input of a graph. ``value`` is the (fake) tensor that it stands for."""
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    after = placeholders[-1] if placeholders else graph._root
    taken = {str(node.target) for node in placeholders}
    number = next(i for i in count(len(placeholders)) if f"{name}_{i}" not in taken)
    with graph.inserting_after(after):
        node = graph.placeholder(f"{name}_{number}")
    if placeholders and placeholders[-1].args:  # after an input with a default, Python wants one
        node.args = (None,)
    # Under the keys of the other inputs: Inductor's cpp_wrapper takes a graph with "val" on one input for an exported
    # one, and then looks for it on all.
    node.meta["example_value"] = value
    if not placeholders or "val" in placeholders[-1].meta:
        node.meta["val"] = value
    # AOTAutograd asks every input of a Dynamo graph for the user variable it came from; this one came from none.
    node._dynamo_source = None
    return node
