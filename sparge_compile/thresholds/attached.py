"""What ``attach`` gives back: the thresholds on a model's modules, to be changed while it runs, and taken off."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import value_error
from ..keeping import WIDTH, Kept
from ..kernels.order import Tile
from ..pair import check_pair, check_progress
from ..user_model import was_compiled
from .buffers import Attached, attached_to, child_of, put_child, remove_child
from .calibration import Calibration
from .followed import GridHook, Grids
from .phases import DENSE_STEP, Phases, keeps_all
from .setting import Held, phases_to_set
from .steps import check_step
from .targets import Target, find_targets, fits_module, modules_of, near_names, site_name

logger = logging.getLogger("sparge_compile")


class Attachment:
    """Thresholds that :func:`attach` put on a model. A context manager: leaving it is ``remove``.

    Whoever makes one sees to it that code is not used that was compiled before (:func:`compile_anew`).
    """

    def __init__(self, model: nn.Module, calibration: Calibration, grid: Grids | None = None) -> None:
        self._model = model
        self._grids = None if grid is None else GridHook(grid)
        modules = modules_of(model)
        entries = find_targets(model, calibration)
        self._sites = {(name, index): modules[name] for name, index in entries}
        _check_names(calibration, grid, modules)
        _warn_of_two_names(calibration, entries, modules)
        self._phases = Phases.of(calibration, calibration.schedule, lambda phase: find_targets(model, phase))
        for (name, index), values in self._phases.values(0).items():
            target = name, index
            child = child_of(modules[name], name)
            child.put(index, values.to(_device(modules[name], model)).expand(self._phases.most_rows(target), -1))
            child.entries[index] = entries[target]
            if (tile := calibration.tiles.get(entries[target])) is not None:
                child.tiles[index] = tile
            if (planned := self._phases.planned(target)) is not None:
                child.planned[index] = planned
            if self._grids is not None:
                child.grid = self._grids.of(site_name(target))
        self._hook: RemovableHandle | None = None
        self._follow_grids(True)
        self._begin(self._phases.first)

    @property
    def model(self) -> nn.Module:
        """The model that the thresholds are on."""
        return self._model

    @property
    def names(self) -> tuple[str, ...]:
        """The sites with thresholds; ``#*`` stands for all attentions of a module that have none of their own."""
        return tuple(map(site_name, self._sites))

    def set(
        self,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        *,
        topk: float | None = None,
        topp: float | None = None,
    ) -> None:
        """Write new values into the buffers: the next call uses them, and nothing is compiled anew.

        Args:
            calibration: new thresholds for the sites that it names; the others keep what they have now. Its phases, if
                any, take the place of those that were there; its first one holds.
            topk, topp: instead, a number for all heads of all sites, in every phase. The one that is not given keeps
                its values.

        Raises:
            ValueError: a name or pattern that fits none of the attached sites, another number of heads, or a value out
                of range. Nothing is changed then.
        """
        if (calibration is None) == (topk is None and topp is None):
            raise value_error(
                "set needs new thresholds",
                given="nothing" if calibration is None else "a calibration and numbers",
                allowed="a calibration, or topk and topp",
                todo="Give one of the two.",
            )
        if calibration is None:
            self._set_numbers(topk, topp)
        else:
            self._set_calibration(Calibration.parse(calibration))

    def _set_numbers(self, topk: float | None, topp: float | None) -> None:
        check_pair(1.0 if topk is None else topk, 0.0 if topp is None else topp, "set")
        numbers = [(column, number) for column, number in enumerate((topk, topp)) if number is not None]
        for column, number in numbers:
            self._phases.put(column, number)
        for (name, index), values in self._buffers().items() if self._phase != DENSE_STEP else ():
            if self._phases.is_dense_layer((name, index)):
                continue
            present = values.clone()
            for column, number in numbers:
                present[:, column] = number
            self._held(name, index).write(index, present)

    def _set_calibration(self, calibration: Calibration) -> None:
        buffers = self._buffers()
        held = Held(
            buffers, self._phases.schedule, {target: self._held(*target).tile_of(target[1]) for target in buffers}
        )
        own, phases = phases_to_set(calibration, held)
        if phases.schedule.dense_steps is not None:  # what has no new thresholds comes back after dense steps
            before = self._phases.values(0) if self._phase == DENSE_STEP else {}
            others = {target: values for target, values in buffers.items() if target not in own}
            phases.add({target: before.get(target, values).cpu().clone() for target, values in others.items()})
        self._phases = phases
        self._begin(phases.first)

    def set_progress(self, fraction: float) -> None:
        """Say how much of a denoising run is done, in [0, 1]: the buffers get the thresholds of that phase.

        It is the share of the steps in which this model is called: of two experts that share a run, each has its own.
        Nothing is compiled anew. Without phases nothing changes.

        Raises:
            ValueError: a progress out of range; dense steps, which are known by their number alone.
        """
        check_progress(fraction)
        if self._phases.schedule.dense_steps is not None:
            raise value_error(
                "set_progress: some steps are dense by plan",
                given=f"a share of the run, and dense steps {self._phases.schedule.dense_steps}",
                allowed="the number of a step",
                todo="Call set_step(step, steps); diffusers_callback does.",
            )
        self._go_to(self._phases.at_progress(fraction))

    def set_step(self, step: int, steps: int) -> None:
        """Say which step of a denoising run begins, from 0 on, of so many in which this model is called.

        What :meth:`set_progress` does for step ÷ steps; and steps that are dense by plan are.

        Raises:
            ValueError: numbers that are none of a step in a run.
        """
        check_step(step, steps)
        self._go_to(self._phases.at_step(step, steps))

    def _go_to(self, phase: int) -> None:
        if phase != self._phase:
            self._begin(phase)

    def _begin(self, phase: int) -> None:
        """Write what holds in a phase, and have those sites that keep everything in it run dense."""
        for (name, index), values in self._phases.values(phase).items():
            held = self._held(name, index)
            held.write(index, values, dense=index in held.planned and keeps_all(values))
        self._phase = phase

    def _held(self, name: str, index: int) -> Attached:
        held = attached_to(self._sites[name, index])
        assert held is not None, f"{name} lost its thresholds"
        return held

    def get(self) -> Calibration:
        """Return the present values of the buffers as a calibration."""
        rows = {name: values.tolist() for name, values in self.buffers().items()}
        kept = {name: Kept.of(each[0][2:]) for name, each in rows.items() if len(each[0]) == WIDTH}
        tiles = {site_name(target): self._held(*target).tile_of(target[1]) for target in self._buffers()}
        return Calibration(
            {name: tuple((row[0], row[1]) for row in each) for name, each in rows.items()},
            kept=kept,
            tiles={name: tile for name, tile in tiles.items() if tile is not None},
        )

    @property
    def has_phases(self) -> bool:
        """Whether ``set_progress`` or ``set_step`` changes anything."""
        return self._phases.several

    def buffers(self) -> dict[str, Tensor]:
        """Return the attached thresholds by site: the buffers, to be written in place.

        float32 [H, 2], or [1, 2] for all heads; [H or 1, 6] where the calibration keeps tokens (docs/design.md).
        """
        return {site_name(target): values for target, values in self._buffers().items()}

    def set_tiles(self, tiles: Mapping[str, Tile | None]) -> None:
        """Say which tiles the thresholds of sites are for, None: raster order. A graph is compiled for each order."""
        for target in self._sites:
            if (name := site_name(target)) in tiles:
                held, tile = self._held(*target), tiles[name]
                others = {index: known for index, known in held.tiles.items() if index != target[1]}
                held.tiles = others if tile is None else {**others, target[1]: tile}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Sites without buffers and hooks, which come back as they were: code that was compiled with them fits.

        Raises:
            ValueError: in the end, where somebody attached others meanwhile; these stay.
        """
        held = {module: attached_to(module) for module in self._sites.values()}
        for module in held:
            remove_child(module)
        self._follow_grids(False)
        try:
            yield
        finally:
            others = [site_name(target) for target, module in self._sites.items() if attached_to(module) is not None]
            if others:
                self._sites = {}
                raise value_error(
                    "attach: thresholds were attached while others were off the model for a while",
                    given=", ".join(others),
                    allowed="those of one call of attach at a time",
                    todo="Call remove() of what attach returned before you go on; attach when calibrate is done.",
                )
            for module, child in held.items():
                assert child is not None
                put_child(module, child)
            self._follow_grids(True)

    def remove(self) -> None:
        """Take buffers and hooks off the model, whose sites then have the option ``calibration`` or the defaults."""
        for (_, index), module in self._sites.items():
            child = attached_to(module)
            if child is None:
                continue
            child.drop(index)
            if self._grids is not None and child.grid in self._grids.grids:
                child.grid = None
            if not child.indices:
                remove_child(module)
        self._sites = {}
        self._follow_grids(False)
        compile_anew(self._model)

    def _follow_grids(self, follows: bool) -> None:
        """Put the hook that follows grids on the model, if it is to have one, or take it off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._grids.hook(self._model) if follows and self._grids is not None else None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attachment({', '.join(self.names)})"

    def _buffers(self) -> dict[Target, Tensor]:
        buffers = {target: self._held(*target).get(target[1]) for target in self._sites}
        return {target: values for target, values in buffers.items() if values is not None}


def _check_names(calibration: Calibration, grid: Grids | None, modules: Mapping[str, nn.Module]) -> None:
    """Check that what is dense by plan, and what grids are given for, are modules of the model.

    Raises:
        ValueError: a name or pattern that fits no module; the message lists names that are near.
    """
    layers = calibration.schedule.dense_layers
    grids = grid if isinstance(grid, Mapping) else {}
    for what, entries in {"dense_layers": () if isinstance(layers, int) else layers, "grid": grids}.items():
        missed = [entry for entry in entries if not fits_module(entry, modules)]
        if missed:
            raise value_error(
                f"attach: {what} for modules that the model does not have",
                given=", ".join(map(repr, missed)),
                allowed=f"modules that may compute attention, as {', '.join(near_names(missed, modules))}",
                todo="sparge_compile.explain(model)(...) lists the sites.",
            )


def _warn_of_two_names(
    calibration: Calibration, entries: Mapping[Target, str], modules: Mapping[str, nn.Module]
) -> None:
    """Warn where a module has several names with different thresholds: its buffers hold those of the last one."""
    each: dict[tuple[nn.Module, int], list[Target]] = {}
    for target in entries:
        each.setdefault((modules[target[0]], target[1]), []).append(target)

    def given(target: Target) -> list[Any]:
        entry = entries[target]
        by_phase = (sites.get(entry) for sites in (calibration.sites, *calibration.phases.values()))
        return [*by_phase, calibration.tiles.get(entry)]

    for targets in each.values():
        *others, last = targets
        if any(given(target) != given(last) for target in others):
            warnings.warn(
                f"sparge: {' and '.join(map(site_name, targets))} are one module, whose thresholds are those of "
                f"{site_name(last)}. The option 'calibration' tells them apart, where the whole model is compiled.",
                stacklevel=4,
            )


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where a module computes, as far as it is known: where accelerate will run it, else where its weights are."""
    if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
        return torch.device(device)
    tensors = (*module.parameters(), *module.buffers(), *model.parameters())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def compile_anew(model: nn.Module) -> None:
    """Drop compiled code if there is any for this model: Dynamo's guards do not see that a hook came or went."""
    if was_compiled(model):
        logger.info("sparge: thresholds were attached to or removed from a compiled model; it is compiled anew")
        torch._dynamo.reset()
