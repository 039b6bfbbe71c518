"""Calibration with kept tokens: what is measured is the rule's, and what it gains is told and saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparge_compile import Calibration, calibrate, head_influence
from sparge_compile.calibrate.curves import TOPK, TOPP, measure
from sparge_compile.keeping import Kept
from sparge_compile.kernels import reference
from sparge_compile.kernels.kept import always_read

KEEP = {"keep_keys": "text", "dense_queries": True, "min_seq_len": 0}


class Joint(nn.Module):
    """Text, and an image that is mostly about it: its means hide the text from the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        x = (torch.cat([text, image], 1) * self.scale).unflatten(-1, (2, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x)


def batches(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    text = torch.randn(n, 1, 64, 32) * 1.5
    return [(t, t[:, torch.randint(0, 64, (576,))] * 0.7 + torch.randn(1, 576, 32) * 0.3) for t in text]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_as_many_blocks_are_kept_as_by_the_rule(is_causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 400, 16)
    mask = torch.rand(1, 1, 400, 400) < 0.01 if masked else None
    numbers = Kept((100, 200), dense_queries=True).numbers
    always = always_read(torch.tensor([(1.0, 0.0, *numbers)]), 400, 400, (0, 0))
    sums = measure(q, k, v, mask, is_causal, 0.25, torch.arange(4).view(1, 1, 4), 1 << 24, always=always)
    for i, j in ((0, 0), (8, 0), (12, 10), (0, 20), (len(TOPK) - 1, 3)):
        thresholds = torch.tensor([(TOPK[i], TOPP[j], *numbers)])
        true = reference.block_map(q, k, thresholds, mask, is_causal, 0.25)
        assert sums.kept[0, i, j] == true.counts.sum()
        out, _ = reference.attention(q, k, v, true, mask, is_causal, 0.25)
        whole = reference.block_map(q, k, torch.tensor([(1.0, 0.0)]), mask, is_causal, 0.25)
        dense, _ = reference.attention(q, k, v, whole, mask, is_causal, 0.25)
        torch.testing.assert_close(sums.error[0, i, j], (out - dense).abs().sum(), atol=1e-2, rtol=1e-3)


def test_what_is_kept_is_in_the_calibration_and_its_file(tmp_path: Path) -> None:
    model = Joint().eval()
    found = calibrate(model, batches(), target_sparsity=0.5, options=KEEP, out=tmp_path / "kept.json")
    assert found.kept == {"(root)": Kept("text", True)}
    assert found.origin is not None
    with_them, without = found.origin.gains["(root)"]
    assert 0 < with_them < without
    text = found.table()
    assert "(root) keeps text with dense queries; error 0." in text and "at equal sparsity without them 0." in text
    loaded = Calibration.load(tmp_path / "kept.json")
    assert loaded == found and loaded.table() == text
    assert json.loads((tmp_path / "kept.json").read_text())["format_version"] == 4, "the model's output was asked"
    kept = Calibration(found.sites, kept=found.kept)
    assert kept.to_dict()["format_version"] == 3
    again = found.at(target_sparsity=0.4)
    assert again.kept == found.kept and not again.origin.gains  # type: ignore[union-attr]
    assert found.at_progress(0.5).kept == found.kept
    influence = head_influence(model, found, batches(1))
    assert all(weight > 0 for weight in influence["(root)"])


def test_files_that_keep_nothing_are_those_of_before(tmp_path: Path) -> None:
    found = calibrate(Joint().eval(), batches(1), target_sparsity=0.5, options={"min_seq_len": 0}, influence=False)
    found.save(tmp_path / "plain.json")
    document = json.loads((tmp_path / "plain.json").read_text())
    assert document["format_version"] == 2
    assert not {"gains", "output", "target_output_error"} & set(document["origin"])
    assert "kept" not in document["sites"]["(root)"]
    assert not found.kept and Calibration.load(tmp_path / "plain.json") == found


@pytest.mark.parametrize("kept, error", [
    ({"other": {"keep_keys": 5}}, "bad kept"), ("text", "bad kept"), ({"*": 512}, "cannot be read"),
    ({"*": {"keep": 5}}, "cannot be read"), ({"*": {"keep_keys": "image"}}, "keep_keys"),
    ({"*": {"keep_keys": (9, 3)}}, "no token"), ({"*": {"dense_queries": True}}, "without kept keys"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(kept: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Calibration({"*": [(0.1, 0.2)]}, kept=kept)  # type: ignore[arg-type]
