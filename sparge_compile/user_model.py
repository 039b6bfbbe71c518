"""The user's own module inside what torch puts around one: torch.compile, checkpointing, DDP, FSDP, DataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

# Attributes under which a module that wraps holds the user's module; no part of a site's name.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# What holds the user's model as ``module``, and is no part of it.
_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}

# Every parameter and buffer that the backend has compiled code for, so that ``attach`` knows what was compiled.
_compiled_for = WeakTensorKeyDictionary()


def user_model(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model or function inside what ``torch.compile`` gave; anything else as it is."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def is_compiled(module: Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` gave."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def unwrapped(module: Module) -> Module:
    """Return the user's own module inside what compiles or distributes it."""
    while True:
        if is_compiled(module):
            module = module._orig_mod  # type: ignore[assignment]
        elif type(module).__name__ in _PARALLEL and isinstance(getattr(module, "module", None), Module):
            module = module.module  # type: ignore[assignment]
        else:
            return module


def remember_compiled(tensor: Tensor) -> None:
    """Note that the backend compiles code that reads this parameter or buffer."""
    _compiled_for[tensor] = True


def was_compiled(model: Module) -> bool:
    """Whether the backend has compiled code that reads a tensor of this model."""
    return any(tensor in _compiled_for for tensor in (*model.parameters(), *model.buffers()))
