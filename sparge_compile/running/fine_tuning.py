"""Which models are being fine-tuned: their training is decided as the inference that they learn for.

Sparse attention may pay in inference alone. What is fine-tuned dense would not be what runs afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace

from torch.nn import Module

from ..passes.find import Match
from ..user_model import bare
from .places import Names

_students: weakref.WeakKeyDictionary[Module, int] = weakref.WeakKeyDictionary()  # with how often each was named


def fine_tune(student: Module, more: int) -> None:
    """A model is fine-tuned by so many more, or less."""
    _students[bare(student)] = _students.get(bare(student), 0) + more


def as_to_run(matches: Iterable[Match], names: Names | None) -> list[Match]:
    """Matches of a model as they are to be decided."""
    return [_in_inference(match) if _is_student(names) else match for match in matches]


def _is_student(names: Names | None) -> bool:
    """Whether a model is a student, or holds one, or is part of one; where nobody knows the model, it may be."""
    students = [student for student, times in _students.items() if times]
    if names is None or not students:
        return bool(students)
    held = set(names.root.modules())
    return any(student in held or names.root in set(student.modules()) for student in students)


def _in_inference(match: Match) -> Match:
    return match if match.attention is None else replace(match, attention=replace(match.attention, trains=False))
