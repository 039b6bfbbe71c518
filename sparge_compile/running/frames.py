"""The frames that Dynamo compiles or leaves to Python, as the Python stack tells while it is at work.

Nothing here is promised by torch: where a version has other names, nothing is known, and nothing is said.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule
from torch.nn import Module

from ..naming import TORCH
from .stack import is_attention_name, outward

_CONVERT = os.path.join("_dynamo", "convert_frame.py")
_ENTRY = os.path.join("_dynamo", "eval_frame.py")
_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}


class Left(NamedTuple):
    """A function with attention in it that Dynamo leaves to Python, why, and for which options."""

    function: CodeType
    why: str
    options: Any  # as they were given to torch.compile

    def __str__(self) -> str:
        return f"{self.function.co_name!r} ({self.function.co_filename}:{self.function.co_firstlineno})"

    def forget(self) -> None:
        """Have Dynamo try the function again: what it once left to Python it would never look at anew."""
        torch._dynamo.eval_frame.reset_code(self.function)


def hear_of_left_frames(backend: Callable[..., Any], tell: Callable[[Left], None]) -> None:
    """Have ``tell`` called, which must not raise, when Dynamo leaves a frame of this backend to Python."""

    def ended(_: Any) -> None:
        left = _left(backend)
        if left is not None:
            tell(left)

    handler = torch._dynamo.callback_handler  # emptied by torch.compiler.reset
    if not any(getattr(each, "sparge_backend", None) is backend for each in handler.end_callbacks):
        ended.sparge_backend = backend  # type: ignore[attr-defined]
        handler.register_end_callback(ended)


def stop_hearing(backend: Callable[..., Any]) -> None:
    """End what :func:`hear_of_left_frames` began for a backend."""
    callbacks = torch._dynamo.callback_handler.end_callbacks
    callbacks[:] = [each for each in callbacks if getattr(each, "sparge_backend", None) is not backend]


def is_whole_call(graph_module: GraphModule) -> bool:
    """Whether the graph that is being compiled is all of what torch.compile was called on: no other will follow.

    The hooks of a module that is compiled are frames of their own, before and after that of its forward.
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or getattr(reason, "graph_break", True):
        return False
    traced, code = False, None
    for frame in outward(sys._getframe()):
        name = frame.f_code.co_filename
        if name.endswith(_CONVERT):
            traced, code = True, frame.f_locals.get("code", code)
        if traced and (not name.startswith(TORCH) or _calls_hooks(frame, code)):
            return False
        if traced and name.endswith(_ENTRY):
            return True
    return False


def _calls_hooks(frame: FrameType, code: CodeType | None) -> bool:
    """Whether this frame calls a module that has hooks, and the code that it came to may be that of a hook."""
    if frame.f_code.co_name != "_call_impl" or not isinstance(module := frame.f_locals.get("self"), Module):
        return False
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    hooked = module._forward_pre_hooks or module._forward_hooks
    return bool(hooked) and getattr(forward, "__code__", None) is not code


def _left(backend: Callable[..., Any]) -> Left | None:
    """What an exception on its way out of Dynamo says of the frame that it was compiling."""
    error = sys.exc_info()[1]
    if error is None or type(error).__name__ != "Unsupported":
        return None
    stack = outward(sys._getframe())
    at = next((f for f in stack if f.f_code.co_name == "_compile" and f.f_code.co_filename.endswith(_CONVERT)), None)
    known = at.f_locals if at is not None else {}
    code, compiler = known.get("code"), known.get("compiler_fn")
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend  # type: ignore[union-attr]
    if not isinstance(code, CodeType) or getattr(compiler, "compiler_fn", compiler) is not backend:
        return None
    if not any(name in _ATTENTION or is_attention_name(name) for name in (*code.co_names, *code.co_freevars)):
        return None
    options = getattr(compiler, "kwargs", {}).get("options") or {}
    return Left(code, str(error).strip().split("\n")[0], options)
