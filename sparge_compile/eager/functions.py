"""The functions that models call for attention, and what takes their place while somebody wants to hear of the calls.

A Python function (flash-attn's, SageAttention's, xformers') gets another ``__code__``: whoever holds the function, by
whatever name and since when, calls the new code, and setting the old one back undoes it everywhere. Functions of torch
are built in and have no code; for them the references in modules are replaced.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dialects import Dialect, dialect_of

# The beginnings of names that are looked at; the dialects say which of the functions are meant.
_NAMES = ("flash_attn", "sageattn", "memory_efficient_attention", "varlen_attn")
_PACKED = {"_qkvpacked": ("qkv", ("q", "k", "v")), "_kvpacked": ("kv", ("k", "v"))}
_BOTH = {"cu_seqlens": ("cu_seqlens_q", "cu_seqlens_k"), "max_seqlen": ("max_seqlen_q", "max_seqlen_k")}
_BUILT_IN: dict[Any, ModuleType] = {
    F.scaled_dot_product_attention: F,
    torch._native_multi_head_attention: torch,
    torch._transformer_encoder_layer_fwd: torch,
}
_PACKAGE = __name__.partition(".")[0]


class Function:
    """A function that attends: ``target`` stands for it in a graph, ``original`` computes what it always did."""

    def __init__(self, original: Callable[..., Any], signature: inspect.Signature | None = None) -> None:
        self.target = self.original = original
        self.signature = signature
        self._packed = next((way for name, way in _PACKED.items() if name in original.__name__), None)
        if signature is not None and self._packed is not None:
            self.target = _unpacked(original, signature, *self._packed)

    @property
    def name(self) -> str:
        """The function's own name."""
        return str(self.original.__name__)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Those of the target; none of a function that is built in."""
        return {} if self.signature is None else inspect.signature(self.target).parameters

    @cached_property
    def dialect(self) -> Dialect | None:
        """How it is called; None for a function of torch."""
        return None if self.signature is None else dialect_of(self.target.__name__, self.parameters)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the target for those of a call: by name, where the function is Python.

        Raises:
            TypeError: the call is none that the function takes.
        """
        if self.signature is None:
            return args, dict(kwargs)
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        if self._packed is None:
            return (), given
        packed, parts = self._packed
        tensor = given.pop(packed)
        given = dict(zip(parts, tensor.unbind(-3), strict=True)) | given
        if packed == "qkv":  # one length for both
            given = {each: value for name, value in given.items() for each in _BOTH.get(name, (name,))}
        return (), given


def _unpacked(
    original: Callable[..., Any], signature: inspect.Signature, packed: str, parts: tuple[str, ...]
) -> Callable[..., Any]:
    """A function of queries, keys and values apart, for one that takes them in one tensor."""

    def call(**given: Any) -> Any:
        tensor = torch.stack([given.pop(part) for part in parts], -3)
        if packed == "qkv":
            given = {next((one for one, both in _BOTH.items() if n in both), n): x for n, x in given.items()}
        return original(**{packed: tensor, **given})

    names: list[str] = []
    for name in signature.parameters:
        names += parts if name == packed else _BOTH.get(name, (name,)) if packed == "qkv" else (name,)
    old = signature.parameters
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [old[name].replace(kind=kind) if name in old else inspect.Parameter(name, kind) for name in names]
    call.__name__ = original.__name__.replace("_qkvpacked", "").replace("_kvpacked", "")
    call.__module__ = original.__module__
    # Of names alone: what has a default may stand before what has none.
    call.__signature__ = _unordered(given)  # type: ignore[attr-defined]
    return call


def _unordered(parameters: list[inspect.Parameter]) -> inspect.Signature:
    return inspect.Signature(parameters, __validate_parameters__=False)


Serve = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]  # takes the place of a call

_lock = threading.RLock()
_serve: Serve | None = None
_codes: dict[str, tuple[FunctionType, CodeType, Callable[..., Any]]] = {}  # by key: what was there, and what is called
_entrances: dict[Callable[..., Any], Any] = {}  # what is called in the place of a function of torch, and that function
_looked_at = 0  # how many modules there were


def replace_functions(serve: Serve) -> None:
    """Have ``serve`` called in the place of every function that attends; call it again to find those that are new."""
    global _serve, _looked_at
    if _serve is serve and _looked_at == len(sys.modules):
        return
    with _lock:
        _serve = serve
        _looked_at = len(sys.modules)
        for module, name, value in list(_candidates()):
            if type(value) is not FunctionType:
                setattr(module, name, _entrance_of(value))
            elif not any(function is value for function, *_ in _codes.values()):
                _replace_code(value)


def restore_functions() -> None:
    """Put everything back as it was, also in modules that were imported meanwhile; what others put there stays."""
    global _serve, _looked_at
    with _lock:
        for function, code, _ in _codes.values():
            function.__code__ = code
            del function.__signature__  # type: ignore[attr-defined]
        for module in list(sys.modules.values()) if _entrances else ():
            for name, value in list(vars(module).items()) if isinstance(module, ModuleType) else ():
                if type(value) is FunctionType and value in _entrances:
                    setattr(module, name, _entrances[value])
        _codes.clear()
        _entrances.clear()
        _serve, _looked_at = None, 0


def entrance(key: str) -> Callable[..., Any]:
    """What is called in the place of a Python function; its new code asks for it."""
    return _codes[key][2]


def _candidates() -> Iterator[tuple[ModuleType, str, Any]]:
    """References to functions that attend, in all modules but those of torch and our own."""
    for module in list(sys.modules.values()):
        package = str(getattr(module, "__name__", "")).partition(".")[0]
        if not isinstance(module, ModuleType) or package == _PACKAGE:
            continue
        for name, value in list(vars(module).items()):
            if type(value) is FunctionType:
                if name.startswith(_NAMES) and _is_known(value):
                    yield module, name, value
            elif type(value) in _TYPES and value in _BUILT_IN and (package != "torch" or module is _BUILT_IN[value]):
                yield module, name, value


_TYPES = set(map(type, _BUILT_IN))


def _is_known(function: FunctionType) -> bool:
    return not function.__name__.startswith("_") and Function(function, inspect.signature(function)).dialect is not None


def _entrance_of(original: Any) -> Callable[..., Any]:
    """What takes the place of a function of torch; as that does, it lets ``__torch_function__`` go first."""
    known = next((entrance for entrance, function in _entrances.items() if function is original), None)
    if known is not None:
        return known
    function = Function(original)

    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _serve is None:
            return original(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if torch.overrides.has_torch_function(tensors):
            return torch.overrides.handle_torch_function(called, tensors, *args, **kwargs)
        return _serve(function, args, kwargs)

    called.__name__ = called.__qualname__ = original.__name__  # by these it is pickled, as what it stands for
    called.__module__, called.__doc__ = _BUILT_IN[original].__name__, original.__doc__
    _entrances[called] = original
    return called


def _replace_code(function: FunctionType) -> None:
    code, signature = function.__code__, inspect.signature(function)
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    original.__kwdefaults__, original.__module__ = function.__kwdefaults__, function.__module__
    original.__dict__.update(function.__dict__)
    original.__signature__ = signature  # type: ignore[attr-defined]
    known = Function(original, signature)

    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _serve is None:
            return original(*args, **kwargs)
        return _serve(known, args, kwargs)

    key = f"{function.__module__}.{function.__qualname__} {id(function)}"
    _codes[key] = function, code, called
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__code__ = _code_of(key, code.co_freevars, code.co_name)


@cache
def _code_of(key: str, cells: tuple[str, ...], name: str) -> CodeType:
    """The code of a replaced function: one each time, since Dynamo guards it, and compiles anew for another.

    A function keeps its closure, and code must have as many free variables as that has cells.
    """
    consts = tuple(key if const == "<key>" else const for const in _entering.__code__.co_consts)
    return _entering.__code__.replace(co_consts=consts, co_freevars=cells, co_name=name)


def _entering(*args: Any, **kwargs: Any) -> Any:
    """The code of replaced functions. It runs among the globals of others, so it imports what it calls."""
    from sparge_compile.eager.functions import entrance

    return entrance("<key>")(*args, **kwargs)
