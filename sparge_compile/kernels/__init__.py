"""Block maps and block-sparse attention: the rule, the CPU path and the Triton kernels.

``cpu`` and ``triton`` are one face each: block_map, forward, pack and backward, with the arguments of the op schemas.
:mod:`sparge_compile.ops` chooses by device. Importing this package imports no Triton.
"""
