"""Orders of columns: what holds for any scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.learning.column_order import InputStatistics, likeness, order_of, score
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.ptq161.grid import BLOCK, SALIENT

seeds, blocks, heads = st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4)


def numbers(seed, count, levels=None):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (count,), generator=random) if levels else torch.rand(count, generator=random)


@given(seeds, blocks, heads)
@settings(max_examples=50, deadline=None)
def test_the_best_channels_stand_in_the_salient_places(seed, blocks, heads):
    run = blocks * BLOCK
    scores = numbers(seed, heads * run, levels=50).float()
    order = order_of(scores, numbers(seed + 1, heads * run), run)
    assert torch.equal(order.sort().values, torch.arange(heads * run))
    assert torch.equal(order.view(heads, run) // run, torch.arange(heads)[:, None].expand(heads, run))
    salient = scores[order.view(-1, BLOCK)[:, :SALIENT]].view(heads, -1)
    others = scores[order.view(-1, BLOCK)[:, SALIENT:]].view(heads, -1)
    # the quota is the only thing that a better channel can be left out for
    assert bool((salient.min(1).values >= others.max(1).values).all())


@given(seeds, blocks)
@settings(max_examples=30, deadline=None)
def test_without_likeness_channels_keep_their_own_order(seed, blocks):
    order = order_of(numbers(seed, blocks * BLOCK)).view(-1, BLOCK)
    for places in (order[:, :SALIENT].flatten(), order[:, SALIENT:].flatten()):
        assert torch.equal(places, places.sort().values)


def test_like_channels_come_into_one_block():
    key = numbers(3, 512)
    order = order_of(numbers(4, 512), key).view(-1, BLOCK)
    for places in (order[:, :SALIENT], order[:, SALIENT:]):
        highest, lowest = key[places].amax(1), key[places].amin(1)
        assert bool((highest[:-1] <= lowest[1:]).all())


def test_channels_that_draw_keep_their_own_order():
    order = order_of(torch.zeros(256), torch.zeros(256)).view(2, BLOCK)
    assert torch.equal(order[:, :SALIENT].flatten(), torch.arange(2 * SALIENT))


def test_peaks_are_the_papers_score():
    seen = InputStatistics(numbers(1, 256), numbers(2, 256))
    weights = [torch.randn(8, 256, generator=torch.Generator().manual_seed(5))]
    assert torch.equal(score(weights, seen, "peak"), seen.peak)
    assert not torch.equal(score(weights, seen, "error"), seen.peak)
    # without anything run, weights alone decide
    assert torch.equal(score(weights, None, "peak"), score(weights, None, "error"))


def test_the_error_score_lowers_the_error_most():
    random = torch.Generator().manual_seed(6)
    weight = torch.randn(64, 512, generator=random) * torch.rand(512, generator=random)
    seen = InputStatistics(torch.rand(512, generator=random), torch.rand(512, generator=random) ** 4)
    grid = grid_of("ptq1_61")

    def error(order):
        off = grid.dequantize(grid.quantize(weight[:, order], seen.energy[order])) - weight[:, order]
        return float((off.square() * seen.energy[order]).sum())

    natural = error(torch.arange(512))
    by_peak = error(order_of(score([weight], seen, "peak")))
    by_error = error(order_of(score([weight], seen, "error")))
    assert by_error < 0.32 * min(natural, by_peak)
    assert error(order_of(score([weight], seen, "error"), likeness([weight]))) < by_error


def test_matrices_that_share_an_input_count_alike():
    weights = [torch.randn(8, 256, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    alone = [score([w], None, "error") for w in weights]
    torch.testing.assert_close(score([weights[0], 100 * weights[1]], None, "error"), sum(alone))
