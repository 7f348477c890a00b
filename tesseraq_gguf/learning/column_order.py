"""Orders of columns for types whose blocks have salient places: which input channel stands where.

PTQ1.61 (arXiv 2502.13179) keeps the input channels that matter most at 4 bits: a structured mask, one bit for each
channel, shared by all matrices that read it. A block of PTQ1_61 has exactly 24 salient places and 104 others. An order
fills them: file column j is input channel order[j].

What a channel matters is its score:

    peak    max|x| over calibration tokens, the paper's
    error   what binarising the channel costs, E[x²]·Σᵢ(|wᵢⱼ| - mᵢ)² with mᵢ the mean magnitude of row i, relative to
            E[x²]·w² of the matrix, summed over the matrices that read it

A whole number of blocks has salient places for exactly 24 of 128 channels, so the best by score always have one; only
where channels may not leave their attention head, each head has places of its own.

Which of the blocks a channel comes to is free. A block has one scale for its salient and one for its binary weights, so
channels are sorted by the magnitude of their weights: blocks of like channels lose less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tesseraq_gguf.types.ptq161.grid import BLOCK, SALIENT

Score = Literal["error", "peak"]
"""What decides which channels are salient."""


@dataclass(frozen=True)
class InputStatistics:
    """What the full-precision chain says of an input.

    Attributes:
        peak: max|x|, float32 [channels].
        energy: E[x²], float32 [channels].
    """

    peak: Tensor
    energy: Tensor


def order_of(
    scores: Tensor, likeness: Tensor | None = None, run: int | None = None, block: int = BLOCK, salient: int = SALIENT
) -> Tensor:
    """Order channels so that the best by score stand in the salient places.

    Args:
        scores: float32 [channels], larger matters more.
        likeness: channels near in this are put into the same block, float32 [channels]; None keeps their own order.
        run: neighbouring channels that may change places among themselves, a multiple of `block` that divides the
            channels; None means all.
        block: places of a block.
        salient: how many of them, the first, are salient.

    Returns:
        A permutation, int64 [channels]: the channel of every place.
    """
    channels = len(scores)
    run = run or channels
    assert run % block == 0 and channels % run == 0
    scores = scores.double().view(-1, run)
    key = torch.arange(channels, device=scores.device) if likeness is None else likeness
    key = key.double().view(-1, run)
    # stable sorts: channels that draw keep their own order, whatever the device
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    count = run // block * salient
    places = torch.empty(len(scores), run // block, block, dtype=torch.int64, device=scores.device)
    for inside, chosen in ((slice(0, salient), ranked[:, :count]), (slice(salient, None), ranked[:, count:])):
        chosen = chosen.sort(1).values
        chosen = chosen.gather(1, key.gather(1, chosen).sort(dim=1, stable=True).indices)
        places[:, :, inside] = chosen.unflatten(1, (run // block, -1))
    first = torch.arange(0, channels, run, device=scores.device)
    return (places.flatten(1) + first[:, None]).flatten()


def score(weights: list[Tensor], inputs: InputStatistics | None, kind: Score) -> Tensor:
    """Score the channels of an input, float32 [channels].

    Args:
        weights: the matrices that read it, float32 [out, channels].
        inputs: what is known of it; None, where nothing was run, takes all channels to be fed alike.
        kind: which score; without `inputs`, `error` in any case.
    """
    if kind == "peak" and inputs is not None:
        return inputs.peak
    energy = torch.ones_like(weights[0][0]) if inputs is None else inputs.energy
    total = torch.zeros_like(energy)
    for weight in weights:
        magnitude = weight.abs()
        cost = (magnitude - magnitude.mean(1, keepdim=True)).square().sum(0) * energy
        total += cost / (weight.square().sum(0) * energy).sum().clamp_min(1e-30)
    return total


def likeness(weights: list[Tensor]) -> Tensor:
    """Mean magnitude of the weights that read each channel, relative to their matrix, float32 [channels]."""
    magnitudes = [weight.abs().mean(0) for weight in weights]
    return torch.stack([m / m.mean().clamp_min(1e-30) for m in magnitudes]).mean(0)
