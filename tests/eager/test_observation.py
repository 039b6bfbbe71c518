"""Calibration measures attention that runs in no graph, under the names that it has in one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toys import Block, Stack

from sparge_compile import calibrate, replace_attention

OPTIONS = {"min_seq_len": 0}


class Disabled(Block):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class Broken(Block):
    """A graph break in a loop leaves the whole frame to Python."""

    def forward(self, x):
        for _ in range(1):
            x = x * float(x.abs().max() > 0)
            x = super().forward(x)
        return x


class Half(Stack):
    """The first block in a graph, the second outside."""

    def __init__(self):
        super().__init__()
        self.blocks[1] = Disabled()


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(1, 512, 32), torch.randn(1, 512, 32)]


@pytest.mark.parametrize("make", [lambda: Stack(block=Disabled), lambda: Stack(block=Broken), Half])
def test_calibrations_are_those_of_graphs(make, batches):
    plain, model = Stack().eval(), make().eval()
    model.load_state_dict(plain.state_dict())
    want = calibrate(plain, batches, target_sparsity=0.4, options=OPTIONS)
    got = calibrate(model, batches, target_sparsity=0.4, options=OPTIONS)
    assert got.sites == want.sites
    assert got.origin.output.influence.keys() == want.sites.keys(), "heads in eager code are tried, too"
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    with replace_attention(model, calibration=got, min_seq_len=0) as replaced:
        eager = model(batches[0])
    with replace_attention(plain, calibration=want, min_seq_len=0):
        assert torch.equal(eager, plain(batches[0]))
    assert [row.name for row in replaced.report.sparse] == list(got.sites)


def test_calibration_while_attention_is_replaced_is_refused(batches):
    model = Stack()
    with (
        replace_attention(model, OPTIONS, on_unsupported="dense"),
        pytest.raises(ValueError, match="is replaced, or calibrated, already"),
    ):
        calibrate(model, batches, options=OPTIONS)
