"""The grid that attach follows: in graphs of blocks, of the whole model, and of code that calls it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import Block

from sparge_compile import Calibration, attach, explain

WIDTH = 16
SPARSE = Calibration({"blocks.*.attn": [(0.4, 0.0)]})
OPTIONS = {"min_seq_len": 0, "token_order": "tiles", "inner": "eager"}
GRIDS = [(2, 9, 10), (2, 10, 9), (3, 6, 10), (4, 7, 9)]  # the first three have the same length


class Outer(nn.Module):
    """A block whose attention stands in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Block(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attn(x))


class Video(nn.Module):
    """[B, C, T, H, W]; the blocks see tokens in a line."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Outer() for _ in range(2))

    def forward(self, video: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # what flattens is in another graph than the blocks
        x = video.flatten(2).transpose(1, 2).contiguous()
        for block in self.blocks:
            x = block(x)
        return x


def grid_of(video: Tensor) -> tuple[int, ...]:
    return tuple(video.shape[2:])


def video_of(grid: tuple[int, ...]) -> Tensor:
    torch.manual_seed(sum(grid))
    return torch.randn(1, WIDTH, *grid)


def made() -> Video:
    torch.manual_seed(0)
    return Video().eval()


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def by_blocks(model: Video, backend: str = "sparge", **how) -> Video:
    for block in model.blocks:
        block.compile(backend=backend, **how)
    return model


def expected(shape: tuple[int, ...], grid: tuple[int, ...] | None) -> Tensor:
    """By a grid of numbers, or in raster order, in code compiled for it alone."""
    torch._dynamo.reset()
    model = made()
    order = {"token_order": "raster"} if grid is None else {"grid": grid}
    with attach(model, SPARSE), torch.no_grad():
        return by_blocks(model, options={**OPTIONS, **order})(video_of(shape))


@pytest.mark.parametrize("dynamic", [None, True])
def test_blocks_follow_the_grid_of_each_call_with_as_many_graphs_as_without_us(dynamic) -> None:
    want = [expected(grid, grid) for grid in GRIDS]

    def graphs(model: Video) -> tuple[int, list[Tensor]]:
        with torch.no_grad():
            results = [model(video_of(grid)) for grid in GRIDS]
        return counters["stats"]["unique_graphs"], results

    torch._dynamo.reset()
    counters.clear()
    number, dense = graphs(by_blocks(made(), "eager", dynamic=dynamic))
    torch._dynamo.reset()
    counters.clear()
    model = made()
    attach(model, SPARSE, grid=grid_of)
    ours, found = graphs(by_blocks(model, dynamic=dynamic, options=OPTIONS))
    for got, right, plain in zip(found, want, dense, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got, plain, atol=1e-4)
    # Of one length two grids are two graphs where sizes are numbers; symbols serve all.
    assert ours == number if dynamic else ours <= number + 2


def test_a_model_that_compiled_code_calls() -> None:
    class Whole(Video):
        def forward(self, video: Tensor) -> Tensor:
            x = video.flatten(2).transpose(1, 2) @ torch.eye(WIDTH)
            return self.blocks[0](x.roll(0, 1))  # a roll may move tokens, so the graph shows no grid

    want = []
    for grid in GRIDS[:2]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Whole().eval()
        with attach(model, SPARSE), torch.no_grad():
            compiled = torch.compile(
                lambda x, model=model: model(x), backend="sparge", options={**OPTIONS, "grid": grid}
            )
            want.append(compiled(video_of(grid)))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Whole().eval()
    attach(model, SPARSE, grid=grid_of)
    compiled = torch.compile(lambda x: model(x), backend="sparge", dynamic=True, options=OPTIONS)
    with torch.no_grad():
        for grid, right in zip(GRIDS, want, strict=False):
            torch.testing.assert_close(compiled(video_of(grid)), right, atol=1e-5, rtol=1e-5)


def orders_of(model: Video, grid: tuple[int, ...], opened_graphs: list) -> list[str]:
    before = len(opened_graphs)
    with torch.no_grad():
        model(video_of(grid))
    return [step.decision.order.partition(", made by")[0] for graph in opened_graphs[before:] for step in graph.steps]


@pytest.mark.parametrize(
    "grid, order",
    [
        (GRIDS[0], "tiles 4×4×4 of 2×9×10"),
        (lambda video: None, "raster: no grid known"),
        ({"blocks.*": grid_of}, "tiles 4×4×4 of 2×9×10"),
        ({"blocks.*.out": grid_of}, "raster: no grid known"),
        ((-1, 2, 9, 9, 4), "tiles 4×4×4 of 2×9×9 with 14 before and 4 behind"),
        (lambda video: (0, *video.shape[2:4], 9, -1), "tiles 4×4×4 of 2×9×9 with 18 behind"),
    ],
    ids=["numbers", "none", "pattern", "elsewhere", "left", "left of a call"],
)
@pytest.mark.filterwarnings("ignore:sparge. the tokens of:UserWarning")
def test_grids_in_all_forms(grid, order: str, opened_graphs) -> None:
    model = made()
    attach(model, SPARSE, grid=grid)
    assert orders_of(by_blocks(model, options=OPTIONS), GRIDS[0], opened_graphs) == [order]


@pytest.mark.filterwarnings("ignore:sparge. the tokens of:UserWarning")
def test_a_copy_follows_its_own_calls_and_a_removed_grid_is_gone(opened_graphs) -> None:
    model = made()
    attached = attach(model, SPARSE, grid=grid_of)
    other = copy.deepcopy(model)
    other(video_of(GRIDS[3]))
    assert orders_of(by_blocks(model, options=OPTIONS), GRIDS[0], opened_graphs)[0].startswith("tiles 4×4×4 of 2×9×10")
    assert other.blocks[0].attn.sparge.grid.numbers.shape[1:] == (1, *GRIDS[3], 1)
    attached.remove()
    assert not model._forward_pre_hooks
    attach(model, SPARSE)
    assert orders_of(model, GRIDS[0], opened_graphs) == ["raster: no grid known"]


def test_a_grid_is_not_asked_for_while_thresholds_are_off() -> None:
    model, asked = made(), []
    attached = attach(model, SPARSE, grid=lambda video: asked.append(1) or grid_of(video))
    with attached.off():
        model(video_of(GRIDS[0]))
        assert not model._forward_pre_hooks and not asked
    model(video_of(GRIDS[0]))
    assert len(asked) == 1 == len(model._forward_pre_hooks)
    attached.remove()
    assert not model._forward_pre_hooks


def test_a_grid_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="attach: grid cannot be read"):
        attach(made(), SPARSE, grid="21x30x52")
    with pytest.raises(ValueError, match="grid for modules that the model does not have: got 'other'"):
        attach(made(), SPARSE, grid={"other": grid_of})
    model = made()
    attach(model, SPARSE, grid=lambda video: (3, 4))
    with pytest.raises(TypeError, match="attach: grid cannot be read"):
        model(video_of(GRIDS[0]))


def test_a_missing_grid_is_warned_of_once() -> None:
    from sparge_compile.notices import forget_warnings

    forget_warnings()
    model = by_blocks(made(), options=OPTIONS)
    with torch.no_grad(), pytest.warns(UserWarning, match="no grid of theirs is known") as caught:
        model(video_of(GRIDS[0]))
        model(video_of(GRIDS[3]))
    assert sum("no grid" in str(each.message) for each in caught) == 1


def test_a_grid_that_does_not_fit_is_warned_of() -> None:
    from sparge_compile.notices import forget_warnings

    forget_warnings()
    model = made()
    attach(model, SPARSE, grid=(2, 9, 11))
    with torch.no_grad(), pytest.warns(UserWarning, match="grid 2×9×11 that is given has 198 tokens, not 180. Give it"):
        by_blocks(model, options=OPTIONS)(video_of(GRIDS[0]))


def test_explain_says_the_order_of_an_attached_grid() -> None:
    model = made()
    attach(model, SPARSE, grid={"blocks.0.attn": grid_of, "blocks.1.*": (2, 10, 9)})
    report = explain(model, {**OPTIONS, "on_unsupported": "dense"})(video_of(GRIDS[0]))
    assert [(row.name, row.order.split(",")[0]) for row in report] == [
        ("blocks.0.attn", "tiles 4×4×4 of 2×9×10"),
        ("blocks.1.attn", "tiles 4×4×4 of 2×10×9"),
    ]


def test_what_prompts_of_other_lengths_leave_is_no_other_graph() -> None:
    model, plain = made(), by_blocks(made(), "eager", dynamic=True)
    lengths = [(1, 1, n) for n in (170, 181, 200, 150)]  # with 150 the grid is no part of the sequence
    with torch.no_grad():
        for length in lengths:
            plain(video_of(length))
        number = counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
        counters.clear()
        attach(model, SPARSE, grid=lambda video: (-1, 2, 9, 9, 0))
        by_blocks(model, dynamic=True, options={**OPTIONS, "on_unsupported": "dense"})
        found = [model(video_of(length)) for length in lengths]
    assert counters["stats"]["unique_graphs"] == number
    for got, length in zip(found, lengths, strict=True):
        left = length[2] - 162
        right = expected(length, (left, 2, 9, 9, 0)) if left >= 0 else expected(length, None)
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


def test_a_grid_that_does_not_fit_a_call_is_not_used() -> None:
    """Symbols of a grid and of a length agree where they are traced; a call in which they do not is raster order."""
    model, grid = made(), [GRIDS[0]]
    attach(model, SPARSE, grid=lambda video: grid[0])
    by_blocks(model, dynamic=True, options={**OPTIONS, "inner": "aot_eager", "on_unsupported": "dense"})
    with torch.no_grad():
        model(video_of(GRIDS[0]))
        grid[0] = (3, 5, 5)
        found = model(video_of(GRIDS[3]))
        torch._dynamo.reset()
        other = made()
        attach(other, SPARSE)
        right = by_blocks(other, options={**OPTIONS, "token_order": "raster"})(video_of(GRIDS[3]))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
