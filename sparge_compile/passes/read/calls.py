"""Calls: each graph node as the ATen calls that it makes. Every spelling of an operation becomes the same handful.

A node is run once on blank fake tensors while its ATen calls are noted. Blank floats are float32 whatever the model's
dtype, so casts between floating dtypes are not seen here; dtypes are read off the graph's own nodes.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .fx_utils import value_of

logger = logging.getLogger("sparge_compile")


@dataclass(frozen=True, eq=False)
class Call:
    """One ATen call. Tensors among the arguments are :class:`Value`."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The op's name without overload, namespace, or the underscore of an in-place form."""
        name = str(self.op._schema.name).removeprefix("aten::")
        return name.rstrip("_") if self.op._schema.is_mutable else name

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self.op.tags

    @property
    def inputs(self) -> list[Value]:
        """The tensors that it reads, in order."""
        return [x for x in tree_flatten((self.args, self.kwargs))[0] if isinstance(x, Value)]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by its position or its name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor: the value of a graph node (``node``), what a call returns (``call``), or a constant (neither)."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    node: Node | None = None
    call: Call | None = None
    constant: Tensor | None = None  # the number that a tensor without dimensions is known to hold


class Calls:
    """Lowers the nodes of one graph, each at most once, when it is asked for."""

    def __init__(self, owner: GraphModule) -> None:
        self.owner = owner
        self._values: dict[Node, Any] = {}
        self._mutated: dict[Node, list[Node]] = {}
        self._random: set[Node] = set()
        self._mode: FakeTensorMode | None = None

    def value(self, node: Node) -> Value | None:
        """The result of a node in terms of its inputs, which are leaves; None where it cannot be told."""
        found = self._lower(node)
        return found if isinstance(found, Value) else None

    def mutated(self, node: Node) -> list[Node]:
        """The inputs that a node changes in place; all of them where it cannot be run."""
        if self._lower(node) is None and node not in self._mutated:
            return list(node.all_input_nodes)
        return self._mutated.get(node, [])

    def runs_quietly(self, node: Node) -> bool:
        """Whether a node is known to run, to change no input and to draw no random numbers."""
        return self._lower(node) is not None and not self._mutated.get(node) and node not in self._random

    def fake(self, node: Node) -> Any:
        """The fake tensor or number that stands on a node; a module's own tensor for what reads an attribute."""
        value = value_of(node)
        if value is None and node.op == "get_attr":
            value = self.owner
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
        return value

    def _lower(self, node: Node) -> Any:
        if node not in self._values:
            self._values[node] = self._run(node) if self._runnable(node) else None
        return self._values[node]

    def _runnable(self, node: Node) -> bool:
        if node.op == "call_module":
            module = self.owner.get_submodule(str(node.target))
            return not isinstance(module, GraphModule) and not any(True for _ in module.parameters())
        if reads_number(self.fake(node)):
            return False  # to run .item() again is to ask the shape environment for another symbol
        if node.op == "call_method":
            return True
        # What changes modes of PyTorch (autocast, grad mode, functorch levels) returns no tensor and must not be run.
        return (
            node.op == "call_function"
            and not isinstance(node.target, torch._ops.HigherOrderOperator)
            and "functorch" not in str(getattr(node.target, "__module__", ""))
            and (node.target is operator.setitem or _holds_tensor(self.fake(node)))
        )

    def _run(self, node: Node) -> Any:
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            parts = self._lower(node.args[0]) if not isinstance(self.fake(node.args[0]), Tensor) else None
            if isinstance(parts, (tuple, list)) and isinstance(node.args[1], int):
                return parts[node.args[1]]
        mode = self._mode or FakeTensorMode(shape_env=self._shape_env(node), allow_non_fake_inputs=True)
        self._mode = mode
        recorder = _Recorder()
        try:
            with mode, torch.no_grad():
                # Nodes in slices, too, which are no containers to pytree.
                args, kwargs = map_arg((node.args, node.kwargs), lambda x: self._blank(x, recorder))
                function: Any = node.target
                if node.op == "call_method":
                    function = getattr(args[0], str(node.target))
                    args = args[1:]
                elif node.op == "call_module":
                    function = self.owner.get_submodule(str(node.target))
                # Torch's own decompositions in C++ may turn symbolic sizes into numbers, and guard on them.
                symbolic = any(isinstance(size, torch.SymInt) for shape in recorder.shapes for size in shape)
                with enable_python_dispatcher() if symbolic else nullcontext(), recorder:
                    result = function(*args, **kwargs)
                value = tree_map(recorder.value_of, result)
        except Exception as error:  # whatever it is: nothing is known of this node, and what reads it stays dense
            logger.debug("cannot look into %s: %s", node.format_node(), error)
            return None
        self._mutated[node] = recorder.mutated
        if recorder.random:
            self._random.add(node)
        return value

    def _shape_env(self, node: Node) -> Any:
        for n in self.owner.graph.nodes:
            if isinstance(fake := value_of(n), FakeTensor):
                return fake.fake_mode.shape_env
        return None

    def _blank(self, node: Node, recorder: _Recorder) -> Any:
        x = self.fake(node)
        if not isinstance(x, Tensor):
            if x is None or _holds_tensor(x):
                raise ValueError(f"{node} is no tensor or number")
            return x
        dtype = torch.float32 if x.dtype.is_floating_point else x.dtype
        blank = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
        recorder.add(blank, Value(tuple(x.shape), x.dtype, x.device, node=node))
        return blank


def reads_number(x: Any) -> bool:
    """Whether what stands on a node is a number: it tells something of a tensor or of other numbers."""
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _holds_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) for y in x))


class _Recorder(TorchDispatchMode):
    """Notes which call made each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mutated: list[Node] = []
        self.random = False
        self._values: dict[int, Value] = {}
        self.shapes: list[tuple[Any, ...]] = []  # of the inputs
        self._alive: list[Tensor] = []  # an id is only good for as long as its tensor lives
        self._storages: dict[int, Node] = {}

    def add(self, tensor: Tensor, value: Value) -> None:
        self._alive.append(tensor)
        self._values[id(tensor)] = value
        if value.node is not None:
            self.shapes.append(value.shape)
            self._storages[tensor.untyped_storage()._cdata] = value.node

    def value_of(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._values:
            self.add(x, Value(tuple(x.shape), x.dtype, x.device, constant=_constant(x)))
        return self._values[id(x)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not any(isinstance(x, Tensor) for x in results):
            return result
        call = Call(func, *tree_map(self.value_of, (tuple(args), dict(kwargs))))
        self.random |= call.random
        for argument, given in _written(func, args, kwargs):
            if argument and isinstance(given, Tensor):
                node = self._storages.get(given.untyped_storage()._cdata)
                self.mutated += [node] if node is not None else []
        for x in results:
            if isinstance(x, Tensor):
                self.add(x, Value(tuple(x.shape), x.dtype, x.device, call=call, constant=_constant(x)))
        return result


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[bool, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        yield argument.alias_info is not None and argument.alias_info.is_write, given


def _constant(x: Tensor) -> Tensor | None:
    """The number that a fake tensor without dimensions carries, where it was made from a Python number."""
    constant = getattr(x, "constant", None)
    return constant if x.dim() == 0 else None
