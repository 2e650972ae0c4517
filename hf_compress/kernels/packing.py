"""Codes of 2, 3 or 4 bits in 32-bit words, in the order in which the kernels read them.

A unit of 32 columns takes `bits` words. 2 bits: one word for 16 columns, column l at bit 2l. 4 bits: two words for
16 columns, column l in word l % 2 at bit 4 * (l // 2). 3 bits: two words as for 2 bits with the low bits of the codes,
and a third whose bit l is the high bit of column l. Columns that pad the last unit have code 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from ..errors import ConfigurationError

BITS = (2, 3, 4)
UNIT = 32


def words_per_row(columns: int, bits: int) -> int:
    """The number of 32-bit words that the codes of a row take."""
    return bits * -(-columns // UNIT)


def pack_codes(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack codes below 2^bits.

    Raises:
        ConfigurationError: `bits` is not 2, 3 or 4, or a code does not fit into them.
    """
    check_bits(bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ConfigurationError(f"a code is {int(codes.max())}; with {bits} bits the largest is {(1 << bits) - 1}.")
    rows, columns = codes.shape
    units = -(-columns // UNIT)
    codes = torch.nn.functional.pad(codes, (0, units * UNIT - columns))
    if bits == 4:
        places = codes.view(rows, 2 * units, 4, 2, 2).permute(0, 1, 4, 2, 3)
        return _join(places, 4).view(torch.int32).view(rows, bits * units)
    if bits == 2:
        return _join(codes.view(rows, 8 * units, 4), 2).view(torch.int32)
    low = _join((codes & 3).view(rows, units, 8, 4), 2)
    high = _join((codes >> 2).view(rows, units, 4, 8), 1)
    return torch.cat([low, high], dim=2).view(rows, 12 * units).view(torch.int32)


def unpack_codes(packed: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The codes that `pack_codes` packed. Raises `ConfigurationError` if the words are not as many as these take."""
    check_bits(bits)
    rows, words = packed.shape
    if words != words_per_row(columns, bits):
        expected = words_per_row(columns, bits)
        raise ConfigurationError(f"{columns} codes of {bits} bits take {expected} words a row, got {words}.")
    units = words // bits
    stored = packed.contiguous().view(torch.uint8)
    if bits == 4:
        codes = _split(stored.view(rows, 2 * units, 2, 4), 4).permute(0, 1, 3, 4, 2)
    elif bits == 2:
        codes = _split(stored, 2)
    else:
        stored = stored.view(rows, units, 12)
        low, high = _split(stored[..., :8], 2), _split(stored[..., 8:], 1)
        codes = low.reshape(rows, units, UNIT) | high.reshape(rows, units, UNIT) << 2
    return codes.reshape(rows, units * UNIT)[:, :columns]


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ConfigurationError(f"`bits` must be 2, 3 or 4, got {bits}.")


def _join(codes: Tensor, bits: int) -> Tensor:
    """Bytes (...) of codes (..., 8 / bits), the first in the lowest bits."""
    parts = codes.unbind(-1)
    joined = parts[0].contiguous()
    for place, part in enumerate(parts[1:], start=1):
        joined |= part << (bits * place)
    return joined


def _split(stored: Tensor, bits: int) -> Tensor:
    """Codes (..., 8 / bits) of bytes (...)."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
    return stored.unsqueeze(-1) >> places & ((1 << bits) - 1)
