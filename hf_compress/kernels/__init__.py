"""Compiled kernels, their torch.library operators and their torch fallback."""

from .codebook import CodebookMatrix, check_matrix, codebook_linear, dequantize
from .library import available_kernels, forced_kernel, kernel_name, use_kernel
from .packing import pack_codes, unpack_codes, words_per_row

__all__ = [
    "CodebookMatrix",
    "available_kernels",
    "check_matrix",
    "codebook_linear",
    "dequantize",
    "forced_kernel",
    "kernel_name",
    "pack_codes",
    "unpack_codes",
    "use_kernel",
    "words_per_row",
]
