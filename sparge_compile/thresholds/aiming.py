"""Another aim for the same measurements. In: an origin, an aim, influence. Out: an origin with that aim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ..errors import value_error
from ..pair import Sites
from .checks import check_aim, check_influence
from .measured import Origin
from .output import ModelOutput


def aimed_anew(
    origin: Origin | None,
    sites: Sites,
    aims: Mapping[str, float | None],
    by: str | None,
    influence: Mapping[str, Sequence[float]] | Literal[False] | None,
) -> Origin:
    """Return an origin with another aim; the arguments are those of ``Calibration.at``.

    Raises:
        ValueError: as ``Calibration.at``.
    """
    if origin is None:
        raise value_error(
            "this calibration cannot be aimed anew",
            given="thresholds without measurements",
            allowed="what sparge_compile.calibrate or `sparge calibrate` made",
            todo="Calibrate the model.",
        )
    before = origin
    if influence is False:
        origin = replace(origin.aimed({"target_sparsity": 0.0}), output=None)
    elif influence is not None:
        check_influence(influence, sites, target_error=aims["target_error"], by=by)
        given = ModelOutput({name: tuple(each) for name, each in influence.items()})
        origin = replace(origin, output=given)
    of_output = aims["target_output_error"]
    if of_output is not None and origin.output is None:
        raise value_error(
            "this calibration says nothing of the model's output",
            given=f"target_output_error={of_output}",
            allowed="one that was made with target_output_error, or target_sparsity by the mean",
            todo="Calibrate with target_output_error, or give the influence of heads.",
        )
    if influence or of_output is not None:
        by = by or "mean"
    return origin.aimed(check_aim(aims, by or before.by, before.mode))
