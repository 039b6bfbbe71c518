"""The trained example: its data are fixed, its weights draw and read digits, its measures measure."""

from __future__ import annotations

import argparse
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import bank
import blind
import case
import choose
import demo
import digits
import distil
import fidelity
import lab
import measures
import order_errors
import output_error
import parts
import precisions
import pytest
import reproduce
import tabular
import torch
import transformer
from PIL import Image
from setups import LARGE, SMALL, Setup

import sparge_compile

MIB = 2**20


def test_the_split_of_digits_is_fixed_and_has_no_image_twice() -> None:
    train, held_out = (bank.digit_images(which, torch.device("cpu"))[0] for which in (False, True))
    assert len(train) == 1500 and len(held_out) == 297
    assert torch.cdist(held_out.flatten(1), train.flatten(1)).min() > 0


@pytest.mark.parametrize("shifted", [False, True])
def test_clips_depend_on_their_arguments_alone(shifted: bool) -> None:
    video, classes = digits.clips(3, 5, shifted=shifted, frames=6)
    again, _ = digits.clips(3, 5, shifted=shifted, frames=6)
    other, _ = digits.clips(3, 6, shifted=shifted, frames=6)
    assert video.shape == (3, 6, 64, 64) and video.abs().max() <= 1
    assert torch.equal(video, again) and not torch.equal(video, other)
    assert classes.sum(1).tolist() == [2 + shifted] * 3


def test_a_digit_stays_within_the_frame_and_keeps_its_ink() -> None:
    """Where digits bounce, nothing of them is lost at a wall: ink varies by what they overlap, never to half."""
    video, _ = digits.clips(8, 1)
    ink = (video + 1).sum((2, 3))
    assert (ink.amin(1) > 0.5 * ink.amax(1)).all()


def test_a_noisy_clip_and_its_velocity_give_the_clip_back() -> None:
    video, _ = digits.clips(4, 2, frames=2)
    mixed, time, velocity = digits.noisy(video, 3)
    assert torch.allclose(mixed - time[:, None, None, None] * velocity, video, atol=1e-5)


def test_the_weights_are_small_enough_to_ship() -> None:
    assert all(path.stat().st_size <= 16 * MIB for path in SMALL.weights.rglob("*.safetensors"))


@torch.no_grad()
def test_the_trained_model_finds_held_out_digits_in_noise() -> None:
    """At t = 0.7 the clip that the model sees behind the noise is far nearer to the truth than a black one is."""
    video, classes = digits.clips(1, 4, held_out=True, frames=12)
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.7])
    mixed = torch.lerp(video, noise, 0.7)
    seen = mixed - 0.7 * transformer.load()(mixed, time, classes)
    assert (seen - video).square().mean() < 0.25 * (-1 - video).square().mean()


def test_the_classifier_reads_held_out_digits() -> None:
    video, classes = digits.clips(24, 7, held_out=True, frames=4)
    classifier = measures.load_classifier()
    assert measures.accuracy(classifier, video, classes).mean() > 0.8
    assert measures.accuracy(classifier, torch.zeros_like(video), classes).mean() < 0.5


def test_measures_of_known_differences() -> None:
    video, _ = digits.clips(2, 8, frames=4)
    assert torch.allclose(measures.psnr(video, video + 0.2), torch.full((2,), 20.0), atol=1e-3)  # 10 log10(4 / 0.04)
    assert torch.allclose(measures.ssim(video, video), torch.ones(2), atol=1e-5)
    assert (measures.ssim(video, -video) < 0.5).all()
    assert torch.allclose(measures.velocity_error(1.1 * video, video), torch.full((2,), 0.01), atol=1e-5)
    assert torch.equal(measures.flicker(torch.ones(2, 5, 64, 64)), torch.zeros(2))
    assert (measures.flicker(torch.randn(2, 5, 64, 64)) > measures.flicker(video[:, :1].expand(-1, 5, -1, -1))).all()


def test_a_table_knows_its_rows_again_and_refuses_other_columns(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(case.TABLES, "x", (("seed", "topp"), ("error",)))
    path = tmp_path / "x.csv"
    table = case.Table(tmp_path, "x")
    table.add([{"seed": 0, "topp": 0.0, "error": 0.123456789}])
    again = case.Table(tmp_path, "x")
    assert again.has(0, 0.0) and not again.has(1, 0.0)
    again.add([{"seed": seed, "topp": topp, "error": float("nan")} for seed, topp in ((0, 0.0), (1, 0.5))])
    assert path.read_text() == "seed,topp,error\n0,0,0.12346\n1,0.5,nan\n"
    monkeypatch.setitem(case.TABLES, "x", (("seed",), ("error",)))
    with pytest.raises(SystemExit, match="other columns"):
        case.Table(tmp_path, "x")


def tiny_lab(out: Path, setup: Setup = SMALL, rounds: int = 1) -> lab.Lab:
    settings = argparse.Namespace(setup=setup, out=out, batch=2, rounds=rounds, frames=4, sample_steps=1, minutes=60)
    return lab.Lab(settings, torch.device("cpu"))


def test_a_student_has_the_tiles_of_each_layer(tmp_path) -> None:
    """Those of its thresholds, as the option has them."""
    small = tiny_lab(tmp_path)
    names = [f"blocks.{number}.attention" for number in range(8)]
    tiles = {names[0]: (4, 4, 4), names[1]: (2, 4, 8), names[2]: (4, 4, 4)}
    found = sparge_compile.Calibration({name: [(0.3, 0.0)] * 4 for name in names}, tiles=tiles)
    assert distil.tiles_of(SMALL, found) == ((4, 4, 4), (2, 4, 8), (4, 4, 4), *[None] * 5)
    assert distil.tiles_of(SMALL, distil.everywhere((0.3, 0.0), "tiles")) == ((4, 4, 4),) * 8
    mixed, when, _, classes = small.seen(0)[0]
    options = {"min_seq_len": 0, "inner": "eager", "calibration": found}
    with torch.no_grad():
        want = torch.compile(small.plain, backend="sparge", options=options)(mixed, when, classes)
        torch.testing.assert_close(small.sparse(found)(mixed, when, classes), want)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=pytest.mark.slow) if rule == "topp" else rule for rule in tabular.RULES]
)
def test_a_pair_of_each_rule_keeps_as_many_blocks_as_it_is_asked_for(rule, tmp_path) -> None:
    small = tiny_lab(tmp_path)
    ((topk, topp), *_) = choose.one_pair(small, 0, rule, 0.8).sites["*"]
    assert (topp == 0) == (rule == "topk") and (topk < 0.1) == (rule == "topp")
    assert small.sparsity(distil.everywhere((topk, topp)), small.seen(0)[0]) == pytest.approx(1 - 3 / 16, abs=0.02)


def test_the_sparsity_of_a_model_is_measured_and_attention_is_put_back() -> None:
    model = transformer.VideoTransformer(width=64, layers=2, heads=2).eval()
    inputs = torch.randn(1, 4, 64, 64), torch.tensor([0.5]), torch.zeros(1, 10)
    before = torch.nn.functional.scaled_dot_product_attention
    assert measures.measured_sparsity(model, distil.everywhere((0.25, 0.0)), inputs) == 0.75
    with pytest.raises(ValueError, match="no thresholds"):
        measures.measured_sparsity(model, sparge_compile.Calibration({"other": [(0.5, 0.0)]}), inputs)
    assert torch.nn.functional.scaled_dot_product_attention is before


def rows(**columns: list[float]) -> list[dict[str, str]]:
    return [dict(zip(columns, map(str, values), strict=True)) for values in zip(*columns.values(), strict=True)]


def test_figures_are_means_of_seeds() -> None:
    two = rows(seed=[0, 0, 1], error=[0.1, 0.3, 0.4], PSNR=[20, 20, float("nan")])
    assert tabular.shown(two, "error") == "0.3000 ± 0.1414"  # of 0.2 and 0.4
    assert tabular.shown(two, "PSNR") == "20.0" and tabular.shown([], "PSNR") == "–"
    assert tabular.shown(rows(seed=[0, 1], error=[1e-5, 3e-5]), "error") == "2.0e-05 ± 1.4e-05"


def test_tables_go_between_their_marks(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    fidelity.fill(page, {"x": r"| new \1 |"})
    assert page.read_text() == "a\n<!-- x -->\n| new \\1 |\n<!-- /x -->\nb\n"
    with pytest.raises(SystemExit, match="'y'"):
        fidelity.fill(page, {"y": ""})


def test_the_page_holds_what_its_results_say() -> None:
    """docs/fidelity.md is as ``reproduce.py --parts`` writes it."""
    text = fidelity.PAGE.read_text()
    for name, table in (fidelity.tables(SMALL.results) | fidelity.tables(LARGE.results)).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text, name


def test_distilled_orders_have_a_table_and_a_sentence_once_they_are_there() -> None:
    rows = tabular.read(SMALL.results / "quality.csv")
    untrained = tabular.where(rows, part="orders", steps="0")
    assert fidelity.distilled_orders_text(untrained) == ""
    found = []
    for row in tabular.where(rows, part="students", target="0.95", trained="all weights"):
        for order, factor in (("raster", 1.0), ("tiles", 0.8)):
            error = str(float(row["velocity error"]) * factor)
            sparsity = {"raster": "0.944", "tiles": "0.957"}[order]
            found.append({**row, "part": "orders", "order": order, "velocity error": error, "sparsity": sparsity})
    text = fidelity.distilled_orders_text([*untrained, *found])
    assert "for 1,000 steps" in text and "20% less at 95.7% sparsity beside 94.4% (less in 3 of 3 seeds)." in text
    assert fidelity.orders_table([*untrained, *found], "PSNR") == fidelity.orders_table(untrained, "PSNR")
    assert "In tiles" not in fidelity.distilled_orders_text(tabular.where(found, order="tiles"))


@pytest.mark.slow
def test_the_study_measures_what_is_missing(tmp_path, monkeypatch, capsys) -> None:
    command = "reproduce.py --parts floor rounded --seeds 0 --batch 2 --rounds 1 --sample-steps 2 --frames 4 --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "found")])
    reproduce.main()
    assert "rendered clips" in capsys.readouterr().out
    found = tabular.read(tmp_path / "found" / "quality.csv")
    assert [row["rule"] for row in found] == list(dict.fromkeys(row["rule"] for row in found))
    dense, *_, rounded = found
    assert float(dense["velocity error"]) == 0 < float(rounded["velocity error"]) < 1e-3
    reproduce.main()
    assert tabular.read(tmp_path / "found" / "quality.csv") == found
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--sample-steps", "3"])
    with pytest.raises(SystemExit, match="another kind of run"):
        reproduce.main()


def test_pairs_are_drawn_in_random_order_and_answers_to_them_are_counted(tmp_path) -> None:
    kinds = ["distilled"] * 6 + ["not trained"]
    found = [(kind, -torch.ones(4, 64, 64), torch.ones(4, 64, 64)) for kind in kinds]
    blind.write(found, tmp_path, random.Random(0))
    key = tabular.read(tmp_path / "key.csv")
    assert sorted(row["kind"] for row in key) == kinds and {row["sparse"] for row in key} == {"A", "B"}
    with Image.open(tmp_path / "sheet2.png") as second:  # the last pair: rows A and B, the sparse one is white
        assert (second.getpixel((64, 32)) == 255) == (key[-1]["sparse"] == "A")
    answers = tmp_path / "answers.csv"
    answers.write_text("\n".join(["pair,answer", *(f"{row['pair']},{row['sparse'].lower()}" for row in key)]))
    assert blind.score(answers, tmp_path / "key.csv") == {"distilled": (6, 6), "not trained": (1, 1)}
    answers.write_text("pair,answer\n1,A\n")
    with pytest.raises(SystemExit, match="pair 2: it needs A or B"):
        blind.score(answers, tmp_path / "key.csv")


@pytest.mark.slow
def test_pairs_to_judge_are_of_the_same_noise(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(blind, "SEEDS", (0,))
    small = tiny_lab(tmp_path, replace(SMALL, blind=(1, 1, 1)), rounds=3)
    found = blind.pairs(small)
    assert [kind for kind, *_ in found] == ["not trained", "distilled"]
    for i, (_, dense, sparse) in enumerate(found, 1):
        assert torch.equal(dense, small.dense_samples(0)[i, ::3]) and dense.shape == sparse.shape == (2, 64, 64)
        assert not torch.equal(dense, sparse)


def readings(folder: str, kind: str) -> tuple[int, ...]:
    """How many pairs of a kind each reader found, and of how many; all found all controls."""
    place = LARGE.results / folder
    each = [blind.score(path, place / "key.csv") for path in sorted(place.glob("answers*.csv"))]
    assert all(found["not trained"] == (12, 12) for found in each)
    return *(found[kind][0] for found in each), each[0][kind][1]


def test_the_pairs_of_the_page_were_found_as_often_as_it_says() -> None:
    folder = SMALL.results / "blind"
    found = blind.score(folder / "answers.csv", folder / "key.csv")
    (controls, all_controls), (right, of) = found["not trained"], found["distilled"]
    text, start = (" ".join(page.read_text().split()) for page in (fidelity.PAGE, fidelity.DOCS.parent / "README.md"))
    assert controls == all_controls and f"found the sparse row of all {controls}, and of {right} of the {of}" in text
    assert f"p = {blind.by_chance(right, of):.2f};" in text
    first, second, of = readings("blind", "distilled")
    assert f"row of all 12 controls, and of {first} and {second} of the {of} pairs (chance" in text
    assert f"told from it in {first} and {second} of {of} pairs" in start
    first, second, of = readings("blind_trained_on", "trained on")
    assert f"they found {first} and {second} of the {of}, by a ground" in text
    assert f"another training of the dense model in {first} and {second}." in start
    first, second, of = readings("blind_by_step", "distilled")
    assert f"Two readers found it in {first} and {second} of {of} pairs" in text
    *found, of = readings("blind_evener", "distilled")
    counts = ", ".join(map(str, found))
    chances = ", ".join(f"{blind.by_chance(right, of):.3f}".lstrip("0") for right in found)
    assert f"Four readers found it in {counts} of {of} pairs (p = {chances})" in text
    assert f"late in sampling in {min(found)} to {max(found)}, with" in start
    folder = LARGE.results / "blind_90"
    found = blind.score(folder / "answers.csv", folder / "key.csv")
    (right, of), chance = found["distilled"], blind.by_chance(*found["distilled"])
    assert f"{right} of {of} (p = {chance:.3f}) and all {found['not trained'][0]} controls".replace("0.", ".") in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_study_at_tiny_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "SPARSITIES", (0.95, 0.8))
    monkeypatch.setattr(parts, "STUDENTS", (0.95,))
    monkeypatch.setattr(parts, "MILD_TO_HIGH", (0.9,))
    monkeypatch.setattr(parts, "PAIRS", ((0.5, 0.8),))
    monkeypatch.setattr(parts, "TRIED", {case.ALL: (1e-3, 3e-3), case.ATTENTION: (1e-3,)})
    command = "reproduce.py --seeds 0 --steps 1 --long-steps 1 --batch 2 --rounds 1 --sample-steps 1 --frames 4 --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "found")])
    reproduce.main()
    made = fidelity.tables(tmp_path / "found")
    wanted = "rules orders rates paper losses students defaults structures split ranking layers"
    assert set(wanted.split()) <= set(made)
    assert all("nan" not in table for table in made.values())
    assert len(list((tmp_path / "found").glob("*.png"))) == 4 + len(parts.STUDENTS)


def test_the_demo(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--frames", "2", "--steps", "2", "--out", str(tmp_path)])
    monkeypatch.setenv(demo.FRAMES_VARIABLE, "2")
    assert demo.main() == 0
    printed = capsys.readouterr().out
    for name in ("dense", "sparse, not trained", "sparse, distilled"):
        assert re.search(rf"^{name} .*%$", printed, re.MULTILINE), name
    with Image.open(tmp_path / "moving_digits.gif") as gif:
        assert gif.n_frames == 2
    assert (tmp_path / "moving_digits.png").stat().st_size > 1000


def test_bounds_on_the_output_are_summed_up(tmp_path) -> None:
    rows = [{"goal": "0.1", "sparsity": "0.5", "error": error, "seconds": "9"} for error in ("0.09", "0.07", "0.11")]
    text = output_error.summary(rows)
    assert text.startswith("bound 0.1: kept in 2 of 3 runs, in 1 by less than 20 %; the error is 0.90 of it")
    args = argparse.Namespace(batches=2, frames=1, device="cpu")
    seen, others = (output_error.inputs(args, 0, held_out) for held_out in (False, True))
    assert len(seen) == 2 and not any(torch.equal(a[0], b[0]) for a in seen for b in others)
    assert torch.equal(seen[0][1], output_error.inputs(args, 0, False)[0][1])


def test_errors_by_order() -> None:
    model, data = transformer.load(), order_errors.inputs(1, 4, "cpu", 0)[:1]
    for order in ("raster", "tiles"):
        assert order_errors.error(model, 1.0, order, data) < 1e-6 < order_errors.error(model, 0.3, order, data)


def test_what_eight_bits_cost() -> None:
    device = torch.device("cpu")
    args = argparse.Namespace(seeds=1, clips=1, batch=1, frames=1, heads=1, device=device)
    model = transformer.load()
    assert all(1e-4 < error < 4e-2 for error in precisions.attention_errors(model, 0.5, args))
    own, eight = (precisions.velocity_errors(model, 1.0, kind, args)[0] for kind in precisions.PRECISIONS)
    assert own < 1e-6 < eight < 1e-2
