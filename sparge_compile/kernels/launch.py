"""The launch table: tile rows, warps and pipeline stages for each kernel, by architecture, head size and item size.

No tuning at run time. There are two sets of entries: for GPUs that give a program 227 KB of shared memory (H100, H200,
B200), and for 99 KB (RTX 30, 40, 50 and anything unknown, which also fits the A100). Those for 227 KB were chosen by
measurement on Hopper; the others are what fits, and were measured nowhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

MAJORS_WITH_227_KB = (9, 10)  # of compute capability: shared memory of one program
MEASURED_CAPABILITIES = ((9, 0),)  # the GPUs on which the entries were chosen by measurement

POOL_WARPS = 2
SELECT_SCORES = 512  # scores that one warp of a selecting program holds


class Launch(NamedTuple):
    """One entry of the table."""

    rows: int  # query rows that a program (forward, dq) or a step (dkv) works on; divides 128
    warps: int
    stages: int


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU."""
    return torch.cuda.get_device_capability(device)


# Dynamo takes what it returns for a constant: torch.compiler.assume_constant_result, which would import Dynamo here.
compute_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


LEAST_PART = 32  # key blocks, kept or not, for which a program of their own pays


def architecture(device: torch.device) -> int:
    """Major of an NVIDIA GPU's compute capability; 0 for any other device and for the interpreter."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return compute_capability(device)[0] if nvidia else 0


def measured(device: torch.device) -> bool:
    """Whether the entries of a GPU were chosen by measurement."""
    return architecture(device) > 0 and compute_capability(device) in MEASURED_CAPABILITIES


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def list_parts(programs: int, n_key: int, device: torch.device) -> int:
    """Over how many programs a list of key blocks is split where there are only so many query blocks of all heads."""
    return 1 if architecture(device) == 0 else parts_of(programs, n_key, multiprocessors(device))


def parts_of(programs: int, n_key: int, at_a_time: int) -> int:
    """The same for a GPU that runs so many programs at a time."""
    return max(1, min(at_a_time // max(programs, 1), n_key // LEAST_PART))


def use_descriptors(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tiles come through tensor descriptors (TMA) where memory allows: they need no address registers."""
    return architecture(device) in MAJORS_WITH_227_KB and dtype.itemsize == 2


def pad_head(head_size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (head_size - 1).bit_length())


def pad_heads(head_size: int, value_size: int) -> tuple[int, int]:
    """The columns of tiles of queries and keys, and of values.

    Values have at least half of the others' columns: with 256 and 32 in bfloat16, Triton 3.6 computed something else on
    Hopper.
    """
    head_pad = pad_head(head_size)
    return head_pad, max(pad_head(value_size), head_pad // 2)


# (bytes of one padded row) -> Launch. A row is head_pad * itemsize: 256 is D = 128 in bf16.
_LARGE = {
    "forward": {64: (64, 4, 2), 128: (64, 4, 2), 256: (128, 4, 2), 512: (128, 8, 2)},
    "dq": {64: (64, 4, 2), 128: (64, 4, 2), 256: (64, 4, 3), 512: (64, 8, 2)},
    "dkv": {64: (64, 4, 2), 128: (64, 4, 2), 256: (64, 4, 2), 512: (32, 8, 2)},
}
_DATA_CENTRE_BLACKWELL = _LARGE | {"dq": _LARGE["dq"] | {512: (64, 8, 1)}}  # two stages under a mask take 240 KB there
_SMALL = {
    "forward": {64: (128, 4, 3), 128: (128, 4, 2), 256: (64, 4, 2), 512: (64, 8, 1)},
    "dq": {64: (64, 4, 2), 128: (64, 4, 2), 256: (64, 4, 1), 512: (32, 8, 1)},
    "dkv": {64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 1), 512: (16, 8, 1)},
}
# In eight bits, whatever the head size: of 128 rows, or with 8 warps, an H200 took longer at 128 and at 256 columns.
_EIGHT_BITS = Launch(64, 4, 2)
# float32 products run without tensor cores, from registers: small tiles, many warps.
_WIDE = {
    "forward": {64: (64, 4, 1), 128: (64, 4, 1), 256: (64, 8, 1), 512: (32, 8, 1), 1024: (16, 8, 1)},
    "dq": {64: (64, 4, 1), 128: (64, 4, 1), 256: (32, 8, 1), 512: (16, 8, 1), 1024: (16, 8, 1)},
    "dkv": {64: (32, 4, 1), 128: (32, 4, 1), 256: (32, 8, 1), 512: (16, 8, 1), 1024: (16, 8, 1)},
}


def attention_launch(direction: str, head_size: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The table's entry for ``direction`` "forward", "dq" or "dkv", a head size, an item size and an architecture."""
    row_bytes = max(64, pad_head(head_size) * dtype.itemsize)
    narrow = {9: _LARGE, 10: _DATA_CENTRE_BLACKWELL}.get(architecture(device), _SMALL)
    if dtype.itemsize == 1:
        return _EIGHT_BITS
    table = _WIDE if dtype.itemsize > 2 else narrow
    return Launch(*table[direction][row_bytes])


def score_precision(device: torch.device) -> str:
    """How the float32 products of block scores are made: by tensor cores in three parts, where there are any."""
    return "tf32x3" if architecture(device) >= 8 else "ieee"


def select_warps(n_pad: int) -> int:
    """Warps for a row of scores, padded to ``n_pad``."""
    return max(1, min(32, n_pad // SELECT_SCORES))
