"""The devices that the kernels run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from helpers import face_of


@contextmanager
def born_on(device: str) -> Iterator[None]:
    """Tensors are born on a device, and float32 products are float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device(device):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def on_the_gpu() -> Iterator[None]:
    """Tensors are born on the GPU, and float32 products are float32."""
    with born_on("cuda"):
        yield


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("triton", marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param("triton", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def face(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The four functions of a device, on which tensors are born; float32 products are float32."""
    with born_on("cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"):
        yield face_of(request.param)
