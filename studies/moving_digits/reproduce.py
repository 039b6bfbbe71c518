"""The findings of SpargeAttention2 (arXiv 2602.13515), asked of the trained model of moving digits, on one GPU.

    python studies/moving_digits/reproduce.py                       # everything: docs/fidelity/*.csv, *.png, tables
    python studies/moving_digits/reproduce.py --parts rules losses  # some parts
    python studies/moving_digits/reproduce.py --parts               # tables and pictures alone; needs no GPU

Every result is a row of a CSV file, written as soon as it is there; what is there is not measured again. A run may be
stopped, and other parts or seeds may be measured beside it on another GPU: they add to the same files. Parts: attention
(error split, ranking, structured inputs), floor (dense values, noise floors), defaults (thresholds without an aim at
sparsity), rules (Top-k, Top-p, hybrid, training-free), rates (learning rates of distillation), losses (distillation
against the plain loss, matched and shifted data), distilled (the rules after distillation), students (long
distillation; pictures), shipped (the student of the repository).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from attention_study import error_split, ranking_gaps, record, synthetic
from digits import FRAMES, SIDE, clips
from distil import held_out_error, precision
from fidelity import RULES, fill, read, tables
from lab import QUALITY, Lab, Table, everywhere
from measures import accuracy, flicker, psnr, ssim
from pictures import sheet
from plots import plot_ranking, plot_rules
from train import HELD_OUT_SEED
from transformer import load

import sparge_compile
from sparge_compile.kernels.block_map import KEY_BLOCK

OUT = Path(__file__).resolve().parents[2] / "docs" / "fidelity"
SPARSITIES = (0.95, 0.9, 0.97, 0.8, 0.85)  # the paper's first
KINDS = ("one pair", "each head", "by influence")
DENSITIES = (0.03, 0.05, 0.1, 0.2, 0.5)
STRUCTURES = ("uniform", "skewed", "clustered", "local")
PAIRS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.0), (0.5, 0.4), (0.5, 0.6), (0.5, 0.8), (0.6, 0.7), (0.7, 0.8))  # topk, topp
BOUNDS = (0.05, 0.1)  # on the error of each head's attention output
STUDENTS = (0.9, 0.95, 0.97)
ALL, ATTENTION = "all weights", "attention layers"  # what trains
RATES = {ALL: (3e-4, 6e-4, 1e-3, 2e-3), ATTENTION: (1e-3, 2e-3, 4e-3)}
TOPK_SHARE = 0.6  # of a hybrid pair's blocks; the paper's pair at 95 % has about as many
NO_TOPK = 1e-3  # one block at least is kept anyhow
STUDIED, SHOWN = 2, 6  # clips: of the study of attention, of a picture


# ---- thresholds


def kept_blocks(lab: Lab, sparsity: float) -> int:
    """Top-k keeps whole blocks; the other rules are asked for as many."""
    return max(1, round((1 - sparsity) * blocks(lab)))


def blocks(lab: Lab) -> int:
    return lab.args.frames * (SIDE // lab.teacher.patch) ** 2 // KEY_BLOCK


@functools.cache
def one_pair(lab: Lab, seed: int, rule: str, sparsity: float) -> sparge_compile.Calibration:
    """The pair of a rule with which the model keeps as many blocks, on clips that are seen, as Top-k alone does."""
    kept = kept_blocks(lab, sparsity)
    if rule == "topk":
        return everywhere((kept / blocks(lab), 0.0))
    lab.sparse(everywhere((kept / blocks(lab), 0.0)))  # with the teacher's weights
    topk = NO_TOPK if rule == "topp" else max(1, round(TOPK_SHARE * kept)) / blocks(lab)
    batch, low, high = lab.seen(seed)[0], 0.0, 1.0
    for _ in range(10):
        topp = (low + high) / 2
        is_sparser = lab.sparsity(everywhere((topk, topp)), batch) > 1 - kept / blocks(lab)
        low, high = (topp, high) if is_sparser else (low, topp)
    return everywhere((topk, high))


@functools.cache
def calibrated(lab: Lab, seed: int, rule: str) -> sparge_compile.Calibration:
    """What ``sparge_compile.calibrate`` measures on clips that are seen, to be aimed with ``at``."""
    batches = [(mixed, when, classes) for mixed, when, _, classes in lab.seen(seed)]
    with precision(lab.device):
        options = {"min_seq_len": 0, "token_order": "raster"}  # as the pairs beside it
        return sparge_compile.calibrate(
            lab.teacher, batches, target_sparsity=0.8, influence=False, mode=rule, options=options
        )


# ---- parts


def attention(lab: Lab, seed: int) -> None:
    """What selection costs in attention itself, layer by layer, and what other rankings would cost; on real inputs and
    on inputs of known structure."""
    out = lab.args.out
    values = ("error", "dropped", "renormalised", "lost_mass", "cosine")
    split = Table(out / "error_split.csv", ("seed", "site", "head", "density"), values)
    ranking = Table(out / "ranking.csv", ("seed", "site", "head", "density", "way"), ("blocks", "mass", "error"))
    structures = Table(
        out / "structures.csv", ("seed", "structure", "topk", "topp"), ("sparsity", "error", "worst head")
    )
    for structure in STRUCTURES:
        if structures.has(seed, structure, *PAIRS[-1]):
            continue
        q, k, v = synthetic(structure, 256 * lab.args.frames, seed=seed, device=lab.device)
        dense = F.scaled_dot_product_attention(q, k, v)
        for topk, topp in PAIRS:
            sparse, sparsity = sparge_compile.attention(q, k, v, topk=topk, topp=topp, return_sparsity=True)
            errors = (sparse - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
            row = {"seed": seed, "structure": structure, "topk": topk, "topp": topp}
            row |= {"sparsity": sparsity.item(), "error": errors.mean().item(), "worst head": errors.max().item()}
            structures.add([row])
    mixed, when, _, classes = next(lab.held_out(seed))
    with precision(lab.device):
        sites = record(lab.teacher, mixed[:STUDIED], when[:STUDIED], classes[:STUDIED])
    for site in sites:
        heads = site.q.shape[1]
        if ranking.has(seed, site.name, heads - 1, DENSITIES[-1], "tiles oracle"):
            continue
        rows = []
        for kept in DENSITIES:
            terms = error_split(site, kept)
            for head in range(heads):
                found = {name: terms[name][head].item() for name in values}
                rows.append({"seed": seed, "site": site.name, "head": head, "density": kept, **found})
        split.add(rows)
        found_ranking = ranking_gaps(site, DENSITIES, seed=seed)
        ranking.add({"seed": seed, **row} for row in found_ranking)
        print(f"seed {seed}: studied {site.name}", flush=True)


def floor(lab: Lab, seed: int) -> None:
    """Dense values, and how far apart two dense models are that differ in rounding or in their noise."""

    def add(kind: str, **found: float) -> None:
        lab.add(("floor", seed, kind, "", "", "", "", ""), dict.fromkeys(QUALITY, math.nan) | found)

    if lab.has("floor", seed, "rendered clips", "", "", "", "", ""):
        return
    add("dense", **lab.quality(lab.dense, seed, 0.0))
    add("dense, weights in bfloat16", **lab.quality(load(device=lab.device, dtype=torch.bfloat16), seed, 0.0))
    dense, other = lab.dense_samples(seed), lab.samples(lab.dense, seed + 500)[0]
    add("dense, other noise and classes", PSNR=psnr(other, dense).mean().item(), SSIM=ssim(other, dense).mean().item())
    video, classes = clips(len(dense), HELD_OUT_SEED + 500 + seed, lab.device, held_out=True, frames=lab.args.frames)
    read = accuracy(lab.classifier, video, classes).mean().item()
    add("rendered clips", flicker=flicker(video).mean().item(), **{"digits read": read})


def defaults(lab: Lab, seed: int) -> None:
    """Untuned pairs for the whole model, and a bound on each head's error."""
    cases = [("one pair", f"{topk:g}, {topp:g}") for topk, topp in PAIRS]
    cases += [("each head", f"error {bound:g}") for bound in BOUNDS]
    keys = [("defaults", seed, "hybrid", kind, target, "none", "", "") for kind, target in cases]
    if all(lab.has(*key) for key in keys):
        return
    fronts = calibrated(lab, seed, "hybrid")
    found = [everywhere(pair) for pair in PAIRS] + [fronts.at(target_error=bound, by="worst") for bound in BOUNDS]
    for key, calibration in zip(keys, found, strict=True):
        lab.measure(key, seed, calibration)


def rules(lab: Lab, seed: int, steps: int = 0) -> None:
    """Rules at equal sparsity: without training or, with some ``steps`` of distillation, the same masks after it."""
    how = ("distillation", "matched", ALL) if steps else ("none", "", "")
    kinds = [kind for kind in KINDS if not steps or kind != "by influence"]  # influence is of the dense model's heads
    cases = itertools.product(SPARSITIES, RULES, kinds)
    keys = [("rules", seed, rule, kind, target, *how) for target, rule, kind in cases]
    missing = [key for key in keys if not lab.has(*key)]
    influence = None
    if any(key[3] == "by influence" for key in missing):
        mixed, when, _, classes = lab.seen(seed)[0]
        model, fronts = load(device=lab.device), calibrated(lab, seed, "hybrid")
        with precision(lab.device):
            influence = sparge_compile.head_influence(model, fronts, [(mixed, when, classes)])
    for key in missing:
        rule, kind, target = key[2:5]
        wanted = 1 - kept_blocks(lab, target) / blocks(lab)
        if kind == "one pair":
            calibration = one_pair(lab, seed, rule, target)
        else:
            weights = influence if kind == "by influence" else None
            calibration = calibrated(lab, seed, rule).at(target_sparsity=wanted, influence=weights)
        lab.measure(key, seed, calibration, steps)


def rates(lab: Lab, seed: int) -> None:
    """Velocity error by learning rate, of the hybrid at 95 %."""
    table = Table(lab.args.out / "rates.csv", ("seed", "trained", "rate"), ("velocity error", "flow loss"))
    for trained, tried in RATES.items():
        for rate in tried:
            if table.has(seed, trained, rate):
                continue
            calibration = one_pair(lab, seed, "hybrid", 0.95)
            student = lab.tuned(seed, calibration, lab.args.steps, all_weights=trained == ALL, lr=rate)
            error, loss = held_out_error(student, lab.dense, lab.held_out(seed))
            table.add([{"seed": seed, "trained": trained, "rate": rate, "velocity error": error, "flow loss": loss}])
            print(f"seed {seed}: {trained} at {rate:g}: velocity error {error:.4g}", flush=True)


def distilled(lab: Lab, seed: int) -> None:
    """The masks of ``rules`` after distillation."""
    rules(lab, seed, lab.args.steps)


def losses(lab: Lab, seed: int) -> None:
    """What ``distilled`` lacks to compare the losses: shifted data, and the plain loss, with full attention too."""
    for rule, loss, data in (
        ("hybrid", "distillation", "shifted"),
        ("hybrid", "flow", "matched"),
        ("hybrid", "flow", "shifted"),
        ("full attention", "flow", "matched"),
        ("full attention", "flow", "shifted"),
    ):
        key = ("losses", seed, rule, "one pair", 0.95, loss, data, ALL)
        if not lab.has(*key):
            calibration = one_pair(lab, seed, rule, 0.95) if rule in RULES else None
            lab.measure(key, seed, calibration, lab.args.steps, loss=loss, shifted=data == "shifted")


def students(lab: Lab, seed: int) -> None:
    """How far long distillation holds, of all weights and of the attention layers alone; of seed 0, pictures of the
    former."""
    for trained, target in itertools.product((ALL, ATTENTION), STUDENTS):
        key = ("students", seed, "hybrid", "one pair", target, "distillation", "matched", trained)
        picture = lab.args.out / f"samples_{100 * target:.0f}.png" if (seed, trained) == (0, ALL) else None
        if lab.has(*key) and (picture is None or picture.exists()):
            continue
        calibration, steps = one_pair(lab, seed, "hybrid", target), lab.args.long_steps
        student = lab.measure(key, seed, calibration, steps, all_weights=trained == ALL)
        if picture is not None:
            videos = {"dense": lab.dense_samples(seed), f"{target:.0%}, distilled": lab.samples(student, seed)[0]}
            videos[f"{target:.0%}, not trained"] = lab.samples(lab.sparse(calibration), seed)[0]
            sheet({name: each[:SHOWN].cpu() for name, each in videos.items()}).save(picture)


def shipped(lab: Lab, seed: int) -> None:
    """The student whose weights are in the repository; of seed 0 a picture."""
    key = ("shipped", seed, "hybrid", "one pair", "", "distillation", "matched", ALL)
    picture = lab.args.out / "samples_shipped.png"
    if lab.has(*key) and (seed or picture.exists()):
        return
    calibration, student = lab.shipped()
    lab.add(key, lab.quality(student, seed, lab.sparsity(calibration, next(lab.held_out(seed)))), calibration)
    if not seed:
        videos = {"dense": lab.dense_samples(seed), "distilled": lab.samples(student, seed)[0]}
        sheet({name: each[:SHOWN].cpu() for name, each in videos.items()}).save(picture)


PARTS = {
    part.__name__: part for part in (attention, floor, defaults, rules, rates, losses, distilled, students, shipped)
}


def report(out: Path) -> None:
    """Write the pictures into ``out`` and its tables into the page of its name beside it; without one, print them."""
    if quality := read(out / "quality.csv"):
        plot_rules(quality, out / "rules.png")
    if ranking := read(out / "ranking.csv"):
        plot_ranking(ranking, out / "ranking.png")
    page, made = out.with_suffix(".md"), tables(out)
    if page.exists():
        fill(page, made)
        print(f"wrote {len(made)} tables into {page}")
    else:
        for name, table in made.items():
            print(f"\n{name}\n{table}")


def settings(args: argparse.Namespace, device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return (
        f"torch {torch.__version__}, {where}; clips of {args.frames} frames; {args.steps} steps of fine-tuning, "
        f"{args.long_steps} of the students, on batches of {args.batch} clips; "
        f"{args.rounds * args.batch} held-out clips and {args.rounds * (args.batch // 2)} samples of "
        f"{args.sample_steps} steps for a figure\n"
    )


def check_settings(path: Path, wanted: str) -> None:
    """One folder holds results of one kind of run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(wanted)
    elif (found := path.read_text()) != wanted:
        raise SystemExit(
            f"{path.parent} has results of another kind of run:\n  there: {found}  this run: {wanted}"
            "Repeat those settings on such a device, or give --out a new folder. (--parts alone measures nothing.)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="in their order (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and noise (0 1 2)")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning (200)")
    parser.add_argument("--long-steps", type=int, default=1000, help="of the students (1000)")
    parser.add_argument("--batch", type=int, default=16, help="clips; samples are drawn from half as many (16)")
    parser.add_argument("--rounds", type=int, default=4, help="batches of held-out clips and of samples (4)")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"a multiple of 4 ({FRAMES})")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.frames % 4 or args.batch < 2:
        parser.error("--frames must be a multiple of 4, --batch at least 2")
    if args.parts:
        torch._dynamo.config.recompile_limit = 64  # one class, compiled dense and sparse, to train and to run
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_settings(args.out / "settings.txt", settings(args, device))
        lab = Lab(args, device)
        for part in args.parts:
            for seed in args.seeds:
                PARTS[part](lab, seed)
    report(args.out)


if __name__ == "__main__":
    main()
