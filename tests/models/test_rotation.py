"""Rotations: which channels each architecture lets us mix, that mixing is exact, and what it does to outliers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS

from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.rotation import hadamard, rotations

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def load(make_model):
    """Return a function that gives a kind's second block, hidden states for it, its arguments, and the config."""

    def load(kind):
        decoder = Decoder(make_model(kind), CPU)
        hidden, inputs = decoder.stem(TOKENS)
        return decoder.load_block(1), hidden[:1], inputs.arguments[1], decoder.config

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_mixed_within_heads_and_nothing_else(kind, load):
    block, hidden, arguments, config = load(kind)
    found = rotations(block, arguments, hidden, block.matrices().keys())
    producer = "self_attn.qkv_proj" if kind == "phi-fused" else "self_attn.v_proj"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert [(r.producer, r.consumers, r.run) for r in found] == [(producer, ("self_attn.o_proj",), size)]
    with torch.no_grad():
        expected = block.run(hidden, arguments)
        for rotation in found:
            rotation.apply(block, hadamard(rotation.run, 5))
        got = block.run(hidden, arguments)
    assert (got - expected).norm() <= 1e-5 * (expected - hidden).norm()
    assert {f"{producer}.weight", "self_attn.o_proj.weight"} <= block.replaced.keys()


def test_matrices_that_may_not_change_do_not(load):
    block, hidden, arguments, _ = load("llama")
    assert rotations(block, arguments, hidden, block.matrices().keys() - {"self_attn.o_proj"}) == []


def test_columns_with_an_order_of_their_own_stay(load):
    block, hidden, arguments, _ = load("llama")
    width = block.matrices()["self_attn.o_proj"].in_features
    block.reorder(["self_attn.o_proj"], torch.arange(width).roll(3))
    assert rotations(block, arguments, hidden, block.matrices().keys()) == []


@pytest.mark.parametrize("size", [8, 64, 80, 96, 256, 640])
def test_a_hadamard_matrix_is_orthogonal_and_spreads_an_outlier(size):
    q = hadamard(size, 3)
    assert torch.allclose(q @ q.T, torch.eye(size), atol=1e-5)
    assert not torch.equal(q, hadamard(size, 4))
    outlier = torch.zeros(size)
    outlier[5] = 1
    assert (q @ outlier).abs().max() <= 2 / size**0.5
