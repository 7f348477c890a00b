"""PTQ1.61: its loss against arithmetic, what it learns and what stays, and methods that go beyond it on its grid."""

from __future__ import annotations

import math

import pytest
import torch
from problems import loss_of, mlp_problem

from tesseraq_gguf.learning.column_order import likeness, order_of, score
from tesseraq_gguf.methods.gptq import GPTQ, compensate
from tesseraq_gguf.methods.ptq161 import Ptq161, energy, minus_log_cosine
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.types.ptq161.grid import BLOCK, SALIENT, Ptq161Grid, with_salient


@pytest.fixture
def problem():
    found = mlp_problem("ptq1_61", 256, 128)
    order = order_of(score([found.block.matrices()["up"].weight], None, "error"))
    found.block.reorder(["up"], order)
    return found


def start_of(problem):
    return {name: start.tensor for name, start in Nearest().start(problem).items()}


def test_energy_weighs_the_first_position_apart():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, generator=random), torch.randn(2, 3, 5, generator=random)
    metric = torch.rand(2, 5, generator=random)
    expected = torch.stack([(a[:, t] * b[:, t] * metric[min(t, 1)]).sum(-1) for t in range(3)], 1)
    torch.testing.assert_close(energy(a, b, metric), expected)


def test_cosine_is_torchs():
    random = torch.Generator().manual_seed(1)
    a = torch.randn(2, 3, 5, generator=random)
    b = a + 0.3 * torch.randn(2, 3, 5, generator=random)
    expected = -torch.nn.functional.cosine_similarity(a, b, -1).log()
    torch.testing.assert_close(minus_log_cosine(a, b, torch.ones(2, 5)), expected)
    # a token that points elsewhere costs much, and breaks nothing
    assert torch.isfinite(minus_log_cosine(a, -a, torch.ones(2, 5))).all()


@pytest.mark.parametrize("both", [True, False])
def test_the_papers_loss(both, problem):
    problem.inputs = problem.inputs + 0.1 * torch.randn(
        problem.inputs.shape, generator=torch.Generator().manual_seed(3)
    )
    tensors = start_of(problem)
    weights = {name: problem.grids[name].dequantize(t) for name, t in tensors.items()}
    samples = torch.tensor([1, 4])
    with torch.no_grad():
        out = problem.quantised(problem.inputs[samples], weights)
        targets = [problem.targets[samples], *([problem.forward(problem.inputs[samples])] if both else [])]
        got = Ptq161(both=both, relative=False, weighted=False).loss(problem, weights, {}, samples)
    squares = sum((out - y).square().sum(-1).mean() for y in targets)
    cosines = sum(-torch.nn.functional.cosine_similarity(out, y, -1).log().mean() for y in targets)
    torch.testing.assert_close(got, squares + cosines, rtol=1e-4, atol=1e-5)


def test_errors_are_weighted_and_divided_by_what_they_are_errors_of(problem):
    problem.sensitivity = torch.rand(2, 256, generator=torch.Generator().manual_seed(4)) + 0.1
    weights = {name: problem.grids[name].dequantize(t) for name, t in start_of(problem).items()}
    samples = torch.tensor([0, 5])
    with torch.no_grad():
        out = problem.quantised(problem.inputs[samples], weights)
        got = Ptq161(both=False).loss(problem, weights, {}, samples)
        without = Ptq161(both=False, parts="scales").loss(problem, weights, {}, samples)
    target = problem.targets[samples]
    root = torch.stack([problem.sensitivity[min(t, 1)] for t in range(target.shape[1])]).sqrt()
    relative = ((out - target) * root).square().sum() / (target * root).square().sum()
    cosine = torch.nn.functional.cosine_similarity(out * root, target * root, -1)
    torch.testing.assert_close(without, relative, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got, relative - cosine.log().mean(), rtol=1e-4, atol=1e-6)


def test_rates_grow_with_the_steps_saved_and_fall_as_a_cosine(problem, monkeypatch):
    taken = []

    class Noting(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            taken.append([group["lr"] for group in self.param_groups])
            assert {group["weight_decay"] for group in self.param_groups} == {0}
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    Ptq161(steps=10).learn(problem)
    falling = [16 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]  # the root of 2560 / 10
    assert taken == [pytest.approx([5e-3 * share, 2e-3 * share]) for share in falling]
    assert (Ptq161().steps, Ptq161().batch, Ptq161().parts) == (2560, 1, "cosine")


def test_scales_are_learned_and_nothing_else(problem):
    start, before = start_of(problem), {n: p.clone() for n, p in problem.block.module.named_parameters()}
    learned = Ptq161(steps=60, batch=4).learn(problem)
    assert loss_of(problem, learned) < 0.87 * _loss_before(problem, start, before)
    for name, tensor in learned.items():
        assert torch.equal(tensor.arrays["q"], start[name].arrays["q"])  # signs and codes stay
        assert torch.equal(tensor.arrays["s"], start[name].arrays["s"])
        assert not torch.equal(tensor.arrays["d"], start[name].arrays["d"])
        signs = tensor.arrays["q"].unflatten(1, (-1, BLOCK))[..., SALIENT:].bool()
        weight = before[f"{name}.weight"].unflatten(1, (-1, BLOCK))[..., SALIENT:]
        assert torch.equal(signs, weight >= 0)
    # columns of what the norm feeds are scaled by the norm
    assert problem.block.replaced.keys() == {"up.weight", "norm.weight"}
    assert not torch.equal(problem.block.module.norm.weight, before["norm.weight"])


def _loss_before(problem, start, parameters):
    now = {n: p.clone() for n, p in problem.block.module.named_parameters()}
    for name, value in parameters.items():
        problem.block.module.get_parameter(name).data.copy_(value)
    loss = loss_of(problem, start)
    for name, value in now.items():
        problem.block.module.get_parameter(name).data.copy_(value)
    return loss


def test_the_mask_alone_learns_nothing(problem):
    start, learned = start_of(problem), Ptq161(steps=5, parts="mask").learn(problem)
    assert all(torch.equal(learned[n].arrays[k], a) for n, t in start.items() for k, a in t.arrays.items())
    assert "norm.weight" not in problem.block.replaced


def test_it_learns_the_same_again(problem):
    norm = problem.block.module.norm.weight.clone()
    first = Ptq161(steps=5, batch=2).learn(problem)
    problem.block.module.norm.weight.data.copy_(norm)
    problem.generator.manual_seed(2)
    again = Ptq161(steps=5, batch=2).learn(problem)
    assert all(torch.equal(again[n].arrays[k], a) for n, t in first.items() for k, a in t.arrays.items())


def test_what_goes_beyond_it_is_better(problem):
    norm = problem.block.module.norm.weight.clone()
    mask = loss_of(problem, start_of(problem))
    gptq = loss_of(problem, AsItStarts(GPTQ()).learn(problem))
    tesseraq = loss_of(problem, TesseraQ(steps=10, rounding_rate=0.05, scale_rate=1e-2).learn(problem))
    learned = loss_of(problem, Ptq161(steps=200, batch=4).learn(problem))
    problem.block.module.norm.weight.data.copy_(norm)
    assert max(tesseraq, gptq) < 0.15 * mask
    assert max(tesseraq, gptq) < learned < mask


def test_tesseraq_learns_signs_and_codes(problem, monkeypatch):
    monkeypatch.setattr("tesseraq_gguf.methods.tesseraq.better", lambda _problem, _start, end: end)  # be it or not
    start = AsItStarts(GPTQ()).learn(problem)
    learned = TesseraQ(steps=10, rounding_rate=0.05, scale_rate=1e-2).learn(problem)
    for name, tensor in learned.items():
        moved = (tensor.arrays["q"] != start[name].arrays["q"]).unflatten(1, (-1, BLOCK))
        assert bool(moved[..., :SALIENT].any())
        assert bool(moved[..., SALIENT:].any())
        assert int(tensor.arrays["q"].unflatten(1, (-1, BLOCK))[..., SALIENT:].max()) == 1


def test_gptq_rounds_signs_before_the_weights_that_can_take_their_errors():
    """Against the same columns rounded in the order of the file."""
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(32, 256, generator=random)
    x = torch.randn(600, 40, generator=random) @ torch.randn(40, 256, generator=random)
    moment = (x.T @ x + 100 * torch.eye(256)) / len(x)

    class InOrder(Ptq161Grid):
        @property
        def parts(self):
            return tuple(reversed(super().parts))

    grid = with_salient(24)

    def error(grid):
        off = grid.dequantize(compensate(weight, moment, grid, 0.01).tensor) - weight
        return float(((off @ moment) * off).sum())

    in_order = InOrder(grid.type, grid.bits, grid.group, grid.span, grid.learns_zero, grid.salient)
    assert error(grid) < 0.05 * error(in_order)


@pytest.mark.parametrize("salient", [12, 24, 26, 40])
def test_other_shares_of_salient_weights(salient):
    grid = with_salient(salient)
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    tensor = grid.quantize(weight[:, order_of(torch.rand(256), likeness([weight]), salient=salient)])
    q = tensor.arrays["q"].unflatten(1, (-1, BLOCK))
    assert int(q[..., :salient].max()) > 8
    assert int(q[..., salient:].max()) == 1
    assert torch.equal(grid.spread(grid.gather(grid.scale(tensor.arrays))), grid.scale(tensor.arrays))
