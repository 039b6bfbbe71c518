"""Kept text in whole models: found where the joint sequence is put together, under dynamic shapes as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from toys import Stack

from sparge_compile import Calibration, attach, explain, replace_attention
from sparge_compile.notices import forget_warnings

TEXT, IMAGE, WIDTH, HEADS = 40, 200, 32, 2
OPTIONS = {"keep_keys": "text", "dense_queries": True, "min_seq_len": 0, "topk": 0.2, "topp": 0.0}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()
    forget_warnings()


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    """A rotary embedding, with numbers that depend on the place."""
    places = torch.arange(x.shape[2], device=x.device)
    angle = places[:, None] * torch.linspace(0.1, 1, x.shape[-1] // 2)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(3)


class Dual(nn.Module):
    """Text and image have projections of their own and are joined in the attention, as in Flux (text first),
    SD3 and HunyuanVideo (text last)."""

    def __init__(self, text_first: bool, dim: int, late: bool = False, out: bool = True) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        self.text_first, self.dim, self.late = text_first, dim, late

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        both = [self.text(text).chunk(3, -1), self.image(image).chunk(3, -1)]
        both = both if self.text_first else both[::-1]
        if self.dim == 2:  # of [B, H, L, D]
            q, k, v = (torch.cat([heads(x) for x in pair], 2) for pair in zip(*both, strict=True))
        else:
            q, k, v = (heads(torch.cat(pair, 1)) for pair in zip(*both, strict=True))
        q, k = turned(self.norm_q(q)), turned(self.norm_k(k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        sizes = [len_of(text), len_of(image)] if self.text_first else [len_of(image), len_of(text)]
        parts = out.split(sizes, 1)
        return tuple(parts if self.text_first else parts[::-1])  # type: ignore[return-value]


def len_of(x: Tensor) -> int:
    return x.shape[1]


class Single(nn.Module):
    """One stream of joined tokens, as in Flux's single blocks; text and image are joined before the blocks."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(blocks))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, image], 1)
        for i in range(len(self.norms)):
            x = self.block(x, i)
        return x[:, : text.shape[1]], x[:, text.shape[1] :]

    def block(self, x: Tensor, i: int) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv[i](self.norms[i](x) * 1.5 + 0.1).chunk(3, -1))
        attended = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return x + F.silu(self.out[i](attended.transpose(1, 2).flatten(2)))


class Checkpointed(Single):
    """Each block is checkpointed, and what joins text and image stands outside of all."""

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, image], 1)
        for i in range(len(self.norms)):
            x = checkpoint(self.block, x, i, use_reentrant=False)
        return x[:, : text.shape[1]], x[:, text.shape[1] :]


class Written(Dual):
    """Attention written out."""

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.text(text), self.image(image)], 1)
        q, k, v = (heads(x) for x in joined.chunk(3, -1))
        weights = torch.softmax(q @ k.mT * 0.25, -1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


class Turning(Dual):
    """Rotary embeddings are written into the image's rows of queries and keys, as in CogVideoX."""

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        start = text.shape[1]
        q, k, v = (heads(x) for x in torch.cat([self.text(text), self.image(image)], 1).chunk(3, -1))
        q, k = self.norm_q(q), self.norm_k(k)
        q[:, :, start:] = turned(q[:, :, start:])
        k[:, :, start:] = turned(k[:, :, start:])
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out[:, :start], out[:, start:]


MODELS = {
    "flux": lambda: Dual(text_first=True, dim=2),
    "joined early": lambda: Dual(text_first=True, dim=1),
    "cogvideox": lambda: Turning(text_first=True, dim=1),
    "sd3": lambda: Dual(text_first=False, dim=1),
    "hunyuanvideo": lambda: Dual(text_first=False, dim=2),
    "single": lambda: Single(),
    "checkpointed": lambda: Checkpointed(),
    "written": lambda: Written(text_first=True, dim=1),
}


def inputs(image: int = IMAGE, text: int = TEXT) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, text, WIDTH), torch.randn(1, image, WIDTH)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_text_is_found(name: str) -> None:
    report = explain(made(name), OPTIONS)(*inputs())
    place = "200:240" if name in ("sd3", "hunyuanvideo") else "0:40"
    assert len(report.sparse) == (2 if name in ("single", "checkpointed") else 1)
    for row in report:
        assert f"keeps text with dense queries, here tokens {place}" in row.detail


@pytest.mark.parametrize("name", ["flux", "sd3", "single", "checkpointed"])
def test_dense_queries_are_those_of_dense_attention(name: str) -> None:
    model = (
        {"single": Single, "checkpointed": Checkpointed}[name](blocks=1).eval()
        if name in ("single", "checkpointed")
        else made(name)
    )
    with torch.no_grad():
        dense = model(*inputs())
        found = torch.compile(model, backend="sparge", options={**OPTIONS, "inner": "eager"})(*inputs())
        plain = {**OPTIONS, "keep_keys": None, "dense_queries": False, "inner": "eager"}
        torch._dynamo.reset()
        sparse = torch.compile(model, backend="sparge", options=plain)(*inputs())
    torch.testing.assert_close(found[0], dense[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[1], dense[1], atol=1e-4)  # the image is sparse
    assert not torch.allclose(sparse[0], dense[0], atol=1e-4)


@pytest.mark.parametrize("is_attached", [False, True])
def test_numbers_are_kept_in_layers_behind_others(is_attached: bool) -> None:
    """Nothing is put together here; the search for it leads through the layer before, which is replaced first."""
    model, kept = Stack(), {"keep_keys": TEXT, "dense_queries": True}
    x = torch.randn(1, 300, 32)
    with torch.no_grad():
        dense = model(x)
        if is_attached:
            attach(model, Calibration({"*": [(0.2, 0.0)]}, kept={"*": kept}))
        options = {"topk": 0.2, "topp": 0.0, "min_seq_len": 0, **({} if is_attached else kept)}
        found = torch.compile(model, backend="sparge", options={**options, "inner": "eager"})(x)
    assert not torch.allclose(found, dense, atol=1e-4)
    with replace_attention(model, options), torch.no_grad():
        assert torch.equal(found, model(x))


class Apart(Dual):
    """The text attends to itself before it is joined: a part is what another attention gives."""

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        alone = heads(text)
        alone = F.scaled_dot_product_attention(alone, alone, alone.exp())
        joined = torch.cat([alone, heads(image)], 2)
        out = F.scaled_dot_product_attention(joined, joined, joined).transpose(1, 2).flatten(2)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


def test_a_part_may_be_what_another_site_gives() -> None:
    model = Apart(text_first=True, dim=2).eval()
    options = {**OPTIONS, "topk": 1.0, "inner": "eager", "on_unsupported": "error"}
    compiled = torch.compile(model, backend="sparge", options=options)
    with torch.no_grad(), pytest.warns(UserWarning, match="no text is kept at"):
        for size in [(150, 40), (600, 70), (700, 80)]:
            torch.testing.assert_close(compiled(*inputs(*size)), model(*inputs(*size)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flux", "single"])
def test_dynamic_shapes_take_as_many_graphs_as_without_us(name: str) -> None:
    """Traced with a text longer than the image; each call keeps the shorter part of its own."""
    model = made(name) if name != "single" else Single(blocks=1).eval()
    sizes = [(150, 400), (600, 40), (700, 50), (560, 90)]

    def graphs(backend: str, **how: Any) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=backend, dynamic=True, **how)
        with torch.no_grad():
            results = [compiled(*inputs(*size)) for size in sizes]
        return counters["stats"]["unique_graphs"], results

    number, dense = graphs("eager")
    ours, found = graphs("sparge", options={**OPTIONS, "inner": "aot_eager"})
    assert ours == number
    for (image, text), got, want in zip(sizes, found, dense, strict=True):
        kept = 0 if text < image else 1
        torch.testing.assert_close(got[kept], want[kept], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(got[1 - kept], want[1 - kept], atol=1e-4)


def test_a_size_that_changes_is_not_known_in_checkpointed_code() -> None:
    compiled = torch.compile(
        made("checkpointed"), backend="sparge", dynamic=True, options={**OPTIONS, "inner": "eager"}
    )
    with torch.no_grad(), pytest.warns(UserWarning, match="no text is kept at"):
        compiled(*inputs())


class Alike(nn.Module):
    """Code that puts something together, but no text and image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.kind == "batch":  # guidance: two prompts in one batch
            x = heads(torch.cat([b, b], 0))
            return F.scaled_dot_product_attention(x, x, x)
        if self.kind == "heads":
            x = torch.cat([heads(b), heads(b)], 1)
            return F.scaled_dot_product_attention(x, x, x)
        if self.kind == "halves":
            x = heads(torch.cat([b, b * 2], 1))
            return F.scaled_dot_product_attention(x, x, x)
        if self.kind == "cache":  # queries are new, keys are old and new
            k = heads(torch.cat([b, a], 1))
            return F.scaled_dot_product_attention(heads(a), k, k)
        if self.kind == "keys alone":
            k = heads(torch.cat([a, b], 1))
            q = heads(torch.cat([a, b], 1).flip(1))
            return F.scaled_dot_product_attention(q, k, k)
        if self.kind == "mixed":  # a product over the tokens moves them
            x = torch.cat([a, b], 1)
            x = heads(torch.ones(x.shape[1], x.shape[1]) @ x)
            return F.scaled_dot_product_attention(x, x, x)
        x = torch.cat([a, b], 1)[:, 7:]  # a cut through the text
        return F.scaled_dot_product_attention(heads(x), heads(x), heads(x))


@pytest.mark.parametrize("kind", ["batch", "heads", "halves", "cache", "keys alone", "mixed", "cut"])
def test_what_is_no_text(kind: str) -> None:
    report = explain(Alike(kind), OPTIONS)(*inputs())
    (row,) = report
    assert row.status == "sparse" and "keeps no text" in row.detail


def test_text_that_is_not_found_is_warned_of_once() -> None:
    compiled = torch.compile(Alike("halves"), backend="sparge", options={**OPTIONS, "inner": "eager"})
    with pytest.warns(UserWarning, match="equally long"), torch.no_grad():
        compiled(*inputs())


def test_attached_thresholds_keep_what_the_graph_says() -> None:
    model = made("flux")
    kept = {"(root)": {"keep_keys": "text", "dense_queries": True}}
    compiled = torch.compile(model, backend="sparge", options={"inner": "eager", "min_seq_len": 0})
    with torch.no_grad():
        dense = model(*inputs())
        attached = attach(model, Calibration({"(root)": [(0.2, 0.0)]}, kept=kept))
        found = compiled(*inputs())
        torch.testing.assert_close(found[0], dense[0], atol=1e-5, rtol=1e-4)
        assert attached.get().kept == {"(root)": ("text", True)}
        attached.set(Calibration({"(root)": [(0.2, 0.0)]}))  # nothing is kept any more, and nothing compiled anew
        graphs = counters["stats"]["unique_graphs"]
        assert not torch.allclose(compiled(*inputs())[0], dense[0], atol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs


def test_equal_blocks_keep_what_each_of_them_is_to() -> None:
    """One graph for both blocks; the first keeps nothing."""
    blocks = nn.ModuleList(Dual(text_first=True, dim=2) for _ in range(2)).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, text: Tensor, image: Tensor) -> list[Tensor]:
            return [block(text, image)[0] for block in self.blocks]

    model = Model()
    with torch.no_grad():
        dense = model(*inputs())
        calibration = Calibration(
            {"blocks.0": [(0.2, 0.0)], "blocks.1": [(0.2, 0.0)]},
            kept={"blocks.1": {"keep_keys": TEXT, "dense_queries": True}},
        )
        for block in blocks:
            block.compile(backend="sparge", options={"calibration": calibration, "inner": "eager", "min_seq_len": 0})
        found = model(*inputs())
    assert counters["stats"]["unique_graphs"] == 1
    assert not torch.allclose(found[0], dense[0], atol=1e-4)
    torch.testing.assert_close(found[1], dense[1], atol=1e-5, rtol=1e-4)
