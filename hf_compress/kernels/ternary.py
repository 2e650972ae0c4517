"""Codes of three values, five in a byte: 1.6 bits each."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from ..errors import ConfigurationError

PER_BYTE = 5
_TOP = 3**PER_BYTE - 1


def ternary_bytes(columns: int) -> int:
    """The number of bytes that the codes of a row take."""
    return -(-columns // PER_BYTE)


def pack_ternary(codes: UInt8[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """Pack codes below 3: the byte of five codes is `Σ code_k · 3^k`; codes that pad the last byte are 0.

    Raises:
        ConfigurationError: a code above 2.
    """
    if codes.numel() and int(codes.max()) > 2:
        raise ConfigurationError(f"a code is {int(codes.max())}; of three codes the largest is 2.")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % PER_BYTE))
    fives = padded.unflatten(1, (-1, PER_BYTE))
    packed: Tensor = (fives * _powers(codes.device)).sum(dim=2, dtype=torch.uint8)
    return packed


def unpack_ternary(packed: UInt8[Tensor, "rows bytes"], columns: int) -> UInt8[Tensor, "rows columns"]:
    """The codes that `pack_ternary` packed. Raises `ConfigurationError` for bytes that no codes give, or another
    number or kind of bytes than these columns take."""
    if packed.dtype != torch.uint8:
        raise ConfigurationError(f"five codes are a byte of {torch.uint8}, got {packed.dtype}.")
    if packed.shape[1] != ternary_bytes(columns):
        raise ConfigurationError(f"{columns} codes take {ternary_bytes(columns)} bytes a row, got {packed.shape[1]}.")
    if packed.numel() and int(packed.max()) > _TOP:
        raise ConfigurationError(f"a byte of five codes is {int(packed.max())}; the largest is {_TOP}.")
    codes = (packed.unsqueeze(2) // _powers(packed.device)) % 3
    return codes.flatten(start_dim=1)[:, :columns]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3**place for place in range(PER_BYTE)], dtype=torch.uint8, device=device)
