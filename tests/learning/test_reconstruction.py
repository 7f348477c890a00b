"""The problem that a method gets: its loss, its samples, what it says of its inputs; and the walk over the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from problems import mlp_problem
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.compute.activations import ActivationRounding, round_tokens
from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.compute.schemes import ActivationScheme
from tesseraq_gguf.learning.reconstruction import Reconstruction, _mean_loss, _usual_length
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.types.grids import grid_of

CPU = torch.device("cpu")


@pytest.fixture
def problem():
    """A small block of 8 samples of 32 tokens, of which each channel is felt differently."""
    problem = mlp_problem("tsq2", 64, 128)
    problem.sensitivity = torch.rand(2, 64, generator=torch.Generator().manual_seed(3)) + 0.1
    return problem


def rounded(problem):
    return {n: problem.grids[n].dequantize(problem.grids[n].quantize(w)) for n, w in problem.matrices().items()}


def by_hand(problem, weights, feed=lambda x: x):
    """The block's output in double precision, with `feed` on what its matrices are fed."""
    x = problem.inputs.double()
    fed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    inner = torch.nn.functional.silu(feed(fed * problem.block.module.norm.weight.double()) @ weights["up"].double().T)
    return x + feed(inner) @ weights["down"].double().T


@pytest.mark.parametrize("compared", [False, True])
def test_the_loss_is_the_squared_error_as_the_answers_feel_it(compared, problem):
    """Where targets are longer than usual, but for the first position, errors count in proportion to their length."""
    weights, some = rounded(problem), torch.tensor([1, 6])
    lengths = problem.targets[some].double().norm(dim=-1)
    problem.usual = usual = float(lengths.median()) if compared else None
    error = (by_hand(problem, weights) - problem.targets.double())[some].square()
    total = 0.0
    for sample, its_lengths in zip(error, lengths, strict=True):
        for position, (token, length) in enumerate(zip(sample, its_lengths, strict=True)):
            share = min(1.0, usual / float(length)) ** 2 if usual is not None and position else 1.0
            total += share * float(token @ problem.sensitivity[min(position, 1)].double())
    assert float(problem.loss(weights, some)) == pytest.approx(total / (2 * 32), rel=1e-4)


def test_a_target_is_long_against_the_median_of_those_behind_the_first_position():
    targets = torch.ones(3, 5, 4)
    targets[:, 0] *= 1000
    targets[1, 3] *= 50
    assert _usual_length(targets) == pytest.approx(4 * 2.0)
    assert _usual_length(torch.zeros(3, 5, 4)) is None
    assert _usual_length(torch.ones(3, 1, 4)) is None


def test_the_loss_has_activations_rounded(problem):
    weights, all_ = rounded(problem), torch.arange(8)
    problem.rounding = ActivationRounding(ActivationScheme(3))
    out = by_hand(problem, weights, lambda x: round_tokens(x.float(), 3).double())
    error = (out - problem.targets.double()).square()
    expected = float(problem.weighted(error.float(), problem.targets))
    assert float(problem.loss(weights, all_)) == pytest.approx(expected, rel=1e-3)
    problem.rounding = None
    assert abs(float(problem.loss(weights, all_)) - expected) > 0.1 * expected


def test_products_are_made_in_the_precision_asked_for(problem):
    weights, all_ = rounded(problem), torch.arange(8)
    exact = float(problem.loss(weights, all_))
    kinds = []
    problem.block.module.up.register_forward_hook(lambda _module, _args, out: kinds.append(out.dtype))
    problem.autocast = torch.bfloat16
    assert float(problem.loss(weights, all_)) == pytest.approx(exact, rel=0.05)
    problem.autocast = torch.float32
    assert float(problem.loss(weights, all_)) == exact
    assert kinds == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_samples_are_drawn_one_of_every_stratum(count, problem):
    drawn = [problem.draw(count).tolist() for _ in range(60)]
    count = min(count, 8)
    assert {len(d) for d in drawn} == {count}
    for place in range(count):
        assert {d[place] for d in drawn} == set(range(place, 8, count))


def test_second_moments_are_means_over_the_tokens_that_were_run(problem):
    moments = problem.second_moments(3)
    x = problem.block.module.norm(problem.inputs[:3]).reshape(-1, 64).double()
    torch.testing.assert_close(moments["up"].double(), x.T @ x / 96, rtol=1e-4, atol=1e-5)
    assert problem.tokens_of(3) == 96
    assert problem.tokens_of(300) == 256


class Two(Team):
    """A team of two whose other member measures what this one does."""

    def __init__(self):
        super().__init__(0, 2)

    def add_up(self, tensors):
        for tensor in tensors:
            tensor *= 2

    def widest(self, low, high):
        return low - 1, high + 1

    def all(self, make):
        return [make(), make()]


def test_what_is_measured_is_measured_by_all(problem):
    alone = problem.second_moments(8)["down"], problem.input_ranges()["up"], _mean_loss(problem, rounded(problem))
    problem.team, problem.samples = Two(), 16
    torch.testing.assert_close(problem.second_moments(16)["down"], alone[0])
    assert problem.input_ranges()["up"] == pytest.approx((alone[1][0] - 1, alone[1][1] + 1))
    assert _mean_loss(problem, rounded(problem)) == pytest.approx(alone[2], rel=1e-6)
    # a step's samples are shared out: of every two strata one is this process'
    assert all(len(problem.draw(4)) == 2 and int(problem.draw(4).max()) < 8 for _ in range(20))


@dataclass
class Noting:
    """A method that rounds, and keeps what it was given."""

    problems: list[BlockProblem] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def learn(self, problem):
        tensors = {name: problem.grids[name].quantize(w) for name, w in problem.matrices().items()}
        weights = {name: problem.grids[name].dequantize(t) for name, t in tensors.items()}
        self.problems.append(problem)
        self.inputs.append(problem.inputs.clone())
        self.targets.append(problem.targets.clone())
        with torch.no_grad():
            self.losses.append(float(problem.loss(weights, torch.arange(len(problem.inputs)))))
        return tensors


TOKENS = torch.randint(4, 300, (5, 24), generator=torch.Generator().manual_seed(1))


def types_of(decoder, type="tsq2"):
    blocks = [decoder.load_block(index) for index in range(len(decoder))]
    return {f"{b.prefix}{name}.weight": type for b in blocks for name in b.matrices()}


@pytest.mark.parametrize("scheme", [ActivationScheme(), ActivationScheme(4), ActivationScheme(8, "static")], ids=str)
def test_one_chain_is_the_model_and_the_other_what_was_learned(scheme, make_model):  # noqa: F811
    """Targets come from the model as it is; inputs from the file as it will be, activations rounded."""
    decoder, method = Decoder(make_model("llama"), CPU), Noting()
    sensitivity = [torch.rand(2, decoder.hidden_size) + 0.1 for _ in range(len(decoder))]
    told = []
    walk = Reconstruction(
        decoder, method, types_of(decoder), 0, torch.float32, lambda *step: told.append(step), activations=scheme
    )
    results = list(walk.run(TOKENS, sensitivity, lambda _: None))
    assert [r.index for r in results] == [0, 1]
    full, recorded = decoder.stem(TOKENS)
    quantised = full.clone()
    with torch.no_grad():
        for index, result in enumerate(results):
            block = decoder.load_block(index)
            torch.testing.assert_close(method.inputs[index], quantised)
            full = block.run(full, recorded.arguments[index])
            torch.testing.assert_close(method.targets[index], full)
            weights = {
                name: grid_of("tsq2").dequantize(result.tensors[f"{block.prefix}{name}.weight"])
                for name in block.matrices()
            }
            rounding = ActivationRounding(scheme, block.by_module(result.ranges)) if scheme.rounds else None
            before, quantised = quantised, block.run(quantised, recorded.arguments[index], weights, None, rounding)
            plain = block.run(before, recorded.arguments[index], weights)
            assert scheme.rounds != torch.allclose(plain, quantised, rtol=1e-5, atol=1e-6)
            error = (quantised - full).square()
            first = (error[:, 0] @ sensitivity[index][0]).sum()
            expected = float(first + (error[:, 1:] @ sensitivity[index][1]).sum()) / TOKENS.numel()
            assert method.losses[index] == pytest.approx(expected, rel=1e-4)
            assert result.loss_after == result.loss_before == pytest.approx(expected, rel=1e-4)
            assert (result.resumed, result.rare) == (False, ())
            assert bool(result.ranges) == scheme.static


def test_the_other_chain_begins_at_the_embedding_as_it_is_stored(make_model):  # noqa: F811
    decoder, method = Decoder(make_model("llama"), CPU), Noting()
    stored = torch.randn(320, decoder.hidden_size, generator=torch.Generator().manual_seed(8))
    outside = {"model.embed_tokens.weight": stored}
    sensitivity = [torch.ones(2, decoder.hidden_size)] * 2
    walk = Reconstruction(decoder, method, types_of(decoder), 0, torch.float32)
    next(walk.run(TOKENS, sensitivity, lambda _: None, lambda: outside))
    torch.testing.assert_close(method.inputs[0], stored[TOKENS])
    hidden, recorded = decoder.stem(TOKENS)
    assert not torch.allclose(hidden, stored[TOKENS])
    with torch.no_grad():
        torch.testing.assert_close(method.targets[0], decoder.load_block(0).run(hidden, recorded.arguments[0]))


def test_losses_that_are_told_are_means_over_some_samples(problem):
    weights = rounded(problem)
    expected = float(problem.loss(weights, torch.arange(8)))
    assert _mean_loss(problem, weights) == pytest.approx(expected, rel=1e-5)
    more = torch.arange(40) % 8
    problem.inputs, problem.targets = problem.inputs[more], problem.targets[more]
    expected = float(problem.loss(weights, torch.arange(32)))  # of forty
    assert _mean_loss(problem, weights) == pytest.approx(expected, rel=1e-5)


def test_blocks_that_were_learned_before_are_only_run(make_model):  # noqa: F811
    decoder = Decoder(make_model("llama"), CPU)
    sensitivity = [torch.ones(2, decoder.hidden_size)] * 2

    def walk(finished):
        method = Noting()
        engine = Reconstruction(decoder, method, types_of(decoder), 0, torch.float32)
        return method, list(engine.run(TOKENS, sensitivity, finished))

    whole, results = walk(lambda _: None)
    rest, resumed = walk(lambda index: results[0] if index == 0 else None)
    assert [p.block.index for p in rest.problems] == [1]
    assert torch.equal(rest.inputs[0], whole.inputs[1])
    assert torch.equal(rest.targets[0], whole.targets[1])
    assert resumed[0] is results[0]
    assert resumed[1].loss_after == results[1].loss_after


def test_every_block_has_random_numbers_of_its_own(make_model):  # noqa: F811
    decoder = Decoder(make_model("llama"), CPU)
    sensitivity = [torch.ones(2, decoder.hidden_size)] * 2
    seeds = []
    for seed in (0, 0, 1):
        method = Noting()
        engine = Reconstruction(decoder, method, types_of(decoder), seed, torch.float32)
        list(engine.run(TOKENS, sensitivity, lambda _: None))
        seeds.append([p.generator.initial_seed() for p in method.problems])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4
