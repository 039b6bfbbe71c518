"""Adapters of PEFT in a model: whether there are any, their parameters, and a time with them switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module

from ..errors import value_error
from ..user_model import unwrapped

_OFF = "_disable_adapters"  # how layers of PEFT say that their adapters are switched off


def has_adapters(student: Module) -> bool:
    """Whether a model holds adapters that can be switched off."""
    return any(hasattr(module, _OFF) for module in unwrapped(student).modules())


def adapter_parameters(base: Module) -> Iterator[Tensor]:
    """Yield the parameters of all adapters of a model."""
    for module in base.modules():
        if hasattr(module, _OFF):
            inner = {id(p) for name in ("base_layer", "original_module") for p in _parameters_of(module, name)}
            yield from (p for p in module.parameters() if id(p) not in inner)


def check_adapters(student: Module) -> None:
    """Raise a ``ValueError`` unless the student's base weights can teach: they are frozen, and no adapter is merged."""
    base = unwrapped(student)
    if not has_adapters(base):
        raise value_error(
            "DistillationHook: the student has no adapters to switch off",
            given="teacher='base'",
            allowed="a model with adapters of PEFT",
            todo="Leave teacher out: a dense copy is made.",
        )
    merged = [
        name
        for name, module in base.named_modules()
        if hasattr(module, _OFF) and bool(getattr(module, "merged_adapters", ()))
    ]
    adapters = {id(p) for p in adapter_parameters(base)}
    moving = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in adapters]
    if merged or moving:
        raise value_error(
            "DistillationHook: the base weights of this student are no frozen teacher",
            given=f"a merged adapter in {merged[0]}" if merged else f"{moving[0]}, which takes gradients",
            allowed="adapters that are not merged, on frozen weights",
            todo="Unmerge the adapter." if merged else "Freeze it, or give a copy of the model as teacher.",
        )


@contextmanager
def adapters_off(base: Module) -> Iterator[None]:
    """Run the model without its adapters meanwhile.

    Not with PEFT's ``disable_adapter``: it turns ``requires_grad`` of the adapters off and on, between a forward and
    its backward here.
    """
    changed = [module for module in base.modules() if not getattr(module, _OFF, True)]
    try:
        for module in changed:
            setattr(module, _OFF, True)
        yield
    finally:
        for module in changed:
            setattr(module, _OFF, False)


def _parameters_of(module: Module, name: str) -> Iterator[Tensor]:
    child = module._modules.get(name)
    return iter(()) if child is None else child.parameters()
