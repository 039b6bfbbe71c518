"""Thresholds on a user's module: the child that holds them as buffers, and the hook that shows them to the backend.

A child of its own, because a float buffer of the module itself would be cast by ``model.half()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from .. import ops
from ..errors import value_error
from ..keeping import WIDTH
from ..kernels.order import LEFT, Tile
from .followed import HERE, FollowedGrid, is_no_frame

CHILD = "sparge"  # the child's name, and so a part of the keys in a state dict


class Attached(Module):
    """Thresholds of a module's attentions, float32 [H, 2 or 6], or [1, 2 or 6] for all heads, by index.

    Index 0 is the module's first attention, 1 its second; ``ops.REST`` is for all that have no index here.

    What offloads a model puts buffers on the meta device, as it does weights, and brings them back for the forward of
    the module that they are in, which this one has not. So it keeps what they held, and gives that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: tuple[int, ...] = ()
        self.entries: dict[int, str] = {}  # the entry of the calibration that each index has its thresholds from
        self.planned: dict[int, bool] = {}  # indices that are dense by plan: always, or at times
        self.tiles: dict[int, Tile] = {}  # whose tokens are the blocks that the thresholds of an index are for
        self.grid: FollowedGrid | None = None  # that of the tokens, where the model's inputs tell it
        self._held: dict[str, Tensor] = {}  # the buffers, or where one is on the meta device what it was before
        self._dense: dict[int, tuple[int, int]] = {}  # buffers that were written dense by plan, and their versions

    def put(self, index: int, values: Tensor) -> None:
        """Hold thresholds for an index; values of the same shape are written in place, and nothing is compiled anew."""
        name, buffer = buffer_name(index), self._own(buffer_name(index))
        if buffer is not None and buffer.shape == values.shape:
            self.write(index, values)
            return
        # Out of inference mode, so that the buffer can be written to there and elsewhere.
        with torch.inference_mode(False):
            fresh = values.to(buffer.device if buffer is not None else values.device, torch.float32, copy=True)
            self.register_buffer(name, fresh)
        self._held[name] = fresh
        self.indices = tuple(sorted({*self.indices, index}))

    def write(self, index: int, values: Tensor, dense: bool = False) -> None:
        """Write values into the buffer of an index, in place, and into what stands behind it.

        Args:
            dense: they keep every block, and whoever runs the site may compute dense attention instead.
        """
        name = buffer_name(index)
        with torch.no_grad():
            for buffer in (self._own(name), self._held[name]):
                if buffer is not None:
                    buffer.copy_(values)
        self._note_dense(index, dense)

    def is_dense(self, index: int) -> bool:
        """Whether the attention of this index is dense by plan now: nobody has written to its buffer since.

        The host knows that without a look at what the buffer holds.
        """
        index = index if index in self.indices else ops.REST
        buffer = self._own(buffer_name(index))
        return buffer is not None and self._dense.get(index) == (id(buffer), buffer._version)

    def is_planned(self, index: int) -> bool | None:
        """True: the attention of this index is dense by plan in every step; False: in some; None: in none."""
        return self.planned.get(index if index in self.indices else ops.REST)

    def _note_dense(self, index: int, dense: bool) -> None:
        self._dense.pop(index, None)
        buffer = self._own(buffer_name(index))
        if dense and buffer is not None:
            self._dense[index] = id(buffer), buffer._version

    def get(self, index: int, device: torch.device | None = None) -> Tensor | None:
        """Return the buffer for the attention of this index, or None where none is meant for it.

        Args:
            index: of the attention in its module.
            device: where the buffer is to be; it is moved there for good if it is elsewhere.
        """
        index = index if index in self.indices else ops.REST
        name = buffer_name(index)
        buffer = self._own(name)
        if buffer is not None and device is not None and buffer.device != device:
            dense = self.is_dense(index)
            with torch.inference_mode(False):
                buffer = buffer.to(device)
            if not buffer.is_meta:
                self._buffers[name] = self._held[name] = buffer
                self._note_dense(index, dense)
        return buffer

    @property
    def wide(self) -> bool:
        """Whether the thresholds have ranges of kept tokens."""
        return any(buffer.shape[1] == WIDTH for buffer in self._held.values())

    def keeps(self, index: int) -> bool:
        """Whether the thresholds of this index have ranges of kept tokens."""
        values = self.get(index)
        return values is not None and values.shape[1] == WIDTH

    def entries_of(self, index: int) -> set[str]:
        """The entry that the attention of this index has its thresholds from, if it is known."""
        index = index if index in self.indices else ops.REST
        return {self.entries[index]} if index in self.entries else set()

    def tile_of(self, index: int) -> Tile | None:
        """The tile whose tokens are the blocks that the thresholds of this index are for; None: no order is said."""
        return self.tiles.get(index if index in self.indices else ops.REST)

    def drop(self, index: int) -> None:
        """Take off the thresholds for an index, if there are any."""
        if index in self.indices:
            delattr(self, buffer_name(index))
            del self._held[buffer_name(index)]
            for known in (self.entries, self.planned, self.tiles, self._dense):
                known.pop(index, None)
            self.indices = tuple(i for i in self.indices if i != index)

    def _own(self, name: str) -> Tensor | None:
        """The buffer of this name with its values."""
        buffer = self._buffers.get(name)
        return self._held[name] if buffer is not None and buffer.is_meta else buffer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attached:
        """Move with the model, but not to the meta device, and stay float32 with the same values.

        A share of 0.05 in half precision would be another share, and ``to_empty`` would leave any.
        """
        for index, name in ((index, buffer_name(index)) for index in self.indices):
            buffer, dense = self._own(name), self.is_dense(index)
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = self._held[name] = buffer if moved.is_meta else buffer.to(moved.device)
            self._note_dense(index, dense)
        return self

    def _restore(self) -> None:
        """Have values in all buffers."""
        for name in map(buffer_name, self.indices):
            self._buffers[name] = self._own(name)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._restore()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args)
        self._held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}


def attached_to(module: Module | None) -> Attached | None:
    """Return the thresholds that are attached to a module, or None."""
    child = None if module is None else module._modules.get(CHILD)
    return child if isinstance(child, Attached) else None


def has_attached(model: Module) -> bool:
    """Whether thresholds are attached to a module of this model."""
    return any(isinstance(module, Attached) for module in model.modules())


def child_of(module: Module, name: str) -> Attached:
    """The child of a module that holds its thresholds; a new one comes with the hook that shows them to the backend.

    Raises:
        ValueError: the module has an attribute of that name already.
    """
    child = attached_to(module)
    if child is None:
        if hasattr(module, CHILD):
            raise value_error(
                f"attach: module {name!r} has an attribute {CHILD!r} of its own",
                given=type(getattr(module, CHILD)).__name__,
                allowed="modules without it",
                todo="Give the thresholds as the option 'calibration'.",
            )
        child = Attached()
        put_child(module, child)
        is_no_frame(mark)
    return child


def put_child(module: Module, child: Attached) -> None:
    """Put a child that holds thresholds, and its hook, on a module."""
    module.add_module(CHILD, child)
    module.register_forward_pre_hook(mark)


def remove_child(module: Module) -> None:
    """Take the child that holds thresholds, and its hook, off a module."""
    delattr(module, CHILD)
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is mark]:
        del hooks[key]


def mark(module: Module, args: Any) -> None:
    """Put a marker for each of a module's thresholds, and for its grid, into the graph: a forward pre-hook.

    One function for all modules, so that Dynamo's guards let equal blocks share a graph.
    """
    put: Any = torch.ops.sparge.mark
    if not torch.compiler.is_compiling() and get_proxy_mode() is None:
        if not is_fx_symbolic_tracing():
            return
        put = _traced(args)
    attached: Any = module._modules[CHILD]
    for index in attached.indices:
        put(attached.get(index), index, attached.tiles.get(index, ()))
    numbers = None if attached.grid is None else attached.grid.numbers
    if numbers is not None and torch.compiler.is_compiling():  # here, not in a function, which would be a frame
        before, *axes, behind = numbers.shape[1:]
        torch.ops.sparge.grid(before + LEFT, *axes, behind + LEFT, HERE)


def _traced(args: Any) -> Callable[..., Any]:
    """What puts markers into a graph of ``symbolic_trace``, which records nothing but calls on its own proxies."""
    proxy = next((x for x in tree_leaves(args) if isinstance(x, Proxy)), None)
    if proxy is None:
        warnings.warn(
            "sparge: symbolic_trace does not see the attached thresholds of a module that is called without positional "
            "arguments; its sites have those of the options. Pass its input by position, or use torch.export.",
            stacklevel=2,
        )
        return torch.ops.sparge.mark
    return lambda *what: proxy.tracer.create_proxy("call_function", torch.ops.sparge.mark.default, what, {})


def buffer_name(index: int) -> str:
    """Return the name of the buffer for an index."""
    return "thresholds" if index == 0 else "thresholds_rest" if index == ops.REST else f"thresholds_{index}"
