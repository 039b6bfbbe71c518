"""Block-sparse attention for any model: ``torch.compile(model, backend="sparge")``.

Public names are imported when they are first used, so that this import is cheap and changes nothing global.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "attach": "attachment",
    "attention": "functional",
    "diffusers_callback": "attachment",
    "explain": "backend",
    "head_influence": "calibrate.influence",
    "BlockMap": "kernels.block_map",
    "Calibration": "thresholds",
    "CostModel": "cost",
    "DistillationHook": "distill",
    "Options": "config",
    "Report": "report",
    "SparsitySchedule": "schedule",
    "rewrite": "rewriting",
}

__all__ = [
    "BlockMap",
    "Calibration",
    "CostModel",
    "DistillationHook",
    "Options",
    "Report",
    "SparsitySchedule",
    "attach",
    "attention",
    "calibrate",
    "diffusers_callback",
    "explain",
    "head_influence",
    "rewrite",
]

if TYPE_CHECKING:
    from .attachment import attach
    from .backend import explain
    from .calibrate.influence import head_influence
    from .config import Options
    from .cost import CostModel
    from .distill import DistillationHook
    from .functional import attention
    from .kernels.block_map import BlockMap
    from .report import Report
    from .rewriting import rewrite
    from .schedule import SparsitySchedule
    from .thresholds import Calibration


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "calibrate":  # a module that can be called
        return import_module(".calibrate", __name__)
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
