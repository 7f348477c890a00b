"""Sequences that nothing is learned on: learning never ends worse on them than it began, whatever the method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from problems import as_problem, mlp_problem
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.hidden_states import Place
from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.compute.schemes import scheme_of
from tesseraq_gguf.conversion import quantise
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.conversion.run import Run
from tesseraq_gguf.conversion.texts import Texts
from tesseraq_gguf.conversion.work_directory import WorkDirectory
from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.evaluation.divergence import divergence
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.held_out import HeldOut, better
from tesseraq_gguf.methods.lrq import lrq
from tesseraq_gguf.methods.omniquant import OmniQuant
from tesseraq_gguf.methods.ptq161 import Ptq161
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.quantised import Quantised, final_states
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import ensure_source
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.quantized import plain_vector

CPU = torch.device("cpu")
WILD = 100.0
"""By how much rates are multiplied, so that learning must end worse than it began."""


def faster(method, factor):
    return dataclasses.replace(method, rates={bits: factor * rate for bits, rate in method.rates.items()})


def tesseraq(factor):
    rates = {name: factor * rate for name, rate in (("rounding_rate", 3e-2), ("scale_rate", 5e-3), ("zero_rate", 5e-3))}
    return TesseraQ(steps=3, batch=2, soft_shares=(0.5, 0.2, 0.05), settle_scales=1, settle_zeros=2, **rates)


METHODS = {
    "tesseraq": ("tsq2", dataclasses.replace(tesseraq(1), initialisation=Nearest()), tesseraq(WILD)),
    "lrq": ("tsq3", faster(lrq(30, 4, 8), 0.1), faster(lrq(10, 2, 8), WILD)),
    "flexround": ("tsq3", faster(flexround(30, 4), 0.1), faster(flexround(10, 2), WILD)),
    "omniquant": ("tsq2", AsItStarts(OmniQuant(10, 2)), AsItStarts(OmniQuant(10, 2, rate=WILD * 5e-3))),
    "ptq161": (
        "ptq1_61",
        Ptq161(10, 2, scale_rate=5e-4, column_rate=2e-4),
        Ptq161(10, 2, scale_rate=0.5, column_rate=0.5),
    ),
}


def problem_of(type, held_out=4):
    """A small block of which some sequences are held out."""
    small = mlp_problem(type, 128, 128)
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(32, 32, 24, generator=random) @ torch.randn(24, 128, generator=random)
    problem = as_problem(small.block, hidden + 0.1 * torch.randn(hidden.shape, generator=random), type)
    here = len(problem.inputs) - held_out
    apart = HeldOut(problem.inputs[here:], problem.targets[here:], held_out) if held_out else None
    return dataclasses.replace(
        problem, inputs=problem.inputs[:here], targets=problem.targets[:here], samples=here, held_out=apart
    )


def error_of(problem, tensors):
    """The loss on the sequences held out, by its definition."""
    weights = {name: problem.grids[name].dequantize(t) for name, t in tensors.items()}
    out = problem.block.run(problem.held_out.inputs, {}, weights, None, problem.rounding)
    return float((out - problem.held_out.targets).square().sum() / out.shape[:2].numel())


@pytest.mark.parametrize("name", METHODS)
def test_learning_that_ends_worse_is_undone(name):
    type, _, wild = METHODS[name]
    problem = problem_of(type)
    vectors = dict(problem.block.norms())
    learned = wild.learn(problem)
    verdict = problem.verdict
    assert verdict.kept_start
    assert verdict.end > 1.02 * verdict.start
    assert error_of(problem, learned) == pytest.approx(verdict.start, rel=1e-4)
    assert problem.block.replaced == {}
    assert all(torch.equal(v, problem.block.norms()[n]) for n, v in vectors.items())


@pytest.mark.parametrize("name", METHODS)
def test_learning_that_ends_better_is_kept(name):
    type, method, _ = METHODS[name]
    problem = problem_of(type)
    learned = method.learn(problem)
    verdict = problem.verdict
    assert not verdict.kept_start
    assert verdict.end < verdict.start
    assert error_of(problem, learned) == pytest.approx(verdict.end, rel=1e-4)


def test_the_start_is_what_the_method_begins_at():
    problem = problem_of("tsq2")
    start = {name: s.tensor for name, s in GPTQ().start(problem).items()}
    learned = METHODS["tesseraq"][2].learn(problem)
    assert all(torch.equal(learned[n].arrays[k], a) for n, t in start.items() for k, a in t.arrays.items())


@pytest.mark.parametrize("which", ["kept", "undone"])
@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_is_held_out_what_was_learned_on_judges(name, which):
    """As of experts to which no token that is held out came."""
    type, *methods = METHODS[name]
    method = methods[which == "undone"]
    alone = dataclasses.replace(problem_of(type), held_out=None)
    learned, expected = method.learn(alone), method.learn(problem_of(type))
    assert alone.verdict is None
    assert all(torch.equal(learned[n].arrays[k], array) for n, t in expected.items() for k, array in t.arrays.items())


def test_what_is_better_on_sequences_held_out_alone_is_undone_too():
    problem = problem_of("tsq2")
    nearest = AsItStarts(Nearest()).learn(problem)
    better_there = METHODS["tesseraq"][1].learn(problem)
    # what is learned on is now what the start does, to the bit
    weights = {n: problem.grids[n].dequantize(t) for n, t in nearest.items()}
    with torch.no_grad():
        problem.targets = problem.quantised(problem.inputs, weights)
    assert better(problem, nearest, better_there) is nearest
    assert problem.verdict.kept_start
    assert problem.verdict.end < problem.verdict.start


def test_activations_are_rounded_in_the_verdict():
    problem = problem_of("tsq4")
    start = AsItStarts(Nearest()).learn(problem)
    better(problem, start, start)
    plain = problem.verdict.start
    problem.rounding = ActivationRounding(scheme_of("a4", None))
    better(problem, start, start)
    assert problem.verdict.start == pytest.approx(error_of(problem, start), rel=1e-4)
    assert problem.verdict.start > 2 * plain
    assert not problem.verdict.kept_start  # a draw is no loss


@pytest.fixture(scope="module")
def decoder(make_model):  # noqa: F811
    return Decoder(make_model("llama"), CPU)


def drawn(count, length, seed=0):
    return torch.randint(4, 300, (count, length), generator=torch.Generator().manual_seed(seed))


def test_nothing_is_learned_on_what_is_held_out_and_both_chains_carry_it(decoder):
    tokens, apart = drawn(3, 16), drawn(2, 16, seed=1)
    seen = []

    class Spy:
        def learn(self, problem):
            seen.append((problem.inputs.clone(), problem.held_out.inputs.clone(), problem.held_out.targets.clone()))
            assert problem.samples == len(problem.inputs) == 3
            rounded = AsItStarts(Nearest()).learn(problem)
            return better(problem, rounded, rounded)

    types = dict.fromkeys(decoder.matrix_shapes(), "tsq3")
    walk = Reconstruction(decoder, Spy(), types, seed=0, autocast=torch.float32)
    metric = [torch.ones(2, decoder.hidden_size)] * 2
    results = list(walk.run(tokens, metric, lambda _: None, held_out=apart))
    alone = Reconstruction(decoder, Spy(), types, seed=0, autocast=torch.float32)
    list(alone.run(tokens, metric, results.__getitem__))  # resumed: nothing is learned
    assert len(seen) == 2
    full = decoder.stem(apart)[0]
    inputs = decoder.stem(apart)[1]
    with torch.no_grad():
        block = decoder.load_block(0)
        y0 = block.run(full, inputs.arguments[0])
        q1 = block.run(full, inputs.arguments[0], decoder.load_block(0).adopt(results[0].tensors))
        y1 = decoder.load_block(1).run(y0, inputs.arguments[1])
    torch.testing.assert_close(seen[0][1], full)
    torch.testing.assert_close(seen[0][2], y0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1][1], q1, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1][2], y1, atol=1e-4, rtol=1e-4)
    assert all(r.verdict is not None and r.verdict.start == r.verdict.end for r in results)


def quantised(decoder, type="tsq2", **more):
    rounded = {}
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        rounded[index] = {
            f"{block.prefix}{name}.weight": grid_of(type).quantize(m.weight.detach())
            for name, m in block.matrices().items()
        }
    return Quantised(decoder, rounded.__getitem__, **more)


def test_the_divergence_is_that_of_all_answers(decoder):
    tokens = drawn(3, 20)
    model = quantised(decoder)
    got = final_states(decoder, tokens, weights=lambda b: b.adopt(model.blocks(b.index)))
    p, q = (decoder.answers()(h.flatten(0, 1)) for h in (final_states(decoder, tokens), got))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 1e-5
    assert divergence(decoder, model, tokens) == pytest.approx(expected, rel=1e-3)
    same = dataclasses.replace(model, blocks=lambda _: {})
    assert divergence(decoder, same, tokens) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("words", [1, 7, 100])
def test_the_divergence_is_added_up_over_parts_of_the_vocabulary(words, decoder, monkeypatch):
    tokens = drawn(2, 16)
    model = dataclasses.replace(quantised(decoder), embeddings={decoder.output_name(): decoder.output_weight().flip(1)})
    expected = divergence(decoder, model, tokens)
    monkeypatch.setattr("tesseraq_gguf.evaluation.divergence._LOGITS", words * tokens.numel())
    monkeypatch.setattr(Decoder, "output_weight", None)  # nobody holds the whole of it
    assert divergence(decoder, model, tokens) == pytest.approx(expected, rel=1e-5)


def test_the_divergence_feels_all_that_was_learned(decoder):
    tokens = drawn(2, 16)
    model = dataclasses.replace(quantised(decoder), blocks=lambda _: {})
    prefix, norm = decoder.final_norm()
    name = decoder.output_name()
    changes: dict[str, dict[str, Any]] = {
        "the output matrix": {"embeddings": {name: decoder.output_weight() * 1.5}},
        "the embedding": {"embeddings": {decoder.embedding_name(): decoder.matrix(decoder.embedding_name()).flip(0)}},
        "the final norm": {"final": {f"{prefix}weight": plain_vector(2 * norm.weight.detach())}},
        "rounded activations": {"rounding": lambda _: ActivationRounding(scheme_of("a4", None))},
    }
    for what, change in changes.items():
        found = divergence(decoder, dataclasses.replace(model, **change), tokens)
        assert found > 1e-6, what


def test_answers_that_are_not_finite_are_an_error(decoder):
    prefix, norm = decoder.final_norm()
    final = {f"{prefix}weight": plain_vector(torch.full_like(norm.weight, torch.nan))}
    model = Quantised(decoder, lambda _: {}, final=final)
    with pytest.raises(NotFiniteError, match="answers of the quantised model"):
        divergence(decoder, model, drawn(1, 8))


class Part(Team):
    """One of several processes, which adds nothing up: its sums are its share."""

    def add_up(self, tensors):
        """Leave them."""

    def from_first(self, make):
        """Decide for itself."""
        return make()


@pytest.mark.parametrize("size", [2, 3, 8])
def test_processes_share_what_is_held_out(size):
    problem = problem_of("tsq2")
    start = AsItStarts(Nearest()).learn(problem)
    better(problem, start, start)
    expected, whole = problem.verdict.start, problem.held_out
    shares = []
    for rank in range(size):
        problem.team = team = Part(rank, size)
        problem.held_out = HeldOut(team.share(whole.inputs), team.share(whole.targets), whole.sequences)
        better(problem, start, start)
        shares.append(problem.verdict.start)
    assert sum(shares) == pytest.approx(expected, rel=1e-5)


def test_the_caches_have_room_for_what_is_held_out(decoder, monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(quantise, "choose_place", lambda size, *_: sizes.append(size) or Place("cpu", tmp_path))
    calibration = Calibration("text", drawn(8, 16), drawn(4, 16))
    for team in (Team(), Team(1, 2)):
        recipe = Recipe("m", tmp_path / "out.gguf")
        work = WorkDirectory(tmp_path / "work", {}, fresh=False)
        run = Run(recipe, decoder, Texts(calibration), team, work, ensure_source(), SilentProgress())
        quantise.place_of(run, calibration)
    assert sizes == [2 * sequences * 16 * decoder.hidden_size * 4 for sequences in (12, 6)]
