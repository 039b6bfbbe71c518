"""``survey``: what thresholds do to a model on one batch. In: model, inputs, thresholds. Out: values, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backend import explain, sparge
from ..calibrate.inputs import arguments
from ..calibrate.record import without_gaps
from ..calibrate.steps import with_step_ends
from ..eager.observation import eager_calls_of
from ..errors import type_error, value_error
from ..options import Options
from ..report import Report
from ..running.observe import calls_through, watching
from ..thresholds.attachment import attach
from ..user_model import user_model
from .clips import clips_of
from .site_survey import SiteSurvey, Surveyor


@dataclass(frozen=True)
class Survey:
    """A model on one batch, under some thresholds. Printed, it is a table.

    Attributes:
        model: its class.
        device: where it ran, by name.
        calls: how often the batch called it; ``steps`` in how many steps of a run.
        sites: in the order in which they ran.
        report: what ``explain`` says of its first call.
        call_error: the relative L2 error ‖u − v‖ ÷ ‖v‖ of what the model's first call gives, on the same inputs.
        output_error: that of what the whole batch gives: after many steps another picture, perhaps no worse a one. Both
            are None where these are no numbers.
        dense, sparse: what the batch gives without us, and with these thresholds.
    """

    model: str
    device: str
    calls: int
    steps: int
    sites: tuple[SiteSurvey, ...]
    report: Report
    call_error: float | None
    output_error: float | None
    dense: Any
    sparse: Any

    @property
    def sparsity(self) -> float:
        """The share of visible key blocks that all sites skip, over the calls that were looked at."""
        visible = sum(site.visible for site in self.sites)
        return sum(site.sparsity * site.visible for site in self.sites) / visible if visible else 0.0

    @property
    def clips(self) -> dict[str, Any]:
        """What ``side_by_side`` takes, where the batch gives a diffusers pipeline's frames or images; else nothing."""
        return clips_of({"dense": self.dense, "sparse": self.sparse})

    @property
    def seconds(self) -> tuple[float, float]:
        """Attention of all timed sites in one call of the model, dense and sparse."""
        timed = [site.seconds for site in self.sites if site.seconds is not None]
        return sum(dense for dense, _ in timed), sum(sparse for _, sparse in timed)

    def __str__(self) -> str:
        from tabulate import tabulate

        dense, sparse = self.seconds
        error = "" if self.call_error is None else f"; error of its first call {self.call_error:.4f}"
        if self.output_error is not None and self.calls > 1:
            error += f", of the whole run {self.output_error:.4f}"
        head = f"{self.model} on {self.device}: {self.sparsity:.1%} of the blocks skipped{error}"
        if sparse:
            head += f"; attention {dense * 1e3:.1f} ms dense, {sparse * 1e3:.1f} ms sparse: {dense / sparse:.2f}x"
        headers = ("site", "shape B H L×S D", "calls", "sparsity", "error", "dense ms", "sparse ms")
        return f"{head}\n{tabulate([site.row() for site in self.sites], headers=headers, disable_numparse=True)}"


def survey(
    model: nn.Module,
    batch: Any,
    options: Mapping[str, Any] | Options | None = None,
    *,
    call: Callable[..., Any] | None = None,
    every: int = 1,
    timed: bool = True,
) -> Survey:
    """Look at what thresholds do to a model: which blocks are read where, for how long, and what comes of it.

    The batch runs three times: as it is; once more, dense, while block maps are made of each call's queries and keys;
    and sparse, uncompiled by Inductor. Maps, times and errors of sites are so on exact inputs; the output's error is
    what all of them together do.

    Args:
        model: the model, compiled or not, on its device and in evaluation mode.
        batch: its arguments, as ``calibrate`` takes a batch.
        options: the backend's: ``calibration``, or ``topk`` and ``topp``; ``min_seq_len`` and the others.
        call: what runs the batch, as a pipeline does; default: the model.
        every: look at every n-th call of the model.
        timed: measure dense and sparse seconds of each site, in the first call that is looked at.

    Raises:
        TypeError: no module.
        ValueError: no site that may become sparse, or ``every`` below 1.
    """
    target = user_model(model)
    if not isinstance(target, nn.Module):
        given = type(target).__name__
        raise type_error("survey: model", given=given, allowed="an nn.Module", todo="`call` may be any function.")
    if every < 1:
        raise value_error("survey: every", given=every, allowed="1 or more", todo="1 looks at each call.")
    settings = Options.parse(options)
    args, kwargs = arguments(batch)
    run = _Run(model, settings, call or model, args, kwargs)
    with torch.no_grad():
        dense = run.as_it_is()
        surveyor = Surveyor(target, settings, run.steps, every, timed)
        watched = watching(target, surveyor)

        def look(number: int, *given: Any, **named: Any) -> Any:
            if number % every:
                return model(*given, **named)
            surveyor.begin(number)
            with eager_calls_of(surveyor):
                return watched(*given, **named)

        run.through(look)
        sites = surveyor.sites()
        if not sites:
            raise value_error(
                "survey: model",
                given="no attention that may become sparse",
                allowed="attention of at least min_seq_len keys",
                todo=f"Give min_seq_len=0, or see why:\n{run.report}",
            )
        sparse = run.sparse()
    device = next((x.device for x in target.parameters()), torch.device("cpu"))
    return Survey(
        model=type(target).__name__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        calls=len(run.steps),
        steps=run.steps[-1] + 1,
        sites=sites,
        report=run.report,
        call_error=_relative_error(*reversed(run.firsts)),
        output_error=_relative_error(sparse, dense),
        dense=dense,
        sparse=sparse,
    )


class _Run:
    """A batch that is run again and again.

    ``steps``: the step of each call of the model, once it ran. ``firsts``: the numbers that its first call gave, as it
    is and sparse.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Options,
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._model, self._settings = model, settings
        self._call, self._args, self._kwargs = call, args, kwargs
        self.steps: list[int] = []
        self.firsts: list[list[Tensor]] = []
        self.report = Report()

    def through(self, own: Callable[..., Any], ended: Callable[[], None] = lambda: None) -> Any:
        """Run the batch; each call of the model goes through ``own``, which is told its number first."""
        numbers = iter(range(1 << 62))
        with calls_through(self._model, lambda *args, **kwargs: own(next(numbers), *args, **kwargs)):
            return with_step_ends(self._call, ended)(*self._args, **self._kwargs)

    def as_it_is(self) -> Any:
        """Run the model as it is; note its steps, and what ``explain`` says of the first call."""
        ended: list[int] = []
        at: list[int] = []

        def plain(number: int, *args: Any, **kwargs: Any) -> Any:
            if number == 0:
                self.report = explain(self._model, _at_start(self._settings))(*args, **kwargs)
            at.append(len(ended))
            return self._first(number, self._model(*args, **kwargs))

        output = self.through(plain, lambda: ended.append(1))
        if not at:
            raise value_error(
                "survey: model",
                given="one that the batch never reaches",
                allowed="the module that is called",
                todo="Give the module that `call` runs.",
            )
        self.steps = without_gaps(at) if ended else list(range(len(at)))
        return output

    def sparse(self) -> Any:
        """Run the model with its thresholds, step by step where they have phases or a plan."""
        settings, steps = self._settings, self.steps
        calibration = settings.calibration
        with ExitStack() as stack:
            handle = None
            if calibration is not None and (calibration.phases or calibration.schedule.dense_steps is not None):
                handle = stack.enter_context(attach(self._model, calibration))
                settings = replace(settings, calibration=None)
            options: Any = replace(settings, inner="eager", inductor={}, inductor_mode=None)
            compiled = torch.compile(self._model, backend=sparge, options=options)

            def run(number: int, *args: Any, **kwargs: Any) -> Any:
                if handle is not None:
                    handle.set_step(steps[number], steps[-1] + 1)
                return self._first(number, compiled(*args, **kwargs))

            return self.through(run)

    def _first(self, number: int, output: Any) -> Any:
        """An output as it is; what the first call gave is copied, since whoever called may write into it."""
        if number == 0:
            self.firsts.append([x.clone() for x in _numbers(output)])
        return output


def _at_start(settings: Options) -> Options:
    """The options with the thresholds of the start, for a look at one call."""
    calibration = None if settings.calibration is None else settings.calibration.at_progress(0)
    return replace(settings, calibration=calibration, dense_steps=None)


def _relative_error(changed: Any, exact: Any) -> float | None:
    """‖u − v‖ ÷ ‖v‖ over the floating tensors and arrays of two outputs; None where there are none, or other shapes."""
    u, v = (_numbers(output) for output in (changed, exact))
    if not v or [x.shape for x in u] != [x.shape for x in v]:
        return None
    error = sum(float((a - b).square().sum()) for a, b in zip(u, v, strict=True))
    norm = sum(float(b.square().sum()) for b in v)
    return (error / norm) ** 0.5 if norm > 0 else None


def _numbers(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    arrays = [torch.as_tensor(x) for x in leaves if getattr(getattr(x, "dtype", None), "kind", "") == "f"]
    return [x.double() for x in (*leaves, *arrays) if isinstance(x, Tensor) and x.is_floating_point()]
