"""MiniMax-H3: text, sound and video in one sequence, which numbers tell apart, as docs/models.md has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparge_compile import Calibration, attach, explain

TEXT, SOUND, GRID = 20, 30, (5, 8, 8)
VIDEO = GRID[0] * GRID[1] * GRID[2]
LENGTH = TEXT + SOUND + VIDEO


def built() -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("diffusers", "0.40")
    from tiny_modular import minimax_h3_transformer

    model = minimax_h3_transformer()
    torch.manual_seed(0)
    places = torch.zeros(LENGTH, 3)
    places[TEXT + SOUND :] = torch.cartesian_prod(*map(torch.arange, GRID)).float()
    kinds = torch.tensor([1] * TEXT + [2] * SOUND + [0] * VIDEO)
    return model, {
        "hidden_states": torch.randn(1, VIDEO, 16),
        "audio_hidden_states": torch.randn(1, SOUND, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(LENGTH, dtype=torch.long),
        "token_tags": kinds,
        "position_ids": places,
        "video_indices": torch.arange(TEXT + SOUND, LENGTH),
        "audio_indices": torch.arange(TEXT, TEXT + SOUND),
        "text_indices": torch.arange(TEXT),
        "return_dict": False,
    }


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "keep_keys, before", [(TEXT + SOUND, TEXT + SOUND), ((0, -VIDEO), -1)], ids=["counted", "left"]
)
def test_numbers_tell_text_and_sound_from_video(keep_keys, before):
    model, inputs = built()
    grid = (before, *GRID, 0)
    options = {"min_seq_len": 200, "keep_keys": keep_keys, "dense_queries": True, "token_order": "tiles"}
    report = explain(model, {**options, "grid": grid})(**inputs)
    assert [row.name for row in report.sparse] == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    kept = "0:50" if before > 0 else f"0:-{VIDEO}"
    assert f"keeps tokens {kept}" in str(report) and "tiles 4×4×4 of 5×8×8 with 50 before" in str(report)
    dense = model(**inputs)[0]
    handle = attach(model, Calibration({"transformer_blocks.*.attn": [(0.3, 0.0)]}), grid=grid)
    model.compile_repeated_blocks(backend="sparge", options={**options, "inner": "eager"})
    assert (model(**inputs)[0] - dense).norm() > 1e-3 * dense.norm()
    handle.set(topk=1.0, topp=0.0)
    torch.testing.assert_close(model(**inputs)[0], dense, atol=1e-5, rtol=1e-4)
