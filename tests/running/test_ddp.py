"""DDP with several buckets: its splitter compiles a graph in pieces, and runs each on fake tensors meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import Stack

from sparge_compile import Calibration, DistillationHook, attach, calibrate, explain

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

FAST = {"min_seq_len": 0, "inner": "aot_eager"}
WIDTH = 320
X = (1, 200, WIDTH)
BUCKET_MB = 1  # a projection of queries, keys and values of this width has 1.2 MB


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SelfAndSelf(nn.Module):
    """Two attentions in one forward, with 2 and 4 heads, and enough parameters for a bucket between them."""

    heads = (2, 4)

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in self.heads)

    def forward(self, x):
        for heads, projection in zip(self.heads, self.qkv, strict=True):
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projection(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


NAMES = [f"blocks.{i}{number}" for i in range(3) for number in ("", "#1")]
PAIRS = Calibration({name: [(0.1 + 0.1 * i, 0.0)] * SelfAndSelf.heads[i % 2] for i, name in enumerate(NAMES)})


def parallel(model):
    return DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)


@pytest.mark.parametrize("give", ["calibration", "attach"])
def test_every_piece_has_the_thresholds_of_its_site(give, opened_graphs):
    base, x = Stack(3, SelfAndSelf), torch.randn(X)
    want = torch.compile(base, backend="sparge", options={**FAST, "calibration": PAIRS})(x)
    model, options, dense = copy.deepcopy(base), dict(FAST), base(x)
    if give == "attach":
        attached = attach(model, PAIRS)
    else:
        options["calibration"] = PAIRS
    compiled = torch.compile(parallel(model), backend="sparge", options=options)
    torch.compiler.reset()  # what was compiled for the model alone would serve this one too
    opened_graphs.clear()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=1e-5)
    assert len(opened_graphs) > 3
    assert [match.site.name for graph in opened_graphs for match in graph.matches] == NAMES
    if give == "attach":
        attached.set(topk=1.0, topp=1.0)
        torch.testing.assert_close(compiled(x), dense, atol=1e-5, rtol=1e-5)


def test_explain_and_calibrate_give_the_names_of_the_model_inside():
    model, x = parallel(Stack(3, SelfAndSelf)).eval(), torch.randn(X)
    assert [row.name for row in explain(model, FAST)(x)] == NAMES
    assert list(calibrate(model, [x], target_error=0.2, options={"min_seq_len": 0}).sites) == NAMES


def test_runs_on_fake_tensors_are_no_training_forwards():
    base, x = Stack(3, SelfAndSelf), torch.randn(X)
    options = {**FAST, "inner": "eager", "topk": 0.1, "topp": 0.0}
    losses = []
    for model in (copy.deepcopy(base), parallel(copy.deepcopy(base))):
        student = torch.compile(model, backend="sparge", options=options)
        with DistillationHook(student, layers=1.0) as hook:
            for _ in range(2):
                student(x)
                losses.append(hook.loss().item())
                assert list(hook.parts) == ["output", *NAMES]
    torch.testing.assert_close(losses, losses[:1] * 4, atol=1e-5, rtol=1e-5)
