"""Fake-quantised activations against plain definitions, and perplexity with them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.grids import grid_of
from tesseraq_gguf.grids.codebook import universal
from tesseraq_gguf.kernel_arithmetic import codebook_blocks, fp4_blocks, int4_blocks, int8_blocks, mean_loss
from tesseraq_gguf.models import Decoder


@pytest.fixture
def x():
    return torch.randn(5, 7, 192, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fake", "error"), [(int8_blocks, 1e-4), (codebook_blocks, 6e-3), (fp4_blocks, 2e-2), (int4_blocks, 2e-2)]
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
    codewords = universal().float()
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


def test_the_loss_is_the_models_own_without_quantisation_and_higher_with_it(make_model):  # noqa: F811
    decoder = Decoder(make_model("llama"), torch.device("cpu"))
    tokens = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    hidden, inputs = decoder.stem(tokens)
    with torch.no_grad():
        for index in range(len(decoder)):
            hidden = decoder.load_block(index).run(hidden, inputs.arguments[index])
    plain, error = mean_loss(decoder, tokens, lambda _: {}, None, 23)
    assert plain == pytest.approx(decoder.mean_loss(hidden, tokens), rel=1e-5)
    assert error > 0

    grid = grid_of("bcq4")
    calls = []

    def fake(x):
        calls.append(x.shape)
        return codebook_blocks(x)

    def weights(index):
        return {n: grid.dequantize(grid.quantize(m.weight)) for n, m in decoder.load_block(index).matrices().items()}

    quantised, _ = mean_loss(decoder, tokens, weights, fake, 23)
    assert calls
    assert quantised != plain
    assert quantised == pytest.approx(plain, rel=0.1)
