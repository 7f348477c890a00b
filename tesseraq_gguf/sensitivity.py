"""How much the model's answer feels an error in each channel of the residual stream, after every block.

A block's squared error counts channels alike, but what follows does not: language models keep a few channels a
thousand times larger than
the rest, and every norm that reads them scales them down. For a small error e after a block the answer moves by

    KL(p || p_e) ≈ ½ eᵀ F e,      F = E[g gᵀ],  g = ∂ log p(y) / ∂ hidden,  y drawn from the model itself

(the Fisher information of the output distribution). Its diagonal, averaged over tokens, weighs the squared error of
reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tesseraq_gguf.models.decoder import Decoder

_FLOOR = 1e-4
"""Smallest weight against the mean: no channel is given up."""


def channel_sensitivity(
    decoder: Decoder, tokens: Tensor, seed: int, report: Callable[[int, int], None] = lambda *_: None
) -> list[Tensor]:
    """Diagonal Fisher information of the hidden states after each block.

    One pass up and one pass down, block by block, so no more than one block has weights at a time.

    Args:
        decoder: the model.
        tokens: a few calibration sequences, int64 [samples, length].
        seed: of the drawn answers.
        report: called with (blocks done, blocks in all).

    Returns:
        For each block float32 [length, hidden], mean 1 over the positions from the second on. The first position,
        where models park attention,
        has weights of its own; all others share theirs.
    """
    hidden, recorded = decoder.stem(tokens)
    levels = [hidden]
    total = 2 * len(decoder)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        with torch.no_grad():
            levels.append(
                torch.cat(
                    [block.run(h, recorded.arguments[index]).cpu() for h in levels[-1].to(decoder.device).split(1)]
                )
            )
        report(index + 1, total)
    gradient = decoder.answer_gradient(levels.pop(), torch.Generator().manual_seed(seed))
    weights = []
    for index in reversed(range(len(decoder))):
        weights.append(_weights(gradient))
        block, inputs = decoder.load_block(index), levels.pop()
        below = []
        for h, g in zip(inputs.split(1), gradient.split(1), strict=True):
            h = h.to(decoder.device).requires_grad_()
            below.append(torch.autograd.grad(block.run(h, recorded.arguments[index]), h, g.to(decoder.device))[0].cpu())
        gradient = torch.cat(below)
        report(total - index, total)
    return weights[::-1]


def _weights(gradient: Tensor) -> Tensor:
    energy = gradient.square().mean(0)
    scale = energy[1:].mean().clamp_min(1e-30)
    rest = energy[1:].mean(0, keepdim=True).expand(len(energy) - 1, -1)
    return (torch.cat([energy[:1], rest]) / scale).clamp_min(_FLOOR)
