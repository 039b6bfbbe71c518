"""What a user does first, with the wheel alone: nothing may need the sources, or a library that was not asked for."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import sparge_compile


class Layer(torch.nn.Module):
    """Four heads of 16 over whatever is given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, L, 64]
        q, k, v = (part.unflatten(2, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


folder = Path(sparge_compile.__file__).parent
assert folder.is_relative_to(sys.prefix), f"{folder} is not what was installed"
assert (folder / "py.typed").exists(), "no type information"
assert (folder / "showing" / "page.html").exists(), "no page for reports"
for module in pkgutil.walk_packages([str(folder)], "sparge_compile."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in sparge_compile.__all__:
    getattr(sparge_compile, name)

model, x = Layer(), torch.randn(1, 2048, 64)
options = {"topk": 1.0, "min_seq_len": 0}
report = sparge_compile.explain(model, options)(x)
print(report)
assert len(report.sparse) == 1
compiled = torch.compile(model, backend="sparge", options={**options, "inner": "eager"})  # by its name
torch.testing.assert_close(compiled(x), model(x))
