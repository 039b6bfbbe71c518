"""The Python stack of a running model: the modules that are being called, and the calls inside the innermost one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch.fx import GraphModule
from torch.nn import Module

from ..naming import PACKAGE
from ..passes.match.foreign import attends
from ..user_model import bare, is_compiled

# By identity: code that holds a slice has no hash before Python 3.12.
_CALLS = frozenset(id(call.__code__) for call in (Module._wrapped_call_impl, Module._call_impl))
# Dynamo's name of the rest of a function behind a graph break.
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.*)_at_\d+$")
_ATTENDS = re.compile(r"flash_attn_\w*func|sageattn\w*|memory_efficient_attention|varlen_attn")
_NO_USER_CODE = {"torch", "sparge_compile", *sys.stdlib_module_names}


class Call(NamedTuple):
    """A function that is being called, and the line where it is now."""

    function: str
    line: int


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def modules_on_stack() -> Iterator[Module]:
    """The user's modules that are being called, innermost first."""
    return (module for module, _ in module_calls(sys._getframe(1)))


def is_innermost(module: Module) -> bool:
    """Whether no part of a module is being called inside its own call."""
    innermost = next(modules_on_stack(), None)
    return innermost is not None and bare(innermost) is module


def outermost_call() -> tuple[Module, FrameType] | tuple[None, None]:
    """The outermost module that is being called, without what wraps it, and the frame of its call."""
    calls = list(module_calls(sys._getframe(1)))
    return (bare(calls[-1][0]), calls[-1][1]) if calls else (None, None)


def module_calls(frame: FrameType | None) -> Iterator[tuple[Module, FrameType]]:
    """The user's modules whose calls are on the stack from a frame on, innermost first, each with the frame of it."""
    for each in outward(frame):
        module = called_module(each)
        if module is not None:
            yield module, each


def calls_in_module() -> list[Call]:
    """The calls of user code inside the innermost module that is being called, outermost first, from its forward on.

    A function that goes on behind a graph break is one call, at its present line.
    """
    calls: list[Call] = []
    module: Module | None = None
    resumed = ""
    for frame in outward(sys._getframe(1)):
        module = called_module(frame)
        if module is not None:
            break
        if is_user_code(frame):
            name = plain_name(frame.f_code.co_name)
            if name != resumed:
                calls.append(Call(name, frame.f_lineno))
            resumed = name if name != frame.f_code.co_name else ""
    names = [call.function for call in reversed(calls)]
    forward = forward_code(module)
    start = names.index(forward.co_name) if forward is not None and forward.co_name in names else 0
    return calls[::-1][start:]


def plain_name(function: str) -> str:
    """The user's name of a function, of which Dynamo may have made one for what follows a break."""
    while (match := _RESUMED.match(function)) is not None:
        function = match.group(1)
    return function


def forward_code(module: Module | None) -> CodeType | None:
    """The code of the forward of a module's class; None where there is none in Python."""
    return getattr(getattr(type(module), "forward", None), "__code__", None)


def is_attention_name(name: str) -> bool:
    """Whether a function of this name is one of those by which libraries are asked for attention."""
    return _ATTENDS.fullmatch(name) is not None


def attends_by_name(code: CodeType) -> bool:
    """Whether code is that of a library's function that attends, by its name and those of its arguments."""
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return is_attention_name(code.co_name) and attends(code.co_name, list(arguments))


def find_root() -> Module | None:
    """The model that is running: what torch.compile was called on, else the outermost module that is being called.

    A module of a list that was given to torch.compile is a block, not the model; and so is one whose activations are
    made anew in a backward, when the model's own forward is over.
    """
    found = _running()
    model = _models.get(found) if found is not None and _in_backward() else None
    return found if model is None else model() or found


def remember_model(root: Module) -> None:
    """Note of all modules that they belong to this model, which runs."""
    if not _in_backward():
        _models.update(dict.fromkeys(root.modules(), ref(root)))


_models: WeakKeyDictionary[Module, ref[Module]] = WeakKeyDictionary()


def _in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def _running() -> Module | None:
    called = list(modules_on_stack())
    for module in called:
        if is_compiled(module) and not _is_block(module, called[-1]):
            return bare(module)
    return bare(called[-1]) if called else None


def called_module(frame: FrameType) -> Module | None:
    """The user's module whose call a frame is."""
    if id(frame.f_code) not in _CALLS:
        return None
    module = frame.f_locals.get("self")
    return module if isinstance(module, Module) and not _is_of_dynamo(module) else None


def _is_of_dynamo(module: Module) -> bool:
    """Whether a module is no user's, but made to run a graph, as DDP's splitter makes several."""
    if is_compiled(module):
        return type(getattr(module, "dynamo_ctx", None)).__name__ == "DisableContext"
    return isinstance(module, GraphModule) or type(module).__module__.startswith("torch._dynamo.backends")


def is_user_code(frame: FrameType) -> bool:
    """Whether a frame runs code of a user, or of a library that is neither torch nor Python's own.

    Code of ours may run among the globals of others (``eager/functions.py``), so its file is asked as well.
    """
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in _NO_USER_CODE and not frame.f_code.co_filename.startswith((PACKAGE, "<eval_with_key>"))


def _is_block(module: Module, outermost: Module) -> bool:
    return module is not outermost and any(
        child is module
        for container in outermost.modules()
        if isinstance(container, (torch.nn.ModuleList, torch.nn.ModuleDict))
        for child in container.children()
    )
