"""Codes of quantised matrices, out of the bytes in which checkpoints pack them. Functions of tensors alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""What the sixteen codes of a 4-bit float (E2M1) stand for."""


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Take codes out of integers that hold them one after the other, the first in the lowest bits.

    Args:
        words: int32 or uint8 [..., words], contiguous along the last axis.
        bits: of a code, 2 to 8. Codes of 3, 5, 6 and 7 bits may reach from one word into the next.

    Returns:
        uint8 [..., codes]: as many as there is room for, and a few more where the last does not end with a byte.
    """
    raw = words.contiguous().view(torch.uint8)
    together = bits // math.gcd(bits, 8)  # bytes until a code begins with a byte again
    if together == 1:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((raw[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[-1] % together))
    parts = raw.unflatten(-1, (-1, together)).to(torch.int64)
    joined = (parts << (8 * torch.arange(together))).sum(-1, keepdim=True)
    shifts = torch.arange(0, 8 * together, bits)
    return ((joined >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def high_first(raw: Tensor) -> Tensor:
    """Take two codes of 4 bits out of each byte, the first out of the higher bits: uint8 [..., n] to [..., 2n]."""
    return torch.stack((raw >> 4, raw & 15), -1).flatten(-2)


def looked_up(codes: Tensor, table: Tensor) -> Tensor:
    """Return what codes, uint8, stand for in a table, float32 [codes], in the shape of the codes."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return what 8-bit exponents (E8M0, uint8 with 127 for 1) stand for, float32; 255 is not a number."""
    found = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    return torch.where(exponents == 255, torch.nan, found)
