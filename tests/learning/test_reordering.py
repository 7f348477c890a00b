"""Columns in the order that types want: the block stays the same function, learned and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import as_problem, loss_of
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.learning.column_order import InputStatistics
from tesseraq_gguf.learning.reconstruction import leaving
from tesseraq_gguf.learning.reordering import InputWatch, plan_moves
from tesseraq_gguf.methods.awq import AWQ, ClipSearch
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.folding import folds
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.ptq161.grid import BLOCK, SALIENT
from tesseraq_gguf.types.quantized import load_tensors, save_tensors

CPU = torch.device("cpu")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


@pytest.fixture
def load(make_model):  # noqa: F811
    """Return a function that gives the second block of a kind as a problem on PTQ1_61."""

    def load(kind="llama-256-bias"):
        decoder = Decoder(make_model(kind), CPU)
        hidden, inputs = decoder.stem(torch.randint(4, 300, (8, 24), generator=torch.Generator().manual_seed(0)))
        # channels that differ, as those of trained models do
        hidden = hidden * torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(3)) ** 3
        return as_problem(decoder.load_block(1), 30 * hidden, "ptq1_61", inputs.arguments[1])

    return load


def moves_of(problem, kind="error", watched=True):
    watch = InputWatch()
    with watch.watching(problem.block, list(problem.grids)):
        for sample in problem.inputs.split(1):
            problem.forward(sample)
    seen = watch.statistics(Team()) if watched else {}
    return plan_moves(problem.block, problem.arguments, problem.inputs[:1], problem.grids, seen, kind)


def reordered(problem, kind="error"):
    for move in moves_of(problem, kind):
        move.apply(problem.block)
    return problem


def outputs(block, problem, weights=None):
    with torch.no_grad():
        return torch.cat([block.run(h, problem.arguments, weights) for h in problem.inputs.split(1)])


@pytest.mark.parametrize("kind", ["error", "peak"])
def test_a_reordered_block_is_the_same_function(kind, load):
    problem = load()
    found = moves_of(problem, kind)
    assert [(move.names, move.route is None) for move in found] == [
        (QKV, True),
        (("self_attn.o_proj",), False),
        (GATED, True),
        (("mlp.down_proj",), False),
    ]
    for move in found:
        assert not torch.equal(move.order, torch.arange(len(move.order)))
        move.apply(problem.block)
        torch.testing.assert_close(outputs(problem.block, problem), problem.targets, rtol=1e-4, atol=1e-4)
    assert problem.block.orders.keys() == {*QKV, *GATED}
    biases = {name for name in problem.block.replaced if name.endswith("bias")}
    assert biases == {"self_attn.v_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias"}


def test_where_no_rows_can_be_moved_an_order_is_stored(load):
    problem = load()
    grids = {name: grid for name, grid in problem.grids.items() if name not in ("self_attn.v_proj", "mlp.up_proj")}
    problem = replace(problem, grids=grids)
    assert all(move.route is None for move in moves_of(problem))
    reordered(problem)
    assert problem.block.orders.keys() == grids.keys()
    torch.testing.assert_close(outputs(problem.block, problem), problem.targets, rtol=1e-4, atol=1e-4)


def test_matrices_in_other_types_keep_their_columns(load):
    problem = load()
    mixed = replace(
        problem, grids=problem.grids | {"self_attn.v_proj": grid_of("tsq4"), "mlp.down_proj": grid_of("tsq2")}
    )
    reordered(mixed)
    assert mixed.block.orders.keys() == {"self_attn.q_proj", "self_attn.k_proj", *GATED}
    torch.testing.assert_close(outputs(mixed.block, mixed), mixed.targets, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_inputs(load):
    problem = load()
    seen: dict[str, list[torch.Tensor]] = {}
    problem.observe(8, lambda name, x: seen.setdefault(name, []).append(x.flatten(0, -2)))
    watch = InputWatch()
    with watch.watching(problem.block, list(problem.grids)):
        for sample in problem.inputs.split(1):
            problem.forward(sample)
    for name, found in watch.statistics(Team()).items():
        x = torch.cat(seen[name])
        torch.testing.assert_close(found.peak, x.abs().amax(0))
        torch.testing.assert_close(found.energy, x.square().mean(0), rtol=1e-4, atol=1e-6)


def test_the_mask_holds_the_channels_with_the_largest_peaks(load):
    problem = load()
    move = moves_of(problem, "peak")[0]
    peaks = []

    def see(name, x):
        if name == QKV[0]:
            peaks.append(x.abs().amax((0, 1)))

    problem.observe(8, see)
    peak = torch.stack(peaks).amax(0)
    salient = move.order.view(-1, BLOCK)[:, :SALIENT].flatten()
    assert set(salient.tolist()) == set(peak.topk(2 * SALIENT).indices.tolist())


def test_query_heads_that_share_values_agree(load):
    problem = load()
    peaks = torch.zeros(256)
    peaks[[3, 128 + 5]] = 1.0  # each matters to one of the two query heads
    seen = {name: InputStatistics(peaks, peaks) for name in problem.grids}
    found = plan_moves(problem.block, problem.arguments, problem.inputs[:1], problem.grids, seen, "peak")
    order = found[1].order
    assert len(order) == 128  # values have one head
    assert {3, 5} <= set(order[:SALIENT].tolist())


def test_what_reads_a_gathered_input_shares_it(load):
    problem = reordered(load())
    seen: dict[str, torch.Tensor] = {}
    problem.observe(1, lambda name, x: seen.setdefault(name, x))
    assert seen[QKV[0]] is seen[QKV[1]] is seen[QKV[2]]
    assert seen[GATED[0]] is seen[GATED[1]]
    moments = problem.second_moments(4)
    assert moments[QKV[0]] is moments[QKV[2]]


def test_folds_of_a_reordered_block_are_exact(load):
    problem = reordered(load())
    found = folds(problem.block, problem.arguments, problem.inputs[:1], problem.grids.keys())
    assert [fold.consumers for fold in found] == [QKV, ("self_attn.o_proj",), GATED, ("mlp.down_proj",)]
    for fold in found:
        random = torch.Generator().manual_seed(fold.channels)
        fold.apply(problem.block, 0.5 + torch.rand(fold.channels, generator=random))
        torch.testing.assert_close(outputs(problem.block, problem), problem.targets, rtol=1e-4, atol=1e-4)


def test_an_order_pays(load):
    plain, ordered = load(), reordered(load())
    assert loss_of(ordered, rounded(ordered)) < 0.65 * loss_of(plain, rounded(plain))


def rounded(problem):
    return {name: start.tensor for name, start in Nearest().start(problem).items()}


@pytest.mark.parametrize(
    "method",
    [AsItStarts(GPTQ()), AWQ(AsItStarts(ClipSearch())), TesseraQ(steps=3, rounding_rate=0.1)],
    ids=["gptq", "awq", "tesseraq"],
)
def test_methods_work_on_a_reordered_block(method, load, tmp_path):
    problem = reordered(load())
    before = loss_of(problem, rounded(problem))
    learned = method.learn(problem)
    assert loss_of(problem, learned) < before
    # what leaves the block makes the same function of a new one
    save_tensors(tmp_path / "block.safetensors", leaving(problem.block, problem.grids, learned))
    tensors, _ = load_tensors(tmp_path / "block.safetensors")
    fresh = load()
    weights = fresh.block.adopt(tensors)
    expected = outputs(problem.block, problem, {n: problem.grids[n].dequantize(t) for n, t in learned.items()})
    torch.testing.assert_close(outputs(fresh.block, fresh, weights), expected, rtol=1e-4, atol=1e-4)
