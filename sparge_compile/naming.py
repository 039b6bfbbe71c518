"""A layer's one name: its module path in the user's model, from a graph node.

The same model must give the same names in whole-model compilation, in ``explain``, in calibration and in distillation.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

ROOT = "(root)"  # attention written directly in the forward of the compiled module

_BASE = re.compile(r"^[LG]\['[^']*'\]")  # Dynamo's name of the local or global that holds the model
_MODULES = re.compile(
    r"(?:\.__dict__)?(?:\['_modules'\]|\._modules)\['([^']*)'\]"
)  # diffusers' models reach children so
_ITEM = re.compile(r"\['?([^'\]]*)'?\]")  # blocks[0], layers['a']
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # modules that wrap a user's module


def clean_path(path: str) -> str:
    """A module path as the user would write it, from Dynamo's or export's spelling of it."""
    path = _MODULES.sub(r".\1", _BASE.sub("", path))
    path = _ITEM.sub(r".\1", path).strip(".")
    return ".".join(part for part in path.split(".") if part and part not in _WRAPPERS) or ROOT


def module_path(node: Any) -> str:
    """The path of the innermost module in which a graph node was traced."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ROOT


class SiteNames:
    """Names sites in graph order: a module's first attention has its path, later ones ``#1``, ``#2``."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def name(self, node: Any, child: str = "") -> str:
        """The name of a site; ``child`` is the module below the node's own that the attention belongs to."""
        path = module_path(node)
        if child:
            path = child if path == ROOT else f"{path}.{child}"
        earlier = self._seen[path]
        self._seen[path] += 1
        return f"{path}#{earlier}" if earlier else path
