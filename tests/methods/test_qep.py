"""QEP: what it moves weights to, what matrices are fed meanwhile, and where it is GPTQ alone."""

from __future__ import annotations

import pytest
import torch
from problems import mlp_problem

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.methods.gptq import GPTQ, compensate
from tesseraq_gguf.methods.qep import QEP, _fed, _solved


@pytest.fixture
def drifted():
    """A problem whose inputs are not what the block is fed in the full-precision model."""
    problem = mlp_problem("tsq2", 64, 128)
    problem.originals = problem.inputs.clone()
    random = torch.Generator().manual_seed(3)
    lost = torch.randn(64, 64, generator=random) / 8
    problem.inputs = problem.inputs - 0.4 * problem.inputs @ lost
    return problem


def fed_by_hand(problem, hidden, up):
    """What `up` and `down` are fed, double precision [tokens, in], with a matrix in place of `up`."""
    x = hidden.double().flatten(0, 1)
    normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    normed = normed * problem.block.module.norm.weight.double()
    return normed, torch.nn.functional.silu(normed @ up.double().T)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_it_is_what_the_formula_says(strength, drifted):
    starts = QEP(strength).start(drifted)
    up, down = (drifted.matrices()[name] for name in ("up", "down"))
    grid = drifted.grids["up"]
    rounded = up
    for place, (name, weight) in enumerate((("up", up), ("down", down))):
        full = fed_by_hand(drifted, drifted.originals, up)[place]
        fed = fed_by_hand(drifted, drifted.inputs, rounded)[place]
        moment, lost = fed.T @ fed / len(fed), (full - fed).T @ fed / len(fed)
        damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        moved = weight.double() + strength * weight.double() @ lost @ torch.linalg.inv(damped)
        expected = compensate(moved.float(), moment.float(), grid, 0.01)
        got = starts[name]
        same = (got.tensor.arrays["q"] == expected.tensor.arrays["q"]).double().mean()
        assert float(same) > 0.98, name  # a code on the edge may fall to the other side, and moves those behind it
        torch.testing.assert_close(got.weight.mean(), expected.weight.mean(), rtol=0.05, atol=1e-3)
        rounded = grid.dequantize(starts["up"].tensor)
    assert list(starts) == list(drifted.grids)


def test_it_comes_closer_to_the_full_precision_model_than_gptq(drifted):
    """In what each matrix makes, of what it is fed once those before it are rounded."""
    matrices = drifted.matrices()
    wanted = fed_by_hand(drifted, drifted.originals, matrices["up"])

    def errors(method):
        rounded = {n: drifted.grids[n].dequantize(s.tensor) for n, s in method.start(drifted).items()}
        made = fed_by_hand(drifted, drifted.inputs, rounded["up"])
        pairs = zip(rounded, wanted, made, strict=True)
        return [float((x @ matrices[n].double().T - y @ rounded[n].double().T).square().mean()) for n, x, y in pairs]

    for gptq, half, whole in zip(*map(errors, (GPTQ(), QEP(0.5), QEP(1.0))), strict=True):
        assert whole < half < 0.9 * gptq


def test_without_the_other_chain_it_is_gptq(drifted):
    drifted.originals = None
    qep, gptq = QEP().start(drifted), GPTQ().start(drifted)
    for name in drifted.grids:
        assert torch.equal(qep[name].tensor.arrays["q"], gptq[name].tensor.arrays["q"])


def test_inputs_that_lost_nothing_move_no_weight_of_the_first_matrix(drifted):
    drifted.originals = drifted.inputs.clone()
    qep, gptq = QEP().start(drifted), GPTQ().start(drifted)
    assert torch.equal(qep["up"].tensor.arrays["q"], gptq["up"].tensor.arrays["q"])
    assert not torch.equal(qep["down"].tensor.arrays["q"], gptq["down"].tensor.arrays["q"])  # fed what up makes


def test_processes_come_to_what_one_does(drifted):
    """Each has every other sample, and they add up what they found."""

    class Pair(Team):
        def __init__(self, kept):
            super().__init__()
            self.kept = kept

        def add_up(self, tensors):
            self.kept.append([tensor.clone() for tensor in tensors])
            for tensor in tensors:
                tensor *= 2  # the other has found the same

    whole = QEP().start(drifted)
    kept: list[list[torch.Tensor]] = []
    drifted.team = Pair(kept)
    doubled = QEP().start(drifted)
    assert [len(tensors) for tensors in kept] == [2, 1] * 2
    for name in drifted.grids:
        assert torch.equal(whole[name].tensor.arrays["q"], doubled[name].tensor.arrays["q"])


def test_what_a_module_is_fed_is_taken_of_all_its_calls_and_the_rest_is_left():
    module, ran = torch.nn.Linear(4, 4), []

    def run():
        module(torch.ones(1, 2, 4))
        module(torch.full((1, 3, 4), 2.0))
        ran.append("the rest")

    assert _fed(module, 2, run).sum(1).tolist() == [4.0] * 2 + [8.0] * 3
    assert not ran


def test_nothing_fed_moves_nothing():
    assert not _solved(torch.zeros(8, 8), torch.zeros(8, 8)).any()
