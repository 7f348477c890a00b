"""Tiny vision-language models with random weights: one for each way in which checkpoints hold a language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LOUD, SMALL, tokenizer

from tesseraq_gguf.models import ModelSource

_TEXT = SMALL | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": LOUD}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION |= {"image_size": 56, "patch_size": 14, "initializer_range": LOUD}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
}
_QWEN_VISION |= {"patch_size": 16, "num_position_embeddings": 64, "initializer_range": LOUD}
_QWEN_TOKENS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# what transformers calls the config, that of the text, that of the vision, what else there is
VISION_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3-vision": (
        "Gemma3Config",
        _TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
        _VISION,
        {"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        _TEXT | {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        _QWEN_VISION | {"patch_size": 14, "fullatt_block_indexes": [1]},
        _QWEN_TOKENS,
    ),
    "qwen3-vl": (
        "Qwen3VLConfig",
        _TEXT | {"head_dim": 16, "rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        _QWEN_TOKENS,
    ),
    "smolvlm": (
        "SmolVLMConfig",
        _TEXT | {"model_type": "llama"},
        _VISION,
        {"image_token_id": 300, "scale_factor": 2, "tie_word_embeddings": False},
    ),
    "mistral3": (
        "Mistral3Config",
        _TEXT | {"model_type": "mistral", "head_dim": 16},
        _VISION | {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 300},
    ),
    "llava": (
        "LlavaConfig",
        _TEXT | {"model_type": "llama"},
        _VISION | {"model_type": "clip_vision_model"},
        {"image_token_index": 300},
    ),
}


_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
_PREPROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 4}

_ON_THE_HUB = {
    "gemma3-vision": ("vision_tower.", "vision_tower.vision_model."),
    "llava": ("vision_tower.", "vision_tower.vision_model."),
}
"""Names of towers before transformers 5, which llama.cpp's converter knows and files on the hub have."""


def _rename_as_on_the_hub(file: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    ours, theirs = _ON_THE_HUB.get(kind, ("", ""))
    if ours:
        renamed = {
            name.replace(ours, theirs, 1) if name.startswith(ours) else name: t for name, t in load_file(file).items()
        }
        save_file(renamed, file, {"format": "pt"})


def save_vision_model(kind: str, folder: Path) -> None:
    import transformers

    name, text, vision, different = VISION_KINDS[kind]
    torch.manual_seed(len(kind))
    config = getattr(transformers, name)(text_config=text, vision_config=vision, **different)
    model = transformers.AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide their places
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not parameter.any():  # as Gemma's projection begins, through which nothing would be seen
                parameter.normal_(std=LOUD)
    model.to(torch.bfloat16).save_pretrained(folder)
    _rename_as_on_the_hub(folder / "model.safetensors", kind)


@pytest.fixture(scope="session")
def make_vision_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    """Return the tiny model of a kind in VISION_KINDS, made once."""
    made: dict[str, ModelSource] = {}
    pieces = tokenizer()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}

    def make(kind: str) -> ModelSource:
        if kind not in made:
            folder = tmp_path_factory.mktemp("vision") / kind
            save_vision_model(kind, folder)
            (folder / "tokenizer.model").write_bytes(pieces)
            (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": _TEMPLATE}))
            (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR))
            made[kind] = ModelSource(kind, folder)
        return made[kind]

    return make
