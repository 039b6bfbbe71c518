"""The teacher of a distillation: a frozen model that gives what dense attention gives, compiled as the student is.

In: a module, or the student itself with its adapters off; a call's arguments. Out: what it returns, and the attention
outputs of the sites that are asked for. Losses live in :mod:`.loss`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..errors import value_error
from ..inner import compile_graph
from ..notices import warn_of_failures
from ..options import Options
from ..passes.pipeline import check, erase_markers, return_dense
from ..passes.work import run
from ..running.graph import Slot, open_graph
from ..running.listeners import Listener, Outlet, heard_by, with_outlet
from ..running.observe import uncompiled
from ..running.places import Names
from ..user_model import unwrapped, user_model
from .adapters import adapter_parameters, adapters_off
from .checksum import checksum


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
        """Run it on a call's arguments and return what it gives.

        Args:
            options: the student's: who compiles, and how.
            sites: those whose outputs ``listener`` is told of.
        """
        base = unwrapped(self.module)
        if self._compiled and (self._backend is None or not self._backend.fits(options, sites)):
            self._compile(_Dense(options, sites, Names(base)))
        without_adapters = adapters_off(base) if self.is_student else nullcontext()
        with torch.no_grad(), _in_evaluation(base), without_adapters, heard_by(listener):
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
        """Run its compiled blocks as a teacher's, whatever they were compiled for."""
        with uncompiled(base):
            try:
                for block, call in self._run_blocks:
                    block._compiled_call_impl = call
                yield
            finally:
                for block, _ in self._run_blocks:
                    block._compiled_call_impl = None

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Return its frozen tensors by name, without adapters where it is the student."""
        base = unwrapped(self.module)
        adapters = {id(p) for p in adapter_parameters(base)} if self.is_student else set()
        return [(name, p) for name, p in base.named_parameters() if id(p) not in adapters]

    def checksum(self) -> str:
        """Return a checksum of all its parameters, quantised ones too. All ranks ask for it together."""
        return checksum(parameter for _, parameter in self.parameters())


class _Dense:
    """Dynamo backend of a teacher: graphs stay as they are, and return the outputs of some sites as well."""

    def __init__(self, options: Options, sites: frozenset[str], names: Names) -> None:
        self._options = options
        self._sites = sites
        self._names = names

    def fits(self, options: Options, sites: frozenset[str]) -> bool:
        """Whether what it compiled serves these options of a student and these sites."""
        same = ("inner", "inductor", "inductor_mode")
        return sites <= self._sites and all(getattr(options, x) == getattr(self._options, x) for x in same)

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = open_graph(graph_module, self._names)
        warn_of_failures(graph.failures)
        wanted = [match for match in graph.matches if match.attention and self._names_of(graph.slots[match.node])]
        run(graph, partial(return_dense, matches=wanted), erase_markers, check)
        outlet = Outlet(self._options, [graph.slots[match.node] for match in wanted], bool(wanted), self._names)
        return with_outlet(compile_graph(graph.graph_module, example_inputs, self._options), outlet)

    def _names_of(self, slot: Slot) -> frozenset[str]:
        """Those of the sites that a slot is in one of the modules that share its graph."""
        return self._sites & {slot.name(place) for place in (slot.locator.first, *slot.others())}


def refuse_in_optimizers(teacher: Teacher) -> Any:
    """Have the first step of any optimizer that holds parameters of a teacher raise a ``ValueError``.

    Returns a handle whose ``remove()`` ends that; it ends by itself when the teacher is gone.
    """
    seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
    reference, handle = weakref.ref(teacher), None

    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is None and handle is not None:
            handle.remove()
        if torch.compiler.is_compiling() or alive is None or optimizer in seen:
            return
        frozen = {id(p): name for name, p in alive.parameters()}
        names = [frozen[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in frozen]
        if names:
            raise value_error(
                "DistillationHook: the teacher is in an optimizer",
                given=f"{type(optimizer).__name__} with {', '.join(names[:4])} of the teacher",
                allowed="the student's parameters",
                todo="Make the optimizer from student.parameters(), not from a module that holds the teacher too.",
            )
        seen.add(optimizer)

    handle = register_optimizer_step_pre_hook(check)
    return handle


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
