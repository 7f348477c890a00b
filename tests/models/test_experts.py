"""Experts as modules of their own: `test_decoder` holds them to transformers; here is what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.experts import aliases, expert_of, stack_of, unroll


def test_matrices_have_the_checkpoints_names(make_model):
    for kind in ("mixtral", "qwen3-moe", "qwen2-moe", "olmoe"):
        source = make_model(kind)
        stored = source.weight_map()
        shapes = Decoder(source, torch.device("cpu")).matrix_shapes()
        experts = [name for name in shapes if stack_of(name)]
        assert len(experts) == 2 * 4 * 3
        assert all(any(alias in stored for alias in aliases(name)) for name in shapes)


def test_gradients_reach_the_experts_that_were_chosen(make_model):
    decoder = Decoder(make_model("qwen3-moe"), torch.device("cpu"))
    hidden, recorded = decoder.stem(torch.tensor([[5, 9]]))
    block = decoder.load_block(0)
    weights = {name: m.weight.detach().clone().requires_grad_() for name, m in block.matrices().items()}
    block.run(hidden, recorded.arguments[0], weights).square().sum().backward()
    reached = {name for name, w in weights.items() if w.grad is not None and stack_of(name)}
    assert 0 < len(reached) < 12  # two tokens choose two experts each
    assert {name.rpartition(".")[2] for name in reached} == {"gate_proj", "up_proj", "down_proj"}


def test_numbers_of_experts():
    assert expert_of("model.layers.3.mlp.experts.17.up_proj.weight") == 17
    assert expert_of("mlp.experts.0.w1") == 0
    assert expert_of("model.layers.3.mlp.shared_expert.up_proj.weight") is None


def test_a_decoder_knows_whether_it_has_experts(make_model):
    kinds = {"qwen2-moe": True, "mixtral": True, "llama": False}
    assert {kind: Decoder(make_model(kind), torch.device("cpu")).has_experts for kind in kinds} == kinds


def test_names_of_stacks():
    assert stack_of("model.layers.3.mlp.experts.17.up_proj.weight") == "model.layers.3.mlp.experts.*.up_proj.weight"
    assert stack_of("mlp.experts.0.w1") == "mlp.experts.*.w1"
    assert stack_of("model.layers.3.mlp.shared_expert.up_proj.weight") is None
    assert stack_of("model.layers.3.mlp.experts.gate_up_proj") is None


def test_unknown_experts_are_refused():
    class StrangeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.empty(2, 4, 4))

    with pytest.raises(ModelError, match="StrangeExperts"):
        unroll(nn.Sequential(StrangeExperts()))
    unroll(nn.Sequential(nn.Conv1d(4, 4, 3)))  # has a weight of three dimensions, and no experts
