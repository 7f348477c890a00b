"""A short trial of speed: one block of a 7B model with random weights, in our 2 bits and in Q4_0, in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.evaluation.speed import Speed, speeds
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.packers import packer_of

OURS, THEIRS = "tsq2", "q4_0"
"""The types that are timed."""

USUAL_PROMPT, USUAL_ANSWER = (2.2, 4.1), (2.4, 3.9)
"""How many times as fast ours was in prompts and answers on the machines of docs/results, at least and at most."""

_WIDTH, _INNER, _HEADS, _VOCABULARY = 4096, 11008, 32, 256

_ROWS = 64
"""Rows that are random; speed does not depend on weights, so they come again and again."""

_SHAPES = {f"attn_{name}": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "output")} | {
    "ffn_gate": (_INNER, _WIDTH),
    "ffn_up": (_INNER, _WIDTH),
    "ffn_down": (_WIDTH, _INNER),
}


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        ours: speed of our type.
        theirs: speed of Q4_0.
    """

    ours: Speed
    theirs: Speed

    @property
    def prompt(self) -> float:
        """How many times as fast ours reads a prompt."""
        return self.ours.prompt / self.theirs.prompt

    @property
    def answer(self) -> float:
        """How many times as fast ours answers."""
        return self.ours.answer / self.theirs.answer


def try_speed(watch: Callable[[str, int, int], None] = lambda *_: None) -> Trial:
    """Time both types.

    Raises:
        RuntimeMissingError: the runtime is not built.
        EvaluationError: it does not run.
    """
    with tempfile.TemporaryDirectory(prefix="tesseraq-trial-") as folder:
        files = [Path(folder, f"{type}.gguf") for type in (OURS, THEIRS)]
        for file in files:
            write_trial(file, file.stem)
        found = speeds(files, rounds=2, watch=watch)
    return Trial(*(found[file] for file in files))


def write_trial(path: Path, type: str) -> None:
    """Write the model in a type, with a tokenizer of no words: llama-bench needs none."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("none")
    kind: Any = tensor_type(type).id  # gguf does not know all of ours, and needs no more than their number
    shapes = {f"blk.0.{name}.weight": shape for name, shape in _SHAPES.items()}
    shapes |= dict.fromkeys(("token_embd.weight", "output.weight"), (_VOCABULARY, _WIDTH))
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    rows = {columns: _random_rows(type, columns) for columns in (_WIDTH, _INNER)}
    for name, (count, columns) in shapes.items():
        writer.add_tensor_info(name, (count, columns), np.dtype(np.float32), count * rows[columns].shape[1], kind)
    for name in norms:
        writer.add_tensor_info(name, (_WIDTH,), np.dtype(np.float32), 4 * _WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for count, columns in shapes.values():
        writer.write_tensor_data(np.tile(rows[columns], (-(-count // _ROWS), 1))[:count])
    for _ in norms:
        writer.write_tensor_data(np.ones(_WIDTH, np.float32))
    writer.close()


def _random_rows(type: str, columns: int) -> NDArray[np.uint8]:
    """Rows of weights about as large as a model's, uint8 [rows, bytes]."""
    random = np.random.default_rng(columns)
    if type == OURS:
        groups = _ROWS, columns // 64
        q = random.integers(0, 4, (_ROWS, columns), np.uint8)
        return packer_of(type).pack({"q": q, "d": np.full(groups, 70, np.uint8), "z": np.full(groups, 112, np.uint8)})
    from gguf.quants import quantize

    weights = (random.standard_normal((_ROWS, columns)) * 0.02).astype(np.float32)
    rows: NDArray[np.uint8] = quantize(weights, tensor_type(type).id)
    return rows
