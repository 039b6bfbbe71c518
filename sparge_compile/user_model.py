"""The user's own module inside what is put around one: torch.compile, checkpointing, DDP, FSDP, DataParallel, PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

# Attributes under which a module that wraps holds the user's module; no part of a site's name.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# The same for attributes whose names a user's module may have as well: they are told by the package and the class.
_HOLDERS = {
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "FullyShardedDataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("peft", "PeftModel"): "base_model",
    ("peft", "PeftMixedModel"): "base_model",
    ("peft", "BaseTuner"): "model",
}
# PEFT's wrapper of a module that is trained as a whole: its original, and a copy for each adapter.
_SAVED = {("peft", "ModulesToSaveWrapper"): "modules_to_save"}
HELD_AS = frozenset(_HOLDERS.values())
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


def bare(module: Module) -> Module:
    """Return the user's own module inside whatever wraps it, PEFT's model of adapters included; it names the sites."""
    while True:
        inner = getattr(unwrapped(module), held_as(unwrapped(module)) or "", None)
        if not isinstance(inner, Module):
            return unwrapped(module)
        module = inner


def held_as(module: Module) -> str | None:
    """The attribute under which a module that wraps another holds it; None for a module that does not."""
    return _by_kind(_HOLDERS, module)


def _by_kind(table: dict[tuple[str, str], str], module: Module) -> str | None:
    kinds = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__)
    return next((table[kind] for kind in kinds if kind in table), None)


def user_names(root: Module) -> list[tuple[str, str, Module]]:
    """Every module below one, its own included: its name, its name without what wraps others, and the module itself."""
    found: dict[str, tuple[str, Module]] = {}
    copies: set[str] = set()  # dicts of PEFT that hold a copy of a module for each adapter
    for name, module in root.named_modules(remove_duplicate=False):
        above, _, last = name.rpartition(".")
        prefix, parent = found[above] if name else ("", root)
        saved = _by_kind(_SAVED, parent)
        is_held = not name or last in WRAPPERS or last == held_as(parent) or above in copies
        if saved is not None:
            is_held |= last in (saved, "original_module")
            copies |= {name} if last == saved else set()
        found[name] = (prefix if is_held else f"{prefix}.{last}".lstrip("."), module)
    return [(name, short, module) for name, (short, module) in found.items()]


def remember_compiled(tensor: Tensor) -> None:
    """Note that the backend compiles code that reads this parameter or buffer."""
    _compiled_for[tensor] = True


def was_compiled(model: Module) -> bool:
    """Whether the backend has compiled code that reads a tensor of this model."""
    return any(tensor in _compiled_for for tensor in (*model.parameters(), *model.buffers()))
