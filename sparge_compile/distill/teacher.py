"""The teacher of a distillation: a frozen model that gives what dense attention gives, compiled as the student is.

In: a module, or the student itself with its adapters off; a call's arguments. Out: what it returns, and the attention
outputs of the sites that are asked for. Losses live in :mod:`.hook`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module

from ..errors import explain_error
from ..inner import compile_graph
from ..options import Options
from ..passes.pipeline import check, erase_markers, return_dense, run
from ..running.graph import open_graph
from ..running.listeners import Listener, Outlet, heard_by, with_outlet
from ..running.observe import uncompiled
from ..running.places import Names
from ..user_model import unwrapped, user_model

_OFF = "_disable_adapters"  # how layers of PEFT say that their adapters are switched off


class Teacher:
    """A frozen dense model. Its parameters take no gradients, and it is in evaluation mode while it runs.

    Args:
        module: the model; with ``is_student`` the student's own, whose adapters are switched off while it runs.
        compiled: compile it as the student is; else it is called as it is.
        blocks: the names of the modules that are compiled on their own; none: it is compiled as a whole.
    """

    def __init__(self, module: Module, *, is_student: bool, compiled: bool, blocks: Sequence[str] = ()) -> None:
        self.module = module
        self.is_student = is_student
        self._compiled = compiled
        names = dict(unwrapped(module).named_modules())
        self._blocks: list[Any] = [user_model(names[name]) for name in blocks] if set(blocks) <= set(names) else []
        self._backend: _Dense | None = None
        self._run: Callable[..., Any] = module
        self._run_blocks: list[tuple[Any, Callable[..., Any]]] = []
        if not is_student:
            unwrapped(module).requires_grad_(False)

    def __call__(
        self, args: Sequence[Any], kwargs: dict[str, Any], options: Options, sites: frozenset[str], listener: Listener
    ) -> Any:
        """What it gives for a call's arguments. ``listener`` hears of the outputs of ``sites``, if there are any.

        ``options`` are the student's: who compiles, and how.
        """
        base = unwrapped(self.module)
        if self._compiled and (self._backend is None or not self._backend.fits(options, sites)):
            self._compile(_Dense(options, sites, Names(base)))
        with torch.no_grad(), _in_evaluation(base), _adapters_off(base, self.is_student), heard_by(listener):
            if not self._compiled:
                return self._run(*args, **kwargs)
            with self._compiled_blocks(base):
                return self._run(*args, **kwargs)

    def _compile(self, backend: _Dense) -> None:
        self._backend = backend
        self._run_blocks = [(block, torch.compile(block._call_impl, backend=backend)) for block in self._blocks]
        if not self._blocks:
            self._run = torch.compile(user_model(self.module), backend=backend)

    @contextmanager
    def _compiled_blocks(self, base: Module) -> Iterator[None]:
        """What is compiled in it runs as a teacher's, whatever it was compiled for."""
        with uncompiled(base):
            try:
                for block, call in self._run_blocks:
                    block._compiled_call_impl = call
                yield
            finally:
                for block, _ in self._run_blocks:
                    block._compiled_call_impl = None

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Its frozen tensors by name, without adapters where it is the student."""
        base = unwrapped(self.module)
        adapters = {id(p) for p in _adapter_parameters(base)} if self.is_student else set()
        return [(name, p) for name, p in base.named_parameters() if id(p) not in adapters]

    def checksum(self) -> str:
        """A number over the bits of all its parameters, the same for any sharding. All ranks ask for it together."""
        total = 0
        for number, (_, parameter) in enumerate(self.parameters(), 1):
            values: Any = parameter.detach()
            if hasattr(values, "full_tensor"):  # a DTensor
                values = values.full_tensor()
            bits = values.contiguous().view(-1).view(torch.uint8)
            total += number * int(bits.to(torch.int64).sum()) + int(bits[:: values.element_size()].sum())
        return f"{total:x}"


class _Dense:
    """Dynamo backend of a teacher: graphs stay as they are, and return the outputs of some sites as well."""

    def __init__(self, options: Options, sites: frozenset[str], names: Names) -> None:
        self._options = options
        self._sites = sites
        self._names = names

    def fits(self, options: Options, sites: frozenset[str]) -> bool:
        same = ("inner", "inductor", "inductor_mode")
        return sites <= self._sites and all(getattr(options, x) == getattr(self._options, x) for x in same)

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = open_graph(graph_module, self._names)
        wanted = [match for match in graph.matches if match.attention is not None and match.site.name in self._sites]
        run(graph, partial(return_dense, matches=wanted), erase_markers, check)
        outlet = Outlet(self._options, [graph.slots[match.node] for match in wanted], bool(wanted), self._names)
        return with_outlet(compile_graph(graph.graph_module, example_inputs, self._options), outlet)


def copy_of(student: Module) -> Module:
    """A dense copy of a student's model as it is now: nothing compiled, nothing shared.

    Raises:
        ValueError: the student is sharded, or a function that knows only the student stands in for its forward.
    """
    base = unwrapped(student)
    for module in base.modules():
        if any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__):
            raise ValueError(
                explain_error(
                    "DistillationHook: a sharded student cannot be copied",
                    given="a student after fully_shard, and no teacher",
                    allowed="a teacher, or a student that is not sharded yet",
                    todo="teacher = copy.deepcopy(model) before fully_shard(model); the teacher may be sharded too.",
                )
            )
    teacher = copy.deepcopy(base)
    for parent in list(teacher.modules()):
        for name, child in list(parent.named_children()):
            if user_model(child) is not child:
                setattr(parent, name, user_model(child))
    for name, module in teacher.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            raise ValueError(
                explain_error(
                    "DistillationHook: a copy of the student would still run the student",
                    given=f"a forward that was replaced by a function, in {name or 'the model itself'}",
                    allowed="modules with the forward of their class, or a teacher",
                    todo="Give teacher=copy.deepcopy(model), made before it was replaced.",
                )
            )
    return teacher


def compiled_blocks(student: Module) -> list[str]:
    """The names of the modules in a student that are compiled on their own."""
    return [
        name
        for name, module in unwrapped(student).named_modules()
        if name and (user_model(module) is not module or getattr(module, "_compiled_call_impl", None) is not None)
    ]


def has_adapters(student: Module) -> bool:
    """Whether a model holds adapters of PEFT that can be switched off."""
    return any(hasattr(module, _OFF) for module in unwrapped(student).modules())


def check_adapters(student: Module) -> None:
    """The student's base weights can be its teacher, or a ``ValueError``: they are frozen, and no adapter is merged."""
    base = unwrapped(student)
    if not has_adapters(base):
        raise ValueError(
            explain_error(
                "DistillationHook: the student has no adapters to switch off",
                given="teacher='base'",
                allowed="a model with adapters of PEFT",
                todo="Leave teacher out: a dense copy is made.",
            )
        )
    merged = [name for name, module in base.named_modules() if hasattr(module, _OFF) and _is_merged(module)]
    adapters = {id(p) for p in _adapter_parameters(base)}
    moving = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in adapters]
    if merged or moving:
        raise ValueError(
            explain_error(
                "DistillationHook: the base weights of this student are no frozen teacher",
                given=f"a merged adapter in {merged[0]}" if merged else f"{moving[0]}, which takes gradients",
                allowed="adapters that are not merged, on frozen weights",
                todo="Unmerge the adapter." if merged else "Freeze it, or give a copy of the model as teacher.",
            )
        )


def _is_merged(module: Module) -> bool:
    return bool(getattr(module, "merged_adapters", ()))


def _adapter_parameters(base: Module) -> Iterator[Tensor]:
    for module in base.modules():
        if hasattr(module, _OFF):
            inner = {id(p) for name in ("base_layer", "original_module") for p in _parameters_of(module, name)}
            yield from (p for p in module.parameters() if id(p) not in inner)


def _parameters_of(module: Module, name: str) -> Iterator[Tensor]:
    child = module._modules.get(name)
    return iter(()) if child is None else child.parameters()


@contextmanager
def _in_evaluation(base: Module) -> Iterator[None]:
    changed = [module for module in base.modules() if module.training]
    try:
        for module in changed:
            module.training = False
        yield
    finally:
        for module in changed:
            module.training = True


@contextmanager
def _adapters_off(base: Module, wanted: bool) -> Iterator[None]:
    """Not with PEFT's ``disable_adapter``: it turns ``requires_grad`` of the adapters off and on, between a forward and
    its backward here."""
    changed = [module for module in base.modules() if wanted and not getattr(module, _OFF, True)]
    try:
        for module in changed:
            setattr(module, _OFF, True)
        yield
    finally:
        for module in changed:
            setattr(module, _OFF, False)
