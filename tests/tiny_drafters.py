"""Tiny models with a head for speculation, whose tensors are those that the hub's have and transformers drops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_pairs import write_tokenizer
from tiny_models import LOUD, SMALL, TEXT

from tesseraq_gguf.models import ModelSource


def save_drafter(folder: Path) -> None:
    """Write a Qwen3.5 with two blocks, the second of full attention, and a head of one more such block."""
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(7)
    config = transformers.Qwen3_5TextConfig(
        **(SMALL | {"hidden_size": 64, "intermediate_size": 128}),
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
                         "partial_rotary_factor": 0.25, "mrope_interleaved": True},
        initializer_range=LOUD,
        mtp_num_hidden_layers=1,
    )  # fmt: skip
    model = transformers.Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    last = next(name for name in weights if "layers.1.mlp.up_proj" in name).removesuffix("mlp.up_proj.weight")
    block = {name.removeprefix(last): w for name, w in weights.items() if name.startswith(last)}
    head = {f"mtp.layers.0.{name}": torch.randn_like(w) * LOUD for name, w in block.items()}
    head |= {
        f"mtp.{name}.weight": torch.randn(64) * 0.1 for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    head |= {"mtp.fc.weight": torch.randn(64, 128) * LOUD}
    save_file(weights | {n: w.to(torch.bfloat16).contiguous() for n, w in head.items()}, file, {"format": "pt"})


@pytest.fixture(scope="session")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A tiny model with a head for speculation; its tokenizer wants `take_for_gpt2`."""
    folder = tmp_path_factory.mktemp("drafter") / "drafter"
    save_drafter(folder)
    write_tokenizer(folder, TEXT * 20, SMALL["vocab_size"])
    return ModelSource("drafter", folder)
