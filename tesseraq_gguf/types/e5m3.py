"""E5M3, the scales of our own types: an unsigned float of 8 bits, (1 + m/8)·2^(e - 24), e the high five bits.

Its code, shifted up, is the middle of a float32 bit pattern. Packers decode in numpy and grids in torch, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_SHIFT = 20
"""Bits of a float32 below its three highest of mantissa."""

_HALF = 1 << (_SHIFT - 1)
"""What is added before these are cut off: rounds to the nearest."""

_OFFSET = 103 << 3
"""Between a code and the float32 bits from there up: exponents are biased by 24 and by 127."""


def decode(code: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codes, of any shape, to scales."""
    return ((code.astype(np.uint32) + np.uint32(_OFFSET)) << np.uint32(_SHIFT)).view(np.float32)


def encode(scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scales of 0 or more, of any shape, to the nearest codes; what is below or above all gets the nearest end."""
    rounded = (scale.astype(np.float32).view(np.uint32) + np.uint32(_HALF)) >> np.uint32(_SHIFT)
    return np.clip(rounded.astype(np.int64) - _OFFSET, 0, 255).astype(np.uint8)


def decode_tensor(code: Tensor) -> Tensor:
    """Codes, uint8 of any shape, to float32 scales: `decode` in torch."""
    import torch

    return ((code.to(torch.int32) + _OFFSET) << _SHIFT).view(torch.float32)


def encode_tensor(scale: Tensor) -> Tensor:
    """Scales of 0 or more, float32 of any shape, to the nearest codes, uint8: `encode` in torch."""
    import torch

    bits = scale.float().contiguous().view(torch.int32)
    return (((bits + _HALF) >> _SHIFT) - _OFFSET).clamp(0, 255).to(torch.uint8)
