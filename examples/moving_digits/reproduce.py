"""The findings of SpargeAttention2 (arXiv 2602.13515), asked of the trained model of moving digits, on one GPU.

    python examples/moving_digits/reproduce.py                       # everything: docs/fidelity/*.csv, *.png, tables
    python examples/moving_digits/reproduce.py --parts rules losses  # some parts
    python examples/moving_digits/reproduce.py --parts               # tables and pictures alone; needs no GPU

Every result is a row of a CSV file, written as soon as it is there; what is there is not measured again. A run may be
stopped, and parts or seeds may be measured side by side on several GPUs: they add to the same files. Parts:
attention (error split, ranking, structured inputs), floor (dense values, noise floors), defaults (untuned thresholds),
rules (Top-k, Top-p, hybrid, training-free), students (long distillation; pictures), losses (distillation against the
plain loss), distilled (the rules after distillation).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from attention_study import Site, error_split, ranking_gaps, record, synthetic
from digits import FRAMES, clips
from distil import held_out_error, precision
from fidelity import report
from lab import QUALITY, Lab, Table, everywhere
from measures import accuracy, flicker, psnr, ssim
from pictures import sheet
from torch import Tensor
from train import HELD_OUT_SEED
from transformer import load

import sparge_compile
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from sparge_compile.kernels.reference import pool, topk_length, topp_length

OUT = Path(__file__).resolve().parents[2] / "docs" / "fidelity"
SPARSITIES = (0.95, 0.9, 0.97, 0.8, 0.85)  # the paper's first
RULES = ("topk", "topp", "hybrid")
KINDS = ("one pair", "each head")
DENSITIES = (0.03, 0.05, 0.1, 0.2, 0.5)
STRUCTURES = ("uniform", "skewed", "clustered", "local")
PAIRS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.0), (0.5, 0.4), (0.5, 0.6), (0.5, 0.8), (0.6, 0.7), (0.7, 0.8))  # topk, topp
STUDENTS = (0.9, 0.95, 0.97)
TOPK_SHARE = 0.6  # of the blocks that a hybrid pair keeps, where no other is asked for
NO_TOPK = 1e-3  # one block at least is kept anyhow
STUDIED, CALIBRATED, SHOWN = 2, 4, 6  # clips: of the study of attention, of a calibration's batch, in a picture

Pair = tuple[float, float]


# ---- thresholds


def leading_mass(sites: Iterable[Site]) -> Tensor:
    """The pooled rule's mass of the leading key blocks, a row for each query block of every head: [rows, Nk]."""
    rows = []
    for site in sites:
        scores = site.q.shape[-1] ** -0.5 * pool(site.q, QUERY_BLOCK) @ pool(site.k, KEY_BLOCK).mT
        rows.append(scores.softmax(-1).sort(-1, descending=True).values.cumsum(-1).flatten(0, 2))
    return torch.cat(rows)


def density(mass: Tensor, topk: float, topp: float) -> float:
    """The mean share of key blocks that a pair keeps."""
    blocks = mass.shape[-1]
    n = torch.tensor(blocks, device=mass.device)
    k, p = (torch.tensor(x, device=mass.device) for x in (topk, topp))
    return (torch.maximum(topk_length(k, n), topp_length(p, n, mass)).float().mean() / blocks).item()


def topp_for(mass: Tensor, topk: float, wanted: float) -> float:
    """The topp with which a pair keeps a density, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if density(mass, topk, middle) < wanted else (low, middle)
    return low


def kept_blocks(sparsity: float, blocks: int) -> int:
    """Top-k keeps whole blocks; the other rules are asked for as many."""
    return max(1, round((1 - sparsity) * blocks))


def hybrid_pair(mass: Tensor, sparsity: float, share: float = TOPK_SHARE) -> Pair:
    """A pair of which Top-k alone keeps ``share`` of the blocks, and Top-p adds what is missing."""
    blocks = mass.shape[-1]
    kept = kept_blocks(sparsity, blocks)
    topk = max(1, round(kept * share)) / blocks
    return topk, topp_for(mass, topk, kept / blocks)


def pairs_of(rule: str, mass: Tensor, sparsity: float) -> list[Pair]:
    """Pairs of one rule that keep as many blocks as Top-k does: several of the hybrid, with more and less of each."""
    kept = kept_blocks(sparsity, mass.shape[-1]) / mass.shape[-1]
    if rule == "topk":
        return [(kept, 0.0)]
    if rule == "topp":
        return [(NO_TOPK, topp_for(mass, NO_TOPK, kept))]
    return list(dict.fromkeys(hybrid_pair(mass, sparsity, share) for share in (0.3, 0.45, TOPK_SHARE, 0.85)))


def seen_mass(lab: Lab, seed: int) -> Tensor:
    mixed, when, _, classes = lab.seen(seed)[0]
    return leading_mass(record(lab.teacher, mixed, when, classes))


def chosen_thresholds(lab: Lab, seed: int) -> dict[tuple[str, str, float], sparge_compile.Calibration]:
    """By rule, ``one pair`` or ``each head``, and sparsity. A hybrid pair is the one of the least velocity error on
    clips that are seen."""
    seen, mass = lab.seen(seed), seen_mass(lab, seed)
    blocks, found = mass.shape[-1], {}
    for rule in RULES:
        for target in SPARSITIES:
            candidates = [everywhere(pair) for pair in pairs_of(rule, mass, target)]
            errors = [0.0]
            if len(candidates) > 1:
                errors = [held_out_error(lab.sparse(each), lab.dense, seen)[0] for each in candidates]
            found[rule, "one pair", target] = candidates[errors.index(min(errors))]
        few = [(mixed[:CALIBRATED], when[:CALIBRATED], classes[:CALIBRATED]) for mixed, when, _, classes in seen]
        with precision(lab.device):
            calibrated = sparge_compile.calibrate(
                lab.teacher, few, target_sparsity=0.8, mode=rule, options={"min_seq_len": 0}
            )
        for target in SPARSITIES:
            found[rule, "each head", target] = calibrated.at(target_sparsity=1 - kept_blocks(target, blocks) / blocks)
    return found


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
    key = ("floor", seed, "", "", "", "", "")
    if lab.quality_table.has(*key, "rendered clips"):
        return
    began, unknown = time.perf_counter(), dict.fromkeys(QUALITY, math.nan)
    lab.add(began, (*key, "dense"), lab.quality(lab.dense, seed, 0.0))
    rounded = load(device=lab.device, dtype=torch.bfloat16)
    lab.add(began, (*key, "dense, bfloat16 throughout"), lab.quality(rounded, seed, 0.0))
    dense, other = lab.dense_samples(seed), lab.samples(lab.dense, seed + 500)[0]
    values = {"PSNR": psnr(other, dense).mean().item(), "SSIM": ssim(other, dense).mean().item()}
    lab.add(began, (*key, "dense, other noise and classes"), unknown | values)
    video, classes = clips(len(dense), HELD_OUT_SEED + 500 + seed, lab.device, held_out=True, frames=lab.args.frames)
    read = accuracy(lab.classifier, video, classes).mean().item()
    lab.add(began, (*key, "rendered clips"), unknown | {"flicker": flicker(video).mean().item(), "digits read": read})


def defaults(lab: Lab, seed: int) -> None:
    """Untuned pairs for the whole model."""
    for pair in PAIRS:
        key = ("defaults", seed, "hybrid", "one pair", f"{pair[0]:g}, {pair[1]:g}", "", "none", "sparse")
        if not lab.quality_table.has(*key):
            began, calibration = time.perf_counter(), everywhere(pair)
            model = lab.sparse(calibration)
            lab.add(began, key, lab.quality(model, seed, lab.sparsity(calibration, seed)))


def rules(lab: Lab, seed: int, steps: int = 0) -> None:
    """Rules at equal sparsity: without training or, with some ``steps`` of distillation, the same masks after it."""
    loss = ("matched", "distillation") if steps else ("", "none")
    keys = [
        ("rules", seed, rule, kind, target, *loss, "sparse")
        for target in SPARSITIES
        for rule in RULES
        for kind in KINDS
    ]
    missing = [key for key in keys if not lab.quality_table.has(*key)]
    thresholds = chosen_thresholds(lab, seed) if missing else {}
    for key in missing:
        began, calibration = time.perf_counter(), thresholds[key[2:5]]
        model = lab.tuned(seed, calibration, steps) if steps else lab.sparse(calibration)
        lab.add(began, key, lab.quality(model, seed, lab.sparsity(calibration, seed)))


def distilled(lab: Lab, seed: int) -> None:
    """The masks of ``rules`` after distillation."""
    rules(lab, seed, lab.args.steps)


def losses(lab: Lab, seed: int) -> None:
    """Distillation against the plain flow-matching loss, on matched and on shifted data, and what the plain loss does
    to full attention."""
    calibration = None
    for data in ("matched", "shifted"):
        for loss, kind in (("distillation", "sparse"), ("flow", "sparse"), ("flow", "full")):
            key = ("losses", seed, "hybrid", "one pair", 0.95, data, loss, kind)
            if lab.quality_table.has(*key):
                continue
            began = time.perf_counter()
            calibration = calibration or everywhere(hybrid_pair(seen_mass(lab, seed), 0.95))
            given = calibration if kind == "sparse" else None
            student = lab.tuned(seed, given, lab.args.steps, loss=loss, shifted=data == "shifted")
            lab.add(began, key, lab.quality(student, seed, lab.sparsity(calibration, seed) if given else 0.0))


def students(lab: Lab, seed: int) -> None:
    """How far long distillation holds, of the attention layers alone and of all weights; of seed 0, pictures too."""
    mass = None
    for target in STUDENTS:
        key = ("students", seed, "hybrid", "one pair", target, "matched")
        kinds = (("none", "sparse"), ("distillation", "attention layers"), ("distillation", "all weights"))
        missing = [kind for kind in kinds if not lab.quality_table.has(*key, *kind)]
        if not missing:
            continue
        mass = seen_mass(lab, seed) if mass is None else mass
        calibration = everywhere(hybrid_pair(mass, target))
        for loss, trained in missing:
            began, model = time.perf_counter(), lab.sparse(calibration)
            if loss != "none":
                model = lab.tuned(seed, calibration, lab.args.long_steps, all_weights=trained == "all weights")
            lab.add(began, (*key, loss, trained), lab.quality(model, seed, lab.sparsity(calibration, seed)))
        if seed == 0:  # the last one that was trained is there still
            videos = {"dense": lab.dense_samples(seed), f"{target:.0%}, distilled": lab.samples(model, seed)[0]}
            videos[f"{target:.0%}, not trained"] = lab.samples(lab.sparse(calibration), seed)[0]
            sheet({name: each[:SHOWN].cpu() for name, each in videos.items()}).save(
                lab.args.out / f"samples_{100 * target:.0f}.png"
            )


PARTS = {part.__name__: part for part in (attention, floor, defaults, rules, students, losses, distilled)}


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
    if args.parts:
        torch._dynamo.config.recompile_limit = 64  # one class, compiled dense and sparse, to train and to run
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lab = Lab(args, device)
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        (args.out / "versions.txt").write_text(
            f"torch {torch.__version__}, {where}, sparge_compile {sparge_compile.__version__}; "
            f"{args.steps} steps of fine-tuning, {args.long_steps} of the students, batches of {args.batch} clips, "
            f"{args.rounds * args.batch} held-out clips and {args.rounds * (args.batch // 2)} samples for a figure, "
            f"{args.sample_steps} steps of sampling\n"
        )
        for part in args.parts:
            for seed in args.seeds:
                PARTS[part](lab, seed)
    report(args.out)


if __name__ == "__main__":
    main()
