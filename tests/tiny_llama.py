"""A tiny Llama with random weights and a tokenizer, as a Hugging Face folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards box with a jolly gnome. "
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def make_tiny_model(folder: Path, template: str | None = None, **shape: int) -> Path:
    """Save a Llama of 2 blocks with random weights, and a tokenizer of 320 tokens; `shape` changes its config."""
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    small = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(**(small | shape))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20 + [chr(97 + i) * 3 + " " + WORDS[i:] for i in range(26)]),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    extra = {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | extra))
    return folder
