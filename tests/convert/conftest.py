"""Tiny models with random weights, made here from transformers configs, and random learned tensors for them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

from tesseraq_gguf.converter.tensor_types import tensor_type
from tesseraq_gguf.grids.affine import TSQ2, scale_code
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.quantized import QuantizedTensor, save_tensors

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
# architecture, what differs from SMALL
KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama-576": ("Llama", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama-odd": ("Llama", {"intermediate_size": 160, "tie_word_embeddings": True}),
    "llama-odder": ("Llama", {"intermediate_size": 100}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 64, "head_dim": 32}),
    "qwen2": ("Qwen2", {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
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
    "phi-fused": ("Phi3", {"original_max_position_embeddings": 512}),
}


def _tokenizer() -> bytes:
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


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    """Return the tiny model of a kind in KINDS, made once."""
    made: dict[str, ModelSource] = {}
    tokenizer = _tokenizer()

    def make(kind: str) -> ModelSource:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            _save(kind, folder)
            (folder / "tokenizer.model").write_bytes(tokenizer)
            template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
            (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template}))
            made[kind] = ModelSource(kind, folder)
        return made[kind]

    return make


def _save(kind: str, folder: Path) -> None:
    import transformers

    architecture, different = KINDS[kind]
    name = f"{architecture}TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, name)(**(SMALL | different))
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide their places
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")


def random_tensor(shape: tuple[int, int], seed: int) -> QuantizedTensor:
    """Return a TSQ2 matrix of random codes whose weights are about as large as a model's."""
    random = torch.Generator().manual_seed(seed)
    rows, groups = shape[0], shape[1] // 64
    q = torch.randint(0, 4, shape, generator=random, dtype=torch.uint8)
    d = scale_code(torch.rand(rows, groups, generator=random) * 0.02 + 0.005)
    z = torch.randint(90, 140, (rows, groups), generator=random, dtype=torch.uint8)
    return TSQ2.assemble(q, d, z)


@pytest.fixture(scope="session")
def learn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelSource], list[Path]]:
    """Return the block files of a model: random codes for every matrix whose rows TSQ2 fits."""
    made: dict[str, list[Path]] = {}

    def make(source: ModelSource) -> list[Path]:
        if source.name not in made:
            folder = tmp_path_factory.mktemp("learned")
            shapes = Decoder(source, torch.device("cpu")).matrix_shapes()
            blocks: dict[str, dict[str, QuantizedTensor]] = {}
            for seed, (name, shape) in enumerate(shapes.items()):
                if tensor_type("tsq2").fits(shape[1]):
                    blocks.setdefault(name.split(".")[2], {})[name] = random_tensor(shape, seed)
            made[source.name] = []
            for block, tensors in blocks.items():
                save_tensors(folder / f"{block}.safetensors", tensors)
                made[source.name].append(folder / f"{block}.safetensors")
        return made[source.name]

    return make
