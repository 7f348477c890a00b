"""Experts as modules of their own: each kind against transformers' own forward, and where checkpoints keep them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.experts import Experts, Forms, aliases, expert_of, form_of, stack_of, unroll

CPU = torch.device("cpu")


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


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = ["gate_proj", "up_proj", "down_proj"]
NUMBERED = ["w1", "w3", "w2"]
KINDS = {
    "mixtral": NUMBERED,
    "minimax": NUMBERED,
    "phimoe": NUMBERED,
    "qwen2_moe": GATED,
    "qwen3_next": GATED,
    "qwen3_5_moe_text": GATED,
    "deepseek_v2": GATED,
    "deepseek_v3": GATED,
    "glm4_moe": GATED,
    "ernie4_5_moe": GATED,
    "hunyuan_v1_moe": GATED,
    "jamba": GATED,
    "granitemoe": GATED,
    "gpt_oss": GATED,
    "llama4_text": GATED,
    "nemotron_h": ["up_proj", "down_proj"],
}
"""Kinds of experts, by transformers' name of the model, and what an expert's matrices are called."""


def _model(kind: str) -> Any:
    config = transformers.CONFIG_MAPPING[kind]
    known = {name: value for name, value in SIZES.items() if hasattr(config(), name)}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**known), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def _saved(kind: str, folder: Path) -> tuple[Any, ModelSource]:
    model = _model(kind)
    model.save_pretrained(folder)
    return model, ModelSource(kind, folder)


def _mixtures(block: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_transformers_does(kind, tmp_path):
    """With weights that `Decoder` reads, on hidden states and routes of their own."""
    model, source = _saved(kind, tmp_path)
    decoder = Decoder(source, CPU)
    assert decoder.has_experts
    compared = 0
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        for name, experts in _mixtures(block.module).items():
            assert [n for n, _ in experts[0].named_children()] == KINDS[kind]
            owner = model.get_submodule(f"model.layers.{index}.{name}")
            hidden = torch.randn(24, experts[0].get_submodule(KINDS[kind][0]).in_features)
            given: Any = (hidden, torch.rand(24, 4).topk(2).indices, torch.rand(24, 2))
            given = given[: len(inspect.signature(type(owner).forward).parameters) - 1]
            with torch.no_grad():
                torch.testing.assert_close(experts(*given), owner(*given), rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared


def test_a_layer_of_a_stack_is_all_that_is_read(tmp_path, monkeypatch):
    """Of a checkpoint whose experts are stacked, in rows that alternate."""
    model, source = _saved("gpt_oss", tmp_path)
    decoder = Decoder(source, CPU)
    asked = []
    rows = type(decoder.weights).rows
    monkeypatch.setattr(
        type(decoder.weights), "rows", lambda self, name, some: asked.append(some) or rows(self, name, some)
    )
    stack = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    place = decoder.place("model.layers.1.mlp.experts.2.up_proj.weight")
    assert (place.name, place.layer, place.first, place.step, place.transposed) == (
        "model.layers.1.mlp.experts.gate_up_proj", 2, 1, 2, True,
    )  # fmt: skip
    assert torch.equal(decoder.matrix("model.layers.1.mlp.experts.2.up_proj.weight"), stack[2, :, 1::2].T)
    assert [some.tolist() for some in asked] == [[2]]
    assert decoder.place("model.layers.1.self_attn.q_proj.weight") is None


def test_experts_that_are_stored_one_by_one(tmp_path):
    model, source = _saved("mixtral", tmp_path)
    decoder = Decoder(source, CPU)
    place = decoder.place("model.layers.0.mlp.experts.3.w3.weight")
    assert (place.name, place.layer) == ("model.layers.0.block_sparse_moe.experts.3.w3.weight", None)
    fused = model.model.layers[0].mlp.experts.gate_up_proj.detach()
    assert torch.equal(decoder.matrix("model.layers.0.mlp.experts.3.w3.weight"), fused[3, len(fused[3]) // 2 :])


class Strange(nn.Module):
    """Experts that no sum of matrices' products is."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 8, 4))
        self.down = nn.Parameter(torch.empty(3, 4, 8))
        self.act = nn.SiLU()

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for expert in range(3):
            token, place = torch.where(chosen == expert)
            inner = self.act(hidden[token] @ self.up[expert].T) + self.extra
            out.index_add_(0, token, inner @ self.down[expert].T * weights[token, place, None])
        return out


def test_what_an_expert_computes_is_found_by_trying():
    plain = type("Plain", (Strange,), {"extra": 0.0})()
    form = form_of(plain)
    assert [(slot.name, slot.stack, slot.transposed) for slot in form.slots] == [
        ("up_proj", "up", False), ("down_proj", "down", False),
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"experts of this kind \(Odd\) cannot be learned yet"):
        form_of(type("Odd", (Strange,), {"extra": 1.0})())


def test_a_stack_that_belongs_to_no_expert_is_refused():
    class StrangeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.empty(2, 4, 4))

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))
    model.extra = StrangeExperts()
    with pytest.raises(ModelError, match=r"StrangeExperts: down_proj \[2, 4, 4\]"):
        Forms(model)
    unroll(nn.Sequential(nn.Conv1d(4, 4, 3)), {})  # has a weight of three dimensions, and no experts
