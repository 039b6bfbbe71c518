"""A layer's one name: its module path in the user's model, from a graph node.

The same model must give the same names in whole-model compilation, in ``explain``, in calibration and in distillation.
What a graph knows is a base (a local of the compiled frame) and a path below it; running/places.py finds the base.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import torch

from .user_model import WRAPPERS

ROOT = "(root)"  # attention written directly in the forward of the compiled module

# Dynamo's name of the local or global that holds the model, or a function, a method or a hook that does: whatever leads
# to the owner of a method (diffusers' hooks keep the forward that they replace). What is left of an iterator behind a
# graph break is read by a function: ___tuple_iterator_getitem(L['___stack0'], 0).
_BASE = re.compile(
    r"^(?:___\w+\()*[LG]\['[^']*'\](?:[\w.\[\]']*, \w+\))*(?:.*\.__self__(?=[.\[]|$))?"
    r"(?:\._torchdynamo_inline|\.__closure__\[\d+\]\.cell_contents|\.__func__|(?:\.forward)?\.__self__)*"
)
_MODULES = re.compile(
    r"(?:\.__dict__)?(?:\['_(?:modules|parameters|buffers)'\]|\._(?:modules|parameters|buffers))\['([^']*)'\]"
)  # diffusers' models reach children so
_GETATTR = re.compile(r"getattr\(([^()]*), '([^']*)'\)")  # below functional_call: getattr(L['self'].blocks, '0')
# A hook of diffusers: the owner of the forward that it keeps, and what it calls that with, are the module itself.
_HOOKED = re.compile(
    r"(?:(?:\.forward\.func\.__closure__\[\d+\]\.cell_contents)+\.forward\.__self__|\.forward\.args\[0\])(?=[.\[]|$)"
)
_ITEM = re.compile(r"\['?([^'\]]*)'?\]")  # blocks[0], layers['a']

_LINE = re.compile(r'File "([^"]+)", line (\d+)')
# Files of torch itself, and of this package, begin so.
TORCH = os.path.dirname(torch.__file__) + os.sep
PACKAGE = os.path.dirname(__file__) + os.sep


def clean_path(path: str) -> str:
    """Return a module path as the user would write it, from Dynamo's or export's spelling of it."""
    path = _MODULES.sub(r".\1", _BASE.sub("", _dotted(path)))
    return user_path(_ITEM.sub(r".\1", path)) or ROOT


def _dotted(path: str) -> str:
    """Return a path of Dynamo with ``a.b`` for ``getattr(a, 'b')``, straight to what a hook keeps."""
    changed = 1
    while changed:
        path, changed = _GETATTR.subn(r"\1.\2", path)
    return _HOOKED.sub("", path)


def user_path(name: str) -> str:
    """Return a dotted name without the modules that wrap a user's module; empty for the root."""
    return ".".join(part for part in name.split(".") if part and part not in WRAPPERS)


def join(prefix: str, path: str) -> str:
    """Return a path below a module as a path below the model; the root's own path is ``ROOT``."""
    return ".".join(part for part in (prefix, path) if part and part != ROOT) or ROOT


def base_of(path: str) -> str | None:
    """Return the local or global of the compiled frame that a path of Dynamo starts from, as ``L['self']``."""
    match = _BASE.match(_dotted(path))
    return match.group() if match else None


def module_path(node: Any) -> str:
    """Return the path of the innermost module in which a graph node was traced."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ROOT


def module_base(node: Any) -> str | None:
    """Return the base of that path; None where the node stands in no module but the compiled frame itself."""
    stack = node.meta.get("nn_module_stack")
    return base_of(list(stack.values())[-1][0]) if stack else None


def code_of(node: Any) -> str | None:
    """Return where in the user's code a graph node was traced, as ``file:line``; None where tracing left no note.

    What torch itself calls on the way (``torch/nn``) is passed over.
    """
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    own = [line for line in lines if not line[0].startswith((TORCH, PACKAGE))] or lines
    return ":".join(own[-1]) if own else None


def numbered(path: str, earlier: int) -> str:
    """Return a site's name, after so many earlier ones in the same module."""
    return f"{path}#{earlier}" if earlier else path


class SiteNames:
    """Names sites in graph order: a module's first attention has its path, later ones ``#1``, ``#2``."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def name(self, path: str) -> str:
        """Return the name of the next site in a module."""
        earlier = self._seen[path]
        self._seen[path] += 1
        return numbered(path, earlier)
