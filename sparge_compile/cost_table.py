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
    # H200, torch 2.11, cuDNN 9.19. Measured are forwards in bfloat16, head sizes 64 and 128 together; all others are
    # estimated from rates of the single kernels.
    "sm90": {
        ("half", 64): (
            (1.395e-5, 7.32e-15, 2.901e-5, 1.125e-12, 1.155e-11, 7.378e-15),
            (4.5e-5, 2.86e-14, 9.0e-5, 1.5e-12, 2.4e-11, 4.5e-14),
        ),
        ("half", 128): (
            (1.395e-5, 7.32e-15, 2.901e-5, 1.125e-12, 1.155e-11, 7.378e-15),
            (4.5e-5, 2.51e-14, 9.0e-5, 1.5e-12, 2.4e-11, 3.35e-14),
        ),
        ("half", 256): (
            (1.395e-5, 7.32e-15, 2.901e-5, 1.125e-12, 1.155e-11, 1.14e-14),
            (4.5e-5, 2.6e-14, 9.0e-5, 1.5e-12, 2.4e-11, 5.5e-14),
        ),
        ("float32", 64): (
            (1.4e-5, 1.0e-13, 3.0e-5, 2.25e-12, 1.155e-11, 2.0e-13),
            (5.0e-5, 4.0e-13, 1.0e-4, 3.0e-12, 2.4e-11, 8.0e-13),
        ),
        ("float32", 128): (
            (1.4e-5, 1.0e-13, 3.0e-5, 2.25e-12, 1.155e-11, 2.0e-13),
            (5.0e-5, 4.0e-13, 1.0e-4, 3.0e-12, 2.4e-11, 8.0e-13),
        ),
    },
}

# An eager call of dense attention takes the host so long (host.py measures it), where the times below were measured.
REFERENCE = 15e-6

# Dense and sparse seconds of the host for one call: of a forward, and of a forward with its backward.
HOST: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "compiled": ((23e-6, 65e-6), (167e-6, 340e-6)),
    "eager": ((15e-6, 77e-6), (180e-6, 900e-6)),
}
