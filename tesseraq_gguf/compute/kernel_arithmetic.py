"""What kernels make of activations before they multiply: pure functions from float32 [..., columns] to the same shape.

With matrices replaced by their dequantised weights, and what they are fed by this, torch computes what a kernel does;
sums of products are in float32 and differ from a kernel's by rounding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tesseraq_gguf.types.bcq.grid import BCQ4_A4
from tesseraq_gguf.types.levels import nearest_indices

BLOCK = 64
"""Numbers that share a scale in our kernels."""

_BLOCKS = 1024
"""Blocks encoded at a time: what is made of them on the way stays in a processor's cache."""

_SMALLEST = 1e-36
"""Blocks of activations whose largest magnitude is not above this are zeros to the kernels."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1."""


def integer_blocks(x: Tensor, bits: int, block: int = BLOCK) -> Tensor:
    """Integers around 0 with one scale for 64 neighbouring numbers; with 8 bits what TSQ and BCQ4 kernels multiply."""
    highest = (1 << (bits - 1)) - 1
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    there = largest > _SMALLEST
    inverse = torch.where(there, highest / largest, 0)
    return ((blocks * inverse).round() * torch.where(there, largest / highest, 0)).flatten(-2)


def fp4_blocks(x: Tensor, block: int = 16) -> Tensor:
    """NVFP4-like: E2M1 numbers, an E4M3 scale for 16 of them, a float scale for the tensor."""
    blocks = x.unflatten(-1, (-1, block))
    whole = x.abs().amax().clamp_min(1e-30) / (6 * 448)
    scale = (blocks.abs().amax(-1, keepdim=True) / (6 * whole)).to(torch.float8_e4m3fn).float() * whole
    magnitudes = torch.tensor(_FP4, device=x.device)
    scaled = torch.where(scale > 0, blocks / scale, 0)
    nearest = magnitudes[torch.bucketize(scaled.abs().contiguous(), (magnitudes[1:] + magnitudes[:-1]) / 2)]
    return (nearest.copysign(scaled) * scale).flatten(-2)


def codebook_blocks(
    x: Tensor, codebooks: Tensor | None = None, block: int = BLOCK, group: int = BCQ4_A4.shape.group
) -> Tensor:
    """Activations of BCQ4_A4 kernels (`cpp_kernels/bcq/cpu.h`), codeword for codeword.

    Args:
        x: float32 [..., columns].
        codebooks: int8 [N_c, 16] ascending; None takes the universal ones.
        block: L_A, numbers that share a scale; 64 in the kernels.
        group: L_b, numbers that share a codebook; 8 in the kernels.
    """
    codebooks = (BCQ4_A4.codebooks if codebooks is None else codebooks).to(x.device)
    parts = x.reshape(-1, block).split(_BLOCKS)
    return torch.cat([_encoded(part, codebooks, group) for part in parts]).view(x.shape)


def _encoded(blocks: Tensor, codebooks: Tensor, group: int) -> Tensor:
    largest = blocks.abs().amax(-1, keepdim=True)
    there = largest > _SMALLEST
    # the scale keeps three bits of mantissa
    bits = (largest / BCQ4_A4.shape.largest).view(torch.int32)
    scale = torch.where(there, ((bits + (1 << 19)) & -(1 << 20)).view(torch.float32), 0)
    quarters = (blocks * torch.where(there, 4 / scale, 0)).round().clamp(-128, 127).to(torch.int64)
    index = (quarters + 128).unflatten(-1, (-1, group))
    # nearest codewords and squared errors of all 256 numbers of quarters, for each codebook
    u = torch.arange(-128, 128, device=blocks.device)
    near = codebooks.to(torch.int32).gather(1, nearest_indices(codebooks)[:, (u >> 1) + 64])
    errors = (4 * near - u).abs().clamp_max(127).square().float()  # sums are exact in float32
    # of errors that draw, the first codebook counts, whatever min() would take
    each = torch.stack([row.take(index).sum(-1) for row in errors], -1)
    order = torch.arange(len(errors), device=blocks.device) / (2 * len(errors))
    selector = (each + order).argmin(-1)
    found = near.take(selector[..., None] * 256 + index)
    return found.flatten(-2) * scale
