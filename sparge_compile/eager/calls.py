"""A call of attention in eager code as a graph of one node, so that it is read, decided and rewritten as graphs are."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule, Node

from .. import ops
from ..report import Reason
from .functions import Function

_CONSTANTS = (bool, int, float, str, type(None))
_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_NUMBERS = {"scale", "softmax_scale", "sm_scale"}  # of which a tensor is read on the host
# Arguments that ask for more than the output.
_RETURNS_MORE = {"return_attn_probs", "return_lse", "return_softmax_lse", "return_softmax"}


@dataclass(frozen=True)
class Call:
    """A call: the function, the arguments of its target, and the tensors among them, in order."""

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: tuple[Any, ...] = ()  # the arguments as they were given

    @classmethod
    def of(cls, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return the call of a function.

        Raises:
            TypeError: it is none that the function takes.
        """
        return cls(function, *function.arguments(args, kwargs), (*args, *kwargs.values()))

    @cached_property
    def named(self) -> list[tuple[str, Any]]:
        """The arguments with their names, or numbers where they have none."""
        return [*((f"argument {i}", x) for i, x in enumerate(self.args)), *self.kwargs.items()]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, each once, in order."""
        return list({id(x): x for _, x in self.named if isinstance(x, Tensor)}.values())

    @property
    def places(self) -> list[int] | None:
        """Which of the given arguments the tensors are; None where they are made of these."""
        places = {id(x): n for n, x in enumerate(self.given)}
        return [places[id(x)] for x in self.tensors] if all(id(x) in places for x in self.tensors) else None

    @property
    def is_autocast(self) -> bool:
        """Whether autocast is on where the tensors are."""
        return _autocast(self.tensors) is not None

    @property
    def refusal(self) -> tuple[Reason, str] | None:
        """Why it cannot be a graph; None where it can."""
        for name, x in self.named:
            if isinstance(x, Tensor) and x.is_nested:
                return Reason.NESTED, ""
            is_tensor = isinstance(x, Tensor) and name not in _NUMBERS
            plain = type(x) in _TENSORS and x.layout is torch.strided if is_tensor else _is_constant(x)
            if not plain:
                return Reason.ARGUMENT, f"{name} is a {type(x).__name__}"
        return (Reason.TRANSFORM, "") if _is_transformed() else None

    @property
    def key(self) -> tuple[Any, ...]:
        """What two calls have in common that are one graph."""
        numbers = {id(x): i for i, x in enumerate(self.tensors)}
        named = ((name, numbers.get(id(x)), _describe(x)) for name, x in self.named)
        return (self.function, _autocast(self.tensors), *named)

    def graph(self) -> GraphModule:
        """The call as a graph; its inputs are the tensors, with fake ones for their values."""
        graph, mode = Graph(), FakeTensorMode()
        inputs = {}
        for i, x in enumerate(self.tensors):
            with mode, torch.inference_mode(False):
                value = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            inputs[id(x)] = _noted(graph.placeholder(f"x{i}"), value.requires_grad_(x.requires_grad))
        args = tuple(inputs.get(id(x), x) for x in self.args)
        kwargs = {name: inputs.get(id(x), x) for name, x in self.kwargs.items()}
        node = graph.call_function(self.function.target, args, kwargs)
        with mode:
            value = self._result([_value(x) for x in args], {name: _value(x) for name, x in kwargs.items()})
        _noted(node, value)
        graph.output(_parts(graph, node, value) if isinstance(value, tuple) else node)
        return GraphModule({}, graph)

    def _result(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result in fake tensors: of a function of torch by calling it, of others as they promise."""
        parameters = self.function.parameters
        if self.function.dialect is None:
            return self.function.target(*args, **kwargs)
        query, value = (next(kwargs[n] for n in names if n in kwargs) for names in (("q", "query"), ("v", "value")))
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        asked = any(kwargs.get(name) for name in _RETURNS_MORE)
        # FlashAttention 3 gave the log-sum-exp always, before one could ask for it.
        always = self.function.dialect.kind == "flash_attn" and not _RETURNS_MORE & set(parameters)
        return (out, query.new_empty(query.shape[:-1], dtype=torch.float32)) if asked or always else out


def form_of(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What calls have in common that are alike, by what is quickly looked at; None for one that wants a closer look.

    Two calls of one form are of one :attr:`Call.key`, and neither is refused if the other is not.
    """
    form: list[Any] = [function, *kwargs]
    tensors: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        kind = type(x)
        if kind in _TENSORS:
            if x.is_nested:
                return None
            form += (x.shape, x.dtype, x.device, x.requires_grad, x.layout)
            tensors.append(x)
        elif kind in _CONSTANTS:
            form += (kind, x)
        elif kind is tuple and all(type(each) is int for each in x):  # a window
            form.append(x)
        else:
            return None
    if not tensors or torch._C._len_torch_dispatch_stack() or _is_transformed():
        return None
    form.append(_autocast(tensors))
    ids = [id(x) for x in tensors]
    return (*form, *map(ids.index, ids)) if len(set(ids)) < len(ids) else tuple(form)


def call_past_the_dispatcher(graph_module: GraphModule) -> None:
    """Have a graph call what the op of an attention is made of, where autocast has nothing to say of it."""
    op = torch.ops.sparge.attention.default
    for node in graph_module.graph.find_nodes(op="call_function", target=op):
        given = dict(zip((x.name for x in op._schema.arguments), node.args, strict=False)) | node.kwargs
        node.args = tuple(given.get(x.name, x.default_value) for x in op._schema.arguments)
        node.kwargs, node.target = {}, ops.attention
    graph_module.recompile()


_level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)


def _is_transformed() -> bool:
    """Whether torch.func transforms what runs, or forward-mode derivatives are taken of it."""
    return _level() is not None or ops.in_forward_mode()


def unseen() -> AbstractContextManager[Any]:
    """Where calls are read: a checkpoint must not count what that saves for a backward as the forward's."""
    is_enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)
    return saved_tensors_hooks(lambda x: x, lambda x: x) if is_enabled() else nullcontext()


def _noted(node: Node, value: Any) -> Node:
    node.meta |= {"val": value, "example_value": value}
    return node


def _parts(graph: Graph, node: Node, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a call that gives several, each with a node. A tensor of size 0 is how kernels in C++ say None."""
    is_none = [x is None or x.shape == (0,) for x in values]
    return tuple(
        None if none else _noted(graph.call_function(operator.getitem, (node, i)), x)
        for i, (x, none) in enumerate(zip(values, is_none, strict=True))
    )


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, Node) else x


def _is_constant(x: Any) -> bool:
    return all(map(_is_constant, x)) if isinstance(x, (tuple, list)) else type(x) in _CONSTANTS


def _describe(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, x.requires_grad
    return tuple(x) if isinstance(x, list) else (type(x), x)


def _autocast(tensors: list[Tensor]) -> torch.dtype | None:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
