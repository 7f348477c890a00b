# needs: extras=demo,build
"""Measure the peak memory of learning Llamas of different depth, each in a process of its own.

Shows that learning needs the same memory whatever the model's depth: fails if 24 blocks take 15 % more than 8.

    scripts/run bench memory
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEPTHS = (8, 24)
MOST = 1.15
WIDTH, INNER, VOCABULARY = 512, 1408, 320
SAMPLES, LENGTH = 4, 32
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards box with a jolly gnome. "


def make_model(folder: Path, blocks: int) -> None:
    """Write a Llama with random weights, one shard per block, and a tokenizer."""
    import sentencepiece
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(blocks)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * columns**-0.5).to(torch.bfloat16)

    weight_map: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, f"{name}.safetensors"))

    shapes = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    for i in range(blocks):
        tensors = {f"model.layers.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        shard(f"block-{i:02}", tensors)
    ends = {"model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16)}
    shard("ends", ends | {f"{n}.weight": matrix(VOCABULARY, WIDTH) for n in ("model.embed_tokens", "lm_head")})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20 + [chr(97 + i) * 3 + " " + WORDS[i:] for i in range(26)]),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def learn(model: Path, out: Path) -> None:
    """Learn a model with few steps and print the peak memory of this process in bytes."""
    import resource
    from dataclasses import replace

    from tesseraq_gguf import Recipe, convert
    from tesseraq_gguf.recipe.presets import PRESETS

    # one step in each stage: more take no more memory
    PRESETS["fast"] = replace(PRESETS["fast"], steps=1)
    convert(Recipe(str(model), out, preset="fast", samples=SAMPLES, seqlen=LENGTH, device="cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak if sys.platform == "darwin" else peak * 1024)


def main() -> None:
    """Learn models of all depths and compare."""
    parser = argparse.ArgumentParser(prog="scripts/run bench memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--learn", nargs=2, type=Path, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.learn:
        learn(*options.learn)
        return
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    peaks: dict[int, int] = {}
    print(f"{'blocks':>6}{'weights':>12}{'peak memory':>14}")
    for blocks in DEPTHS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "model").mkdir()
            make_model(folder / "model", blocks)
            size = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
            command = [sys.executable, __file__, "--learn", str(folder / "model"), str(folder / "out.gguf")]
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        peaks[blocks] = int(result.stdout.split()[-1])
        print(f"{blocks:>6}{size / 2**20:>8.0f} MiB{peaks[blocks] / 2**20:>10.0f} MiB", flush=True)
    ratio = peaks[DEPTHS[-1]] / peaks[DEPTHS[0]]
    print(f"{DEPTHS[-1]} blocks take {ratio:.2f} times the memory of {DEPTHS[0]}")
    if ratio > MOST:
        sys.exit(f"error: more than {MOST:.2f} times")


if __name__ == "__main__":
    main()
