"""Which key blocks are kept whatever the thresholds, and which query blocks keep all, as thresholds [H, 6] say.

In: thresholds, sizes, and the range that the graph gave. Out: two boolean tensors, for rule.py and whoever calls it.
The Triton kernels spell it out anew. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..keeping import OF_GRAPH, WIDTH
from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div


class Always(NamedTuple):
    """What is read whatever the thresholds, where it is visible: both bool."""

    keys: Tensor  # [H, 1, Nk], key blocks that hold a kept token
    queries: Tensor  # [H, Nq, 1], query blocks that hold a dense row


def always_read(
    thresholds: Tensor,
    length: int,
    keys: int,
    found: tuple[int, int],
    slots_q: Tensor | None = None,
    slots_k: Tensor | None = None,
) -> Always | None:
    """What thresholds [H, 6] keep of L queries and S keys; None for thresholds [H, 2].

    ``found`` is the range that stands for ``OF_GRAPH``. Query rows are those of kept tokens, so where L is not S, or
    one side alone has another order (``slots_q`` [L], ``slots_k`` [S]: the token of each row), there are none.
    """
    if thresholds.shape[-1] != WIDTH:
        return None
    key_blocks = blocks_with(thresholds[:, 2:4], KEY_BLOCK, keys, found, slots_k)
    query_blocks = blocks_with(thresholds[:, 4:6], QUERY_BLOCK, length, found, slots_q)
    same = length == keys and (slots_q is None) == (slots_k is None)
    return Always(key_blocks.unsqueeze(1), query_blocks.unsqueeze(2) & same)


def blocks_with(ranges: Tensor, block: int, length: int, found: tuple[int, int], slots: Tensor | None = None) -> Tensor:
    """bool [H, N]: the blocks of a sequence that hold a token of a range, float32 [H, 2]."""
    start, stop = ranges.unbind(-1)
    of_graph = start == OF_GRAPH
    start, stop = (torch.where(of_graph, own, x) for own, x in zip(found, (start, stop), strict=True))
    start, stop = (torch.where(x < 0, x + length, x).clamp(0, length).unsqueeze(-1) for x in (start, stop))
    if slots is not None:
        inside = (slots >= start) & (slots < stop)
        return F.pad(inside, (0, -len(slots) % block)).unflatten(-1, (-1, block)).any(-1)
    first = torch.arange(ceil_div(length, block), device=ranges.device) * block
    return (first < stop) & (first + block > start) & (start < stop)
