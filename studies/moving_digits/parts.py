"""The parts of ``reproduce.py``: what is asked of a model. Each adds rows to tables of a folder, those that lack.

A part takes the lab and a seed, and gives nothing back.
"""

from __future__ import annotations

import itertools
import math
from fnmatch import fnmatch
from pathlib import Path

import torch
import torch.nn.functional as F
from attention_study import error_split, ranking_gaps, record, synthetic
from case import ALL, ATTENTION, QUALITY, Case, Table
from choose import KINDS, calibrated, one_pair, thresholds
from digits import HELD_OUT_SEED, clips
from distil import everywhere, held_out_error
from lab import Lab
from measures import accuracy, flicker, psnr, ssim
from pictures import sheet
from tabular import RULES
from torch import Tensor
from train import precision
from transformer import load

import sparge_compile

SPARSITIES = (0.95, 0.9, 0.97, 0.8, 0.85)  # the paper's first
MILD_TO_HIGH = (0.3, 0.4, 0.5, 0.6, 0.68, 0.75, 0.8, 0.84, 0.88, 0.9, 0.95)
CHOSEN = (0.84, 0.6, 0.95, 0.88, 0.68)
ORDERS = ("raster", "tiles")
DENSITIES = (0.03, 0.05, 0.1, 0.2, 0.5)
STRUCTURES = ("uniform", "skewed", "clustered", "local")
PAIRS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.0), (0.5, 0.4), (0.5, 0.6), (0.5, 0.8), (0.6, 0.7), (0.7, 0.8))  # topk, topp
BOUNDS = (0.05, 0.1)  # on the error of each head's attention output
STUDENTS = (0.9, 0.95, 0.97)
TRIED = {ALL: (3e-4, 6e-4, 1e-3, 2e-3), ATTENTION: (1e-3, 2e-3, 4e-3)}  # learning rates
STUDIED, SHOWN = 2, 6  # clips: of the study of attention, of a picture


def attention(lab: Lab, seed: int) -> None:
    """What selection costs in attention itself, layer by layer, and what other rankings would cost; on real inputs and
    on inputs of known structure."""
    structures(lab, seed)
    split, ranking = Table(lab.args.out, "error_split"), Table(lab.args.out, "ranking")
    mixed, when, _, classes = next(lab.held_out(seed))
    with precision(lab.device):
        sites = record(lab.plain, mixed[:STUDIED], when[:STUDIED], classes[:STUDIED])
    for site in sites:
        heads = site.q.shape[1]
        if ranking.has(seed, site.name, heads - 1, DENSITIES[-1], "tiles oracle"):
            continue
        rows = []
        for kept in DENSITIES:
            terms = error_split(site, kept)
            for head in range(heads):
                found = {name: terms[name][head].item() for name in split.values}
                rows.append({"seed": seed, "site": site.name, "head": head, "density": kept, **found})
        split.add(rows)
        found_ranking = ranking_gaps(site, DENSITIES, seed=seed)
        ranking.add({"seed": seed, **row} for row in found_ranking)
        print(f"seed {seed}: studied {site.name}", flush=True)


def structures(lab: Lab, seed: int) -> None:
    table = Table(lab.args.out, "structures")
    for structure in STRUCTURES:
        if table.has(seed, structure, *PAIRS[-1]):
            continue
        length = math.prod(lab.setup.grid(lab.args.frames))
        q, k, v = synthetic(structure, length, seed=seed, device=lab.device)
        dense = F.scaled_dot_product_attention(q, k, v)
        for topk, topp in PAIRS:
            sparse, sparsity = sparge_compile.attention(q, k, v, topk=topk, topp=topp, return_sparsity=True)
            errors = (sparse - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
            row = {"seed": seed, "structure": structure, "topk": topk, "topp": topp}
            row |= {"sparsity": sparsity.item(), "error": errors.mean().item(), "worst head": errors.max().item()}
            table.add([row])


def floor(lab: Lab, seed: int) -> None:
    """Dense values, how far apart samples of other noise are, and what the reader makes of rendered clips."""

    def add(kind: str, **found: float) -> None:
        lab.add(Case("floor", kind, loss=""), seed, dict.fromkeys(QUALITY, math.nan) | found)

    if lab.has(Case("floor", "rendered clips", loss=""), seed):
        return
    add("dense", **lab.quality(lab.dense, seed, 0.0))
    dense = lab.dense_samples(seed)
    other = dense.roll(1, 0)
    add("dense, other noise and classes", PSNR=psnr(other, dense).mean().item(), SSIM=ssim(other, dense).mean().item())
    number = HELD_OUT_SEED + 500 + seed
    video, classes = clips(len(dense), number, lab.device, held_out=True, **lab.kind)
    read = accuracy(lab.classifier, video, classes).mean().item()
    add("rendered clips", flicker=flicker(video).mean().item(), **{"digits read": read})


def rounded(lab: Lab, seed: int) -> None:
    """The dense model whose weights and activations are in bfloat16."""
    case = Case("floor", "dense, weights in bfloat16", loss="")
    if not lab.has(case, seed):
        model = load(device=lab.device, dtype=torch.bfloat16, setup=lab.setup)
        lab.add(case, seed, lab.quality(model, seed, 0.0))


def defaults(lab: Lab, seed: int) -> None:
    """Untuned pairs for the whole model, and a bound on each head's error."""
    cases = {Case("defaults", thresholds="one pair", target=f"{k:g}, {p:g}"): everywhere((k, p)) for k, p in PAIRS}
    bounds = {Case("defaults", thresholds="each head", target=f"error {bound:g}"): bound for bound in BOUNDS}
    for case, calibration in cases.items():
        if not lab.has(case, seed):
            lab.measure(case, seed, calibration)
    for case, bound in bounds.items():
        if not lab.has(case, seed):
            lab.measure(case, seed, calibrated(lab, seed, "hybrid").at(target_error=bound, by="worst"))


def rules(lab: Lab, seed: int) -> None:
    """Rules at equal sparsity, without training."""
    measure_all(lab, seed, [Case("rules", r, k, t) for t, r, k in itertools.product(SPARSITIES, RULES, KINDS)])


def orders(lab: Lab, seed: int) -> None:
    """Raster order beside tiles, without training, from mild to high sparsity: one pair for all heads, and calibrated
    ones."""
    cases = itertools.product((KINDS[0], KINDS[2]), MILD_TO_HIGH, ORDERS)
    measure_all(lab, seed, [Case("orders", "hybrid", kind, target, order) for kind, target, order in cases])


def chosen_orders(lab: Lab, seed: int) -> None:
    """The same where calibration chooses the order of each layer, at the sparsity that it aims at."""
    cases = [Case("orders", "hybrid", KINDS[2], target, "chosen") for target in CHOSEN]
    measure_all(lab, seed, [case for case in cases if fnmatch(case.name, lab.args.arms)])


def distilled_orders(lab: Lab, seed: int) -> None:
    """Raster order beside tiles after long distillation at high sparsity."""
    cases = itertools.product(STUDENTS[1:], ORDERS)
    pairs = [Case("orders", "hybrid", "one pair", target, order) for target, order in cases]
    tuned = [case.tuned(lab.args.long_steps) for case in pairs]
    measure_all(lab, seed, [case for case in tuned if fnmatch(case.name, lab.args.arms)])


def distilled(lab: Lab, seed: int) -> None:
    """The masks of ``rules`` after distillation; influence is of the dense model's heads."""
    cases = itertools.product(SPARSITIES, RULES, KINDS[:2])
    measure_all(lab, seed, [Case("rules", r, k, t).tuned(lab.args.steps) for t, r, k in cases])


def measure_all(lab: Lab, seed: int, cases: list[Case]) -> None:
    for case in cases:
        if not lab.has(case, seed):
            lab.measure(case, seed, thresholds(lab, seed, case))


def rates(lab: Lab, seed: int) -> None:
    """Velocity error by learning rate, of the hybrid at 95 %."""
    table = Table(lab.args.out, "rates")
    for trained, tried in TRIED.items():
        for rate in tried:
            if table.has(seed, trained, rate):
                continue
            case = Case("rates", thresholds="one pair", target=0.95).tuned(lab.args.steps, trained, rate=rate)
            student = lab.tuned(case, seed, thresholds(lab, seed, case))
            error, loss = held_out_error(student, lab.dense, lab.held_out(seed))
            table.add([{"seed": seed, "trained": trained, "rate": rate, "velocity error": error, "flow loss": loss}])
            print(f"seed {seed}: {trained} at {rate:g}: velocity error {error:.4g}", flush=True)


def losses(lab: Lab, seed: int) -> None:
    """What ``distilled`` lacks to compare the losses: shifted data, and the plain loss, with full attention too."""
    for rule, loss, data in (
        ("hybrid", "distillation", "shifted"),
        ("hybrid", "flow", "matched"),
        ("hybrid", "flow", "shifted"),
        ("full attention", "flow", "matched"),
        ("full attention", "flow", "shifted"),
    ):
        case = Case("losses", rule, "one pair", 0.95).tuned(lab.args.steps, loss=loss, data=data)
        if not lab.has(case, seed):
            lab.measure(case, seed, thresholds(lab, seed, case) if rule in RULES else None)


def students(lab: Lab, seed: int) -> None:
    """How far long distillation holds, of all weights and of the attention layers alone; of seed 0, pictures of the
    former."""
    for trained, target in itertools.product((ALL, ATTENTION), STUDENTS):
        case = Case("students", thresholds="one pair", target=target).tuned(lab.args.long_steps, trained)
        picture = lab.args.out / f"samples_{100 * target:.0f}.png" if (seed, trained) == (0, ALL) else None
        if lab.has(case, seed) and (picture is None or picture.exists()):
            continue
        calibration = one_pair(lab, seed, "hybrid", target)
        student = lab.measure(case, seed, calibration)
        if picture is not None:
            videos = {"dense": lab.dense_samples(seed), f"{target:.0%}, distilled": lab.samples(student, seed)[0]}
            videos[f"{target:.0%}, not trained"] = lab.samples(lab.sparse(calibration), seed)[0]
            draw(videos, picture)


def shipped(lab: Lab, seed: int) -> None:
    """The student whose weights are in the repository; of seed 0 a picture."""
    case = Case("shipped", thresholds="one pair", loss="distillation", data="matched", trained=ALL)  # see distil.log
    picture = lab.args.out / "samples_shipped.png"
    if lab.has(case, seed) and (seed or picture.exists()):
        return
    calibration, student = lab.shipped()
    sparsity = lab.sparsity(calibration, next(lab.held_out(seed)), lab.copy_of(student))
    lab.add(case, seed, lab.quality(student, seed, sparsity), calibration)
    if not seed:
        draw({"dense": lab.dense_samples(seed), "distilled": lab.samples(student, seed)[0]}, picture)


def draw(videos: dict[str, Tensor], path: Path) -> None:
    sheet({name: each[:SHOWN].cpu() for name, each in videos.items()}).save(path)
