"""LO-BCQ's design: its error never rises, both steps do what they say, and codewords are of 6 bits."""

from __future__ import annotations

import pytest
import torch

from tesseraq_gguf.learning.codebooks import model_codebooks
from tesseraq_gguf.methods import lobcq
from tesseraq_gguf.methods.lobcq import Patience, Sought
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.types.facts import LAYOUTS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def arrays():
    """Arrays whose blocks are of three kinds: even, of one sign, and with outliers."""
    x = torch.randn(600, 64, generator=generator(1))
    x[200:400] = x[200:400].abs()
    x[400:, ::8] *= 4
    return lobcq.block_arrays(x, 64, 600, generator())


def test_block_arrays_are_scaled_to_31_and_zeros_left_out():
    x = torch.randn(10, 128, generator=generator())
    x[3] = 0
    scaled = lobcq.block_arrays(x, 64, 100, generator())
    assert scaled.shape == (18, 64)
    torch.testing.assert_close(scaled.abs().amax(1), torch.full((18,), 31.0))
    assert len(lobcq.block_arrays(x, 64, 5, generator())) <= 5


@pytest.mark.parametrize("start", ["k-means++", "random"])
@pytest.mark.parametrize(("block", "count"), [(8, 8), (4, 2), (16, 5), (64, 1)])
def test_the_error_never_rises(arrays, start, block, count):
    found = lobcq.design(arrays, Sought(block, count), generator(), start, Patience(12, 0.0))
    assert all(after <= before * (1 + 1e-6) for before, after in zip(found.errors, found.errors[1:], strict=False))
    assert found.errors[-1] < found.errors[0]
    assert found.codebooks.shape == (count, 16)
    assert found.codebooks.dtype == torch.int8
    assert int(found.codebooks.abs().max()) <= 31
    assert bool((found.codebooks.int().diff(dim=1) >= 0).all())


def test_a_design_ends_when_the_error_falls_no_further(arrays):
    found = lobcq.design(arrays, Sought(8, 4), generator(), patience=Patience(50, 0.01))
    falls = [1 - now / before for before, now in zip(found.errors[1::2], found.errors[3::2], strict=False)]
    assert all(fall >= 0.0099 for fall in falls[:-1])
    assert falls[-1] < 0.0101
    assert 4 <= len(found.errors) < 100
    assert len(lobcq.design(arrays, Sought(8, 4), generator(), patience=Patience(3, 0.0)).errors) == 6


def test_a_block_gets_the_codebook_that_serves_it_best(arrays):
    codebooks = torch.randint(-31, 32, (6, 16), generator=generator()).float().sort(1).values
    blocks = lobcq.on_lattice(arrays[:40]).view(-1, 8)
    chosen, error = lobcq.assign(blocks, codebooks)
    x = blocks.double() / 16 - 31
    each = (x[:, None, :, None] - codebooks.double()[None, :, None]).square().amin(-1).sum(-1)
    torch.testing.assert_close(each.gather(1, chosen[:, None])[:, 0], each.amin(1))
    assert error == pytest.approx(float(each.amin(1).mean()) / 8, rel=1e-5)


def test_a_refit_is_at_the_means_of_what_is_nearest(arrays):
    blocks = lobcq.on_lattice(arrays).view(-1, 8)
    start = torch.linspace(-31, 31, 16).repeat(2, 1)
    chosen = torch.arange(len(blocks)) % 2
    fitted, error = lobcq.refit(blocks, chosen, start)
    for index, levels in enumerate(fitted):
        x = (blocks[chosen == index].float() / 16 - 31).flatten()
        nearest = lobcq.nearest(x, levels)
        means = torch.stack([x[nearest == i].mean() if (nearest == i).any() else levels[i] for i in range(16)])
        torch.testing.assert_close(levels, means, atol=0.35, rtol=0.0)  # thirty steps come near, not always all the way
    before = float((x := blocks.float() / 16 - 31).sub(start[0][lobcq.nearest(x, start[0])]).square().mean())
    assert error < before


def test_the_error_of_a_refit_is_its_mean_squared_error(arrays):
    blocks = lobcq.on_lattice(arrays).view(-1, 8)
    chosen = torch.arange(len(blocks)) % 2
    fitted, error = lobcq.refit(blocks, chosen, torch.linspace(-31, 31, 16).repeat(2, 1))
    x = blocks.double() / 16 - 31
    levels = fitted.double()[chosen]
    nearest = (x[:, :, None] - levels[:, None, :]).square().amin(-1)
    assert error == pytest.approx(float(nearest.mean()), rel=1e-5)


def test_the_lattice_ends_where_codewords_do():
    x = torch.tensor([-40.0, -31.0, -30.97, 0.0, 0.03, 30.99, 31.0, 40.0])
    assert lobcq.on_lattice(x).tolist() == [0, 0, 0, 496, 496, 992, 992, 992]


def test_a_level_that_serves_nothing_stays():
    histogram = torch.zeros(993, dtype=torch.float64)
    histogram[480], histogram[484], histogram[900] = 3.0, 1.0, 5.0  # at -1.0, -0.75 and 25.25
    levels = torch.linspace(-30, 30, 16, dtype=torch.float64)
    moved = lobcq.lloyd_max(histogram, levels, 10)
    expected = levels.clone()
    expected[7], expected[14] = -0.9375, 25.25
    torch.testing.assert_close(moved, expected)


def test_integers_stay_within_6_bits_and_move_while_the_error_falls():
    histogram = torch.zeros(993, dtype=torch.float64)
    histogram[0], histogram[992] = 10.0, 10.0
    histogram[496 + 4 * 16] = 8.0  # at 4
    levels = torch.tensor([-33.0, -31.2, *torch.linspace(-20, 0, 12).tolist(), 6.4, 34.0], dtype=torch.float64)
    rounded = lobcq.round_levels(histogram, levels)
    assert (float(rounded[0]), float(rounded[-1])) == (-31.0, 31.0)
    assert 4.0 in rounded.tolist()
    assert torch.equal(rounded, rounded.sort().values)


def test_rounding_loses_little_and_repairs_some(arrays):
    found = lobcq.design(arrays, Sought(8, 4), generator())
    assert found.errors[-1] <= found.rounded_error < 1.1 * found.errors[-1]
    histogram = torch.bincount(lobcq.on_lattice(arrays).flatten(), minlength=2 * 31 * 16 + 1).double()
    levels = lobcq.lloyd_max(histogram, torch.linspace(-31, 31, 16).double(), 30)
    rounded = lobcq.round_levels(histogram, levels)
    assert torch.equal(rounded, rounded.round())

    def error(levels):
        points = torch.arange(len(histogram)) / 16 - 31
        return float(((points - levels.float()[lobcq.nearest(points, levels.float())]).square() * histogram).sum())

    assert error(rounded) <= error(levels.round())


def test_more_codebooks_serve_better(arrays):
    errors = [lobcq.design(arrays, Sought(8, count), generator()).rounded_error for count in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.46 * errors[0]


def test_an_unknown_start_is_refused(arrays):
    with pytest.raises(ValueError, match="k-means"):
        lobcq.design(arrays, Sought(8, 2), generator(), "zeros")


@pytest.mark.parametrize("levels", [4, 16])
def test_a_lattice_may_reach_further_than_codewords(arrays, levels):
    """What is scaled beyond them counts as far as it is off."""
    found = lobcq.design(arrays * 2, Sought(16, 4, levels, 62), generator())
    assert found.codebooks.shape == (4, levels)
    assert int(found.codebooks.abs().max()) <= 31
    blocks = lobcq.on_lattice(arrays * 2, 62).view(-1, 16)
    chosen, error = lobcq.assign(blocks, found.codebooks.float(), 62)
    x = blocks.double() / 16 - 62
    distance = (x[:, :, None] - found.codebooks.double()[chosen][:, None]).abs().amin(-1)
    assert error == pytest.approx(float(distance.square().mean()), rel=1e-5)
    assert found.rounded_error == pytest.approx(error, rel=1e-2)


def test_a_design_goes_on_from_codebooks(arrays):
    first = lobcq.design(arrays, Sought(16, 4, 4), generator(), patience=Patience(steps=1))
    further = lobcq.design(arrays, Sought(16, 4, 4), generator(), first.codebooks)
    assert further.errors[0] == pytest.approx(first.rounded_error)
    assert further.errors[-1] < first.errors[-1]


def test_arrays_are_scaled_as_far_as_serves_them_best(arrays):
    codebooks = torch.tensor([[-30, -9, 9, 30], [-12, -4, 4, 12]], dtype=torch.int8)
    scaled, error = lobcq.widened(arrays, codebooks, 16)

    def errors(x):
        each = (x.unflatten(1, (-1, 1, 16))[..., None] - codebooks.float()[:, None]).square().amin(-1)
        return each.sum(-1).amin(-1).sum(-1)

    tried = torch.stack([errors(arrays * factor) / factor**2 for factor in 2.0 ** (-torch.arange(-8, 3) / 8)])
    torch.testing.assert_close(errors(scaled) / (scaled / arrays)[:, 0] ** 2, tried.amin(0), rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(float(tried.amin(0).sum()) / arrays.numel(), rel=1e-4)


def test_clipping_serves_codebooks_of_few_levels(arrays):
    found = lobcq.design(arrays, Sought(16, 4, 4), generator())
    clipped = lobcq.clipped(arrays, found, 16)
    assert clipped.rounded_error == pytest.approx(lobcq.widened(arrays, clipped.codebooks, 16)[1])
    assert clipped.rounded_error < 0.95 * found.rounded_error
    assert bool((clipped.codebooks == 0).any())
    assert bool((clipped.codebooks.int().diff(dim=1) >= 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_can_have_its_own(make_model, layout):
    shape = LAYOUTS[layout]
    decoder = Decoder(make_model("llama"), torch.device("cpu"))
    tokens = torch.randint(4, 300, (2, 16), generator=generator())
    found = model_codebooks(decoder, tokens, 0, shape)
    assert found.shape == shape.shape
    assert torch.equal(found, model_codebooks(decoder, tokens, 0, shape))
    alone = model_codebooks(decoder, None, 0, shape)
    assert torch.equal(found, alone) != shape.activations
