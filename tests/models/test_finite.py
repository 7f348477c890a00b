"""What is not finite stops a run and names block and matrix; zeros, constants, one sequence and one token do not."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from problems import as_problem, mlp_problem
from tiny_models import make_model  # noqa: F401  (a fixture)
from torch import nn

from tesseraq_gguf.errors import ModelError, NotFiniteError
from tesseraq_gguf.learning.bit_budget import CostMeter
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.codebooks import model_codebooks
from tesseraq_gguf.learning.distillation import Distillation, _Student
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.methods.awq import AWQ, ClipSearch
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.gptq import GPTQ, compensate
from tesseraq_gguf.methods.lrq import lrq
from tesseraq_gguf.methods.omniquant import OmniQuant
from tesseraq_gguf.methods.problem import Method
from tesseraq_gguf.methods.ptq161 import Ptq161, minus_log_cosine
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.finite import origin
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.types.facts import LAYOUTS
from tesseraq_gguf.types.grids import GRIDS, grid_of

CPU = torch.device("cpu")
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
QUICK = TesseraQ(2, 2, soft_shares=(0.5, 0.1), settle_scales=1, settle_zeros=1)


class Changed(Decoder):
    """A model some of whose parameters are multiplied: checkpoints whose activations overflow."""

    factors: dict[str, float] = {}  # noqa: RUF012

    def _read(self, name):
        return super()._read(name).float() * self.factors.get(name, 1.0)


def changed(source, **factors):
    decoder = Changed(source, CPU)
    decoder.factors = {
        name: factor for short, factor in factors.items() for name in [f"model.layers.1.mlp.{short}_proj.weight"]
    }
    return decoder


def drawn(count=4, length=16):
    return torch.randint(4, 300, (count, length), generator=torch.Generator().manual_seed(1))


def walk(decoder, method, type="tsq2", autocast=torch.float32):
    types = dict.fromkeys(decoder.matrix_shapes(), type)
    engine = Reconstruction(decoder, method, types, seed=0, autocast=autocast)
    return engine.run(drawn(), [torch.ones(2, decoder.hidden_size)] * len(decoder), lambda _: None, held_out=drawn(2))


@pytest.mark.parametrize("factors", [{"up": 1e30, "gate": 1e10}, {"down": 1e38, "up": 1e10}])
def test_a_model_that_overflows_is_refused_before_anything_is_learned(factors, make_model):  # noqa: F811
    decoder = changed(make_model("llama"), **factors)
    with pytest.raises(NotFiniteError, match=r"block 2 of the model overflows, .*model\.layers\.1\.mlp\.") as error:
        measure_sensitivity(decoder, drawn(), 0)
    assert "\n" not in str(error.value)
    done = []
    with pytest.raises(NotFiniteError, match=r"block 2: its output overflows, .*model\.layers\.1\.mlp\."):
        done += [result.index for result in walk(decoder, AsItStarts(GPTQ()))]
    assert done == []


def test_blocks_before_the_one_that_overflows_are_kept(make_model):  # noqa: F811
    decoder = changed(make_model("llama"), down=1e38, up=1e10)
    done = []
    with pytest.raises(NotFiniteError):
        for result in walk(decoder, AsItStarts(Nearest())):
            done.append(result.index)
    assert done == [0]


@pytest.mark.parametrize("method", [AsItStarts(GPTQ()), AWQ(AsItStarts(ClipSearch())), QUICK])
def test_moments_that_overflow_name_their_matrix(method, make_model):  # noqa: F811
    # activations of 1e25 are finite, their squares are not; the next matrix brings them back
    decoder = changed(make_model("llama"), up=1e25, down=1e-25)
    with pytest.raises(NotFiniteError, match=re.escape(DOWN)):
        list(walk(decoder, method))


@pytest.mark.parametrize("type", ["tsq2", "bcq2", "bcq4", "ptq1_61", "q4_0", "q2_k", "q3_k"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gptq_ends_and_names_the_matrix(type, bad):
    grid, weight = grid_of(type), torch.randn(4, 256)
    moment = torch.eye(256)
    moment[3, 5] = bad
    with pytest.raises(NotFiniteError, match=r"^some\.weight: the second moments"):
        compensate(weight, moment, grid, 0.01, "some.weight")
    weight[1, 7] = bad
    with pytest.raises(NotFiniteError, match=r"^some\.weight: its weights"):
        compensate(weight, torch.eye(256), grid, 0.01, "some.weight")


@pytest.mark.parametrize("type", GRIDS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("what", ["nothing", "dead channels", "constant", "one token", "huge", "tiny"])
def test_gptq_takes_whatever_moments_there_are(what, damping, type):
    torch.manual_seed(5)
    grid, weight, x = grid_of(type), torch.randn(4, 256), torch.randn(64, 256)
    if what == "nothing":
        x = torch.zeros(1, 256)
    if what == "dead channels":
        x[:, ::3] = 0
    if what == "constant":
        x = torch.ones(64, 256)
    x = x[:1] if what == "one token" else x * {"huge": 1e18, "tiny": 1e-20}.get(what, 1)
    done = compensate(weight, x.T @ x / len(x), grid, damping)
    assert done.weight.isfinite().all()
    value = grid.dequantize(done.tensor)
    assert float((value - weight).norm()) < 3 * float(weight.norm())


def test_gptq_does_not_feel_the_unit_of_activations():
    torch.manual_seed(6)
    weight, x = torch.randn(8, 128), torch.randn(512, 128) @ torch.randn(128, 128)
    moment, grid = x.T @ x / 512, grid_of("tsq2")
    expected = compensate(weight, moment, grid, 0.01).tensor
    for unit in (2.0**-60, 2.0**-2, 2.0**40):
        got = compensate(weight, moment * unit, grid, 0.01).tensor
        assert all(torch.equal(got.arrays[key], array) for key, array in expected.arrays.items())


class _Dead(nn.Module):
    """A block that gives zeros, whatever its matrices are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(128), nn.Linear(128, 128, bias=False)
        self.down = nn.Linear(128, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))) * 0)


METHODS: dict[str, tuple[str, Method]] = {
    "gptq": ("tsq2", AsItStarts(GPTQ())),
    "awq": ("tsq2", AWQ(AsItStarts(ClipSearch()))),
    "omniquant": ("tsq2", AsItStarts(OmniQuant(3, 2))),
    "tesseraq": ("tsq2", QUICK),
    "tesseraq in bcq4": ("bcq4", QUICK),
    "lrq": ("tsq3", lrq(3, 2, 8)),
    "flexround": ("tsq3", flexround(3, 2)),
    "ptq161": ("ptq1_61", Ptq161(3, 2)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", ["zeros", "constant", "one sequence", "one token", "dead channels", "dead block"])
def test_methods_take_whatever_inputs_there_are(what, name):
    type, method = METHODS[name]
    problem = mlp_problem(type, 128, 128)
    hidden = problem.inputs.clone()
    if what == "zeros":
        hidden.zero_()
    if what == "constant":
        hidden.fill_(1.0)
    if what == "dead channels":
        hidden[..., ::3] = 0
    if what == "one sequence":
        hidden = hidden[:1]
    if what == "one token":
        hidden = hidden[:1, :1]
    block = problem.block
    if what == "dead block":
        block = dataclasses.replace(block, module=_Dead().requires_grad_(False))
    problem = as_problem(block, hidden, type)
    learned = method.learn(problem)
    assert learned.keys() == problem.grids.keys()
    for matrix, tensor in learned.items():
        assert problem.grids[matrix].dequantize(tensor).isfinite().all()


def test_a_token_without_direction_has_a_gradient():
    out = torch.zeros(1, 3, 8)
    out[0, 1] = 1
    out.requires_grad_()
    minus_log_cosine(out, torch.ones(1, 3, 8), torch.ones(2, 8)).sum().backward()
    assert out.grad.isfinite().all()


@pytest.mark.parametrize("name", ["tesseraq", "omniquant", "lrq", "flexround", "ptq161"])
def test_learning_that_leaves_the_finite_numbers_is_an_error(name):
    type, method = METHODS[name]
    problem = mlp_problem(type, 128, 128)
    problem.targets[2, 3, 4] = torch.inf
    with pytest.raises(NotFiniteError, match=r"^block 1: learning left the finite numbers after \d+ steps, "):
        for _ in range(20):  # until the sequence is drawn
            method.learn(problem)


def test_variables_that_leave_in_the_last_step_are_seen():
    problem = mlp_problem("tsq2", 128, 128)
    method = TesseraQ(1, 2, scale_rate=torch.nan, soft_shares=(0.5,), settle_scales=9, settle_zeros=9)
    with pytest.raises(NotFiniteError, match=r"in layers\.0\.\w+\.weight"):
        method.learn(problem)


@pytest.mark.parametrize("method", [lrq(1, 2, 8), flexround(1, 2)], ids=["lrq", "flexround"])
def test_divisors_that_leave_in_the_last_step_are_seen(method, monkeypatch):
    monkeypatch.setattr(type(method), "rate", lambda self, bits: torch.nan)
    with pytest.raises(NotFiniteError, match=r"in layers\.0\.\w+\.weight"):
        method.learn(mlp_problem("tsq3", 128, 128))


def test_half_precision_that_overflows_is_an_error():
    problem = mlp_problem("tsq2", 128, 128)
    problem.block.matrices()["down"].weight *= 1e6
    with torch.no_grad():
        targets = torch.cat([problem.block.run(h, {}) for h in problem.inputs.split(1)])
    assert targets.isfinite().all()
    problem = dataclasses.replace(problem, targets=targets, autocast=torch.float16)
    with pytest.raises(NotFiniteError, match=r"^block 1: learning left .* layers\.0\.\w+\.weight"):
        QUICK.learn(problem)


def test_the_matrix_that_overflows_is_named_even_when_what_follows_does_too():
    problem = mlp_problem("tsq2", 128, 128)
    problem.block.matrices()["up"].weight *= 1e30
    hidden = problem.inputs[:1]
    assert origin(problem.block, lambda: problem.forward(hidden)) == "from layers.0.up.weight on"
    assert origin(problem.block, lambda: problem.forward(hidden * torch.nan)) == "in front of layers.0.up.weight"


@pytest.mark.parametrize("length", [1, 2])
def test_sensitivity_of_short_sequences_is_finite(length, make_model):  # noqa: F811
    decoder = Decoder(make_model("llama"), CPU)
    found = measure_sensitivity(decoder, drawn(3, length), 0)
    assert all(weights.isfinite().all() for weights in [*found.blocks, found.embedding, found.output_moment])


def test_costs_that_are_not_finite_name_their_matrix(make_model):  # noqa: F811
    decoder = Decoder(make_model("llama"), CPU)
    block = decoder.load_block(1)
    meter = CostMeter({UP: ["tsq2", "tsq3"]})
    with pytest.raises(NotFiniteError, match=re.escape(UP)):
        meter.block(block, {"mlp.up_proj": (torch.full((4, 128), 1e25), torch.full((4, 192), 1e15))})


def test_codebooks_of_a_model_of_zeros_or_of_infinities(make_model):  # noqa: F811
    source = make_model("llama")
    empty = Changed(source, CPU)
    empty.factors = dict.fromkeys(empty.matrix_shapes(), 0.0)
    with pytest.raises(ModelError, match="all zeros"):
        model_codebooks(empty, None, 0, LAYOUTS["bcq4"])
    with pytest.raises(NotFiniteError, match=re.escape(UP)):
        model_codebooks(changed(source, up=torch.inf), None, 0, LAYOUTS["bcq4"])


def test_the_last_pass_stops_at_gradients_that_are_not_finite(make_model, tmp_path, monkeypatch):  # noqa: F811
    decoder = Decoder(make_model("llama"), CPU)

    def blocks(index):
        block = decoder.load_block(index)
        return {
            f"{block.prefix}{name}.weight": grid_of("tsq2").quantize(m.weight.detach())
            for name, m in block.matrices().items()
        }

    slope = _Student._slope
    monkeypatch.setattr(_Student, "_slope", lambda *a: (*(f := slope(*a))[:1], f[1] * torch.inf, *f[2:]))
    with pytest.raises(NotFiniteError, match=r"model\.layers\.1\..*: the gradients of the last pass"):
        Distillation(steps=2).run(Quantised(decoder, blocks), Calibration("text", drawn(), drawn(2)), 0, tmp_path)
