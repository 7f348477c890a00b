"""A rotated start: it changes no function, and rounded activations harm less."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from problems import as_problem, loss_of

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.schemes import scheme_of
from tesseraq_gguf.methods.rotated import Rotated
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.models import Decoder


@pytest.fixture
def problem(make_model):
    """Return a Llama block whose values have channels that stand out, with activations of 4 bits."""
    decoder = Decoder(make_model("llama"), torch.device("cpu"))
    tokens = torch.randint(4, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    hidden, inputs = decoder.stem(tokens)
    block = decoder.load_block(1)
    with torch.no_grad():
        block.module.get_parameter("self_attn.v_proj.weight")[::16] *= 30
    made = as_problem(block, hidden, "tsq4", inputs.arguments[1])
    return dataclasses.replace(made, rounding=ActivationRounding(scheme_of("a4", None)))


def test_outliers_of_the_values_harm_less(problem):
    plain = copy.deepcopy(problem)
    method = AsItStarts(Nearest())
    before = loss_of(plain, method.learn(plain))
    rotated = Rotated(method)
    after = loss_of(problem, rotated.learn(problem))
    assert after < 0.78 * before
    assert {"self_attn.v_proj.weight", "self_attn.o_proj.weight"} <= problem.block.replaced.keys()


def test_the_block_stays_the_function_it_is(problem):
    hidden = problem.inputs[:1]
    with torch.no_grad():
        expected = problem.forward(hidden)
        assert Rotated(AsItStarts(Nearest())).rotate(problem) == ["self_attn.v_proj"]
        got = problem.forward(hidden)
    assert (got - expected).norm() <= 1e-5 * (expected - hidden).norm()
