"""The face of the CPU: the four functions of the op schemas (ops.py), with the same arguments as those of the GPU."""

from __future__ import annotations

from torch import Tensor

from .. import block_map as forms
from .attention import backward, block_map, forward

__all__ = ["backward", "block_map", "forward", "pack"]


def pack(counts: Tensor, indices: Tensor) -> Tensor:
    """int32 [B, H, Nq, ceil(Nk / 32)] from the lists of a map, int32 [B, H, Nq] and [B, H, Nq, Nk]."""
    return forms.pack(forms.BlockMap(counts, indices).to_dense())
