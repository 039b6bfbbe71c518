"""Block-sparse attention for any model: ``torch.compile(model, backend="sparge")``.

Public names are imported when they are first used, so that this import is cheap and changes nothing global.

A few modules bear odd names because public functions have the plain ones, and an imported module of the same name
would take the function's place: ``attention`` is in ``functional``, ``rewrite`` in ``rewriting``; ``attach``, for
likeness, in ``thresholds.attachment``. ``calibrate`` is both: a folder that can be called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

_WHERE = {
    "attach": "thresholds.attachment",
    "attention": "functional",
    "calibration_part": "sharing.parts",
    "compare_calibrations": "sharing.difference",
    "diffusers_callback": "thresholds.denoising",
    "explain": "backend",
    "head_influence": "calibrate.influence",
    "plot_calibration": "showing.plots",
    "plot_survey": "showing.plots",
    "side_by_side": "showing.clips",
    "survey": "showing.survey",
    "write_report": "showing.page",
    "merge_calibrations": "sharing.merging",
    "BlockMap": "kernels.block_map",
    "Calibration": "thresholds.calibration",
    "CostModel": "cost",
    "DistillationHook": "distill.hook",
    "Grid": "kernels.order",
    "Options": "options",
    "Report": "report",
    "SparsitySchedule": "distill.schedule",
    "replace_attention": "eager.replacement",
    "rewrite": "rewriting",
    "Ranks": "parallel.attention",
    "shard_attention": "parallel.models",
    "sharded_attention": "parallel.attention",
    "set_step": "thresholds.steps",
    "varlen_attention": "functional",
}

__all__ = [
    "BlockMap",
    "Calibration",
    "CostModel",
    "DistillationHook",
    "Grid",
    "Options",
    "Ranks",
    "Report",
    "SparsitySchedule",
    "attach",
    "attention",
    "calibrate",
    "calibration_part",
    "compare_calibrations",
    "diffusers_callback",
    "explain",
    "head_influence",
    "merge_calibrations",
    "plot_calibration",
    "plot_survey",
    "replace_attention",
    "rewrite",
    "set_step",
    "shard_attention",
    "sharded_attention",
    "side_by_side",
    "survey",
    "varlen_attention",
    "write_report",
]

if TYPE_CHECKING:
    from .backend import explain
    from .calibrate.influence import head_influence
    from .calibrate.run import calibrate
    from .cost import CostModel
    from .distill.hook import DistillationHook
    from .distill.schedule import SparsitySchedule
    from .eager.replacement import replace_attention
    from .functional import attention, varlen_attention
    from .kernels.block_map import BlockMap
    from .kernels.order import Grid
    from .options import Options
    from .parallel.attention import Ranks, sharded_attention
    from .parallel.models import shard_attention
    from .report import Report
    from .rewriting import rewrite
    from .sharing.difference import compare_calibrations
    from .sharing.merging import merge_calibrations
    from .sharing.parts import calibration_part
    from .showing.clips import side_by_side
    from .showing.page import write_report
    from .showing.plots import plot_calibration, plot_survey
    from .showing.survey import survey
    from .thresholds.attachment import attach
    from .thresholds.calibration import Calibration
    from .thresholds.denoising import diffusers_callback
    from .thresholds.steps import set_step


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "calibrate":  # a module that can be called
        return import_module(".calibrate", __name__)
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
