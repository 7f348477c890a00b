"""Tiny models with random weights of every architecture that is tried, saved as checkpoints on the hub are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from byte_pairs import write_tokenizer
from tiny_models import LOUD, SMALL, TEXT, VOCABULARY, tokenizer

from tesseraq_gguf.errors import TesseraqError

_WIDTH = int(SMALL["hidden_size"])

_GAIN = 0.5
"""How much a matrix enlarges what it is fed: with more, what llama.cpp rounds on the way would count for too much."""

DENSE, MIXTURE, HYBRID = "dense", "mixture of experts", "state space, convolutions or linear attention"


class Unavailable(TesseraqError):  # noqa: N818  (a finding, not a failure)
    """A library does not have the architecture."""


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: its `model_type` in transformers.
        kind: what its blocks are.
        different: what its configuration has beside `SMALL`, or in place of it; None leaves an entry out.
        tokenizer: what its vocabulary is: `bytes` for pairs of bytes, `pieces` for a file of sentencepiece, `converted`
            for such a one as transformers keeps it.
        tokens: special tokens that the conversion class asks for.
        stated: what config.json has in checkpoints of the hub, and transformers does not save.
        obstacle: what is in the way in llama.cpp or transformers, a clause for the table; empty if nothing is.
    """

    name: str
    kind: str = DENSE
    different: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "bytes"
    tokens: tuple[str, ...] = ()
    stated: Mapping[str, Any] = field(default_factory=dict)
    obstacle: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the settings of its tiny model."""
        return {name: value for name, value in (SMALL | dict(self.different)).items() if value is not None}


def save(architecture: Architecture, folder: Path) -> None:
    """Write a tiny model with its tokenizers into a folder, in bfloat16.

    Raises:
        Unavailable: transformers does not have it.
    """
    model = build(architecture)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | dict(architecture.stated)
    file.write_text(json.dumps(config), encoding="utf-8")
    if architecture.tokenizer == "bytes":
        write_tokenizer(folder, TEXT, VOCABULARY, architecture.tokens)
    else:
        _write_pieces(folder, converted=architecture.tokenizer == "converted")


def _write_pieces(folder: Path, converted: bool) -> None:
    from transformers import LlamaTokenizer

    (folder / "tokenizer.model").write_bytes(tokenizer())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    if converted:
        LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink()


def build(architecture: Architecture) -> Any:
    """Return a tiny model whose logits vary, float32.

    Raises:
        Unavailable: transformers does not have it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture.name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Unavailable("transformers does not have it")
    config = AutoConfig.for_model(architecture.name, **architecture.settings())
    torch.manual_seed(len(architecture.name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            _vary(name, parameter)
    return model


def _vary(name: str, parameter: torch.Tensor) -> None:
    """Give a parameter values by which it can be told from others."""
    if "inv_freq" in name or not parameter.is_floating_point() or "A_log" in name:
        return
    if parameter.dim() > 1:
        outside = len(parameter) == VOCABULARY
        parameter.normal_(std=LOUD if outside else _GAIN * _WIDTH**-0.5)
    elif isinstance(parameter, torch.nn.Parameter) or name.endswith("bias"):
        parameter.add_(torch.randn_like(parameter) * 0.1)


def named(name: str) -> Architecture:
    """Return an architecture by its name."""
    return next(a for a in ARCHITECTURES if a.name == name)


_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "head_dim": 32,
    "num_hidden_layers": 4,
}
_KDA = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
_NEMOTRON = "M*EM"
_GLM = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}

ARCHITECTURES = (
    Architecture("llama", tokenizer="pieces"),
    Architecture("mistral", tokenizer="pieces", different={"head_dim": 32}),
    Architecture("ministral3", tokenizer="pieces", different={"head_dim": 32}),
    Architecture("qwen2"),
    Architecture("qwen3", different={"head_dim": 64, "tie_word_embeddings": True}),
    Architecture("gemma", tokenizer="pieces", different={"head_dim": 32}),
    Architecture("gemma2", tokenizer="pieces", different=_GEMMA),
    Architecture("gemma3_text", tokenizer="pieces", different=_GEMMA),
    Architecture(
        "gemma3n_text",
        tokenizer="pieces",
        different={
            "head_dim": 32,
            "num_kv_shared_layers": 0,  # llama.cpp shares from the 20th block on
            "sliding_window": 64,
            "hidden_size_per_layer_input": 256,  # this and the rank it takes for granted
            "vocab_size_per_layer_input": 320,
            "laurel_rank": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            # as llama.cpp has it in the first ten blocks; what is little above a threshold enlarges what is rounded
            "activation_sparsity_pattern": [0.95] * 2,
        },
    ),
    Architecture(
        "gemma4_text",
        tokenizer="converted",
        different={
            "head_dim": 16,  # products of keys and queries are not made smaller: with more, attention is all or nothing
            "global_head_dim": 32,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 320,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "final_logit_softcapping": 30.0,  # llama.cpp caps logits at this whatever a file says
        },
    ),
    Architecture("phi", different={"num_key_value_heads": 4, "intermediate_size": 512}),
    Architecture("phi3", tokenizer="pieces", different={"original_max_position_embeddings": 512}),
    Architecture("olmo"),
    Architecture("olmo2"),
    Architecture("olmo3", different={"sliding_window": 64}),
    Architecture(
        "granite", different={"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    ),
    Architecture("smollm3"),
    Architecture("stablelm"),
    Architecture("starcoder2"),
    Architecture("exaone4", different={"sliding_window": 64}),
    Architecture("glm", different={"head_dim": 32}, tokens=_GLM),
    Architecture("glm4", different={"head_dim": 32}, tokens=_GLM),
    Architecture("nemotron", tokenizer="pieces"),
    Architecture("seed_oss", different={"head_dim": 32}),
    Architecture("apertus", tokenizer="pieces"),
    Architecture("arcee", tokenizer="pieces"),
    Architecture("ernie4_5", tokenizer="pieces", different={"head_dim": 32}),
    Architecture("cohere", different={"logit_scale": 0.0625}),
    Architecture("cohere2", different={"logit_scale": 0.0625, "sliding_window": 64}, stated={"rotary_pct": 1.0}),
    Architecture("hunyuan_v1_dense", different={"head_dim": 32}),
    Architecture("internlm2"),
    Architecture("internlm3", tokenizer="pieces"),
    Architecture("minicpm3", tokenizer="pieces", different=_LATENT),
    Architecture(
        "gpt2", different={"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, stated={"n_ctx": 512}
    ),
    Architecture(
        "gpt_neox", different={"intermediate_size": 256, "tie_word_embeddings": False}, stated={"rotary_pct": 0.25}
    ),
    Architecture("gpt_bigcode", different={"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    Architecture("falcon", different={"num_kv_heads": 1}),
    Architecture("bloom", different={"n_layer": 2, "n_head": 4}),
    Architecture(
        "mpt",
        different={"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
        stated={"architectures": ["MPTForCausalLM"]},
    ),
    Architecture("opt", obstacle="llama.cpp does not have it"),
    Architecture("jais2"),
    Architecture(
        "bitnet",
        tokenizer="pieces",
        obstacle="llama.cpp's converter knows the tensors of an older BitNet alone, and not `ffn_sub_norm`",
    ),
    Architecture("mixtral", MIXTURE, {"num_local_experts": 8, "num_experts_per_tok": 2}, tokenizer="pieces"),
    Architecture("qwen2_moe", MIXTURE, _EXPERTS | {"shared_expert_intermediate_size": 192}),
    Architecture("qwen3_moe", MIXTURE, _EXPERTS | {"head_dim": 64, "norm_topk_prob": True}),
    Architecture("olmoe", MIXTURE, {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    Architecture(
        "phimoe",
        MIXTURE,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "original_max_position_embeddings": 512}
        | {"attention_bias": True, "lm_head_bias": True},
        tokenizer="pieces",
        stated={"architectures": ["PhiMoEForCausalLM"]},
        obstacle="llama.cpp norms without subtracting the mean, and routes by a softmax in place of the sparse mixer",
    ),
    Architecture("granitemoe", MIXTURE, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Architecture(
        "granitemoeshared", MIXTURE, {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 128}
    ),
    Architecture(
        "ernie4_5_moe",
        MIXTURE,
        {
            "intermediate_size": 128,  # llama.cpp divides it by the heads of keys
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
        tokenizer="pieces",
    ),
    Architecture(
        "hunyuan_v1_moe",
        MIXTURE,
        {"num_experts": 8, "moe_topk": 2, "moe_intermediate_size": 64, "head_dim": 32},
        stated={"moe_topk": [2, 2], "moe_intermediate_size": [64, 64], "num_shared_expert": [1, 1]},
        obstacle="llama.cpp's converter reads none but Tencent's own tokenizer, which transformers does not have",
    ),
    Architecture("glm4_moe", MIXTURE, _ROUTED | {"head_dim": 32}, tokens=_GLM),
    Architecture(
        "glm4_moe_lite",
        MIXTURE,
        _ROUTED | _LATENT,
        tokens=_GLM,
        stated={"scoring_func": "sigmoid"},  # llama.cpp takes it for granted of 47 blocks alone
    ),
    Architecture("deepseek_v2", MIXTURE, _ROUTED | _LATENT | {"topk_method": "greedy"}),
    Architecture("deepseek_v3", MIXTURE, _ROUTED | _LATENT, stated={"scoring_func": "sigmoid"}),
    Architecture(
        "gpt_oss", MIXTURE, {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 64}
    ),
    Architecture(
        "minimax_m2",
        MIXTURE,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 16},
        stated={"scoring_func": "sigmoid"},
    ),
    Architecture(
        "minimax",
        MIXTURE,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32},
        obstacle="llama.cpp converts MiniMax's own checkpoints alone, and transformers reads none but its `-hf` ones",
    ),
    Architecture(
        "llama4_text",
        MIXTURE,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,  # the fourth has no positions
            "intermediate_size_mlp": 192,
            "head_dim": 32,
            "interleave_moe_layer_step": 1,
        },
    ),
    Architecture(
        "dbrx",
        MIXTURE,
        {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        },
    ),
    Architecture(
        "dots1",
        MIXTURE,
        _ROUTED | {"head_dim": 32, "num_key_value_heads": 4, "norm_topk_prob": True},
        stated={"scoring_func": "sigmoid"},
    ),
    Architecture(
        "afmoe",
        MIXTURE,
        _EXPERTS
        | {
            "head_dim": 32,
            "num_hidden_layers": 4,  # the fourth attends to everything, without positions
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "sliding_window": 64,
            "route_scale": 2.8,
            "mup_enabled": True,  # llama.cpp takes it for granted
        },
        stated={"route_norm": True},
    ),
    Architecture(
        "lfm2_moe",
        MIXTURE,
        _EXPERTS | {"num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    Architecture("qwen3_next", MIXTURE, _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 64}),
    Architecture("qwen3_5_moe_text", MIXTURE, _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 64}),
    Architecture("qwen3_5_text", HYBRID, _DELTA),
    Architecture(
        "lfm2",
        HYBRID,
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    Architecture(
        "granitemoehybrid",
        HYBRID,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
        },
        stated={"layer_types": ["mamba", "attention"]},  # transformers renames them
    ),
    Architecture(
        "falcon_h1",
        HYBRID,
        {
            "head_dim": 32,
            "mamba_d_ssm": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "key_multiplier": 0.4,
            "attention_out_multiplier": 0.9,
            "mlp_multipliers": [0.9, 0.3],
            "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.23,
        },
    ),
    Architecture(
        "nemotron_h",
        HYBRID,
        {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": _NEMOTRON,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
        stated={"hybrid_override_pattern": _NEMOTRON},
    ),
    Architecture("mamba", HYBRID, {"state_size": 16, "intermediate_size": 256}),
    Architecture("falcon_mamba", HYBRID, {"state_size": 16, "intermediate_size": 256}),
    Architecture(
        "mamba2",
        HYBRID,
        {"intermediate_size": None, "num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1},
    ),
    Architecture(
        "jamba",
        HYBRID,
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 32,
        },
        tokenizer="pieces",
    ),
    Architecture(
        "bamba", HYBRID, {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
    ),
    Architecture(
        "kimi_linear",
        HYBRID,
        _LATENT | _EXPERTS | {"q_lora_rank": None, "n_shared_experts": 1, "linear_attn_config": _KDA},
        stated={"linear_attn_config": _KDA},
    ),
    Architecture("rwkv", HYBRID, {"attention_hidden_size": 128}, obstacle="llama.cpp does not have its version 4"),
)
"""All that are tried."""
