"""TesseraQ: its quantiser against the paper's formulas, its hardening, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from problems import as_problem, loss_of, mlp_problem

from tesseraq_gguf.methods.gptq import GPTQ, _inverse_factor, compensate
from tesseraq_gguf.methods.start import AsItStarts, Start
from tesseraq_gguf.methods.tesseraq import SOFT_SHARE, SoftMatrix, TesseraQ, inverse_soft_step, ranked, soft_step
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.bcq.grid import CodebookGrid
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.tsq.grid import TSQ2

CPU = torch.device("cpu")


@pytest.fixture
def matrix():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    return weight, TSQ2.quantize(weight)


@pytest.fixture
def problem(make_model):
    """Return the first block of a tiny Gemma, with random tokens."""
    decoder = Decoder(make_model("gemma3"), CPU)
    tokens = torch.randint(4, 300, (12, 48), generator=torch.Generator().manual_seed(1))
    hidden, inputs = decoder.stem(tokens)
    block = decoder.load_block(0)
    return as_problem(block, hidden, "tsq2", inputs.arguments[0])


def test_the_schedule_is_the_papers():
    """Percent that is hard in each stage, as the paper's table has it."""
    hard = [20, 35, 50, 57, 62, 66, 70, 73, 76, 79, 82, 85, 88, 90, 92, 94, 96, 98, 99, 99.5]
    assert pytest.approx([1 - percent / 100 for percent in hard]) == SOFT_SHARE
    method = TesseraQ()
    assert (method.steps, method.batch, method.soft_shares, method.scale_decay) == (250, 4, SOFT_SHARE, 1e-4)
    assert (method.rounding_rate, method.scale_rate, method.zero_rate) == (1e-3, 1e-3, 1e-3)
    assert (method.settle_scales, method.settle_zeros) == (14, 17)


def test_the_soft_step_and_its_inverse():
    x = torch.linspace(-2.3, 2.3, 100)
    torch.testing.assert_close(soft_step(x), (1.2 / (1 + torch.exp(-x)) - 0.1).clamp(0, 1))
    torch.testing.assert_close(inverse_soft_step(soft_step(x)), x, atol=1e-4, rtol=1e-4)
    assert float(soft_step(torch.tensor(20.0))) == 1.0
    assert float(soft_step(torch.tensor(-20.0))) == 0.0


def test_it_starts_at_the_weights_where_nothing_clamps(matrix):
    weight, tensor = matrix
    soft = SoftMatrix(Start(tensor, weight), TSQ2)
    d = e5m3.decode_tensor(tensor.arrays["d"])
    z = TSQ2.decode_zero(tensor.arrays["z"])
    position = TSQ2.grouped(weight) / d[..., None] + z[..., None]
    inside = ((position > 0.01) & (position < 2.99)).flatten(-2)
    assert inside.float().mean() > 0.7
    torch.testing.assert_close(soft.weight()[inside], weight[inside], atol=1e-3, rtol=1e-3)


def test_the_backward_equals_autograds(matrix):
    weight, tensor = matrix
    soft = SoftMatrix(Start(tensor, weight), TSQ2)
    with torch.no_grad():
        soft.tuning += 0.3
        soft.rounding.view(-1)[:40] = torch.linspace(-4, 4, 40)  # some beyond where the step is clipped
    gradient = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    learned = [soft.rounding, soft.tuning, soft.zero]
    got = torch.autograd.grad((soft.weight() * gradient).sum(), learned)
    step = (torch.sigmoid(soft.rounding) * 1.2 - 0.1).clamp(0, 1)
    plain = (soft._scale * 2 * torch.sigmoid(soft.tuning) * (soft._base + step - soft.zero)).view(8, 128)
    expected = torch.autograd.grad((plain * gradient).sum(), learned)
    torch.testing.assert_close(soft.weight(), plain)
    for ours, autograds in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, autograds)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.1, 0.005])
def test_hardening_fixes_the_decided_weights_for_good(share, matrix):
    soft = SoftMatrix(Start(matrix[1], matrix[0]), TSQ2)
    before = soft_step(soft.rounding.detach())
    soft.harden(share)
    after = soft_step(soft.rounding.detach())
    fixed = (after == 0) | (after == 1)
    count = after.numel()
    assert abs(int((~fixed).sum()) - round(share * count)) <= 0.01 * count
    # the fixed are the most decided, on the side they were; the others have not moved
    assert (before[fixed] - 0.5).abs().min() >= (before[~fixed] - 0.5).abs().max() - 1e-6
    assert torch.equal(after[fixed], (before[fixed] > 0.5).float())
    assert torch.equal(after[~fixed], before[~fixed])
    grown = torch.autograd.grad(soft.weight().square().sum(), soft.rounding)[0]
    assert not grown[fixed].any()


def test_what_leaves_is_what_was_learned(matrix):
    soft = SoftMatrix(Start(matrix[1], matrix[0]), TSQ2)
    with torch.no_grad():
        soft.tuning += 0.21
        soft.zero += 0.013
    soft.settle_scale()
    soft.settle_zero()
    soft.harden(0.0)
    assert torch.equal(TSQ2.dequantize(soft.finish()), soft.weight())


def test_second_moments_are_those_of_the_inputs(problem):
    moments = problem.second_moments(samples=5)
    seen: dict[str, torch.Tensor] = {}
    handle = problem.block.matrices()["mlp.down_proj"].register_forward_pre_hook(lambda _, a: seen.update(x=a[0]))
    with torch.no_grad():
        problem.forward(problem.inputs[:5])
    handle.remove()
    x = seen["x"].reshape(-1, seen["x"].shape[-1]).double()
    torch.testing.assert_close(moments["mlp.down_proj"].double(), x.T @ x / len(x), atol=1e-5, rtol=1e-4)
    assert moments["self_attn.q_proj"] is moments["self_attn.k_proj"]
    assert moments["self_attn.q_proj"] is not moments["mlp.up_proj"]


def test_second_moments_in_half_precision_are_nearly_the_same(problem):
    exact = problem.second_moments(samples=5)
    problem.autocast = torch.bfloat16
    for name, moment in problem.second_moments(samples=5).items():
        assert moment.dtype == torch.float32
        assert float((moment - exact[name]).norm() / exact[name].norm()) < 0.02


def test_gptq_lowers_the_output_error():
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 192, generator=random)
    x = torch.randn(2000, 192, generator=random) @ torch.randn(192, 192, generator=random)
    moment = x.T @ x / len(x)
    outcome = compensate(weight, moment, TSQ2, 0.01)

    def error(tensor):
        off = TSQ2.dequantize(tensor) - weight
        return float((off @ moment * off).sum())

    assert error(outcome.tensor) < 0.66 * error(TSQ2.quantize(weight, moment.diagonal()))
    # the codes are the nearest ones of the weights as they were when they were rounded
    a = outcome.tensor.arrays
    assert torch.equal(TSQ2.encode(outcome.weight, a), a["q"])


@pytest.mark.parametrize("type", ["tsq2", "q4_0"])
def test_gptq_is_column_by_column(type):
    """Against the algorithm as the paper has it: double precision, every later column moved at once."""
    random = torch.Generator().manual_seed(6)
    grid, weight = grid_of(type), torch.randn(8, 192, generator=random)
    x = torch.randn(400, 48, generator=random) @ torch.randn(48, 192, generator=random)
    moment = x.T @ x / len(x)
    damped = moment.double() + 0.02 * moment.double().diagonal().mean() * torch.eye(192)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).T  # its square is the inverse
    left = weight.double()
    codes = []
    for column in range(192):
        inside = column % grid.group
        if inside == 0:
            columns = slice(column, column + grid.group)
            arrays = grid.search(left[:, columns].float(), upper.diagonal()[columns].float() ** -2)
            d, z = grid.scale(arrays)[:, 0].double(), grid.zero(arrays)[:, 0].double()
        q = (left[:, column] / d + z).round().clamp(0, grid.highest)
        codes.append(q)
        error = (left[:, column] - d * (q - z)) / upper[column, column]
        left[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    found = compensate(weight, moment, grid, 0.02)
    same = found.tensor.arrays["q"] == torch.stack(codes, 1)
    assert float(same.double().mean()) > 0.995
    off = (found.weight.double() - left).abs()
    assert float(off.flatten().quantile(0.98)) < 1e-2 * float(weight.std())
    assert (GPTQ().damping, GPTQ().samples) == (0.01, 128)


def test_damping_grows_until_there_is_an_inverse():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double()
    moment = (x.T @ x).float()  # of rank 3
    factor = _inverse_factor(moment, 0.01)
    expected = torch.linalg.inv(moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(64))
    found = factor.double().T @ factor.double()  # in units of its own
    torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-2, atol=1e-5)
    assert torch.isfinite(_inverse_factor(moment - 0.5 * torch.eye(64), 1e-9)).all()


def test_gptq_survives_inputs_that_are_always_zero():
    weight = torch.randn(4, 64)
    outcome = compensate(weight, torch.zeros(64, 64), TSQ2, 0.01)
    assert torch.isfinite(TSQ2.dequantize(outcome.tensor)).all()


def test_each_method_beats_the_one_before(problem):
    rounded = {name: TSQ2.quantize(w) for name, w in problem.matrices().items()}
    start = AsItStarts(GPTQ()).learn(problem)
    method = TesseraQ(steps=4, batch=4, rounding_rate=6e-2, scale_rate=1e-2, zero_rate=1e-2)
    learned = method.learn(problem)
    assert loss_of(problem, start) < 0.48 * loss_of(problem, rounded)
    assert loss_of(problem, learned) < 0.56 * loss_of(problem, start)


def test_the_seed_decides(problem):
    method = TesseraQ(steps=1, batch=4, rounding_rate=6e-2)
    outcomes = []
    for seed in (5, 5, 6):
        problem.generator.manual_seed(seed)
        outcomes.append(method.learn(problem)["mlp.up_proj"].arrays["q"])
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize(("type", "gptq", "tesseraq"), [("bcq2", 0.23, 0.62), ("bcq4", 0.16, 0.84)])
def test_on_codebooks_each_method_beats_the_one_before(type, gptq, tesseraq):
    """Between the two nearest codewords, as between neighbouring codes."""
    problem = mlp_problem(type, 128, 192)
    rounded = {name: problem.grids[name].quantize(w) for name, w in problem.matrices().items()}
    start = AsItStarts(GPTQ()).learn(problem)
    learned = TesseraQ(steps=4, batch=4, rounding_rate=6e-2, scale_rate=1e-2).learn(problem)
    assert loss_of(problem, start) < gptq * loss_of(problem, rounded)
    assert loss_of(problem, learned) < tesseraq * loss_of(problem, start)


@pytest.mark.parametrize("rank", [1, 2, 500, 999, 1000])
def test_sorting_finds_what_selecting_finds(rank):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(rank)).round(decimals=1)  # many are equal
    expected = torch.tensor(sorted(values.tolist())[rank - 1])
    assert ranked(values, rank, sorting=True) == ranked(values, rank, sorting=False) == expected


@pytest.mark.parametrize("own", [False, True], ids=["universal", "own"])
@pytest.mark.parametrize("type", ["bcq2", "bcq4"])
def test_what_leaves_a_codebook_grid_is_what_was_learned(type, own):
    grid = grid_of(type)
    if own:
        assert isinstance(grid, CodebookGrid)
        codebooks = torch.randint(-31, 32, grid.shape.shape, generator=torch.Generator().manual_seed(3)).sort(1).values
        grid = grid.with_codebooks(codebooks)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    start = Start(grid.quantize(weight), weight)
    soft = SoftMatrix(start, grid)
    inside = (grid.dequantize(start.tensor) - weight).abs() < 0.2 * weight.abs()
    torch.testing.assert_close(soft.weight()[inside], weight[inside], atol=0.05, rtol=0.2)
    with torch.no_grad():
        soft.tuning += 0.21
    soft.settle_scale()
    soft.settle_zero()
    soft.harden(0.0)
    tensor = soft.finish()
    assert torch.equal(grid.dequantize(tensor), soft.weight())
    assert ("c" in tensor.arrays) == own
    # the tensor explains itself to a grid that knows nothing of its codebooks
    assert torch.equal(grid_of(type).dequantize(tensor), soft.weight())


@pytest.mark.parametrize(("type", "share"), [("tsq2", 1.0), ("tsq3", 3 / 7), ("tsq4", 0.2), ("ptq1_61", 1.0)])
def test_variables_move_less_where_there_are_more_codes(type, share):
    """A first step of Adam is as long as its rate, whatever the gradient."""
    problem = mlp_problem(type, 128, 256)
    method = TesseraQ(steps=1, batch=4, scale_rate=1e-3, zero_rate=1e-3)
    starts = method.initialisation.start(problem)
    soft = {name: SoftMatrix(start, problem.grids[name]) for name, start in starts.items()}
    before = {name: matrix.rounding.detach().clone() for name, matrix in soft.items()}
    method._stage(problem, soft, 0)
    for name, matrix in soft.items():
        moved = (matrix.rounding.detach() - before[name]).abs()
        assert float(moved.median()) == pytest.approx(1e-3 * share**0.5, rel=0.01)
        assert matrix.parameter_share == pytest.approx(share)
        assert float(matrix.tuning.detach().abs().median()) == pytest.approx(1e-3 * share, rel=0.01)


@dataclass
class AsInThePaper:
    """The method once more, written down from its formulas: autograd, and Adam by hand."""

    method: TesseraQ
    shares: dict[str, float]
    variables: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    fixed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def course(self, problem) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights that each step computes its loss with, and in the end those that leave."""
        for name, start in self.method.initialisation.start(problem).items():
            grid, arrays = problem.grids[name], start.tensor.arrays
            d, z = e5m3.decode_tensor(arrays["d"])[..., None], grid.decode_zero(arrays["z"])[..., None]
            position = start.weight.view(*d.shape[:2], 64) / d + z
            base = position.floor().clamp(0, 2**grid.bits - 2)
            nu = ((position - base).clamp(1e-4, 1 - 1e-4) + 0.1).div(1.2).logit()
            self.variables[name] = {"nu": nu, "v": torch.zeros_like(d), "z": z}
            self.fixed[name] = {"base": base, "d": d, "shape": start.weight.shape, "grid": grid}
        for stage, share in enumerate(self.method.soft_shares):
            for name, own in self.variables.items():
                self._harden(own, share)
                if stage == self.method.settle_scales:
                    self._settle_scale(own, self.fixed[name])
                if stage == self.method.settle_zeros:
                    grid = self.fixed[name]["grid"]
                    own["z"] = grid.decode_zero(grid.zero_code(own["z"]))
            moments = {name: dict.fromkeys(own, (0.0, 0.0)) for name, own in self.variables.items()}
            for step in range(self.method.steps):
                for own in self.variables.values():
                    for key in own:
                        own[key] = own[key].detach().requires_grad_()
                weights = {name: self._weight(name) for name in self.variables}
                yield {name: w.detach() for name, w in weights.items()}
                problem.loss(weights, problem.draw(self.method.batch)).backward()
                for name, own in self.variables.items():
                    self._descend(own, moments[name], self.shares[name], step + 1, stage)
        for own in self.variables.values():
            self._harden(own, 0.0)
        yield {name: self._weight(name).detach() for name in self.variables}

    def _weight(self, name):
        own, fixed = self.variables[name], self.fixed[name]
        step = (1.2 * torch.sigmoid(own["nu"]) - 0.1).clamp(0, 1)
        return (2 * torch.sigmoid(own["v"]) * fixed["d"] * (fixed["base"] + step - own["z"])).reshape(fixed["shape"])

    def _harden(self, own, share):
        nu = own["nu"].detach()
        ranks = sorted(nu.abs().flatten().tolist())
        keep = round(share * len(ranks))
        limit = ranks[keep - 1] if keep else -1  # of equals, all stay soft
        own["nu"] = torch.where(nu.abs() <= limit, nu, nu.sign() * 20)

    def _settle_scale(self, own, fixed):
        scale = (2 * torch.sigmoid(own["v"].detach()) * fixed["d"])[..., 0]
        fixed["d"] = e5m3.decode_tensor(e5m3.encode_tensor(scale))[..., None]
        own["v"] = torch.zeros_like(own["v"])

    def _descend(self, own, moments, share, step, stage):
        method = self.method
        rates = {"nu": method.rounding_rate * share**0.5}
        if stage < method.settle_scales:
            rates["v"] = method.scale_rate * share
        if stage < method.settle_zeros:
            rates["z"] = method.zero_rate * share
        for key, rate in rates.items():
            gradient = own[key].grad + (method.scale_decay * own[key].detach() if key == "v" else 0)
            first, second = moments[key]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[key] = first, second
            change = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            own[key] = own[key].detach() - rate * change


@pytest.mark.parametrize(("type", "share"), [("tsq2", 1.0), ("tsq3", 3 / 7)])
def test_the_whole_course_is_the_papers(type, share, monkeypatch):
    """Every step's weights, and those that leave, are those of an implementation that shares no code with ours."""
    method = TesseraQ(
        steps=3, batch=3, rounding_rate=3e-2, scale_rate=2e-2, zero_rate=1e-2, scale_decay=0.1,
        settle_scales=2, settle_zeros=3, soft_shares=(0.8, 0.5, 0.3, 0.1, 0.02),
    )  # fmt: skip
    ours, papers = mlp_problem(type, 64, 128), mlp_problem(type, 64, 128)
    course, told, losses, loss = [], [], [], ours.loss
    ours.report = lambda *said: told.append(said)

    def seen(weights, samples):
        if torch.is_grad_enabled():
            course.append({name: w.detach().clone() for name, w in weights.items()})
            losses.append(loss(weights, samples))
            return losses[-1]
        return loss(weights, samples)

    monkeypatch.setattr(ours, "loss", seen)
    monkeypatch.setattr("tesseraq_gguf.methods.tesseraq.better", lambda _problem, _start, end: end)  # be it or not
    learned = method.learn(ours)
    course.append({name: ours.grids[name].dequantize(tensor) for name, tensor in learned.items()})
    reference = AsInThePaper(method, dict.fromkeys(learned, share))
    expected = list(reference.course(papers))
    assert len(course) == len(expected) == 16
    for step, (got, wanted) in enumerate(zip(course, expected, strict=True)):
        for name in wanted:
            scale = float(wanted[name].square().mean().sqrt())
            off = (got[name] - wanted[name]).abs() / scale
            # Adam makes much of gradients that are next to nothing: of those, sums in another order may differ
            assert float(off.quantile(0.995)) < 1e-3, (step, name)
    said = [(done, total, doing) for done, total, doing in told if total]
    assert said[::3] == [(1 + 3 * k, 15, f"stage {k + 1} of 5, {s} % soft") for k, s in enumerate((80, 50, 30, 10, 2))]
    assert [done for done, *_ in said] == list(range(1, 16))
    assert [mark.loss for mark in ours.curve] == pytest.approx([loss.item() for loss in losses])
