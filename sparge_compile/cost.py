"""The cost model: seconds of dense and of sparse attention, in closed form over shapes.

Sizes may be ints or sympy expressions; block counts are taken as L / 128 and S / 64, so that the forms stay smooth.
Coefficients are fitted by ``benchmarks/fit_cost_model.py``, one set for each class of device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import sympy
import torch

from .errors import value_error
from .kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from .limit import Limit
from .report import Prediction


@dataclass(frozen=True)
class Shape:
    """The sizes that the model asks for: ints or sympy expressions."""

    batch: Any
    heads: Any
    kv_heads: Any
    length: Any
    keys: Any
    head_size: Any
    value_head_size: Any
    is_causal: bool = field(default=False, kw_only=True)

    @staticmethod
    def symbolic(is_causal: bool = False) -> Shape:
        """Return all sizes as positive sympy symbols, to read the closed forms."""
        return Shape(*sympy.symbols("B H Hk L S D Dv", positive=True), is_causal=is_causal)


@dataclass(frozen=True)
class CostModel:
    """Seconds for one forward.

    dense  = dense_base + dense_pair · pairs · (D + Dv) / 2
    sparse = sparse_base + pool · B (H L + Hk S) D + select · B H Nq Nk + sparse_pair · density · pairs · (D + Dv) / 2

    with pairs = B H L S (half of it under a causal mask).
    """

    dense_base: float
    dense_pair: float
    sparse_base: float
    pool: float
    select: float
    sparse_pair: float

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise value_error(
                    f"cost coefficient {f.name} is not usable",
                    given=repr(value),
                    allowed="seconds, 0 or more",
                    todo="benchmarks/fit_cost_model.py prints a set for your device.",
                )

    @classmethod
    def parse(cls, coefficients: Mapping[str, float] | CostModel) -> CostModel:
        """Return a model from a complete set of coefficients by name, in seconds.

        Raises:
            ValueError: another set of names, or a coefficient that is negative or no number.
        """
        if isinstance(coefficients, cls):
            return coefficients
        known = {f.name for f in fields(cls)}
        if not isinstance(coefficients, Mapping) or set(coefficients) != known:
            raise value_error(
                "option 'costs' is not a set of cost coefficients",
                given=repr(coefficients)[:80],
                allowed=f"a dict with {', '.join(sorted(known))}, in seconds",
                todo="benchmarks/fit_cost_model.py prints one for your device.",
            )
        return cls(**coefficients)

    def dense(self, s: Shape) -> Any:
        """Return the seconds of dense attention: a number, or a sympy expression for symbolic sizes."""
        return self.dense_base + self.dense_pair * _products(s)

    def sparse(self, s: Shape, density: Any) -> Any:
        """Return the seconds of sparse attention that keeps this share of the visible blocks; as :meth:`dense`."""
        pooled = s.batch * (s.heads * s.length + s.kv_heads * s.keys) * s.head_size
        scored = s.batch * s.heads * (s.length / QUERY_BLOCK) * (s.keys / KEY_BLOCK)
        kept = density * _products(s)
        return self.sparse_base + self.pool * pooled + self.select * scored + self.sparse_pair * kept

    def limit(self, least_keys: int, density: float, margin: float, is_causal: bool) -> Limit:
        """Return from which sizes on: ``least_keys`` keys, and ``dense`` at least ``margin`` times ``sparse``."""
        pairs = 0.5 if is_causal else 1.0
        return Limit(
            least_keys,
            (
                self.dense_base - margin * self.sparse_base,
                pairs * (self.dense_pair - margin * density * self.sparse_pair),
                -margin * self.pool,
                -margin * self.select / (QUERY_BLOCK * KEY_BLOCK),
            ),
        )

    def predict(self, s: Shape, density: float) -> Prediction:
        """Return both, in seconds, for sizes that are numbers."""
        return Prediction(float(self.dense(s)), float(self.sparse(s, density)), density)


def _products(s: Shape) -> Any:
    products = s.batch * s.heads * s.length * s.keys * (s.head_size + s.value_head_size) / 2
    return products / 2 if s.is_causal else products


def device_class(device: torch.device) -> str:
    """Return the name of a class of devices with one set of coefficients: ``"cpu"``, and ``"sm90"`` and so on."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


def cost_model(device: torch.device) -> CostModel:
    """Return the coefficients of a device's class; an unmeasured GPU is taken to be like the measured one."""
    return COST_MODELS.get(device_class(device), COST_MODELS["sm90"])


COST_MODELS = {
    "cpu": CostModel(  # two cores of a server, float32, torch 2.13
        dense_base=4.11e-5,
        dense_pair=3.90e-11,
        sparse_base=1.22e-3,
        pool=8.52e-10,
        select=1.18e-7,
        sparse_pair=6.39e-11,
    ),
    "sm90": CostModel(  # H200, bfloat16, torch 2.11, cuDNN 9.19
        dense_base=1.395e-05,
        dense_pair=7.32e-15,
        sparse_base=2.901e-05,
        pool=1.125e-12,
        select=1.155e-11,
        sparse_pair=7.378e-15,
    ),
}
