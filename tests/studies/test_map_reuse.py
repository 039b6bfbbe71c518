"""Block maps of an earlier step in the trained example: what is read is what was made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from map_reuse import TILE, Maps, moved, shared

from sparge_compile import Grid, attention

GRID = Grid(0, 4, 8, 16)


@pytest.mark.parametrize("grid", [None, GRID], ids=["raster", "tiles"])
def test_a_held_map_is_read_and_a_fresh_one_is_that_of_the_rule(grid):
    q, k, v, other = torch.randn(4, 1, 2, 512, 16).unbind()
    dense, maps = F.scaled_dot_product_attention, Maps(0.4, grid)
    order = {} if grid is None else {"grid": grid, "tile": TILE}
    with maps.used(None):
        fresh = F.scaled_dot_product_attention(q, k, v)
    made, operands = maps.made, maps.operands
    torch.testing.assert_close(fresh, attention(q, k, v, topk=0.4, **order))
    with maps.used(made):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), fresh)
    with maps.used(made):
        reused = F.scaled_dot_product_attention(other, k, v)
    assert F.scaled_dot_product_attention is dense
    assert not torch.allclose(reused, attention(other, k, v, topk=0.4, **order))
    assert shared(made[0], made[0]) == 1 and moved(operands, operands, 0) == 0
