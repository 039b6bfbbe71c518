"""The bench of ``reproduce.py``: models that are compiled once and measured often, for one setup.

In: cases and their thresholds. Out: rows of figures. What is asked of them is in ``parts.py``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from by_step import ByStep, in_each
from case import KEY, QUALITY, Case, Table, key_of
from digits import noise_of
from distil import (
    Student,
    batches,
    fine_tune,
    guided_loss,
    held_out,
    held_out_error,
    in_pairs,
    inner,
    tiles_of,
    weights_of,
)
from lessons import Batch, Recalling, has_room
from measures import accuracy, flicker, load_classifier, measured_sparsity, psnr, ssim
from safetensors.torch import load_file
from torch import Tensor, nn
from train import precision
from transformer import compiled, load, sample

import sparge_compile
from sparge_compile import Calibration
from sparge_compile.kernels.order import Tile

AIMED = (0.5, 0.75, 1.0)  # shares of the steps after which thresholds are aimed anew

Aim = Callable[[nn.Module], Calibration]


class OutOfTime(Exception):
    """What comes next would not be done within the minutes that were given."""


class Lab:
    """The dense model, and students that take other weights. ``args`` are those of ``reproduce.py``."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.setup = args, device, args.setup
        self.kind = {"setup": args.setup, "frames": args.frames}  # of clips
        self.plain = load(device=device, setup=args.setup).requires_grad_(False)  # never compiled, never changed
        self.dense = compiled(self._copy(), backend=inner(device))
        self.classifier = load_classifier(device, args.setup)
        self.quality_table = Table(args.out, "quality")
        self._students: dict[tuple[Tile | None, ...], Student] = {}
        self.teacher = Recalling(self.dense)
        self._seed: int | None = None  # of what is kept
        self._lessons: list[Batch] = []  # that the teacher was asked about
        self._held_out: list[Batch] = []
        self._dense_samples: tuple[int, Tensor] | None = None
        self.drawn: Tensor | None = None  # the samples of the model that was measured last
        self._began, self._pace = time.perf_counter(), {"step": 0.0, "rest": 0.0}  # seconds

    def _copy(self) -> nn.Module:
        return load(device=self.device, setup=self.setup).requires_grad_(False)

    # ---- models

    @cached_property
    def free(self) -> nn.Module:
        """A dense model that takes other weights."""
        return compiled(self._copy(), backend=inner(self.device))

    def copy_of(self, model: nn.Module) -> nn.Module:
        """An uncompiled dense model with the weights of a student."""
        copy = self._copy()
        copy.load_state_dict(model.state_dict(), strict=False)  # without the thresholds
        return copy

    def student(self, calibration: Calibration) -> Student:
        """The one whose layers have the tiles of these thresholds."""
        tiles = tiles_of(self.setup, calibration)
        if tiles not in self._students:
            self._students[tiles] = Student(self.setup, self.device, tiles, self.args.frames)
        return self._students[tiles]

    def sparse(self, calibration: Calibration) -> nn.Module:
        """A student with the teacher's weights, and these thresholds."""
        return self.student(calibration).set(calibration)

    def called(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        """What is called: a student whose thresholds have phases gets those of the times that it is called with."""
        return ByStep(model, self.student(calibration).attached, self.setup.shift) if calibration.phases else model

    def shipped(self) -> tuple[Calibration, nn.Module]:
        """The distilled student of the repository, and its thresholds."""
        calibration = Calibration.load(self.setup.weights / "student.json")
        weights = load_file(self.setup.weights / "student.safetensors", str(self.device))
        return calibration, self.student(calibration).set(calibration, weights)

    def tuned(
        self,
        case: Case,
        seed: int,
        calibration: Calibration | None,
        aim: Aim | None = None,
        weights: dict[str, Tensor] | None = None,
        data: Iterator[Batch] | None = None,
    ) -> nn.Module:
        """The student, or without thresholds the dense model, fine-tuned from the teacher's weights but for those that
        are given, on the case's batches or others. ``aim`` gives thresholds for what it has become."""
        if calibration is None:
            model = self.free
            model.load_state_dict(self.plain.state_dict())
        else:
            model = self.student(calibration).set(calibration, weights)
        trained = weights_of(model, case.trained)
        for each in trained.values():
            each.requires_grad_(True)
        data = data or self.lessons(case, seed)
        how: dict[str, Any] = {"every": max(1, case.steps // 4), "say": lambda text: print(f"    {text}", flush=True)}
        if calibration is not None and not calibration.phases:
            attached = self.student(calibration).attached
            schedule = sparge_compile.SparsitySchedule(attached, round(case.anneal * case.steps))
            aimed = {math.ceil(share * case.steps) for share in AIMED} if aim else set()

            def after(step: int) -> None:
                schedule.step()
                if step in aimed and aim:
                    attached.set(aim(model))

            how["after"] = after
        called = model if calibration is None else self.called(model, calibration)
        assert calibration is None or not (calibration.phases and case.anneal), "a schedule has no phases"
        if case.loss == "distillation":
            teacher = self._copy() if case.outputs else self.teacher  # outputs: the hook compiles it as it needs it
            with sparge_compile.DistillationHook(
                model, teacher, layers=case.outputs, compile=bool(case.outputs)
            ) as hook:
                fine_tune(called, trained.values(), data, case.steps, case.rate, lambda *_: hook.loss(), **how)
        elif case.loss == "guided":
            fine_tune(called, trained.values(), self.taught(data), case.steps, case.rate, guided_loss, **how)
        else:
            fine_tune(
                called, trained.values(), data, case.steps, case.rate, lambda u, v: F.mse_loss(u.float(), v), **how
            )
        model.requires_grad_(False)
        return model

    # ---- inputs

    def _of(self, seed: int) -> None:
        """Let go what was kept of another seed."""
        if self._seed != seed:
            self._seed = seed
            self._lessons.clear()
            self._held_out.clear()
            self.teacher.forget()

    def lessons(self, case: Case, seed: int) -> Iterator[Batch]:
        """The batches that a case trains on; those of matched data are kept for the next case."""
        self._of(seed)
        how: dict[str, Any] = {"size": self.args.batch, "device": self.device, "seed": seed, **self.kind}
        if case.loss == "guided":
            yield from map(in_pairs, batches(case.steps, **how))
            return
        if case.data != "matched":
            yield from batches(case.steps, shifted=True, **how)
            return
        kept = self._lessons[: case.steps]
        yield from kept
        for number, each in enumerate(batches(case.steps, first=len(kept), **how), len(kept)):
            if number == len(self._lessons) and has_room(number, self.device):
                self._lessons.append(each)
            yield each

    def taught(self, lessons: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches with the teacher's velocities."""
        for mixed, when, _, classes in lessons:
            with precision(self.device):
                said = self.teacher(mixed, when, classes)
            yield mixed, when, said, classes

    def seen(self, seed: int, count: int = 2) -> list[tuple[Tensor, ...]]:
        """What thresholds are chosen by: noisy clips of digits that the model was trained on, times, velocities,
        classes."""
        return list(batches(count, self.args.batch, self.device, 900 + seed, **self.kind))

    def held_out(self, seed: int) -> Iterator[Batch]:
        self._of(seed)
        if not self._held_out:
            self._held_out.extend(held_out(self.args.rounds, self.args.batch, self.device, seed, **self.kind))
        return iter(self._held_out)

    # ---- figures

    @torch.no_grad()
    def samples(self, model: Callable[..., Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Clips and their classes, ``rounds`` times batch / 2 of them."""
        count, device, frames = self.args.batch // 2, self.device, self.args.frames
        given = [noise_of(self.setup, 1_000 * seed + n, count, device, frames) for n in range(self.args.rounds)]
        with precision(device):
            videos = [sample(model, *each, self.args.sample_steps, shift=self.setup.shift) for each in given]
        return torch.cat(videos), torch.cat([classes for _, classes in given])

    def dense_samples(self, seed: int) -> Tensor:
        if self._dense_samples is None or self._dense_samples[0] != seed:
            self._dense_samples = seed, self.samples(self.dense, seed)[0]
        return self._dense_samples[1]

    def sparsity(self, calibration: Calibration, clips: Batch, plain: nn.Module | None = None) -> float:
        """Of these thresholds in an uncompiled dense model, the teacher if none is given, on a batch of ``seen`` or
        ``held_out``; of phases the mean over the steps of sampling."""
        if calibration.phases:
            counted = in_each(self.args.sample_steps)
            of = {start: self.sparsity(calibration.at_progress(start), clips, plain) for start in set(counted)}
            return statistics.fmean(of[start] for start in counted)
        mixed, when, _, classes = clips
        with precision(self.device):
            return measured_sparsity(plain or self.plain, calibration, (mixed, when, classes))

    def quality(self, model: nn.Module, seed: int, sparsity: float) -> dict[str, float]:
        """The row of a model in evaluation mode."""
        dense = self.dense_samples(seed)
        video, classes = self.samples(model, seed)
        self.drawn = video
        values = (
            sparsity,
            *held_out_error(model, self.teacher, self.held_out(seed)),
            psnr(video, dense).mean().item(),
            ssim(video, dense).mean().item(),
            accuracy(self.classifier, video, classes).mean().item(),
            flicker(video).mean().item(),
        )
        return dict(zip(QUALITY, values, strict=True))

    # ---- results

    def has(self, case: Case, seed: int) -> bool:
        return self.quality_table.has(*key_of(case, seed))

    def measure(self, case: Case, seed: int, calibration: Calibration | None, aim: Aim | None = None) -> nn.Module:
        """Add the row of a model, fine-tuned if the case says so; None: of a dense one. Gives the model. Where training
        moves what thresholds keep, ``aim`` gives those for the model as it is, and training goes on with them.

        Raises:
            OutOfTime: it would take longer than what is left, as far as earlier ones tell.
        """
        self.check_time(case.name, case.steps * self._pace["step"] + self._pace["rest"])
        start = time.perf_counter()
        model = self.tuned(case, seed, calibration, aim) if case.steps else self.sparse(calibration)
        trained = time.perf_counter()
        sparsity = 0.0
        if calibration is not None:
            calibration = self.student(calibration).attached.get()
            sparsity = self.sparsity(calibration, next(self.held_out(seed)), self.copy_of(model))
        self.add(case, seed, self.quality(model, seed, sparsity), calibration)
        if case.steps:
            self._pace["step"] = (trained - start) / case.steps
        self._pace["rest"] = time.perf_counter() - trained
        return model

    def check_time(self, what: str, seconds: float) -> None:
        """Raise OutOfTime where something would take longer than what is left."""
        if time.perf_counter() - self._began + seconds > 60 * self.args.minutes:
            raise OutOfTime(f"{what} would take {seconds:.0f} s")

    def add(self, case: Case, seed: int, found: dict[str, float], calibration: Calibration | None = None) -> None:
        phases = () if calibration is None else calibration.all_phases().values()
        pairs = {pair for sites in phases for pairs in sites.values() for pair in pairs}
        pair = "{:.5g}, {:.5g}".format(*pairs.pop()) if len(pairs) == 1 else ""
        self.quality_table.add([{**dict(zip(KEY, key_of(case, seed), strict=True)), "pair": pair, **found}])
        text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        print(f"[{time.perf_counter() - self._began:6.1f} s] {case.part}, seed {seed}: {case.name}: {text}", flush=True)
