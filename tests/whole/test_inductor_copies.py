"""What the op costs beside itself: copies and casts that Inductor makes because of it. There should be none, and each
gather into the order of blocks is there once.

Counted where they arise, in the graphs that reach Inductor and where it brings an operand into another layout, and
compared with the same model under the stock backend. The C++ of the other nodes is not compiled: it is not looked at.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.ir import ExternKernel

SPARSE = {"backend": "sparge", "options": {"topk": 0.5, "topp": 0.0, "min_seq_len": 0}}
HEADS, HEAD_SIZE, LENGTH = 2, 64, 200
WIDTH = HEADS * HEAD_SIZE
MOVES = ("clone", "copy", "_to_copy", "convert_element_type", "contiguous")


def wan():
    """A self-attention of Wan: three projections, norms over the width, rotary embedding, [B, L, H, D] memory."""
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    rotary = tuple(torch.randn(1, LENGTH, 1, HEAD_SIZE) for _ in range(2))
    attention = WanAttention(WIDTH, HEADS, HEAD_SIZE, processor=WanAttnProcessor()).to(torch.bfloat16)
    return attention, lambda x: attention(x, rotary_emb=rotary)


class Fused(torch.nn.Module):
    """One projection for query, key and value, which are views of its result: [B, L, 3, H, D] or [B, L, 3 H D]."""

    def __init__(self, unbind):
        super().__init__()
        self.unbind = unbind
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.unbind:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_SIZE)).permute(2, 0, 3, 1, 4).unbind()
        else:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def fused(unbind):
    model = Fused(unbind).to(torch.bfloat16)
    return model, model


class Modulated(Fused):
    """The same behind a scale and a shift, whose gradients are sums over the tokens."""

    def __init__(self):
        super().__init__(False)
        self.scale, self.shift = (torch.nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))

    def forward(self, x):
        return super().forward(x * (1 + self.scale) + self.shift)


def modulated():
    model = Modulated().to(torch.bfloat16)
    return model, model


MODELS = {"wan": wan, "chunk": lambda: fused(False), "unbind": lambda: fused(True), "modulated": modulated}


@pytest.fixture
def seen(monkeypatch):
    """Counts of nodes that move data, and how many tensors that lay in memory were copied into another layout."""
    seen = Counter()
    copy_input = ExternKernel.copy_input

    def counted(x):
        # Without strides yet, it is a formula that may be computed into any layout.
        seen["operand copied"] += x.maybe_get_stride() is not None
        return copy_input(x)

    def look(graph):
        names = (node.target._opname for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))
        seen.update(name for name in names if name in MOVES)
        seen["sparse"] += any("sparge" in str(node.target) for node in graph.nodes)
        seen["gathers"] += sum(node.target is torch.ops.aten.index.Tensor for node in graph.nodes)

    def compile_no_code(self, arguments, source):
        seen["read by an index"] += source.count("index out of bounds")
        return lambda *_: None

    monkeypatch.setattr(ExternKernel, "copy_input", staticmethod(counted))
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", compile_no_code)
    with config.patch({"post_grad_custom_post_pass": look, "force_disable_caches": True, "cpp.simdlen": 1}):
        yield seen


def moves(seen, model, how, train, dynamic=False):
    """What is counted in the forward and, in training, the backward of a model that is compiled anew."""
    torch.manual_seed(0)
    torch.compiler.reset()
    seen.clear()
    module, call = MODELS[model]()
    module.requires_grad_(train)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=train)
    out = torch.compile(call, dynamic=dynamic, fullgraph=True, **how)(x)
    if train:
        out.sum().backward()
    return Counter(seen)


@pytest.mark.parametrize(
    ("model", "train", "dynamic"),
    [
        pytest.param("wan", False, False, id="wan", marks=pytest.mark.slow),
        pytest.param("wan", True, False, id="wan training"),
        pytest.param("unbind", True, False, id="unbind training"),
        pytest.param("chunk", False, True, id="chunk dynamic"),
    ],
)
def test_the_op_causes_no_copy_and_no_cast(seen, model, train, dynamic):
    ours = moves(seen, model, SPARSE, train, dynamic)
    assert ours.pop("sparse") == 1 + train
    assert ours.pop("operand copied", 0) == 0
    stock = moves(seen, model, {"backend": "inductor"}, train, dynamic)
    stock.pop("operand copied", 0)  # the stock op for a CPU wants its log-sum-exp in another layout
    assert ours <= stock


def test_a_gather_is_written_once(seen):
    tiles = {"token_order": "tiles", "grid": (2, 10, 10)}
    found = moves(seen, "modulated", {**SPARSE, "options": {**SPARSE["options"], **tiles}}, True)
    assert found["read by an index"] == found["gathers"] == 4


def test_a_copy_would_be_counted(seen):
    @torch.library.custom_op("sparge_test::picky", mutates_args=(), tags=(torch.Tag.needs_contiguous_strides,))
    def picky(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    picky.register_fake(torch.empty_like)
    torch.compile(lambda x: picky((x @ x).mT))(torch.ones(8, 8))
    assert seen["operand copied"] > 0
