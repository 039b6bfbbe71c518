"""The arms of the large study, in the order of what one wants to know first; and what a student falls short by.

``arms`` measures those whose names fit ``--arms``; ``apart`` takes one student apart.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import by_step
import torch
from attention_study import ranking_gaps, record
from blind import keep_clips, paired
from case import ALL, ATTENTION, LATE, Case, Table
from choose import aimed, thresholds
from digits import HELD_OUT_SEED, clips
from distil import IN_LAYERS, batches, held_out_error, save_student, weights_of
from lab import Aim, Lab
from lessons import Batch
from measures import accuracy, psnr
from pictures import sheet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import precision

from sparge_compile import Calibration

SHORT, LONG = 500, 2000  # steps
SHIP_STEPS, EVENER, GENTLER, EPOCHS = 6000, 2000, 600, 4  # of students; long ones see each batch in each epoch
SHIP_SEED, SHIP_RATE = 50, 2e-3
SHIFTS = (5.0, 2.0)  # of times, beside that of training: strokes get their edges at less noise
SHOWN = 3  # clips of a picture
TARGETS, RULES, ORDERS = (0.951, 0.9, 0.97), ("hybrid", "topk", "topp"), ("tiles", "raster")  # 19 of 392 blocks
MILDER, UNTRAINED = (0.9, 0.8, 0.7), (0.8, 0.7, 0.5)  # targets of other students, and with the dense weights
RATES = {ALL: (5e-4, 1e-3, 4e-3, 8e-3), ATTENTION: (2e-3, 8e-3)}  # beside those of case.RATES
TIMES = (0.99, 0.97, 0.95, 0.9, 0.8, 0.6, 0.3)
DENSE_STEPS = (2, 5)  # of sampling
DENSE = (1.0, 0.0)
PART_SECONDS = 60  # that a part of a student taken apart is thought to take
TRAINED_ON = 3e-4  # the learning rate of the last stage of training


def case(rule: str = "hybrid", target: float = TARGETS[0], order: str = "tiles", kind: str = "one pair") -> Case:
    return Case("arms", rule, kind, target, order)


FIRST, *BY_STEP = str(TARGETS[0]), "by-step", "evener"  # students


def arms() -> list[Case]:
    """Each once; the first are what the rest is compared with."""
    first = [case(rule, order=order) for order in ORDERS for rule in RULES]
    listed = [case(), case().tuned(SHORT), case().tuned(LONG), *first, *(each.tuned(SHORT) for each in first)]
    listed += [
        each for order in IN_LAYERS for each in (case("topk", order=order), case("topk", order=order).tuned(SHORT))
    ]
    listed += [case(rule).tuned(LONG) for rule in RULES[1:]]
    listed += [case().tuned(LONG, loss="flow"), case().tuned(LONG, ATTENTION)]
    listed += [case().tuned(SHORT, trained, rate=rate) for trained, rates in RATES.items() for rate in rates]
    listed += [each for target in TARGETS[1:] for each in (case(target=target), case(target=target).tuned(SHORT))]
    listed += [case(kind=kind).tuned(SHORT) for kind in ("each head", "by influence")]
    listed += [replace(case().tuned(SHORT), anneal=0.25), replace(case().tuned(SHORT), outputs=0.1)]
    listed += [
        case().tuned(SHORT, ATTENTION),
        case().tuned(SHORT, loss="flow"),
        case("topk").tuned(SHORT, loss="guided"),
    ]
    listed += [case(target=target).tuned(LONG) for target in TARGETS[1:]]
    listed += [
        each
        for target in TARGETS[1:]
        for order in ORDERS
        for rule in RULES
        for each in (case(rule, target, order), case(rule, target, order).tuned(SHORT))
    ]
    return list(dict.fromkeys(listed))


def measure_arms(lab: Lab, seed: int) -> None:
    """The arms that are asked for."""
    for arm in arms():
        if fnmatch.fnmatch(arm.name, lab.args.arms):
            measure(lab, seed, scaled(arm, lab.args.scale))


def measure(lab: Lab, seed: int, arm: Case) -> None:
    """An arm, if it lacks; of seed 0 a picture."""
    if lab.has(arm, seed):
        return
    calibration = thresholds(lab, seed, arm)
    lab.measure(arm, seed, calibration, aim(lab, seed, arm))
    if not seed and arm.steps:
        folder = lab.args.out / "pictures"
        folder.mkdir(exist_ok=True)
        path = folder / f"{''.join(c if c.isalnum() else '-' for c in arm.name)}.jpg"
        sheet({"dense": lab.dense_samples(seed)[:SHOWN], arm.name: lab.drawn[:SHOWN]}).save(path, quality=90)


def aim(lab: Lab, seed: int, arm: Case) -> Aim | None:
    """One pair keeps other blocks where weights change; Top-k's as many as before."""
    if arm.thresholds != "one pair" or arm.rule == "topk":
        return None
    return lambda model: aimed(lab, seed, arm.rule, arm.target, arm.order, lab.copy_of(model))


class Recipe(NamedTuple):
    """How a model is made that is shown: from which student it goes on, if not from the dense model."""

    arm: Case
    begins: str = ""
    epochs: int = 1


def shipped() -> dict[str, Recipe]:
    """The student that ships; from its weights on those that keep more, and two that keep more late in sampling, one
    after the other; from there on those that keep more at all times. What has the dense weights is not trained."""
    rate = SHIP_RATE / 2
    found = {FIRST: Recipe(case("topk").tuned(SHIP_STEPS, rate=SHIP_RATE), "", EPOCHS)}
    found |= {str(target): Recipe(case("topk", target).tuned(GENTLER, rate=rate), FIRST) for target in MILDER}
    stages = zip(BY_STEP, by_step.KEPT, (SHIP_STEPS, EVENER), (FIRST, *BY_STEP), strict=False)
    for name, kind, steps, begins in stages:
        found[name] = Recipe(case("topk", order="moved", kind=kind).tuned(steps, rate=rate), begins, EPOCHS)
    for target in MILDER[:2]:
        found[f"{name}-{target}"] = Recipe(case("topk", target, "moved", kind).tuned(GENTLER, rate=rate), name)
    found = {name: each._replace(arm=replace(each.arm, part="shipped")) for name, each in found.items()}
    return found | {f"{target}-untrained": Recipe(case("topk", target, "moved")) for target in UNTRAINED}


def ship(lab: Lab, seed: int) -> None:
    """What is shown: the students, each is one, and models that are not trained; seeds are of what judges."""
    for name, recipe in shipped().items():
        arm = scaled(recipe.arm, lab.args.scale)
        if lab.has(arm, seed) or not any(fnmatch.fnmatch(name, pattern) for pattern in lab.args.students):
            continue
        calibration = thresholds(lab, seed, arm)
        weights = learned(lab, name, recipe._replace(arm=arm), calibration) if arm.steps else None
        model = lab.student(calibration).set(calibration, weights)
        sparsity = lab.sparsity(calibration, next(lab.held_out(seed)), lab.copy_of(model))
        lab.add(arm, seed, lab.quality(lab.called(model, calibration), seed, sparsity), calibration)
        show(lab, seed, name, "distilled" if arm.steps else "dense weights")


def learned(lab: Lab, name: str, recipe: Recipe, calibration: Calibration) -> dict[str, Tensor]:
    """The weights of a student. It is trained if its file is not there."""
    path = lab.args.out / f"student-{name}.safetensors"
    if not path.exists():
        begins = stored(lab, recipe.begins)
        if recipe.begins and begins is None:
            raise SystemExit(f"{name} goes on from {recipe.begins}, which is not in {lab.args.out}: ship that one, too")
        weights = None if begins is None else load_file(begins, str(lab.device))
        model = lab.tuned(recipe.arm, 0, calibration, None, weights, sharper(lab, recipe, calibration))
        save_student(weights_of(model, ALL), calibration, path)
    return load_file(path, str(lab.device))


def stored(lab: Lab, name: str) -> Path | None:
    """The file of a student, if there is one; of the first it may be the repository's."""
    paths = lab.args.out / f"student-{name}.safetensors", lab.setup.weights / "student.safetensors"
    return next((path for path in paths[: 1 + (name == FIRST)] if path.exists()), None)


def show(lab: Lab, seed: int, name: str, kind: str) -> None:
    """Keep the pairs for a blind test of what was drawn last, and controls; of seed 0 a picture."""
    assert lab.drawn is not None
    dense = lab.dense_samples(seed)
    if not seed:
        picture = lab.args.out / f"samples_{name}.jpg"
        sheet({"dense": dense[:SHOWN], kind: lab.drawn[:SHOWN]}).save(picture, quality=90)
    found = paired(lab.setup, dense, controls(lab, seed), lab.drawn, kind)
    keep_clips(found, lab.args.out / f"clips-{name}-{seed}.safetensors")


@functools.cache
def controls(lab: Lab, seed: int) -> Tensor:
    """Samples that anyone should find: at the sparsity of the student that ships, without training."""
    return lab.samples(lab.sparse(thresholds(lab, seed, case("topk"))), seed)[0]


def sharper(lab: Lab, recipe: Recipe, calibration: Calibration) -> Iterator[Batch]:
    """Other clips than the arms', at times of training and at less noise by turns; the same in each epoch. Strokes get
    their edges in the last steps of sampling, at times below 0.75; of those of training 5 % are there. Where thresholds
    have phases, a batch has the times of one of them."""
    shifts, within = (lab.setup.shift, *SHIFTS), [(0.0, 1.0)] * (1 + len(SHIFTS))
    if calibration.phases:
        within = by_step.times(lab.setup.shift)
        shifts = tuple((low + high) / (2 - low - high) for low, high in within)  # half are later than the middle
    first = SHIP_SEED + (1 + len(SHIFTS)) * bool(calibration.phases)
    count = math.ceil(recipe.arm.steps / recipe.epochs)
    how = {"size": lab.args.batch, "device": lab.device, "frames": lab.args.frames}
    each = [
        batches(math.ceil(count / len(shifts)), seed=seed, setup=replace(lab.setup, shift=shift), within=times, **how)
        for seed, (shift, times) in enumerate(zip(shifts, within, strict=True), first)
    ]
    lessons = itertools.islice(itertools.chain.from_iterable(zip(*each, strict=True)), count)
    return itertools.islice(itertools.cycle(lessons), recipe.arm.steps)


def scaled(arm: Case, share: float) -> Case:
    """With this share of its steps: to try the study out."""
    return replace(arm, steps=math.ceil(arm.steps * share))


def spread(lab: Lab, seed: int) -> None:
    """How far a dense model goes that is trained on as long as a short arm: what another training would make of it. It
    is one; seeds are of what judges it. In a blind test it says how often the clips of other weights are told."""
    trained = scaled(
        Case("floor", "dense, trained on", order="").tuned(SHORT, loss="flow", rate=TRAINED_ON), lab.args.scale
    )
    if lab.has(trained, seed):
        return
    path = lab.args.out / "trained-on.safetensors"
    if not path.exists():
        save_file(lab.tuned(trained, 0, None).state_dict(), path)
    lab.free.load_state_dict(load_file(path, str(lab.device)))
    lab.add(trained, seed, lab.quality(lab.free.eval(), seed, 0.0))
    show(lab, seed, "trained-on", "trained on")


# ---- taking apart


def apart(lab: Lab, seed: int) -> None:
    """Where a student's error is: at which times, in which layers and heads, in which steps of sampling."""
    table = Table(lab.args.out, "apart")
    for name, calibration, model in judged(lab, seed):
        for what, part in APART.items():
            if table.has(seed, name, what, "all") or (calibration.phases and "time" not in what):
                continue
            lab.check_time(f"{name} by {what}", PART_SECONDS)
            found = part(lab, seed, calibration, model)
            key = {"seed": seed, "student": name, "what": what}
            table.add({**key, "which": which, "value": value} for which, value in found.items())
            print(f"seed {seed}, {name}: by {what} {', '.join(f'{k} {v:.4g}' for k, v in found.items())}", flush=True)


def judged(lab: Lab, seed: int) -> Iterator[tuple[str, Calibration, nn.Module]]:
    """The student that ships, if it is there; and its thresholds, or those of 95 %, on the dense model's weights. Then
    the same of those that keep more late in sampling, where they were trained, which are asked by time alone."""
    calibration = thresholds(lab, seed, case("topk"))
    if (path := stored(lab, FIRST)) is not None:
        calibration = Calibration.load(path.with_suffix(".json"))
        yield "distilled", calibration, lab.student(calibration).set(calibration, load_file(path, str(lab.device)))
    yield "not trained", calibration, lab.sparse(calibration)
    for name, kind in zip(BY_STEP, by_step.KEPT, strict=True):
        if (path := stored(lab, name)) is not None:
            calibration, late = Calibration.load(path.with_suffix(".json")), kind.replace("by step", LATE)
            student = lab.student(calibration)
            yield late, calibration, lab.called(student.set(calibration, load_file(path, str(lab.device))), calibration)
            yield f"{late}, not trained", calibration, lab.called(student.set(calibration), calibration)


def by_time(lab: Lab, seed: int, calibration: Calibration, model: nn.Module) -> dict[str, float]:
    """Velocity error at some times of the same clips, and over all that training sees."""
    video, classes = clips(lab.args.batch, HELD_OUT_SEED + 700 + seed, lab.device, held_out=True, **lab.kind)
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed)).to(video)
    found = {}
    for time in TIMES:
        when = torch.full((len(video),), time, device=lab.device)
        batch = torch.lerp(video, noise, time), when, noise - video, classes
        found[f"{time:g}"] = held_out_error(model, lab.dense, [batch])[0]
    return {**found, "all": held_out_error(model, lab.teacher, lab.held_out(seed))[0]}


def by_time_of_half(lab: Lab, seed: int, calibration: Calibration, model: nn.Module) -> dict[str, float]:
    """The same with half of the blocks at all times: what is left then is what weights learned that have fewer."""
    attached = lab.student(calibration).attached
    attached.set(Calibration({site: [(0.5, 0.0)] for site in calibration.sites}, tiles=calibration.tiles))
    found = by_time(lab, seed, calibration, model.model if isinstance(model, by_step.ByStep) else model)
    attached.set(calibration)
    return found


def pairs_of(lab: Lab, calibration: Calibration) -> dict[str, list[tuple[float, float]]]:
    """Of each site, by name."""
    names = [name for name, _ in lab.plain.named_modules() if name.endswith(".attention")]
    heads = lab.plain.blocks[0].attention.heads
    return {name: list(calibration.lookup(name, heads) or ()) for name in names}


def restored(
    lab: Lab, seed: int, calibration: Calibration, model: nn.Module, which: dict[str, list[tuple[str, int]]]
) -> dict[str, float]:
    """Velocity error with some heads dense; the student's weights stay."""
    attached, pairs = lab.student(calibration).attached, pairs_of(lab, calibration)
    data, found = list(lab.held_out(seed)), {}
    for name, heads in {"all": [], **which}.items():
        sites = {site: list(each) for site, each in pairs.items()}
        for site, head in heads:
            sites[site][head] = DENSE
        tiles = {site: tile for site in sites if (tile := calibration.tile_of(site)) is not None}
        attached.set(Calibration(sites, tiles=tiles))
        found[name] = held_out_error(model, lab.teacher, data)[0]
    attached.set(calibration)
    return found


def by_layer(lab: Lab, seed: int, calibration: Calibration, model: nn.Module) -> dict[str, float]:
    pairs = pairs_of(lab, calibration)
    layers = {site.split(".")[1]: [(site, head) for head in range(len(each))] for site, each in pairs.items()}
    return restored(lab, seed, calibration, model, layers)


def by_head(lab: Lab, seed: int, calibration: Calibration, model: nn.Module) -> dict[str, float]:
    pairs = pairs_of(lab, calibration)
    heads = {f"{site.split('.')[1]}.{h}": [(site, h)] for site, each in pairs.items() for h in range(len(each))}
    return restored(lab, seed, calibration, model, heads)


def by_ranking(lab: Lab, seed: int, calibration: Calibration, model: nn.Module) -> dict[str, float]:
    """Of each layer the error of attention, in L1 norms, by pooled scores and by true mass, and the mass that is
    dropped; all layers at the sparsity of the whole."""
    plain = lab.copy_of(model)
    given = next(lab.held_out(seed))
    ways = ("tiles 2x4x8", "tiles oracle") if calibration.tiles else ("pooled", "oracle")
    density = 1 - lab.sparsity(calibration, given, plain)
    with precision(lab.device):
        sites = record(plain, *(given[i][:1] for i in (0, 1, 3)))
    found: dict[str, list[float]] = {}
    for layer, site in enumerate(sites):
        for row in ranking_gaps(site, [density], ways, seed=seed):
            kind = "true mass" if "oracle" in row["way"] else "pooled"
            found.setdefault(f"{layer} {kind}", []).append(row["error"])
            if kind == "pooled":
                found.setdefault(f"{layer} dropped", []).append(1 - row["mass"])
    means = {name: statistics.fmean(values) for name, values in found.items()}
    pooled = [value for name, value in means.items() if name.endswith("pooled")]
    return {**means, "all": statistics.fmean(pooled)}


def by_dense_steps(lab: Lab, seed: int, calibration: Calibration, model: nn.Module) -> dict[str, float]:
    """Share of digits read in samples whose first or last steps are dense; "all": none is."""

    def read(dense: range) -> float:
        step = 0

        def call(*args: Tensor) -> Tensor:
            nonlocal step
            chosen: Callable[..., Tensor] = lab.dense if step % lab.args.sample_steps in dense else model
            step += 1
            return chosen(*args)

        video, classes = lab.samples(call, seed)
        likeness.append(psnr(video, lab.dense_samples(seed)).mean().item())
        return accuracy(lab.classifier, video, classes).mean().item()

    likeness: list[float] = []
    steps = lab.args.sample_steps
    found = {"all": read(range(0))}
    for count in (count for count in DENSE_STEPS if count < steps):
        found[f"first {count}"], found[f"last {count}"] = read(range(count)), read(range(steps - count, steps))
    return found


APART = {
    "time": by_time,
    "time, half of the blocks": by_time_of_half,
    "layer": by_layer,
    "head": by_head,
    "ranking": by_ranking,
    "steps": by_dense_steps,
}
