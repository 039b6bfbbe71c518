"""What a calibration run is asked to do, checked: its aim, and how it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import value_error
from ..kernels.order import Tile
from ..options import Options
from ..thresholds.checks import check_aim
from ..thresholds.fronts import BY, MODES
from ..version import __version__
from .orders import shares_for

DEFAULT_ERROR = 0.05  # of a head's attention output: below it, images of video models were seen not to change


def parse_aim(aims: Mapping[str, float | None], by: str | None, mode: str) -> dict[str, Any]:
    """The fields of an ``Origin`` that say what is aimed at; the rest by default. ``aims`` are by name."""
    if all(value is None for value in aims.values()):
        aims = {"target_error": DEFAULT_ERROR}
    by = by or ("mean" if aims.get("target_error") is None else "worst")
    for name, value, allowed in (("by", by, BY), ("mode", mode, MODES)):
        if value not in allowed:
            raise value_error(
                f"calibrate: {name}",
                given=repr(value),
                allowed=", ".join(map(repr, allowed)),
                todo=f"Give one of them, or leave {name} out.",
            )
    return check_aim(aims, by, mode)


@dataclass(frozen=True)
class Settings:
    """The checked settings of a run beside the model and its inputs; see the arguments of ``calibrate``."""

    aim: Mapping[str, Any]
    phases: Sequence[float]
    options: Options
    query_blocks: int
    every: int
    memory: int  # MiB
    seed: int
    influence: bool | None = None  # None: for a sparsity by the mean, if the model allows
    orders: tuple[Tile | None, ...] = (None,)  # of tokens, which are tried where they are several

    def __post_init__(self) -> None:
        for name in ("query_blocks", "every", "memory"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise value_error(
                    f"calibrate: {name}",
                    given=repr(number),
                    allowed="a whole number, at least 1",
                    todo=f"Leave {name} out for a value that suits most models.",
                )
        starts = [float(start) for start in self.phases]
        if starts != sorted(set(starts)) or not all(0 < start < 1 for start in starts):
            raise value_error(
                "calibrate: phases",
                given=self.phases,
                allowed="ascending numbers in (0, 1)",
                todo="Give where each later phase begins.",
            )
        object.__setattr__(self, "phases", starts)
        if self.influence not in (None, True, False) or (self.influence is not None and self._influence_clashes()):
            raise value_error(
                "calibrate: influence",
                given=f"{self.influence!r} with {', '.join(f'{k}={v!r}' for k, v in self.aim.items())}",
                allowed="True or False with a sparsity; the output's error needs it, and by='worst' has no use for it",
                todo="Leave it out.",
            )

    @property
    def asks_model(self) -> bool:
        """Whether the model shall say how its output depends on its heads."""
        by_mean = "target_error" not in self.aim and self.aim["by"] == "mean"
        return by_mean if self.influence is None else self.influence

    def _influence_clashes(self) -> bool:
        needed, useless = "target_output_error" in self.aim, self.aim["by"] == "worst"
        return (needed and not self.influence) or (useless and bool(self.influence))

    def _kept(self) -> list[Any]:
        """What the options keep; nothing where they keep nothing."""
        options = self.options
        own = [options.keep_keys, options.dense_queries] if options.keep_keys is not None else []
        return own or ([dict(options.calibration.kept)] if options.calibration and options.calibration.kept else [])

    def of_samples(self, model: nn.Module) -> dict[str, Any]:
        """Return all that the samples of a batch depend on, for a folder of finished batches."""
        return {
            "version": __version__,
            "model": type(model).__qualname__,
            "options": [self.options.min_seq_len, self.options.additive_masks, self.options.grid, *self._kept()],
            **({"precision": self.options.precision} if self.options.precision else {}),
            "numbers": [self.query_blocks, self.every, self.seed],
            "orders": [self.orders, shares_for(self.aim.get("target_sparsity"))],
        }
