"""A checksum of tensors: a number over their bits. In: dense, sharded and quantised tensors. Out: hexadecimal text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PRIME = 1_000_003  # parts of one tensor count differently


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return a hexadecimal number over the bits of all tensors, the same for any sharding of them.

    All ranks that hold shards ask for it together.
    """
    total = 0
    for number, tensor in enumerate(tensors, 1):
        for part, values in enumerate(_parts(tensor)):
            bits = values.contiguous().view(-1).view(torch.uint8)
            # In two ways, so that exchanged bytes show.
            total += (number + part * _PRIME) * int(bits.to(torch.int64).sum())
            total += int(bits[:: values.element_size()].sum())
    return f"{total:x}"


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The dense tensors that a tensor consists of.

    A quantised one may refuse every view of itself (torchao), or give results of its own kind (GGUF).
    """
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor
        tensor = tensor.full_tensor()
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # without storage: as torch would store it
        file = io.BytesIO()
        torch.save(tensor, file)
        yield torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            yield tensor.as_subclass(Tensor)
