"""The cost model: seconds of dense and of sparse attention, in closed form over shapes.

Sizes may be ints or sympy expressions; block counts are taken as L / 128 and S / 64, so that the forms stay smooth.
Coefficients stand in ``cost_table.py``: the GPU's by device, dtype and head size, the host's by who launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import sympy
import torch

from .cost_table import GATHER, GPU, HOST, MASKED, PROGRAMS
from .errors import value_error
from .host import slowness
from .kernels.block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from .kernels.launch import pad_head, pad_heads, parts_of
from .limit import Limit
from .report import Prediction

_DIAGONAL = QUERY_BLOCK / 2  # keys of the diagonal for a query, for what is pooled of both

_OPTIONAL = ("dense_host", "sparse_host", "training")


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
    """Seconds of the GPU for one forward, of the host to launch it, and both for a forward with its backward.

    dense  = dense_base + dense_pair · pairs · (D + Dv) / 2
    sparse = sparse_base + pool · B (H L + Hk S) D + select · B H Nq Nk + sparse_pair · density · pairs · (D + Dv) / 2

    with pairs = B H L S. Under a causal mask it is half of that, and the blocks on the diagonal, of as many keys as
    queries, add 64 · sparse_pair · (1 - density) · B (H L + Hk S) D. A call takes the longer of the GPU's time and the
    host's.
    ``training`` has the same for a forward with its backward; None: what holds for a forward holds for both.
    """

    dense_base: float
    dense_pair: float
    sparse_base: float
    pool: float
    select: float
    sparse_pair: float
    dense_host: float = 0.0
    sparse_host: float = 0.0
    training: CostModel | None = None

    def __post_init__(self) -> None:
        if isinstance(self.training, Mapping):
            object.__setattr__(self, "training", CostModel.parse(self.training))
        for f in fields(self)[:-1]:
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise value_error(
                    f"cost coefficient {f.name} is not usable",
                    given=repr(value),
                    allowed="seconds, 0 or more",
                    todo="benchmarks/fit_cost_model.py prints a set for your device.",
                )

    @classmethod
    def parse(cls, coefficients: Mapping[str, Any] | CostModel) -> CostModel:
        """Return a model from coefficients by name, in seconds: the six of the GPU, and what else there is.

        Raises:
            ValueError: a name that is missing or unknown, or a coefficient that is negative or no number.
        """
        if isinstance(coefficients, cls):
            return coefficients
        needed = {f.name for f in fields(cls)}.difference(_OPTIONAL)
        if not isinstance(coefficients, Mapping) or not needed <= set(coefficients) <= needed.union(_OPTIONAL):
            raise value_error(
                "option 'costs' is not a set of cost coefficients",
                given=repr(coefficients)[:80],
                allowed=f"a dict with {', '.join(sorted(needed))}, in seconds, and perhaps {', '.join(_OPTIONAL)}",
                todo="benchmarks/fit_cost_model.py prints one for your device.",
            )
        return cls(**coefficients)

    def of(self, trains: bool) -> CostModel:
        """Return the coefficients of a forward with its backward where attention is trained, else of a forward."""
        return self.training if trains and self.training is not None else self

    def with_gathers(self, device: torch.device, dtype: torch.dtype, head_size: int, value_head_size: int) -> CostModel:
        """Return the coefficients where a call brings operands and result into the order of tiles, and back.

        Each number of q, k, v and the result is read and written once more, in training those of their gradients, too.
        """
        name = device_class(device)
        seconds = GATHER.get(name, GATHER["sm90"]) * dtype.itemsize * (1 + value_head_size / head_size)
        training = self.of(True)
        training = replace(training, pool=training.pool + 2 * seconds, training=None)
        return replace(self, pool=self.pool + seconds, training=training)

    def with_idle(self, device: torch.device, s: Shape) -> CostModel:
        """Return the coefficients where a call of these sizes has fewer programs than the GPU runs at a time."""
        forward, backward = idle(device_class(device), s)
        training = self.of(True)
        training = replace(training, sparse_pair=training.sparse_pair * max(forward, backward), training=None)
        return replace(self, sparse_pair=self.sparse_pair * forward, training=training)

    def dense(self, s: Shape) -> Any:
        """Return the GPU's seconds of dense attention: a number, or a sympy expression for symbolic sizes."""
        return self.dense_base + self.dense_pair * _products(s)

    def sparse(self, s: Shape, density: Any) -> Any:
        """Return those of sparse attention that keeps this share of the visible blocks; as :meth:`dense`."""
        pooled = s.batch * (s.heads * s.length + s.kv_heads * s.keys) * s.head_size
        scored = s.batch * s.heads * (s.length / QUERY_BLOCK) * (s.keys / KEY_BLOCK)
        kept = density * _products(s) + (1 - density) * _DIAGONAL * s.is_causal * pooled
        return self.sparse_base + self.pool * pooled + self.select * scored + self.sparse_pair * kept

    def limit(self, least_keys: int, density: float, margin: float, is_causal: bool) -> Limit:
        """Return from which sizes on sparse attention is ``margin`` times as fast, with ``least_keys`` keys or more.

        Sparse attention must win by its time on the GPU, as beside other work; and the host's for it, unless dense
        attention takes the host as long, must be less than what dense attention takes the GPU, as alone in a queue.
        """
        multiplied = self.dense_pair * (0.5 if is_causal else 1.0)
        kept = density * self.sparse_pair * (0.5 if is_causal else 1.0)
        diagonal = self.sparse_pair * (1 - density) * _DIAGONAL * is_causal
        gain = [
            self.dense_base - margin * self.sparse_base,
            multiplied - margin * kept,
            -margin * (self.pool + diagonal),
            -margin * self.select / (QUERY_BLOCK * KEY_BLOCK),
        ]
        if margin * self.sparse_host > self.dense_host:
            gain += [self.dense_base - margin * self.sparse_host, multiplied, 0.0, 0.0]
        return Limit(least_keys, tuple(gain))

    def predict(self, s: Shape, density: float, trains: bool = False) -> Prediction:
        """Return all of it, in seconds, for sizes that are numbers."""
        c = self.of(trains)
        return Prediction(float(c.dense(s)), float(c.sparse(s, density)), density, c.dense_host, c.sparse_host, trains)


def _products(s: Shape) -> Any:
    products = s.batch * s.heads * s.length * s.keys * (s.head_size + s.value_head_size) / 2
    return products / 2 if s.is_causal else products


def idle(name: str, s: Shape) -> tuple[float, float]:
    """How many times as long a sparse forward, and its backward, take because some multiprocessors have no program.

    The forward splits lists of key blocks where query blocks are few. The backward does not; it has two programs for
    each query block.
    """
    at_a_time = PROGRAMS.get(name, PROGRAMS["sm90"])
    programs = max(1, s.batch * s.heads * ceil_div(s.length, QUERY_BLOCK))
    parts = parts_of(programs, ceil_div(s.keys, KEY_BLOCK), at_a_time)
    return max(1.0, at_a_time / (programs * parts)), max(1.0, at_a_time / (2 * programs))


def device_class(device: torch.device) -> str:
    """Return the name of a class of devices with one set of coefficients: ``"cpu"``, and ``"sm90"`` and so on."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


def cost_model(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 128,
    value_head_size: int | None = None,
    launched: str = "compiled",
    masked: bool = False,
) -> CostModel:
    """Return the coefficients for attention on a device; an unmeasured GPU is taken to be like the measured one.

    Args:
        device: where. On a GPU, the first call in a process measures how fast its host is (``host.py``).
        dtype, head_size, value_head_size: of the operands. Rows of a size that tiles do not have are padded there.
        launched: by whom: ``"compiled"`` code, ``"eager"`` code, or a CUDA ``"graph"``, which needs no host.
        masked: whether there is a mask.
    """
    slow = slowness(device) if device.type == "cuda" and launched in HOST else 0.0  # asked only where it counts
    return class_costs(device_class(device), slow, dtype, head_size, value_head_size, launched, masked)


def class_costs(
    name: str,
    slow: float,
    dtype: torch.dtype,
    head_size: int,
    value_head_size: int | None,
    launched: str,
    masked: bool = False,
) -> CostModel:
    """Return those of a class of devices, whose hosts take ``slow`` times as long as the table's; as cost_model."""
    sizes = head_size, head_size if value_head_size is None else value_head_size
    table = GPU.get(name, GPU["sm90"])
    width = "float32" if dtype.itemsize > 2 else "half"
    kinds = sorted((head, kind) for kind, head in table if kind == width) or sorted((h, k) for k, h in table)
    kind = next((k for k in kinds if k[0] >= pad_head(max(sizes))), kinds[-1])
    padding = 1.0 if name == "cpu" else sum(pad_heads(*sizes)) / sum(sizes)
    hosts = HOST.get(launched, ((0.0, 0.0),) * 2)
    more = MASKED if masked and launched in HOST else (0.0, 0.0)
    inference, training = (
        CostModel(*six[:5], six[5] * padding, slow * dense, slow * (sparse + mask))
        for six, (dense, sparse), mask in zip(table[kind[1], kind[0]], hosts, more, strict=True)
    )
    return replace(inference, training=training)
