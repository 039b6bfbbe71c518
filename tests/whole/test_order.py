"""Token order in whole models: the grid that each graph shows, and results that do not tell where it is known from."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import FRAMES, HEIGHT, TEXT, WIDTH, cogvideox, flux, hunyuan_video, llama, ltx_video, sd3, seeded, tensor_of
from models import wan as wan_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from toys import Block, Stack

from sparge_compile import (
    Calibration,
    DistillationHook,
    Grid,
    attach,
    attention,
    explain,
    replace_attention,
    rewrite,
    set_step,
)
from sparge_compile.kernels.order import TILE, make_order

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TILES = {"token_order": "tiles", "min_seq_len": 0, "inner": "eager", "on_unsupported": "dense"}
DENSE = {**TILES, "topk": 1.0, "topp": 0.0}
SPARSE = {**TILES, "topk": 0.3, "topp": 0.0}
VIDEO = f"tiles 4×4×4 of {FRAMES}×{HEIGHT}×{WIDTH}"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def wan() -> tuple[nn.Module, dict[str, Any]]:
    return wan_of(layers=1)


def unet() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=24,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, {
        "sample": torch.randn(1, 4, 18, 22),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }


# Of the sites that attend to at least so many tokens as they have, in order.
SHOWN = {
    wan: [VIDEO],
    hunyuan_video: ["raster: no grid known", *[f"{VIDEO} with 11 behind"] * 2],
    ltx_video: [VIDEO] * 2,
    cogvideox: [f"{VIDEO} with 11 before"] * 2,
    sd3: ["tiles 1×8×8 of 1×17×19 with 11 behind", "tiles 1×8×8 of 1×17×19", "tiles 1×8×8 of 1×17×19 with 11 behind"],
    unet: ["tiles 1×8×8 of 1×18×22", "tiles 1×8×8 of 1×9×11", *["tiles 1×8×8 of 1×18×22"] * 2],
    flux: ["raster: no grid known"] * 2,  # its tokens are put in a line by the pipeline
    llama: ["raster: causal"] * 2,
}


@pytest.mark.parametrize("build", SHOWN, ids=lambda build: build.__name__)
def test_a_model_shows_its_grid_and_gives_what_it_gave(build) -> None:
    model, inputs = seeded(build)
    model.eval()
    report = explain(model, DENSE)(**inputs)
    orders = [row.order.split(", ")[0] for row in report.sparse if row.shapes["length"] == row.shapes["keys"]]
    assert orders == SHOWN[build] and not report.failures
    crossing = [row.order for row in report.sparse if row.shapes["length"] != row.shapes["keys"]]
    assert all(order.startswith("queries tiles") and "keys raster" in order for order in crossing)
    ordered = [row.order for row in report.sparse if "tiles" in row.order]
    assert all(f" gathers for {len(ordered)} sites" in order for order in ordered) or build is unet
    with torch.no_grad():
        want = tensor_of(model(**inputs))
        got = tensor_of(torch.compile(model, backend="sparge", options=DENSE)(**inputs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def run(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return tensor_of(torch.compile(model, backend="sparge", options={**SPARSE, **options})(**inputs))


def test_a_shown_grid_is_the_one_that_may_be_given() -> None:
    model, inputs = seeded(wan)
    model.eval()
    shown = run(model, inputs)
    torch.testing.assert_close(run(model, inputs, grid=(FRAMES, HEIGHT, WIDTH)), shown)
    assert not torch.allclose(run(model, inputs, token_order="raster"), shown, atol=1e-4)
    assert not torch.allclose(run(model, inputs, grid=(FRAMES, WIDTH, HEIGHT)), shown, atol=1e-4)
    options = {**SPARSE, "grid": (FRAMES, HEIGHT, WIDTH)}
    del options["inner"]
    with torch.no_grad(), replace_attention(model, options) as replaced:
        torch.testing.assert_close(tensor_of(model(**inputs)), shown)
    assert replaced.report.sites[0].order.startswith(VIDEO)


def permuted(grids: dict[int, Grid], topk: float = 0.3) -> Callable[..., Tensor]:
    """Sparse attention in raster order over tokens that torch has permuted, by the grid that so many tokens have."""

    def order_of(tokens: int) -> Tensor:
        grid = grids.get(tokens)
        return torch.arange(tokens) if grid is None else make_order(grid, TILE, torch.device("cpu")).slots.long()

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        q, k = order_of(query.shape[2]), order_of(key.shape[2])
        if attn_mask is not None:
            attn_mask = attn_mask[..., k]
            attn_mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., q, :]
        out = attention(query[:, :, q], key[:, :, k], value[:, :, k], topk=topk, topp=0.0, attn_mask=attn_mask)
        return out[:, :, q.argsort()]

    return attend


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by blocks"])
@pytest.mark.parametrize("build", [wan, hunyuan_video], ids=lambda build: build.__name__)
def test_sparse_in_tiles_is_a_permutation_in_torch(build, whole: bool, monkeypatch) -> None:
    """Of videos of two resolutions, with a text beside them or behind them."""
    model, inputs = seeded(build)
    model.eval()
    clips = [inputs["hidden_states"], torch.randn(1, 4, 3, 2 * 8, 2 * 10)]

    def grid_of(hidden_states: Tensor, **_: Any) -> tuple[int, ...]:
        return hidden_states.shape[2], hidden_states.shape[3] // 2, hidden_states.shape[4] // 2

    want = []
    for clip in clips:
        grid = grid_of(clip)
        grids = {math.prod(grid): Grid(0, *grid, 0), math.prod(grid) + TEXT: Grid(0, *grid, TEXT)}
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(F, "scaled_dot_product_attention", permuted(grids))
            want.append(tensor_of(model(**{**inputs, "hidden_states": clip})))
    thresholds = Calibration({"*": [(0.3, 0.0)]})
    with attach(model, thresholds, grid=None if whole else grid_of), torch.no_grad():
        if whole:
            compiled = torch.compile(model, backend="sparge", options=TILES)
        else:
            compiled = model
            model.compile_repeated_blocks(backend="sparge", options=TILES)
        for clip, right in zip(clips, want, strict=True):
            got = tensor_of(compiled(**{**inputs, "hidden_states": clip}))
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


def test_an_exported_program_has_the_order_in_it() -> None:
    model, inputs = seeded(wan)
    model.eval()
    options = {name: value for name, value in SPARSE.items() if name != "inner"}
    program = rewrite(torch.export.export(model, (), inputs), options)
    assert program.graph_module.meta["sparge_report"].sites[0].order.startswith(VIDEO)
    with torch.no_grad():
        torch.testing.assert_close(tensor_of(program.module()(**inputs)), run(model, inputs))


class Video(nn.Module):
    """A patch embedding, text before the video, and blocks, which may be checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([text, self.embed(video).flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x[:, text.shape[1] :]


def inputs_of(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(height)
    return torch.randn(1, 4, frames, 2 * height, 2 * width), torch.randn(1, TEXT, 32)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_resolutions_change_and_nothing_is_compiled_anew(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = Video(checkpointed)
    sizes = [(5, 7, 9), (5, 9, 7), (3, 12, 5)]
    options = {**SPARSE, "inner": "aot_eager"}

    def results(backend: str, of: list[tuple[int, int, int]], **how: Any) -> list[Tensor]:
        """Outputs and gradients; the number of graphs is counted."""
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=backend, **how)
        found = []
        for size in of:
            model.zero_grad()
            out = compiled(*inputs_of(*size))
            out.square().mean().backward()
            found += [out.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]
        return found

    results("eager", sizes, dynamic=True)
    graphs = counters["stats"]["unique_graphs"]
    found = results("sparge", sizes, dynamic=True, options=options)
    assert counters["stats"]["unique_graphs"] == graphs
    want = [x for size in sizes for x in results("sparge", [size], options={**options, "grid": (TEXT, *size, 0)})]
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


class Layer(nn.Module):
    """A block whose attention is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


@pytest.mark.parametrize("how", ["whole", "by blocks", "options"])
def test_steps_of_a_run_keep_the_order(how: str, monkeypatch) -> None:
    """A dense step, then steps of two phases: each is a permutation in torch, and none compiles anything anew."""
    torch.manual_seed(0)
    model, clip = Video().eval(), inputs_of(5, 7, 9)
    model.blocks = nn.ModuleList(Layer() for _ in range(2))
    phases = [(0.0, 0.2), (0.5, 0.2 if how == "options" else 0.5)]
    want = []
    for _, topk in phases:
        with monkeypatch.context() as patch, torch.no_grad():
            grid = Grid(TEXT, 5, 7, 9, 0)
            patch.setattr(F, "scaled_dot_product_attention", permuted({TEXT + 5 * 7 * 9: grid}, topk))
            want.append(model(*clip))
    with torch.no_grad():
        dense = model(*clip)
    first = Calibration({"blocks.*": [(0.2, 0.0)]})
    compiled: Any = model
    if how == "options":
        options = {**TILES, "calibration": first, "dense_steps": 1}
        compiled = torch.compile(model, backend="sparge", options=options)
        set_step_to = partial(set_step, model)
    else:
        planned = Calibration(first.sites, phases={0.5: {"blocks.*": [(0.5, 0.0)]}})
        grid_of = None if how == "whole" else lambda video, text: (TEXT, 5, 7, 9, 0)
        set_step_to = attach(model, planned, dense_steps=1, grid=grid_of).set_step
        for block in model.blocks if how == "by blocks" else ():
            block.compile(backend="sparge", options=TILES)
        compiled = torch.compile(model, backend="sparge", options=TILES) if how == "whole" else model
    graphs = []
    for step in (0, 1, 2, 3, 0, 1):
        set_step_to(step, 4)
        with torch.no_grad():
            got = compiled(*clip)
        graphs.append(counters["stats"]["unique_graphs"])
        if step == 0:
            assert torch.equal(got, dense)
        else:
            torch.testing.assert_close(got, want[step // 2], atol=1e-5, rtol=1e-4)
            assert not torch.allclose(got, dense, atol=1e-3)
    assert len(set(graphs)) == 1


class Small(nn.Module):
    """Tokens of a video that a hook of distillation trains, with the attention of each block compared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(2, 32, 1)
        self.stack = Stack()

    def forward(self, video: Tensor) -> Tensor:
        return self.stack(self.embed(video).flatten(2).transpose(1, 2))


def test_distillation_with_an_order() -> None:
    torch.manual_seed(0)
    student = Small()
    options = {**SPARSE, "inner": "aot_eager"}
    compiled = torch.compile(student, backend="sparge", options=options)
    with DistillationHook(compiled, layers=1.0) as hook:
        x = torch.randn(1, 2, 3, 9, 10)
        compiled(x)
        loss = hook.loss()
        loss.backward()
    grads = [p.grad for p in student.parameters()]
    assert loss > 0 and all(g is not None and g.isfinite().all() for g in grads)


class Masked(nn.Module):
    """Attention under a key mask, written out."""

    def forward(self, video: Tensor, keep: Tensor) -> Tensor:
        x = F.conv3d(video, torch.ones(8, 2, 1, 1, 1)).flatten(2).transpose(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
        scores = (x @ x.mT).masked_fill(~keep[:, None, None], float("-inf"))
        return torch.softmax(scores, -1) @ x


def test_masks_follow_the_order() -> None:
    torch.manual_seed(0)
    video, keep = torch.randn(1, 2, 3, 9, 10), torch.rand(1, 270) > 0.3
    (row,) = explain(Masked(), DENSE)(video, keep)
    assert row.kind == "decomposed" and row.shapes["length"] == 270 and row.order.startswith("tiles 4×4×4 of 3×9×10")
    got = torch.compile(Masked(), backend="sparge", options=DENSE)(video, keep)
    torch.testing.assert_close(got, Masked()(video, keep), atol=1e-5, rtol=1e-4)


def test_a_block_that_is_compiled_inside_a_checkpoint_saves_the_same_twice() -> None:
    """What the passes compute when the first forward compiles it is not counted by the checkpoint."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(1, 270, 32, requires_grad=True)
    block.compile(backend="sparge", options={**SPARSE, "grid": (3, 9, 10)})
    checkpoint(block, x, use_reentrant=False).square().mean().backward()
    assert x.grad is not None and x.grad.isfinite().all()
