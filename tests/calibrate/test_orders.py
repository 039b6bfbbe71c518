"""Which order of tokens a calibration chooses, and that it measures and asks in that order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparge_compile import Calibration, Options, attach, attention, calibrate, explain
from sparge_compile.calibrate import conduct, influence, order_choice, orders, stages
from sparge_compile.calibrate.calls import ModelCall
from sparge_compile.calibrate.curves import TOPK
from sparge_compile.calibrate.order_choice import Question, chosen, own_orders
from sparge_compile.calibrate.orders import Trials, best_for_attention, parse_orders, shares_for
from sparge_compile.calibrate.record import Recorder
from sparge_compile.calibrate.trial import KeptTrial
from sparge_compile.errors import is_of_user
from sparge_compile.kernels.order import TILE as DEFAULT

GRID, TILE, WIDTH = (8, 8, 16), (2, 4, 8), 32
OPTIONS = {"min_seq_len": 0}


class Attend(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads * self.scale, heads, heads).transpose(1, 2).flatten(2)


class Video(nn.Module):
    """[B, C, T, H, W]; the last layer attends in a line, of which nobody knows the grid."""

    def __init__(self, layers: int = 2, in_line: bool = False, heads: int = 2) -> None:
        super().__init__()
        self.layers, self.in_line = nn.ModuleList(Attend(heads) for _ in range(layers)), in_line

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
    monkeypatch.setattr(conduct, "choose_orders", None)
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
    tried, real = [], Recorder.find_grids

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

    monkeypatch.setattr(Recorder, "find_grids", count)
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
    assert own_orders(ALONE, TILE) == {"a": TILE, "b": TILE, "c": None}
    assert own_orders(ALONE, None) == {"a": TILE, "b": None, "c": None}
    assert own_orders({TILE: ALONE[TILE], None: {"a": 0.01}}, TILE) == {"a": None, "b": TILE, "c": TILE}


def call_of(x: Tensor) -> ModelCall:
    return ModelCall.of(0, 0, (x,), {})


def test_each_site_is_asked_of_alone_at_the_density_that_is_aimed_at():
    """What the model returns with one site sparse, or all, in each order; all orders are tried by one graph."""
    model, x = made(), boxes(0)
    sites = dict.fromkeys(NAMES, 2)
    with torch.no_grad():
        exact = model(x)
        found = {}
        with KeptTrial(model, Options(min_seq_len=0)) as trials, trials.of(sites) as trial:
            question = Question(trial, sites, 0.1)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            for order in (None, TILE, None):
                orders = dict.fromkeys(NAMES, order)
                assert question.groups == [NAMES]  # so few heads that sites would not be asked of
                found[order] = question.alone(orders, call_of(x), [[name] for name in NAMES])
                found[order]["*"] = question.all_sparse(orders, call_of(x))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
        for order, errors in found.items():
            for name, error in errors.items():
                sites = {site: [(0.1, 0.0) if name in ("*", site) else (1.0, 0.0)] * 2 for site in NAMES}
                tiles = {} if order is None else dict.fromkeys(NAMES, order)
                options = {**OPTIONS, "inner": "eager", "calibration": Calibration(sites, tiles=tiles)}
                torch._dynamo.reset()
                out = torch.compile(model, backend="sparge", options=options)(x)
                assert error == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_sites_have_orders_of_their_own_in_the_graph_that_is_there(shared):
    """Unless they share their code, as far as it is known: then what has other orders is compiled anew."""
    model, x, sites = made(), boxes(0), dict.fromkeys(NAMES, 2)
    codes = dict.fromkeys(NAMES, "block") if shared else {name: name for name in NAMES}
    own = {NAMES[0]: TILE, NAMES[1]: None}
    with KeptTrial(model, Options(min_seq_len=0)) as trials, trials.of(sites, codes) as trial:
        question = Question(trial, sites, 0.1)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = [question.all_sparse(orders, call_of(x)) for orders in (dict.fromkeys(NAMES, TILE), own)]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1 + shared
    calibration = Calibration({name: [(0.1, 0.0)] * 2 for name in NAMES}, tiles={NAMES[0]: TILE})
    with torch.no_grad():
        out = torch.compile(model, backend="sparge", options={**OPTIONS, "inner": "eager", "calibration": calibration})(
            x
        )
        expected = ((out - model(x)).norm() / model(x).norm()).item()
    assert found[1] == pytest.approx(expected, rel=1e-3) and found[1] > 1.1 * found[0]


def test_thresholds_that_a_user_attaches_between_questions_are_refused_and_stay():
    model, sites = made(), dict.fromkeys(NAMES, 2)
    own = Calibration({NAMES[0]: [(0.3, 0.0)]})
    with KeptTrial(model, Options(min_seq_len=0)) as trials:
        with trials.of(sites):
            pass
        attached = attach(model, own)
        said = f"attached while others were off the model for a while: got {NAMES[0]}"
        with pytest.raises(ValueError, match=said), trials.of(sites):
            pass
    assert attached.names == (NAMES[0],) and torch.equal(attached.buffers()[NAMES[0]], torch.tensor([[0.3, 0.0]]))
    attached.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_very_many_sites_are_asked_of_together():
    def groups(sites: int, heads: int) -> list[int]:
        return [len(group) for group in Question(None, {str(n): heads for n in range(sites)}, 0.1).groups]

    assert groups(8, 4) == [1] * 8 and groups(30, 12) == [2] * 15 and groups(57, 24) == [3] * 19
    for sites, heads in ((8, 4), (30, 12), (57, 24), (2, 2)):  # a quarter of what influence takes
        number = len(groups(sites, heads))
        assert number == 1 or number + 2 * -(-number // 2) <= 0.3 * influence.forwards(sites * heads)


def test_a_model_in_eager_code_is_asked_in_the_order_that_is_tried():
    """Its calls are prepared once for each form, which says nothing of orders."""
    model, x = made(1), boxes(0)
    model.layers[0].forward = torch.compiler.disable(model.layers[0].forward)
    sites = {"layers.0": 2}
    with KeptTrial(model, Options(min_seq_len=0, grid=GRID)) as trials, trials.of(sites) as trial:
        question = Question(trial, sites, 0.1)
        raster, tiles = (question.all_sparse({"layers.0": order}, call_of(x)) for order in (None, TILE))
    assert 0 < tiles < 0.9 * raster


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
    trials = recorder.try_orders(0, lambda: recorder._model(image), parse_orders(None), (0.3,))
    found = trials.sites["layers.0"]
    assert found[2, 4, 8] is found[1, 8, 8] and found[None] is not found[1, 8, 8]


class Asked:
    """A question to a model of three sites; c matters less than the others."""

    pairs = dict.fromkeys("abc", ((0.1, 0.0),))
    groups = (("a",), ("b",), ("c",))

    def __init__(self, own: float) -> None:
        self.own, self.asked = own, []

    def all_sparse(self, orders, call) -> float:
        kinds = set(orders.values())
        self.asked.append((call, kinds.pop() if len(kinds) == 1 else "own"))
        return {None: 0.9, TILE: 0.5, (4, 4, 4): 0.6, (1, 8, 8): 0.95, "own": self.own}[self.asked[-1][1]]

    def alone(self, orders, call, groups) -> dict[str, float]:
        (order,) = set(orders.values())
        self.asked += [(call, order, *group) for group in groups]
        return {name: {"a": 0.3, "b": 0.2, "c": 0.1}[name] * (1 if order == TILE else 0.9) for (name,) in groups}


@pytest.mark.parametrize("own, wins", [(0.4, True), (0.49, False)])
def test_orders_of_their_own_must_win_on_another_call(own, wins):
    asked = Asked(own)
    found = chosen(asked, (None, TILE, (1, 8, 8), (4, 4, 4)), "one", "other", by_site=True)
    assert found == ({"a": (4, 4, 4), "b": (4, 4, 4), "c": TILE} if wins else dict.fromkeys("abc", TILE))
    assert asked.asked == [
        *(("one", order) for order in (None, TILE, (1, 8, 8), (4, 4, 4))),
        *(("one", TILE, name) for name in "abc"),
        *(("one", order, name) for order in ((4, 4, 4), None) for name in "ab"),
        *(("other", order) for order in (TILE, "own")),
    ]
    asked = Asked(own)
    assert chosen(asked, (None, TILE), "one", "other", by_site=False) == dict.fromkeys("abc", TILE)
    assert len(asked.asked) == 2  # nobody asks the model of its heads


def test_attention_chooses_where_the_model_cannot_be_asked(monkeypatch):
    """Then alone is attention looked at in every order."""
    tried = []
    monkeypatch.setattr(Recorder, "try_orders", lambda self, *args: tried.append(args) or Trials(args[2], (), SITES))
    monkeypatch.setattr(order_choice, "best_for_attention", lambda trials: TILE)
    for model in (made(), made().train()):
        found = calibrate(model, batches(1), target_error=0.1, options=OPTIONS, orders=["raster", TILE])
        assert found.tiles == dict.fromkeys(NAMES, TILE) and len(tried) == model.training


def test_a_fault_of_the_model_is_not_taken_for_one_that_cannot_be_asked(monkeypatch):
    def fail(*args):
        raise ValueError("not a word to the user")

    monkeypatch.setattr(order_choice, "Question", fail)
    with pytest.raises(ValueError, match="not a word"):
        calibrate(made(), batches(1), target_error=0.1, options=OPTIONS, orders=["raster", TILE])


def test_a_choice_of_orders_takes_half_as_many_forwards_more():
    def forwards(orders) -> int:
        model, made = Video(4, heads=4).eval(), []
        model.register_forward_pre_hook(lambda module, args: made.append(1))
        clips = [x[:, :, :4, :8, :8] for x in batches(2)]
        calibrate(model, clips, target_sparsity=0.5, options=OPTIONS, orders=orders, query_blocks=1)
        return len(made)

    without = forwards(["raster"])
    assert without < forwards(["raster", "2x4x8", "4x4x4", "2x8x4"]) <= 1.5 * without


@pytest.mark.parametrize("in_line", [False, True], ids=["grids", "and a line"])
def test_a_choice_of_orders_is_made_by_the_graphs_of_a_calibration_without_one(in_line):
    """Dynamo makes one to record by and one that is tried, also where a site has no grid."""

    def found(orders) -> Calibration:
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = calibrate(made(in_line=in_line), batches(), target_sparsity=0.75, options=OPTIONS, orders=orders)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
        return found

    chosen = found(["raster", TILE])
    assert chosen.tiles == dict.fromkeys(NAMES, TILE) and chosen == found([TILE])


class Broken(Video):
    """Its layers have a graph each, in which no marker says what is attached: each may run the others'."""

    def forward(self, video: Tensor) -> Tensor:
        x = video.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x) + x
            torch._dynamo.graph_break()
        return x


def test_the_order_that_suits_the_inputs_is_chosen_where_the_graph_breaks_between_layers():
    options = {**OPTIONS, "grid": GRID}
    found, other = (
        calibrate(Broken().eval(), batches(), target_sparsity=0.75, options=options, orders=orders)
        for orders in (["raster", TILE], [TILE])
    )
    assert found.tiles == dict.fromkeys(NAMES, TILE) and found.sites == other.sites


def test_a_model_is_as_it_was_while_its_samples_are_recorded():
    """Whoever makes the batches may load its weights, which names of thresholds would keep from fitting."""
    model = made()
    weights, before = copy.deepcopy(model.state_dict()), torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def loaded():
        for each in batches():
            model.load_state_dict(weights)
            yield each

    found = calibrate(model, loaded(), target_sparsity=0.75, options=OPTIONS, orders=["raster", TILE])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    assert found.tiles == dict.fromkeys(NAMES, TILE) and model.state_dict().keys() == weights.keys()


def test_eager_code_is_measured_as_it_is_once_orders_were_tried():
    """While they are, it is replaced."""

    def found(orders) -> Calibration:
        model = made(1)
        model.layers[0].forward = torch.compiler.disable(model.layers[0].forward)
        options = {**OPTIONS, "grid": GRID}
        return calibrate(model, batches(), target_sparsity=0.75, options=options, orders=orders)

    assert found(["raster", TILE]) == found([TILE])


def test_the_time_of_a_stage_inside_another_counts_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))
    times = stages.Stages()
    with times("samples"), times("orders"):
        pass
    assert str(times) == "time: 4.0 s: orders 2.0 s, 50%; samples 2.0 s, 50%"
