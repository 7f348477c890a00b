"""Tiny models whose blocks are unlike Llama's, by what is unlike: what the walk has to ask them for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import LOUD, SMALL

from tesseraq_gguf.models import ModelSource

_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}
_SHARING = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 320,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
# model type of transformers, what differs from SMALL
ASKED: dict[str, tuple[str, dict]] = {
    "matrices that multiply from the left": ("gpt2", _GPT),
    "arguments without keywords": ("gpt_bigcode", _GPT),
    "an attention of its own, alibi for every head": ("falcon", {"num_kv_heads": 1, "alibi": True}),
    "masks for its own attention": ("bloom", {"n_layer": 2, "n_head": 4}),
    "two values, no cache": ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "a decoder within the base model": ("opt", {"ffn_dim": 192, "word_embed_proj_dim": 64}),
    "streams, inputs for every block, shared keys": ("gemma3n_text", _SHARING | {"laurel_rank": 32}),
    "inputs for every block, shared keys": ("gemma4_text", _SHARING | {"global_head_dim": 64}),
    "kinds of blocks": (
        "nemotron_h",
        {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*-M",
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "state space beside attention": ("falcon_h1", _MAMBA | {"head_dim": 32, "mamba_d_ssm": 256, "mamba_n_groups": 1}),
    "two values, a state space": ("bamba", _MAMBA | {"attn_layer_indices": [1]}),
    "state space alone": ("mamba", {"state_size": 16}),
    "a matrix that is no layer's": ("falcon_mamba", {"state_size": 16, "time_step_rank": 64}),
    "convolutions": (
        "lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "linear attention": (
        "qwen3_5_text",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "head_dim": 32,
            "num_hidden_layers": 4,
        },
    ),
}


def save(kind: str, folder: Path) -> None:
    """Write a model, with weights by which logits vary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, different = ASKED[kind]
    torch.manual_seed(len(kind))
    config = AutoConfig.for_model(model_type, **(SMALL | different))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.normal_(std=LOUD)
            elif parameter.dim() == 1 and not name.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    """Return the tiny model of a kind in ASKED, made once."""
    made: dict[str, ModelSource] = {}

    def make(kind: str) -> ModelSource:
        if kind not in made:
            folder = tmp_path_factory.mktemp("asked") / ASKED[kind][0]
            save(kind, folder)
            made[kind] = ModelSource(kind, folder)
        return made[kind]

    return make
