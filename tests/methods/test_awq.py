"""AWQ: the scales it finds, that they help, and that what they change leaves the engine; its clip search."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from problems import as_problem, loss_of
from torch import nn

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.schemes import scheme_of
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.methods.awq import AWQ, ClipSearch, scales
from tesseraq_gguf.methods.enlarging import enlarge
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.folding import Fold

CPU = torch.device("cpu")
WIDTH = 256
TYPES = ["tsq2", "q4_0", "q2_k"]


class _Block(nn.Module):
    """Values that mix over the tokens before, and a gated MLP; some channels of both norms speak loudly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RMSNorm(WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            for norm in (self.first, self.second):
                norm.weight[::19] *= 12

    def forward(self, x):
        v = self.v(self.first(x)).cumsum(1)
        x = x + self.o(torch.cat([v, v.roll(1, 1)], -1))  # two query heads share one of values
        h = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.fixture
def problem_on():
    """Return a function that gives a small block as a problem in a tensor type."""

    def make(tensor_type):
        torch.manual_seed(7)
        block = LoadedBlock(0, "layers.0.", _Block().requires_grad_(False))
        hidden = torch.randn(6, 32, WIDTH)
        return as_problem(block, hidden, tensor_type)

    return make


def test_scales_are_the_papers_formula():
    fold = Fold("norm", 0, 4, 0.0, ("a", "b"), torch.arange(4))
    mean = torch.tensor([0.5, 2.0, 1.0, 8.0])
    s = mean.sqrt()
    torch.testing.assert_close(scales(fold, {"a": mean, "b": mean}, 0.5), s / (s.max() * s.min()).sqrt())
    assert torch.equal(scales(fold, {"a": mean}, 0.0), torch.ones(4))


def test_scales_of_shared_channels_are_those_of_their_mean():
    fold = Fold("v", 0, 2, 0.0, ("o",), torch.tensor([0, 1, 0, 1]))
    s = scales(fold, {"o": torch.tensor([1.0, 4.0, 3.0, 12.0])}, 0.5)
    torch.testing.assert_close(s[1] / s[0], torch.tensor(2.0))


def test_channels_that_never_speak_keep_scales_finite():
    fold = Fold("norm", 0, 3, 0.0, ("a",), torch.arange(3))
    s = scales(fold, {"a": torch.tensor([0.0, 1.0, 2.0])}, 0.95)
    assert torch.isfinite(s).all()
    assert (s > 0).all()


@pytest.mark.parametrize(("start", "left"), [(Nearest(), 0.93), (ClipSearch(), 0.985)], ids=["nearest", "clipped"])
def test_it_lowers_the_loss_where_channels_are_loud(start, left, problem_on):
    plain, scaled = problem_on("q4_0"), problem_on("q4_0")
    rounded = AsItStarts(start).learn(plain)
    learned = AWQ(AsItStarts(start), points=5, rows=64).learn(scaled)
    assert {"first.weight", "second.weight"} <= scaled.block.replaced.keys()
    assert loss_of(scaled, learned) < left * loss_of(plain, rounded)


def test_the_exponent_is_the_one_that_errs_least(problem_on):
    """Against the paper's losses, on the inputs themselves."""
    problem, chosen = problem_on("q4_0"), {}
    fed: dict[str, list[torch.Tensor]] = {}
    modules = problem.block.matrices()
    problem.observe(6, lambda name, x: fed.setdefault(name, []).append(x[0].double()))
    x = {name: torch.cat(parts) for name, parts in fed.items()}
    means = {name: inputs.abs().mean(0) for name, inputs in x.items()}
    alphas = [i / 10 for i in range(10)]
    for producer, consumers in {"first": ("v",), "second": ("gate", "up")}.items():
        losses = []
        for alpha in alphas:
            s = means[consumers[0]] ** alpha
            s = (s / (s.max() * s.min()).sqrt()).float()
            loss = 0.0
            for name in consumers:
                weight = modules[name].weight[:: len(modules[name].weight) // 64]
                importance = (x[name].square().mean(0) / s**2).float()
                rounded = problem.grids[name].dequantize(problem.grids[name].quantize(weight * s, importance))
                loss += float((x[name] @ (rounded / s - weight).double().T).square().sum())
            losses.append(loss)
        chosen[producer] = alphas[losses.index(min(losses))]
    found = AWQ(AsItStarts(Nearest()), points=10, rows=64).scale(problem)
    assert {name: found[name] for name in chosen} == chosen
    assert max(chosen.values()) > 0


def test_what_it_measures_on_unless_told_otherwise():
    method = AWQ(AsItStarts(Nearest()))
    assert (method.points, method.samples, method.rows, method.tokens) == (20, 32, 512, 2048)
    assert ClipSearch().samples == 128


def test_with_rounded_activations_as_many_tokens_are_measured_as_allowed(problem_on):
    problem = problem_on("tsq4")  # sequences of 32 tokens
    for tokens, samples, measured in ((100, 32, 96), (1, 32, 32), (1000, 2, 64), (1000, 32, 192)):
        fed = AWQ(AsItStarts(Nearest()), tokens=tokens, samples=samples)._fed(problem)
        assert {name: x.shape for name, x in fed.items()} == {
            name: (measured, module.in_features) for name, module in problem.block.matrices().items()
        }


def test_the_block_computes_what_it_did(problem_on):
    problem = problem_on("q4_0")
    chosen = AWQ(AsItStarts(Nearest()), points=5, rows=64).scale(problem)
    assert chosen.keys() == {"first", "v", "second", "up"}
    assert max(chosen.values()) > 0
    torch.testing.assert_close(problem.forward(problem.inputs), problem.targets, rtol=1e-4, atol=1e-4)


def test_it_changes_nothing_where_nothing_helps(problem_on):
    problem = problem_on("tsq2")
    assert set(AWQ(AsItStarts(Nearest()), points=1).scale(problem).values()) == {0.0}
    assert problem.block.replaced == {}


@pytest.mark.parametrize("tensor_type", TYPES)
def test_clip_search_beats_round_to_nearest(tensor_type, problem_on):
    problem = problem_on(tensor_type)
    rounded, clipped = Nearest().start(problem), ClipSearch().start(problem)
    loss = {k: loss_of(problem, {n: s.tensor for n, s in v.items()}) for k, v in (("r", rounded), ("c", clipped))}
    assert loss["c"] < {"tsq2": 0.75, "q4_0": 0.64, "q2_k": 0.57}[tensor_type] * loss["r"]
    for name, start in clipped.items():
        assert torch.equal(start.weight, problem.matrices()[name])
        arrays = start.tensor.arrays
        assert torch.equal(problem.grids[name].encode(start.weight, arrays), arrays["q"])


def test_what_it_changed_leaves_the_engine_and_comes_back(make_model):
    decoder = Decoder(make_model("llama-bias"), CPU)
    tokens = torch.randint(4, 300, (3, 32), generator=torch.Generator().manual_seed(1))
    types = dict.fromkeys(decoder.matrix_shapes(), "q4_0")

    def walk(method):
        return Reconstruction(decoder, method, types, seed=0, autocast=torch.float32)

    sensitivity = [torch.ones(2, decoder.hidden_size)] * len(decoder)
    method = AWQ(AsItStarts(Nearest()), points=4, rows=32)
    results = list(walk(method).run(tokens, sensitivity, lambda _: None))
    first = results[0].tensors
    vectors = {name for name, tensor in first.items() if tensor.plain}
    norms = {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert vectors <= norms | {f"model.layers.0.{name}_proj.bias" for name in ("self_attn.v", "mlp.up")}
    assert vectors
    assert set(types) & set(first) == {name for name in types if name.startswith("model.layers.0.")}
    # a run that takes up the first block again must feed the second one the same
    kept = {0: dataclasses.replace(results[0], resumed=True)}
    again = list(walk(method).run(tokens, sensitivity, lambda index: copy.deepcopy(kept.get(index))))
    assert again[0].resumed
    assert again[1].loss_after == results[1].loss_after
    for name, tensor in results[1].tensors.items():
        assert all(torch.equal(array, again[1].tensors[name].arrays[key]) for key, array in tensor.arrays.items())


def test_with_rounded_activations_scales_share_the_error(problem_on):
    rounding = ActivationRounding(scheme_of("a4", None))
    method, alphas, losses = AWQ(AsItStarts(ClipSearch())), [], []
    for known in (False, True):  # whether scales are chosen with them, or for weights alone
        problem = problem_on("tsq4")
        problem.rounding = rounding if known else None
        alphas.append(method.scale(problem))
        problem.rounding = rounding
        losses.append(loss_of(problem, method.then.learn(problem)))
    assert any(alphas[1][name] > alpha for name, alpha in alphas[0].items())  # loud channels are made smaller
    assert losses[1] < 0.47 * losses[0]


def test_small_weights_are_enlarged_where_scales_would_be_coarse(problem_on):
    """The block computes what it did, and rounding errs as little as it does with large weights."""
    small, large, even = problem_on("nvfp4"), problem_on("nvfp4"), problem_on("q4_0")
    for problem, size in ((small, 2.0**-5), (large, 16.0), (even, 2.0**-5)):
        for name in ("v", "o", "gate", "up", "down"):
            problem.block.replace(f"{name}.weight", problem.block.matrices()[name].weight * size)

    def errors(problem):
        grid = problem.grids["v"]
        weights = {name: m.weight for name, m in problem.block.matrices().items()}
        off = {name: grid.dequantize(grid.quantize(w)) - w for name, w in weights.items()}
        return {name: float(off[name].square().sum() / w.square().sum()) for name, w in weights.items()}

    before, targets = errors(small), small.forward(small.inputs)
    for problem in (small, even):
        enlarge(problem, problem.folds())
    after = errors(small)
    torch.testing.assert_close(small.forward(small.inputs), targets, rtol=1e-6, atol=1e-6)
    assert after == pytest.approx(errors(large), rel=0.02)
    assert all(before[name] > 1.3 * left for name, left in after.items())
    assert set(small.block.replaced) >= {"first.weight", "second.weight"}
    assert "first.weight" not in even.block.replaced
