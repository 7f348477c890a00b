"""What kernels make of activations against plain definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tesseraq_gguf.compute.kernel_arithmetic import codebook_blocks, fp4_blocks, integer_blocks
from tesseraq_gguf.types.bcq.grid import universal


@pytest.fixture
def x():
    return torch.randn(5, 7, 192, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fake", "error"),
    [
        (partial(integer_blocks, bits=8), 1e-4),
        (codebook_blocks, 6e-3),
        (fp4_blocks, 2e-2),
        (partial(integer_blocks, bits=4), 2e-2),
    ],
)
def test_errors_are_small_and_zeros_stay(fake, error, x):
    assert fake(x).shape == x.shape
    assert float((fake(x) - x).square().sum() / x.square().sum()) < error
    assert torch.equal(fake(torch.zeros(1, 64)), torch.zeros(1, 64))


def test_codebook_blocks_choose_the_best_codebook(x):
    got = codebook_blocks(x).view(-1, 8)
    scale = (x.view(-1, 64).abs().amax(1) / 31).repeat_interleave(8)
    bits = scale.view(torch.int32)
    scale = (((bits + (1 << 19)) >> 20) << 20).view(torch.float32)[:, None]
    codewords = universal("bcq4").float()
    distance = (x.view(-1, 8)[:, None, :, None] / scale[..., None, None] - codewords[None, :, None]).abs()
    best = distance.amin(-1).square().sum(-1).amin(-1)
    mine = ((x.view(-1, 8) - got) / scale).square().sum(-1)
    # numbers are rounded to quarters of the scale before codebooks are compared
    assert float((mine / best.clamp_min(1)).mean()) < 1.02
    assert bool((mine >= best - 1e-3).all())
    steps = got / scale
    torch.testing.assert_close(steps, steps.round())


def test_scales_are_of_three_bits_and_of_any_size():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    for exponent in (-90, 0, 90):
        torch.testing.assert_close(codebook_blocks(x * 2.0**exponent), codebook_blocks(x) * 2.0**exponent)


def test_any_codebooks_and_lengths(x):
    codebooks = torch.linspace(-31, 31, 16).round().to(torch.int8)[None]
    wide = codebook_blocks(x, codebooks, block=32, group=16)
    assert float((wide - x).square().mean()) < float((codebook_blocks(x, codebooks) - x).square().mean())
