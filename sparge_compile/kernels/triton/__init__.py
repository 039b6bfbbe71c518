"""The face of the GPU: the functions of the op schemas (ops.py), with the same arguments as the CPU's, ``code`` and
``centred``.

Importing it imports Triton, so ops.py does so when an op first runs on a GPU. The functions hide the modules of their
names: ``from .forward import ...`` reaches what else is in them.
"""

from __future__ import annotations

from .backward import backward
from .decode import centred
from .forward import forward
from .forward_8 import code
from .lists import pack
from .select import block_map, means, select

__all__ = ["backward", "block_map", "centred", "code", "forward", "means", "pack", "select"]
