"""Calls of a compiled graph on fake tensors, made to learn what it gives: they are no calls of the model.

The splitter of DDP makes one of each piece while it compiles the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor


def is_rehearsal(args: Sequence[Any]) -> bool:
    """Whether a call on these inputs computes nothing."""
    if FakeTensor in map(type, args):
        return True
    # To look for the mode takes long, and it is one of those of dispatch.
    return torch._C._len_torch_dispatch_stack() > 0 and active_fake_mode() is not None
