"""Which module teaches a student: its own base weights, a dense copy of it, or what the user gave."""

from __future__ import annotations

import copy

from torch.nn import Module

from ..errors import type_error, value_error
from ..user_model import unwrapped, user_model
from .adapters import check_adapters, has_adapters
from .teacher import Teacher


def make_teacher(student: Module, teacher: Module | str | None, *, compiled: bool) -> Teacher:
    """Return the teacher of a student; see the arguments of ``DistillationHook``.

    Raises:
        TypeError: something else than a module, ``"base"`` or None.
        ValueError: base weights that are not frozen or have no adapters, a student that cannot be copied, a teacher
            that shares parameters with the student.
    """
    blocks = compiled_blocks(student)
    if teacher == "base" or (teacher is None and has_adapters(student)):
        check_adapters(student)
        return Teacher(unwrapped(student), is_student=True, compiled=compiled, blocks=blocks)
    if teacher is None:
        return Teacher(copy_of(student), is_student=False, compiled=compiled, blocks=blocks)
    if not isinstance(teacher, Module):
        raise type_error(
            "DistillationHook: bad teacher",
            given=repr(teacher),
            allowed="an nn.Module, 'base' or None",
            todo="Leave it out: a dense copy is made.",
        )
    of_student = {id(p) for p in unwrapped(student).parameters()}
    shared = [name for name, p in unwrapped(teacher).named_parameters() if id(p) in of_student]
    if shared:
        raise value_error(
            "DistillationHook: the teacher shares parameters with the student, which would train it",
            given=", ".join(shared[:4]),
            allowed="weights of its own",
            todo="Leave teacher out (a copy is made), give copy.deepcopy(model), or teacher='base' for adapters.",
        )
    return Teacher(teacher, is_student=False, compiled=compiled, blocks=blocks)


def copy_of(student: Module) -> Module:
    """Return a dense copy of a student's model as it is now: nothing compiled, nothing shared.

    Raises:
        ValueError: the student is sharded, or a function that knows only the student stands in for its forward.
    """
    base = unwrapped(student)
    for module in base.modules():
        if any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__):
            raise value_error(
                "DistillationHook: a sharded student cannot be copied",
                given="a student after fully_shard, and no teacher",
                allowed="a teacher, or a student that is not sharded yet",
                todo="teacher = copy.deepcopy(model) before fully_shard(model); the teacher may be sharded too.",
            )
    teacher = copy.deepcopy(base)
    for parent in list(teacher.modules()):
        for name, child in list(parent.named_children()):
            if user_model(child) is not child:
                setattr(parent, name, user_model(child))
    for name, module in teacher.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            raise value_error(
                "DistillationHook: a copy of the student would still run the student",
                given=f"a forward that was replaced by a function, in {name or 'the model itself'}",
                allowed="modules with the forward of their class, or a teacher",
                todo="Give teacher=copy.deepcopy(model), made before it was replaced.",
            )
    return teacher


def compiled_blocks(student: Module) -> list[str]:
    """Return the names of the modules in a student that are compiled on their own."""
    return [
        name
        for name, module in unwrapped(student).named_modules()
        if name and (user_model(module) is not module or getattr(module, "_compiled_call_impl", None) is not None)
    ]
