"""What attention takes, as measured: seconds of the GPU by class of device, dtype and head size; of the host.

``benchmarks/fit_cost_model.py`` measures and prints these tables. Numbers only.
"""

from __future__ import annotations

# dense_base, dense_pair, sparse_base, pool, select, sparse_pair of sparge_compile.cost.CostModel
Six = tuple[float, float, float, float, float, float]

# By dtype ("half" is bfloat16 and float16) and padded head size: of a forward, and of a forward with its backward.
GPU: dict[str, dict[tuple[str, int], tuple[Six, Six]]] = {
    "cpu": {  # two cores of a server, float32, torch 2.13; the backward is taken to be as a forward, three times
        ("float32", 128): (
            (4.11e-5, 3.90e-11, 1.22e-3, 8.52e-10, 1.18e-7, 6.39e-11),
            (1.64e-4, 1.56e-10, 4.88e-3, 3.41e-9, 4.72e-7, 2.56e-10),
        ),
    },
    # H200, torch 2.11, cuDNN 9.19.
    "sm90": {
        ("half", 64): (
            (9.38e-06, 8.578e-15, 1.796e-05, 9.288e-13, 4.176e-11, 8.679e-15),
            (3.621e-05, 3.1e-14, 4.556e-05, 4.711e-12, 1.013e-10, 4.092e-14),
        ),
        ("half", 128): (
            (1.09e-05, 6.254e-15, 2.12e-05, 9.372e-13, 3.421e-11, 5.996e-15),
            (4.683e-05, 2.464e-14, 5.453e-05, 4.768e-12, 7.005e-11, 3.059e-14),
        ),
        ("half", 256): (
            (2.864e-07, 5.881e-15, 2.392e-05, 1.559e-12, 0, 7.2e-15),
            (0.0001018, 3.199e-14, 9.456e-05, 5.486e-12, 0, 6.212e-14),
        ),
        ("float32", 64): (
            (2.841e-05, 1.151e-13, 9.13e-06, 4.858e-12, 0, 3.688e-13),
            (4.823e-05, 4.049e-13, 0.0001737, 3.006e-11, 0, 1.834e-12),
        ),
        ("float32", 128): (
            (2.841e-05, 1.151e-13, 9.13e-06, 4.858e-12, 0, 3.688e-13),
            (4.823e-05, 4.049e-13, 0.0001737, 3.006e-11, 0, 1.834e-12),
        ),
    },
}

# What nobody has measured: entries above that are copies of others, and rows of the host below.
ESTIMATED: set[tuple[str, object]] = {("host", "eager"), ("host", "masked"), ("sm90", ("float32", 128))}

# Seconds of a gather for each byte that is brought into the order of tiles or back: read, and written.
GATHER = {"cpu": 2e-10, "sm90": 3.7e-13}

# How many programs run at a time: the multiprocessors of a GPU. Where there are fewer, some are idle.
PROGRAMS = {"cpu": 1, "sm90": 132}

# An eager call of dense attention takes the host so long (host.py measures it), where the times below were measured.
REFERENCE = 2.88e-05

# Dense and sparse seconds of the host for one call: of a forward, and of a forward with its backward; in eager code
# with what `replace_attention` takes.
HOST: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "compiled": ((4.2e-05, 7.2e-05), (2.0e-04, 2.5e-04)),
    "eager": ((2.8e-05, 1.9e-04), (2.6e-04, 8.3e-04)),
}

# What a mask adds to both of a sparse call: its pooling.
MASKED = (2.0e-05, 2.0e-05)
