"""How a call attends, beside its operands: the last arguments of every op, as one value.

The ops have them one by one in their schemas; the functions behind the ops take them as they come and hold them as
:class:`How`. A packed call has all sequences one after the other in the rows of one batch entry, q [1, H, T, D]; where
each begins is read on the device alone. Its maps have the sequences where others have the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

NOT_CAUSAL, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2  # what a kernel is told of causality


# The fields of a How that are tensors.
TENSORS = ("attn_mask", "cu_seqlens_q", "cu_seqlens_k", "slots_q", "slots_k")


class How(NamedTuple):
    """The arguments of an op behind its operands, in the order of the schemas."""

    attn_mask: Tensor | None  # bool or float [B or 1, H or 1, L or 1, S]
    is_causal: bool
    scale: float
    bottom_right: bool = False  # the causal diagonal ends at the last query and key; else it begins at the first ones
    cu_seqlens_q: Tensor | None = None  # int32 [N + 1]: the row where each sequence begins, and where the last one ends
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: Any = 0  # no sequence is longer; an int, or a SymInt while tracing
    max_seqlen_k: Any = 0
    # The sizes of what the sequence is put together of, of which thresholds may keep some. AOTInductor gives None for
    # an empty list.
    parts: Sequence[Any] | None = None
    slots_q: Tensor | None = None  # int32 [L] and [S]: the token of each row, where there is an order
    slots_k: Tensor | None = None
    eight_bits: bool = False  # the forward's products are of eight bits (eight_bits.py)

    @property
    def packed(self) -> bool:
        """Whether the rows hold several sequences."""
        return self.cu_seqlens_q is not None

    @property
    def ordered(self) -> bool:
        """Whether queries or keys are in another order than that of their tokens."""
        return self.slots_q is not None or self.slots_k is not None

    @property
    def causality(self) -> int:
        """NOT_CAUSAL, TOP_LEFT or BOTTOM_RIGHT."""
        return (BOTTOM_RIGHT if self.bottom_right else TOP_LEFT) if self.is_causal else NOT_CAUSAL

    def sequences(self, query: Tensor) -> Any:
        """The number of sequences: B, or N of a packed call."""
        return query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def length(self, query: Tensor) -> Any:
        """Rows of the longest sequence of query [B, H, L, D]."""
        return self.max_seqlen_q if self.packed else query.shape[2]

    def keys(self, key: Tensor) -> Any:
        """Rows of the longest sequence of key [B, Hk, S, D]."""
        return self.max_seqlen_k if self.packed else key.shape[2]

    def diagonal(self, length: Any, keys: Any) -> Any:
        """How many keys after its own number a query of a causal sequence sees; sizes may be tensors."""
        return keys - length if self.bottom_right else 0

    def of_one(self) -> How:
        """The same for one of the sequences, by itself."""
        return How(*self[:4])
