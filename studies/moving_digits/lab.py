"""The bench of ``reproduce.py``: tables of results on disk, and models that are compiled once and measured often.

In: weights and thresholds. Out: a row of figures. What is asked of them is in ``reproduce.py``.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import CLASSES, SIDE
from distil import LR, LR_ATTENTION, attention_weights, batches, fine_tune, held_out, held_out_error, precision
from measures import accuracy, flicker, load_classifier, measured_sparsity, psnr, ssim
from torch import Tensor, nn
from transformer import WEIGHTS, load, sample

import sparge_compile

QUALITY = ("sparsity", "velocity error", "flow loss", "PSNR", "SSIM", "digits read", "flicker")
BUFFER = 1 << 20  # bytes: what is added to a table is written at once, also beside another process


class Table:
    """A CSV file of results; a row is known by the columns of its key. Several processes may add to one file."""

    def __init__(self, path: Path, key: tuple[str, ...], values: tuple[str, ...]) -> None:
        self.path, self.key, self.columns = path, key, (*key, *values)
        self.done: set[tuple[str, ...]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(self.columns)
        except FileExistsError:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != self.columns:
                    raise SystemExit(f"{path} has other columns than {', '.join(self.columns)}: move it away") from None
                self.done = {tuple(row[name] for name in key) for row in reader}

    def has(self, *key: object) -> bool:
        return tuple(map(_text, key)) in self.done

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; those that are there already stay as they are."""
        with self.path.open("a", newline="", buffering=BUFFER) as file:
            writer = csv.writer(file, lineterminator="\n")
            for row in rows:
                key = tuple(_text(row[name]) for name in self.key)
                if key not in self.done:
                    writer.writerow([_text(row[name]) for name in self.columns])
                    self.done.add(key)


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class Lab:
    """The dense model, and a sparse and a dense one that take other weights; each is compiled once.

    ``args`` are those of ``reproduce.py``.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        inner = "inductor" if device.type == "cuda" else "eager"
        self.teacher, self.model, self.free = (load(device=device).requires_grad_(False) for _ in range(3))
        self.attached = sparge_compile.attach(self.model, everywhere((0.1, 0.1)))
        options = {"min_seq_len": 0, "inner": inner}
        self.student = torch.compile(self.model, backend="sparge", fullgraph=True, dynamic=False, options=options)
        self.dense = torch.compile(self.teacher, backend=inner, fullgraph=True, dynamic=False)
        self.full = torch.compile(self.free, backend=inner, fullgraph=True, dynamic=False)
        self.classifier = load_classifier(device)
        self.quality_table = Table(
            args.out / "quality.csv",
            ("part", "seed", "rule", "thresholds", "target", "loss", "data", "trained"),
            ("pair", *QUALITY),
        )
        self._dense_samples: tuple[int, Tensor] | None = None
        self._began = time.perf_counter()

    # ---- models

    def sparse(self, calibration: sparge_compile.Calibration) -> nn.Module:
        """The compiled student with the teacher's weights, and these thresholds."""
        self.model.load_state_dict(self.teacher.state_dict(), strict=False)  # the thresholds are buffers
        self.attached.set(calibration)
        return self.student.eval()

    def shipped(self) -> tuple[sparge_compile.Calibration, nn.Module]:
        """The distilled student of the repository, and its thresholds."""
        calibration = sparge_compile.Calibration.load(WEIGHTS / "student.json")
        student = self.sparse(calibration)
        self.model.load_state_dict(load("student").state_dict(), strict=False)
        return calibration, student

    def tuned(
        self,
        seed: int,
        calibration: sparge_compile.Calibration | None,
        steps: int,
        *,
        loss: str = "distillation",
        shifted: bool = False,
        all_weights: bool = True,
        lr: float | None = None,
    ) -> nn.Module:
        """The student, or without thresholds the dense model, after some steps from the teacher's weights."""
        if calibration is None:
            self.free.load_state_dict(self.teacher.state_dict())
            model, student = self.free, self.full
        else:
            model, student = self.model, self.sparse(calibration)
        trained = dict(model.named_parameters()) if all_weights else attention_weights(model)
        for each in trained.values():
            each.requires_grad_(True)
        data = batches(steps, self.args.batch, self.device, seed, frames=self.args.frames, shifted=shifted)
        lr = lr or (LR if all_weights else LR_ATTENTION)
        if loss == "distillation":
            with sparge_compile.DistillationHook(student, self.dense, compile=False) as hook:  # it is compiled
                fine_tune(student, trained.values(), data, steps, lr, lambda *_: hook.loss(), every=steps)
        else:
            fine_tune(student, trained.values(), data, steps, lr, lambda u, v: F.mse_loss(u.float(), v), every=steps)
        model.requires_grad_(False)
        return student

    # ---- inputs

    def seen(self, seed: int, count: int = 2) -> list[tuple[Tensor, ...]]:
        """What thresholds are chosen by: noisy clips of digits that the model was trained on, times, velocities,
        classes."""
        return list(batches(count, self.args.batch, self.device, 900 + seed, frames=self.args.frames))

    def held_out(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        return held_out(self.args.rounds, self.args.batch, self.device, seed, frames=self.args.frames)

    def noise(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """Noise [batch / 2, T, 64, 64] and classes of one round of sampling."""
        count = self.args.batch // 2
        generator = torch.Generator().manual_seed(1_000 * seed + number)
        noise = torch.randn(count, self.args.frames, SIDE, SIDE, generator=generator)
        chosen = torch.rand(count, CLASSES, generator=generator).argsort(-1)[:, :2]
        return noise.to(self.device), F.one_hot(chosen, CLASSES).sum(1).float().to(self.device)

    # ---- figures

    @torch.no_grad()
    def samples(self, model: Callable[..., Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Clips and their classes, ``rounds`` times batch / 2 of them."""
        given = [self.noise(seed, number) for number in range(self.args.rounds)]
        with precision(self.device):
            videos = [sample(model, noise, classes, self.args.sample_steps) for noise, classes in given]
        return torch.cat(videos), torch.cat([classes for _, classes in given])

    def dense_samples(self, seed: int) -> Tensor:
        if self._dense_samples is None or self._dense_samples[0] != seed:
            self._dense_samples = seed, self.samples(self.dense, seed)[0]
        return self._dense_samples[1]

    def sparsity(self, calibration: sparge_compile.Calibration, clips: tuple[Tensor, ...]) -> float:
        """Of the sparse model with the weights that it has, on a batch of ``seen`` or ``held_out``."""
        mixed, when, _, classes = clips
        with precision(self.device):
            return measured_sparsity(self.model, calibration, (mixed, when, classes))

    def quality(self, model: nn.Module, seed: int, sparsity: float) -> dict[str, float]:
        """The row of a model in evaluation mode."""
        video, classes = self.samples(model, seed)
        dense = self.dense_samples(seed)
        values = (
            sparsity,
            *held_out_error(model, self.dense, self.held_out(seed)),
            psnr(video, dense).mean().item(),
            ssim(video, dense).mean().item(),
            accuracy(self.classifier, video, classes).mean().item(),
            flicker(video).mean().item(),
        )
        return dict(zip(QUALITY, values, strict=True))

    # ---- results

    def has(self, *key: object) -> bool:
        return self.quality_table.has(*key)

    def measure(
        self,
        key: tuple[object, ...],
        seed: int,
        calibration: sparge_compile.Calibration | None,
        steps: int = 0,
        **training: Any,
    ) -> nn.Module:
        """Add the row of a sparse model, after some steps of training (see ``tuned``) if there are any; None: of the
        dense model. Gives the model."""
        if steps or calibration is None:
            model = self.tuned(seed, calibration, steps, **training)
        else:
            model = self.sparse(calibration)
        sparsity = 0.0 if calibration is None else self.sparsity(calibration, next(self.held_out(seed)))
        self.add(key, self.quality(model, seed, sparsity), calibration)
        return model

    def add(
        self,
        key: tuple[object, ...],
        found: dict[str, float],
        calibration: sparge_compile.Calibration | None = None,
    ) -> None:
        pairs = set() if calibration is None else {pair for pairs in calibration.sites.values() for pair in pairs}
        pair = "{:.5g}, {:.5g}".format(*pairs.pop()) if len(pairs) == 1 else ""
        self.quality_table.add([{**dict(zip(self.quality_table.key, key, strict=True)), "pair": pair, **found}])
        text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        print(f"[{time.perf_counter() - self._began:6.1f} s] {' · '.join(map(str, key))}: {text}", flush=True)


def everywhere(pair: tuple[float, float], heads: int = 4) -> sparge_compile.Calibration:
    """One pair for all heads of the model."""
    return sparge_compile.Calibration({"*": [pair] * heads})
