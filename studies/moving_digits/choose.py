"""Thresholds for a sparsity that is asked for: one pair of a rule, or each head's own."""

from __future__ import annotations

import functools

import torch
from by_step import KEPT, in_phases
from case import Case
from distil import everywhere
from lab import Lab
from torch import nn
from train import precision

import sparge_compile
from sparge_compile import Calibration
from sparge_compile.calibrate.orders import said
from sparge_compile.kernels.block_map import KEY_BLOCK

KINDS = ("one pair", "each head", "by influence")
TOPK_SHARE = 0.6  # of a hybrid pair's blocks; the paper's pair at 95 % has about as many
NO_TOPK = 1e-3  # one block at least is kept anyhow


def kept_blocks(lab: Lab, sparsity: float) -> int:
    """Top-k keeps whole blocks; the other rules are asked for as many."""
    return max(1, round((1 - sparsity) * blocks(lab)))


def blocks(lab: Lab) -> int:
    frames, rows, columns = lab.setup.grid(lab.args.frames)
    return frames * rows * columns // KEY_BLOCK


def thresholds(lab: Lab, seed: int, case: Case) -> Calibration:
    """Those that a case names."""
    assert isinstance(case.target, float)
    if case.thresholds in KEPT:
        return in_phases(lab.setup, case.thresholds, case.order, case.target)
    if case.thresholds == "one pair":
        return one_pair(lab, seed, case.rule, case.target, case.order)
    wanted = 1 - kept_blocks(lab, case.target) / blocks(lab)
    if case.order == "chosen":
        return chosen(lab, seed, wanted)
    weights = influence(lab, seed, case.order) if case.thresholds == "by influence" else None
    found = calibrated(lab, seed, case.rule, case.order).at(target_sparsity=wanted, influence=weights)
    return Calibration(found.sites, tiles=found.tiles)


@functools.cache
def one_pair(lab: Lab, seed: int, rule: str, sparsity: float, order: str = "raster") -> Calibration:
    """The pair of a rule with which the model keeps as many blocks, on clips that are seen, as Top-k alone does."""
    return aimed(lab, seed, rule, sparsity, order)


def aimed(lab: Lab, seed: int, rule: str, sparsity: float, order: str, plain: nn.Module | None = None) -> Calibration:
    """The same for other weights: an uncompiled dense model that has them."""
    kept = kept_blocks(lab, sparsity)
    layers = lab.setup.sizes[1]
    if rule == "topk":
        return everywhere((kept / blocks(lab), 0.0), order, layers)
    topk = NO_TOPK if rule == "topp" else max(1, round(TOPK_SHARE * kept)) / blocks(lab)
    batch, low, high = lab.seen(seed)[0], 0.0, 1.0
    for _ in range(10):
        topp = (low + high) / 2
        is_sparser = lab.sparsity(everywhere((topk, topp), order, layers), batch, plain) > 1 - kept / blocks(lab)
        low, high = (topp, high) if is_sparser else (low, topp)
    return everywhere((topk, high), order, layers)


@functools.cache
def calibrated(lab: Lab, seed: int, rule: str, order: str = "raster") -> Calibration:
    """What ``sparge_compile.calibrate`` measures on clips that are seen, to be aimed with ``at``."""
    batches = [(mixed, when, classes) for mixed, when, _, classes in lab.seen(seed)]
    with precision(lab.device):
        options = {"min_seq_len": 0, "token_order": order}  # as the pairs beside it
        return sparge_compile.calibrate(
            lab.plain, batches, target_sparsity=0.8, influence=False, mode=rule, options=options
        )


@functools.cache
def chosen(lab: Lab, seed: int, sparsity: float) -> Calibration:
    """What ``sparge_compile.calibrate`` gives for a sparsity, the order of tokens of each layer included."""
    batches = [(mixed, when, classes) for mixed, when, _, classes in lab.seen(seed)]
    with precision(lab.device):
        found = sparge_compile.calibrate(
            lab.plain, batches, target_sparsity=sparsity, options={"min_seq_len": 0}, progress=True
        )
    print(f"    tokens in {said({name: found.tiles.get(name) for name in found.sites})}", flush=True)
    return Calibration(found.sites, tiles=found.tiles)


@functools.cache
def influence(lab: Lab, seed: int, order: str = "raster") -> dict[str, tuple[float, ...]]:
    """What an error of each head does to the model's output."""
    mixed, when, _, classes = lab.seen(seed)[0]
    fronts = calibrated(lab, seed, "hybrid", order)
    with torch.no_grad(), precision(lab.device):
        return sparge_compile.head_influence(lab.plain, fronts, [(mixed, when, classes)])
