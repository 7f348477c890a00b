"""Tiny models with random weights, made here from transformers configs: one per habit of an architecture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from tesseraq_gguf.models import ModelSource

VOCABULARY = 320
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jolly gnome. "
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOUD = 0.2
"""Standard deviation of weights with which logits vary: those of transformers' own hardly do."""
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# architecture, what differs from SMALL
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-576": ("Llama", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama-odd": ("Llama", {"intermediate_size": 160, "tie_word_embeddings": True}),
    "llama-odder": ("Llama", {"intermediate_size": 100}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 64, "head_dim": 32}),
    "qwen2": ("Qwen2", {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 0.5},
    ),
    "gemma3": (
        "Gemma3",
        {
            "hidden_size": 640,
            "head_dim": 64,
            "sliding_window": 64,
            "query_pre_attn_scalar": 64,
            "num_key_value_heads": 1,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 192}),
    "qwen3-moe": ("Qwen3Moe", MIXTURE | {"head_dim": 64}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi-fused": ("Phi3", {"original_max_position_embeddings": 512}),
}
# more experts than are learned together
MANY_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-many": (
        "Mixtral",
        {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 18, "num_experts_per_tok": 4},
    ),
}
_WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
# rows of two blocks of 128, and heads of one
WIDE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-256": ("Llama", _WIDE),
    "llama-256-bias": ("Llama", _WIDE | {"attention_bias": True, "mlp_bias": True}),
    "mixtral-272": ("Mixtral", _WIDE | {"intermediate_size": 272, "num_local_experts": 8, "num_experts_per_tok": 2}),
}
# heads of other kinds than a matrix that is all there is to logits
HEAD_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "cohere": ("Cohere", {"logit_scale": 0.0625}),
    "phi": ("Phi", {"num_key_value_heads": 4, "intermediate_size": 512}),  # llama.cpp takes these for granted
    "gpt-neox": ("GPTNeoX", {"intermediate_size": 256, "tie_word_embeddings": False}),
    "gemma2-capped": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 2.0}),
}


def experts(kind: str) -> list[tuple[str, str, str]]:
    """Gate, up and down of each expert of a mixture, by module name; none of other kinds."""
    names = {"mixtral": ("w1", "w3", "w2")}.get(kind, ("gate_proj", "up_proj", "down_proj"))
    count = 4 if kind in MIXTURES else 0
    return [tuple(f"mlp.experts.{e}.{name}" for name in names) for e in range(count)]  # type: ignore[misc]


def tokenizer() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20 + [chr(97 + i) * 3 + " " + TEXT[i:] for i in range(26)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        hard_vocab_limit=True,
        pad_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def save_model(kind: str, folder: Path, spread: float | None = None) -> None:
    import transformers

    architecture, different = (KINDS | MANY_KINDS | WIDE_KINDS | HEAD_KINDS)[kind]
    if kind in HEAD_KINDS:
        spread = spread or LOUD
    if spread:
        different = different | {"initializer_range": spread}
    name = f"{architecture}TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, name)(**(SMALL | different))
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide their places
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelSource]:
    """Return the tiny model of a kind in KINDS, MANY_KINDS, WIDE_KINDS or HEAD_KINDS, made once.

    A second argument is the standard deviation of its weights, such as LOUD, in place of transformers' 0.02.
    """
    made: dict[tuple[str, float | None], ModelSource] = {}
    pieces = tokenizer()

    def make(kind: str, spread: float | None = None) -> ModelSource:
        if (kind, spread) not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            save_model(kind, folder, spread)
            (folder / "tokenizer.model").write_bytes(pieces)
            template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
            (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template}))
            made[kind, spread] = ModelSource(kind, folder)
        return made[kind, spread]

    return make
