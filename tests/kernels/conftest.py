"""The devices that the kernels run on."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from helpers import face_of


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("triton", marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param("triton", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def face(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The four functions of a device, on which tensors are born; float32 products are float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device("cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"):
        yield face_of(request.param)
    torch.backends.cuda.matmul.allow_tf32 = before
