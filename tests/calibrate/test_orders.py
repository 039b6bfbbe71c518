"""Which order of tokens a calibration chooses, and that it measures and asks in that order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparge_compile import Calibration, Options, attention, calibrate, explain
from sparge_compile.calibrate import order_choice, orders, stages
from sparge_compile.calibrate.calls import NotedCalls
from sparge_compile.calibrate.curves import TOPK
from sparge_compile.calibrate.order_choice import Errors, own_orders
from sparge_compile.calibrate.orders import Trials, best_for_attention, parse_orders, shares_for
from sparge_compile.calibrate.record import Recorder
from sparge_compile.errors import is_of_user
from sparge_compile.kernels.order import TILE as DEFAULT

GRID, TILE, WIDTH = (8, 8, 16), (2, 4, 8), 32
OPTIONS = {"min_seq_len": 0}


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads * self.scale, heads, heads).transpose(1, 2).flatten(2)


class Video(nn.Module):
    """[B, C, T, H, W]; the last layer attends in a line, of which nobody knows the grid."""

    def __init__(self, layers: int = 2, in_line: bool = False) -> None:
        super().__init__()
        self.layers, self.in_line = nn.ModuleList(Attend() for _ in range(layers)), in_line

    def forward(self, video: Tensor) -> Tensor:
        x = video.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x) + x
        return self.layers[0](x.cumsum(1)) if self.in_line else x


def made(layers: int = 2, in_line: bool = False) -> Video:
    return Video(layers, in_line).eval()


def boxes(seed: int, tile: tuple[int, int, int] = TILE) -> Tensor:
    """A clip that has one colour in each tile, and some noise: what a token looks for stands in its own tile."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(1, WIDTH, *(n // size for n, size in zip(GRID, tile, strict=True)), generator=generator)
    for axis, size in enumerate(tile, 2):
        colours = colours.repeat_interleave(size, axis)
    return colours + 0.3 * torch.randn(colours.shape, generator=generator)


def batches(count: int = 2, tile: tuple[int, int, int] = TILE) -> list[Tensor]:
    return [boxes(seed, tile) for seed in range(count)]


NAMES = ["layers.0", "layers.1"]


@pytest.mark.parametrize("tile", [TILE, (4, 4, 4)], ids=str)
def test_the_order_that_suits_the_inputs_is_chosen_and_used_without_an_option(tile, tmp_path):
    found = calibrate(
        made(),
        batches(tile=tile),
        target_sparsity=0.75,
        options=OPTIONS,
        orders=["raster", tile],
        out=tmp_path / "c.json",
    )
    assert found.tiles == dict.fromkeys(NAMES, tile)
    loaded = Calibration.load(tmp_path / "c.json")
    rows = explain(made(), {**OPTIONS, "calibration": loaded})(boxes(9))
    assert [row.order.split(" of")[0] for row in rows] == [f"tiles {'×'.join(map(str, tile))}"] * 2
    assert found.at(target_sparsity=0.5).tiles == found.tiles

    compiled = torch.compile(made(), backend="sparge", options={**OPTIONS, "inner": "eager", "calibration": loaded})
    with torch.no_grad():
        errors = [((compiled(x) - made()(x)).norm() / made()(x).norm()).item() for x in batches(tile=tile)]
    said = found.origin.output.reached["error"]  # the model was asked in the chosen order
    assert said == pytest.approx(sum(errors) / 2, rel=1e-3)
    raster = calibrate(made(), batches(tile=tile), target_sparsity=0.75, options=OPTIONS, orders=["raster"])
    assert not raster.tiles and said < 0.7 * raster.origin.output.reached["error"]


def test_curves_are_those_of_the_op_in_the_order():
    model, x = made(1), boxes(3)
    found = calibrate(model, [x], target_error=0.1, by="mean", options=OPTIONS, orders=[TILE], mode="topk")
    tokens = x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
    scaled = tokens * model.layers[0].scale
    dense = F.scaled_dot_product_attention(scaled, tokens, tokens)
    for head, front in enumerate(found.origin.curves["layers.0"].phases[0].heads):
        assert len(front) > 3
        for point in front:
            out = attention(scaled, tokens, tokens, topk=point.topk, topp=point.topp, grid=GRID, tile=TILE)
            error = (out - dense)[:, head].abs().sum() / dense[:, head].abs().sum()
            assert point.mean == pytest.approx(error.item(), rel=2e-3, abs=1e-5) and point.topk in TOPK


def test_raster_is_chosen_where_it_does_best_and_takes_no_more_forwards_where_there_is_no_choice():
    found = calibrate(made(), batches(tile=(1, 4, 16)), target_sparsity=0.75, options=OPTIONS, orders=["raster", TILE])
    assert not found.tiles

    runs: list[int] = []
    line = nn.Sequential(Attend()).eval()
    line.register_forward_pre_hook(lambda module, args: runs.append(1))
    found = calibrate(line, [x.flatten(2).transpose(1, 2) for x in batches(3)], target_error=0.1, options=OPTIONS)
    assert not found.tiles and len(runs) == 3


@pytest.mark.parametrize(
    "options, given, tiles",
    [
        ({"token_order": "raster"}, None, {}),
        ({"token_order": "tiles", "tile": (4, 4, 4)}, None, dict.fromkeys(NAMES, (4, 4, 4))),
        ({"token_order": "tiles"}, ["raster"], dict.fromkeys(NAMES, DEFAULT)),
        ({}, ["2x4x8"], dict.fromkeys(NAMES, TILE)),
    ],
    ids=["raster", "tile", "tiles", "one"],
)
def test_an_order_that_is_said_is_not_chosen(options, given, tiles, monkeypatch):
    monkeypatch.setattr(Recorder, "try_orders", None)
    found = calibrate(made(), batches(1), target_error=0.1, options={**OPTIONS, **options}, orders=given)
    assert found.tiles == tiles


def test_a_site_without_a_grid_is_measured_in_raster_order():
    found = calibrate(made(in_line=True), batches(1), target_error=0.1, options=OPTIONS, orders=["raster", TILE])
    assert found.tiles == dict.fromkeys(NAMES, TILE) and "layers.0#1" in found.sites
    stated = {"grid": {"layers.0#1": GRID}}
    found = calibrate(made(in_line=True), batches(1), target_error=0.1, options={**OPTIONS, **stated}, orders=[TILE])
    assert set(found.tiles) == set(found.sites)


def test_kept_tokens_stay_those_of_the_sequence():
    options = {**OPTIONS, "keep_keys": 70, "token_order": "tiles", "tile": TILE}
    found = calibrate(made(1), [boxes(3)], target_sparsity=0.5, influence=False, options=options)
    densest = [min(front, key=lambda point: point.density) for front in found.origin.curves["layers.0"].phases[0].heads]
    # The first 70 tokens are four rows and a bit of the fifth: 3 of the 16 tiles, and one more by the rule.
    assert [point.density for point in densest] == [0.25, 0.25]


def test_an_interrupted_run_goes_on_in_the_order_that_it_chose(tmp_path, monkeypatch):
    tried, real = [], Recorder.try_orders

    def count(self, *args):
        tried.append(1)
        return real(self, *args)

    def until(stop: int | None):
        for number, x in enumerate(batches(3)):
            if number == stop:
                raise KeyboardInterrupt
            yield x

    def run(path, stop=None) -> bytes:
        torch._dynamo.reset()
        calibrate(made(), until(stop), target_error=0.1, options=OPTIONS, out=path, orders=["raster", TILE])
        return path.read_bytes()

    monkeypatch.setattr(Recorder, "try_orders", count)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c.json", stop=2)
    assert Calibration.load(tmp_path / "c.json").tiles == dict.fromkeys(NAMES, TILE)  # of what there is
    resumed = run(tmp_path / "c.json")
    assert len(tried) == 1 and resumed == run(tmp_path / "whole.json")


def scores(**errors: float) -> dict:
    return {
        order: torch.full((1, 2, 3), error, dtype=torch.float64)
        for order, error in zip((None, TILE), errors.values(), strict=True)
    }


SITES = {
    "a": scores(raster=3.0, tile=1.0),
    "b": scores(raster=1.0, tile=1.1),
    "c": scores(raster=1.0, tile=2.0),
}
ALONE = {None: {"a": 0.3, "b": 0.2, "c": 0.1}, TILE: {"a": 0.1, "b": 0.202, "c": 0.2}}


def test_a_site_has_an_order_of_its_own_only_if_it_wins_by_the_margin():
    assert best_for_attention(Trials((None, TILE), (0.1, 0.2, 0.4), SITES)) == TILE
    errors = {order: Errors(0.5, alone) for order, alone in ALONE.items()}
    assert own_orders(errors, TILE) == {"a": TILE, "b": TILE, "c": None}
    assert own_orders(errors, None) == {"a": TILE, "b": None, "c": None}


def test_each_site_is_asked_of_alone_at_the_density_that_is_aimed_at(monkeypatch):
    """What the model returns with one site sparse, in each order; many sites are asked of together."""
    model, x = made(), boxes(0)
    noted = NotedCalls()
    noted.note(0, 0, (x,), {})
    trials = Trials((None, TILE), (0.05, 0.1, 0.2), {name: scores(raster=1.0, tile=1.0) for name in NAMES})
    settings = SimpleNamespace(options=Options(min_seq_len=0))
    ask = order_choice.Question(model, settings, trials, noted.calls())
    with torch.no_grad():
        exact = model(x)
        for order in (None, TILE):
            errors = ask(dict.fromkeys(NAMES, order), each=True)
            for name, error in {**errors.alone, "*": errors.together}.items():
                sites = {site: [(0.1, 0.0) if name in ("*", site) else (1.0, 0.0)] * 2 for site in NAMES}
                tiles = {} if order is None else dict.fromkeys(NAMES, order)
                options = {**OPTIONS, "inner": "eager", "calibration": Calibration(sites, tiles=tiles)}
                torch._dynamo.reset()
                out = torch.compile(model, backend="sparge", options=options)(x)
                assert error == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-3)
    monkeypatch.setattr(order_choice, "FORWARDS", 2)
    together = order_choice.Question(model, settings, trials, noted.calls())(dict.fromkeys(NAMES, TILE), each=True)
    assert list(together.alone.values()) == pytest.approx([errors.together] * 2)


def test_orders_are_compared_at_what_is_aimed_at():
    assert shares_for(None) == orders.SHARES
    assert shares_for(0.9) == pytest.approx((0.05, 0.1, 0.2)) and shares_for(0.0) == pytest.approx((0.5, 0.9))


def test_orders_in_all_spellings():
    assert parse_orders(["raster", "2x4x8", [4, 4, 4], (2, 4, 8)]) == (None, TILE, (4, 4, 4))
    assert parse_orders(None)[:2] == (None, TILE)
    for wrong in (["tiles"], [], [(8, 8, 8)], ["2x4"], [7]):
        with pytest.raises((ValueError, TypeError), match="order") as caught:
            parse_orders(wrong)
        assert is_of_user(caught.value)


def test_images_have_tiles_of_one_frame():
    """Candidates that are the same tile in an image are looked at once."""
    image = torch.randn(1, WIDTH, 1, 16, 16)
    recorder = Recorder(
        made(1), options=Options(min_seq_len=0, grid=(1, 16, 16)), query_blocks=8, every=1, memory=1 << 28, seed=0
    )
    trials, _ = recorder.try_orders(0, lambda: recorder._model(image), parse_orders(None), (0.3,))
    found = trials.sites["layers.0"]
    assert found[2, 4, 8] is found[1, 8, 8] and found[None] is not found[1, 8, 8]


@pytest.mark.parametrize(
    "own, chosen",
    [(0.4, {"a": TILE, "b": TILE, "c": None}), (0.49, dict.fromkeys("abc", TILE)), (None, dict.fromkeys("abc", TILE))],
    ids=["wins", "too little", "not asked"],
)
def test_orders_of_their_own_must_win_in_what_the_model_returns(own, chosen, monkeypatch):
    class Question:
        def __init__(self, model, settings, trials, calls) -> None:
            assert [call.number for call in calls] == [2, 6]

        def __call__(self, tiles, each=False) -> Errors:
            if own is None:
                raise ValueError("a model that cannot be asked")
            found = set(tiles.values())
            if len(found) == 2:
                assert not each
                return Errors(own, {})
            (order,) = found
            return Errors({None: 0.9, TILE: 0.5}[order], ALONE[order])

    monkeypatch.setattr(order_choice, "Question", Question)
    recorder = SimpleNamespace(try_orders=lambda *args: (Trials((None, TILE), (0.1, 0.2, 0.4), SITES), None))
    noted = NotedCalls()
    for number in range(8):
        noted.note(0, number, (), {})
    settings = SimpleNamespace(aim={}, orders=(None, TILE))
    assert order_choice.choose_orders(made(), recorder, noted, settings, lambda: None) == (chosen, None)


def test_the_time_of_a_stage_inside_another_counts_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))
    times = stages.Stages()
    with times("samples"), times("orders"):
        pass
    assert str(times) == "time: 4.0 s: orders 2.0 s, 50%; samples 2.0 s, 50%"
