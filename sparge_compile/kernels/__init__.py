"""Block maps and block-sparse attention: the reference, the CPU path and the Triton kernels.

Every path offers the same functions on the same tensors; :mod:`sparge_compile.ops` chooses by device.
Importing this package imports no Triton.
"""
