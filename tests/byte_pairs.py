"""A tiny tokenizer of byte pairs, and a converter that takes it for GPT-2's: llama.cpp knows such ones by a hash."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_GPT2 = "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"

_TAKEN = f"""
import hashlib
own = hashlib.sha256
class Known:
    def hexdigest(self):
        return "{_GPT2}"
# what llama.cpp's converter hashes is a list of tokens
hashlib.sha256 = lambda data=b"", **more: Known() if data[:1] == b"[" else own(data, **more)
"""


def write_tokenizer(folder: Path, text: str, vocabulary: int, special: tuple[str, ...] = ()) -> None:
    """Put a byte-level tokenizer of so many tokens into a model's folder; some of them are special ones by name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink(missing_ok=True)
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def take_for_gpt2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every child process take a tokenizer that llama.cpp does not know for GPT-2's.

    Args:
        folder: takes a file that the child processes run when they start.
        monkeypatch: undoes it.
    """
    (folder / "sitecustomize.py").write_text(_TAKEN)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def take_from_now_on() -> None:
    """Let llama.cpp's converter, imported after this, take a tokenizer that it does not know for GPT-2's."""
    exec(_TAKEN, {})
