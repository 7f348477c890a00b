"""What a model answers with 4-bit weights and activations, in torch: the arithmetic of our kernels, block by block.

Matrices are replaced by their dequantised weights, and what they are fed by what a kernel would make of it. Sums of
products are torch's, in float32, and differ from a kernel's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tesseraq_gguf.converter.packers import bcq
from tesseraq_gguf.grids.codebook import nearest_indices, universal
from tesseraq_gguf.models.decoder import Decoder

Fake = Callable[[Tensor], Tensor]
"""Activations float32 [..., columns] to what a kernel multiplies in their place, of the same shape."""

_BLOCKS = 1024
"""Blocks encoded at a time: what is made of them on the way stays in a processor's cache."""

_SMALLEST = 1e-36
"""Blocks of activations whose largest magnitude is not above this are zeros to the kernels."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1."""


def int8_blocks(x: Tensor, block: int = 64) -> Tensor:
    """Activations of TSQ and BCQ4 kernels: 8 bits, one scale for 64 neighbouring numbers."""
    return _integers(x, block, 127)


def int4_blocks(x: Tensor, block: int = 64) -> Tensor:
    """Plain 4-bit integers, -7 to 7, one float scale for 64 neighbouring numbers."""
    return _integers(x, block, 7)


def _integers(x: Tensor, block: int, highest: int) -> Tensor:
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


def codebook_blocks(x: Tensor, codebooks: Tensor | None = None, block: int = 64, group: int = bcq.GROUP) -> Tensor:
    """Activations of BCQ4_A4 kernels (`cpp_kernels/bcq-cpu.h`), codeword for codeword.

    Args:
        x: float32 [..., columns].
        codebooks: int8 [N_c, 16] ascending; None takes the universal ones.
        block: L_A, numbers that share a scale; 64 in the kernels.
        group: L_b, numbers that share a codebook; 8 in the kernels.
    """
    codebooks = (universal() if codebooks is None else codebooks).to(x.device)
    parts = x.reshape(-1, block).split(_BLOCKS)
    return torch.cat([_encoded(part, codebooks, group) for part in parts]).view(x.shape)


def _encoded(blocks: Tensor, codebooks: Tensor, group: int) -> Tensor:
    largest = blocks.abs().amax(-1, keepdim=True)
    there = largest > _SMALLEST
    # the scale keeps three bits of mantissa
    bits = (largest / bcq.LARGEST).view(torch.int32)
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


@torch.no_grad()
def mean_loss(
    decoder: Decoder,
    tokens: Tensor,
    weights: Callable[[int], Mapping[str, Tensor]],
    activations: Fake | None,
    scored: int,
    embeddings: Mapping[str, Tensor] | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy in nats per token as llama-perplexity counts it: over the last tokens of each sequence.

    Args:
        decoder: the full-precision model.
        tokens: int64 [samples, length].
        weights: gives a block's matrices that are quantised, dequantised, by module name.
        activations: what its matrices are fed; None leaves that as it is.
        scored: tokens at the end of each sequence that count.
        embeddings: embedding and output matrix to use, by checkpoint name.

    Returns:
        The mean, and its standard error.
    """
    hidden, recorded = decoder.stem(tokens, embeddings)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        given = weights(index)
        if activations is not None:
            for name, module in block.matrices().items():
                if name in given:
                    module.register_forward_pre_hook(lambda _, args: (activations(args[0]),))
        for sample in range(len(hidden)):
            hidden[sample] = block.run(hidden[sample : sample + 1], recorded.arguments[index], given)[0]
    norm = decoder.final_norm()[1]
    head = (embeddings or {}).get(decoder.output_name())
    head = decoder.output_weight() if head is None else head
    losses = []
    for h, t in zip(hidden, tokens, strict=True):
        logits = decoder.logits(norm, head, h[-scored - 1 : -1])
        losses.append(torch.nn.functional.cross_entropy(logits, t[-scored:], reduction="none"))
    loss = torch.cat(losses).double()
    return float(loss.mean()), float(loss.std() / len(loss) ** 0.5)
