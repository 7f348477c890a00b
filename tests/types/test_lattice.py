"""Lattice types: bytes against gguf-py and the C library, points against all points, and searches against ggml's."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import loss_of, mlp_problem
from stock_bytes import (
    FINITE,
    Array,
    assert_same,
    dequantized_in_c,
    quantized_in_c,
    random_bytes,
)

from tesseraq_gguf.methods.gptq import GPTQ, compensate
from tesseraq_gguf.methods.start import NEAREST, Start
from tesseraq_gguf.methods.tesseraq import SOFT_SHARE, SoftMatrix, TesseraQ
from tesseraq_gguf.types.facts import names, tensor_type
from tesseraq_gguf.types.grid import importance_of
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.lattice.grid import LatticeGrid
from tesseraq_gguf.types.lattice.packer import LatticePacker, Signs
from tesseraq_gguf.types.lattice.points import Magnitudes
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.quantized import QuantizedTensor

TYPES = names(lambda t: t.family == "lattice")


def lattice(name: str) -> LatticeGrid:
    grid = grid_of(name)
    assert isinstance(grid, LatticeGrid)
    return grid


def packer_for(name: str) -> LatticePacker:
    packer = packer_of(name)
    assert isinstance(packer, LatticePacker)
    return packer


def random_arrays(name: str, rows: int, blocks: int, seed: int) -> dict[str, Array]:
    """Signed points and parameters without a pattern."""
    random, packer = np.random.default_rng(seed), packer_for(name)
    columns = 256 * blocks
    points = packer.points[random.integers(0, len(packer.points), (rows, columns // packer.points.shape[1]))]
    signs = random.choice(np.array([-1, 1], np.int8), (rows, columns // 8, 8))
    if packer.signs is Signs.EVEN:
        signs[..., 7] = signs[..., :7].prod(-1)
    if packer.signs is Signs.INSIDE:
        signs[:] = 1
    q = points.reshape(rows, columns) * signs.reshape(rows, columns)
    sc = random.integers(0, packer.steps + 1, (rows, columns // packer.group)).astype(np.uint8)
    arrays = {"q": q, "sc": sc, "d": random.choice(FINITE, (rows, blocks))}
    return arrays | ({"lower": random.integers(0, 2, sc.shape, dtype=np.uint8)} if packer.shift else {})


@pytest.mark.parametrize("name", TYPES)
def test_identity(name: str) -> None:
    packer = packer_for(name)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1 << 32), st.sampled_from(list(FINITE)))
    def check(rows: int, blocks: int, seed: int, half: np.float16) -> None:
        arrays = random_arrays(name, rows, blocks, seed)
        arrays["d"][0, 0] = half
        data = packer.pack(arrays)
        assert data.shape == (rows, blocks * tensor_type(name).block_bytes)
        back = packer.unpack(data)
        assert set(back) == set(arrays)
        for key, array in arrays.items():
            assert_same(back[key], array)

    check()


@pytest.mark.parametrize("name", TYPES)
def test_every_byte_is_read_back(name: str) -> None:
    data = random_bytes(name, 200, 3, 0)
    assert_same(packer_for(name).pack(packer_for(name).unpack(data)), data)


@pytest.mark.parametrize("name", TYPES)
def test_arrays_need_not_be_contiguous(name: str) -> None:
    arrays = random_arrays(name, 6, 2, 2)
    every_other = {key: np.asfortranarray(a)[::2] for key, a in arrays.items()}
    data = packer_for(name).pack(arrays)
    assert_same(packer_for(name).pack(every_other), data[::2])
    assert_same(packer_for(name).unpack(data[::2])["q"], arrays["q"][::2])


@pytest.mark.parametrize("name", TYPES)
def test_numpy_and_torch_dequantise_as_gguf_does(name: str) -> None:
    data = random_bytes(name, 50, 3, 4)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
    arrays = packer_for(name).unpack(data)
    assert_same(packer_for(name).dequantize(arrays), theirs)
    tensor = QuantizedTensor(name, {key: torch.from_numpy(a) for key, a in arrays.items()})
    assert_same(lattice(name).dequantize(tensor).numpy(), theirs)


@pytest.mark.parametrize("name", TYPES)
def test_arrays_that_do_not_fit_together(name: str) -> None:
    packer, good = packer_for(name), random_arrays(name, 2, 2, 7)
    packer.pack(good)
    no_point, odd = good["q"].copy(), good["q"].copy()
    no_point[1, 9] = 2
    odd[1, 9] *= -1
    bad: list[dict[str, Array]] = [
        {"q": good["q"][:, :-1]},
        {"q": good["q"][0]},
        {"q": good["q"].astype(np.uint8)},
        {"q": no_point},
        {"sc": good["sc"][:1]},
        {"sc": good["sc"].astype(np.int8)},
        {"sc": good["sc"] + np.uint8(packer.steps + 1)},
        {"d": good["d"][:, :1]},
        {"d": good["d"].astype(np.float32)},
        {"d": np.full_like(good["d"], np.nan)},
    ]
    if packer.signs is Signs.EVEN:
        bad.append({"q": odd})
    if packer.shift:
        bad += [{"lower": good["lower"][:1]}, {"lower": good["lower"] + np.uint8(2)}]
    for wrong in bad:
        with pytest.raises(ValueError, match=rf"^{name} (wants|has) "):
            packer.pack(good | wrong)


@pytest.mark.runtime
@pytest.mark.parametrize("name", TYPES)
def test_numpy_dequantises_as_c_does(name: str) -> None:
    data = random_bytes(name, 1000, 2, 5)
    assert_same(packer_for(name).dequantize(packer_for(name).unpack(data)), dequantized_in_c(name, data))


@pytest.mark.runtime
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize(
    # before ggml quantises to the first of the IQ1 types, it looks for the neighbours of all their vectors
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("iq1") else []) for name in TYPES],
)
def test_the_search_leaves_less_than_that_of_c(name: str, tails: bool) -> None:
    random = np.random.default_rng(6)
    weight = 0.02 * random.standard_normal((24, 512)).astype(np.float32)
    if tails:
        weight *= np.exp(0.5 * random.standard_normal(weight.shape)).astype(np.float32)
    grid, packer = lattice(name), packer_for(name)
    for importance in (np.ones(512, np.float32), random.random(512).astype(np.float32) ** 4 + np.float32(0.001)):
        theirs = packer.dequantize(packer.unpack(quantized_in_c(name, weight, importance)))
        ours = grid.dequantize(grid.quantize(torch.from_numpy(weight), torch.from_numpy(importance))).numpy()
        left, before = ((importance * (w - weight) ** 2).sum() for w in (ours, theirs))
        assert left < 0.97 * before


def every_signed_point(name: str) -> torch.Tensor:
    """All signed points of a type, float32 [points · signs, weights]; of even signs where a point has all eight."""
    points = lattice(name).points
    if not isinstance(points, Magnitudes):
        return points.levels
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=points.weights)))
    if points.even and points.weights == 8:
        signs = signs[signs.prod(1) > 0]
    return (points.levels[:, None] * signs).flatten(0, 1)


def even(grid: LatticeGrid) -> bool:
    """Whether signs hold a parity."""
    return isinstance(grid.points, Magnitudes) and grid.points.even


def drawn(name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in units of a scale that suits them, and importances, float32 [rows, 8]."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 8, generator=random) * lattice(name).points.largest / 2.2
    return x, torch.rand(rows, 8, generator=random) + 0.05


def error(x: torch.Tensor, h: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (h * (x - q).square()).sum(-1)


def errors(x: torch.Tensor, h: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Σ h·(x - p)² of all points, float64 [n, points]."""
    x, h, points = x.double(), h.double(), points.double()
    return (h * x * x).sum(1, keepdim=True) - 2 * (h * x) @ points.T + h @ points.square().T


@pytest.mark.parametrize("name", TYPES)
def test_the_nearest_of_all_points(name: str) -> None:
    grid = lattice(name)
    x, h = drawn(name, 60)
    q = grid._nearest(x, h)
    if even(grid):
        assert bool((q.prod(1) > 0).all())
    width, every = grid.vector, every_signed_point(name)
    best = torch.zeros(len(x), dtype=torch.float64)
    for place in range(0, 8, width):
        part = slice(place, place + width)
        of_all = errors(x[:, part], h[:, part], every)
        if even(grid):  # each half keeps the parity that it has
            of_all[every.prod(1).sign() != q[:, part].prod(1).sign()[:, None]] = torch.inf
        best += of_all.amin(1)
    got = error(x, h, q)
    # the sign that gives way to parity is chosen before the point: rarely, another would have been better
    assert float(got.sum()) < 1.02 * float(best.sum())
    assert float((got > best * 1.0001).float().mean()) < 0.1


@pytest.mark.parametrize("name", TYPES)
def test_the_nearest_point_but_one(name: str) -> None:
    grid, every = lattice(name), every_signed_point(name)
    x, h = (a[:, : grid.vector].contiguous() for a in drawn(name, 60))
    distances = errors(x, h, every)
    q = every[distances.argmin(1)]
    other = grid.points.other(x, h, q)
    assert bool((other != q).any(1).all())
    distances.scatter_(1, distances.argmin(1, keepdim=True), torch.inf)
    if even(grid):
        distances[every.prod(1).sign() != q.prod(1).sign()[:, None]] = torch.inf
        assert torch.equal(other.prod(1).sign(), q.prod(1).sign())
    assert float(error(x, h, other).sum()) < 1.005 * float(distances.amin(1).sum())


@pytest.mark.parametrize("name", TYPES)
def test_a_point_is_chosen_by_what_its_errors_leave(name: str) -> None:
    grid, random = lattice(name), torch.Generator().manual_seed(9)
    weight, x = torch.randn(200, 256, generator=random), torch.randn(300, 24, generator=random)
    x = x @ torch.randn(24, 256, generator=random) + torch.randn(300, 256, generator=random)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True)
    arrays = grid.search(weight)
    rounder, block = grid.rounder(arrays), weight.T.contiguous()
    first = torch.stack([rounder(column, block, factor)[1] for column in range(grid.vector)], 1)
    nearest = grid.dequantize(grid.assemble(grid.encode(weight, arrays, importance_of(factor)), arrays))
    inverse = torch.linalg.inv(factor[: grid.vector, : grid.vector])
    weight, nearest = weight[:, : grid.vector], nearest[:, : grid.vector]
    left, before = (((weight - q) @ inverse).square().sum() for q in (first, nearest))
    assert left < 0.985 * before


def test_a_group_of_iq1_s_is_shifted_to_where_its_weights_are() -> None:
    grid, random = lattice("iq1_s"), torch.Generator().manual_seed(11)
    lower = torch.arange(16)[None] % 3 == 0
    levels = grid.points.levels[torch.randint(2048, (1, 64), generator=random)].view(1, 16, 32)
    weight = 0.03 * (levels + torch.where(lower, -0.125, 0.125)[..., None]).flatten(1)
    tensor = grid.quantize(weight)
    assert torch.equal(tensor.arrays["lower"], lower.to(torch.uint8))
    assert float((grid.dequantize(tensor) - weight).square().sum()) < 1e-4 * float(weight.square().sum())


def test_learning_keeps_the_shifts_of_groups() -> None:
    grid = lattice("iq1_s")
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    start = Start(grid.quantize(weight), weight)
    soft = SoftMatrix(start, grid)
    with torch.no_grad():
        soft.tuning += 0.05
    soft.settle_scale()
    soft.settle_zero()
    soft.harden(0.0)
    tensor = soft.finish()
    assert torch.equal(tensor.arrays["lower"], start.tensor.arrays["lower"])
    assert torch.equal(grid.dequantize(tensor), soft.weight())


@pytest.fixture
def soft() -> SoftMatrix:
    grid = lattice("iq3_xxs")
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    return SoftMatrix(Start(grid.quantize(weight), weight), grid)


def test_a_variable_moves_a_vector(soft: SoftMatrix) -> None:
    assert soft.rounding.shape == (4 * 512 // 32, 8)
    begin = soft.weight().detach()
    with torch.no_grad():
        soft.rounding[5, 3] += 1
    moved = (soft.weight() - begin).view(64, 8, 4).abs().sum(-1) > 0
    assert moved.nonzero().tolist() == [[5, 3]]


def test_the_backward_equals_autograds(soft: SoftMatrix) -> None:
    with torch.no_grad():
        soft.tuning += 0.3
        soft.rounding.view(-1)[:40] = torch.linspace(-4, 4, 40)
    gradient = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    learned = [soft.rounding, soft.tuning]
    got = torch.autograd.grad((soft.weight() * gradient).sum(), learned)
    step = (torch.sigmoid(soft.rounding) * 1.2 - 0.1).clamp(0, 1).repeat_interleave(4, 1)
    scale = soft._scale * 2 * torch.sigmoid(soft.tuning)
    assert soft._gap is not None
    plain = (scale * (soft._base + step * soft._gap)).view(4, 512)
    torch.testing.assert_close(soft.weight(), plain)
    for ours, autograds in zip(got, torch.autograd.grad((plain * gradient).sum(), learned), strict=True):
        torch.testing.assert_close(ours, autograds)


def test_hard_vectors_are_points(soft: SoftMatrix) -> None:
    begun = soft.finish().arrays["q"]
    with torch.no_grad():
        soft.rounding += torch.randn(soft.rounding.shape, generator=torch.Generator().manual_seed(2))
        soft.tuning += 0.21
    soft.settle_scale()
    soft.settle_zero()
    soft.harden(0.0)
    tensor = soft.finish()
    assert float((tensor.arrays["q"] != begun).float().mean()) > 0.02
    assert torch.equal(lattice("iq3_xxs").dequantize(tensor), soft.weight())
    packer_for("iq3_xxs").pack({key: a.numpy() for key, a in tensor.arrays.items()})


@pytest.mark.parametrize("name", TYPES)
def test_learning_begins_at_the_points_that_gptq_chose(name: str) -> None:
    random = torch.Generator().manual_seed(8)
    weight, x = torch.randn(8, 256, generator=random), torch.randn(64, 256, generator=random)
    start = compensate(weight, x.T @ x / 64, lattice(name), 0.01)
    soft = SoftMatrix(start, lattice(name))
    assert torch.equal(soft._code, start.tensor.arrays["q"])


@pytest.mark.parametrize("name", TYPES)
def test_gptq_and_learning_leave_less(name: str) -> None:
    problem = mlp_problem(name, 256, 256)
    nearest = {n: start.tensor for n, start in NEAREST.start(problem).items()}
    rounded = {n: start.tensor for n, start in GPTQ().start(problem).items()}
    method = TesseraQ(20, rounding_rate=0.1, scale_rate=0.01, settle_scales=7, soft_shares=SOFT_SHARE[::2])
    losses = [loss_of(problem, tensors) for tensors in (nearest, rounded, method.learn(problem))]
    assert losses[1] < 0.4 * losses[0]
    assert losses[2] < 0.9 * losses[1]
