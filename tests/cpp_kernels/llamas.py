"""Small Llamas written tensor by tensor, and their answers: for tests of what the runtime makes of a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tesseraq_gguf.runtime import SourceTree
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.ptq161 import packer as ptq161

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[Array, int]]
"""Bytes or numbers, and their `ggml_type`, by the tensor's name."""

F32, I32, BCQ4, PTQ1_61, BCQ2 = 0, 26, 503, 505, 506

PACKER = packer_of("ptq1_61")

WIDTH, INNER, VOCABULARY = 256, 384, 48

SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}

SHARED = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Whose order a matrix has."""


LETTERS = "abcdefghijklmnopqrstuvwxyz"

_WRITE = """
import json, sys, numpy as np, gguf
path, arrays, job = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
writer = gguf.GGUFWriter(path, "llama", **job["split"])
writer.add_context_length(64)
writer.add_embedding_length(job["width"])
writer.add_block_count(1)
writer.add_feed_forward_length(job["inner"])
writer.add_head_count(4)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(job["width"] // 4)
writer.add_vocab_size(len(job["tokens"]))
writer.add_tokenizer_model("llama")
writer.add_token_list(job["tokens"])
writer.add_token_scores([0.0] * len(job["tokens"]))
writer.add_token_types([2, 3, 3] + [1] * (len(job["tokens"]) - 3))
writer.add_unk_token_id(0); writer.add_bos_token_id(1); writer.add_eos_token_id(2)
if job["codebooks"]:
    key = {128: "tesseraq.bcq.codebooks", 16: "tesseraq.bcq2.codebooks"}[len(job["codebooks"])]
    writer.add_key_value(key, job["codebooks"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT8)
for name, type in job["types"].items():
    writer.add_tensor(name, arrays[name], raw_dtype=gguf.GGMLQuantizationType(type))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


def write_model(
    source: SourceTree,
    path: Path,
    tensors: Tensors,
    codebooks: Array | None = None,
    split: Mapping[str, int | bool] | None = None,
) -> Path:
    """Write a Llama of one block, with a tokenizer of single letters, and return its file, or the first of them.

    Args:
        source: whose `gguf` writes the file.
        path: where to.
        tensors: what is in it.
        codebooks: those of BCQ4, int8 [8, 16], or of BCQ2, int8 [4, 4]; None for the universal ones.
        split: arguments of GGUFWriter that make several files.
    """
    arrays = path.with_suffix(".npz")
    named: dict[str, Any] = {name: array for name, (array, _) in tensors.items()}
    np.savez(arrays, **named)
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *LETTERS]
    job = {
        "types": {name: type for name, (_, type) in tensors.items()},
        "tokens": [*tokens, *(f"<{i}>" for i in range(VOCABULARY - len(tokens)))],
        "width": WIDTH,
        "inner": INNER,
        "codebooks": codebooks.flatten().tolist() if codebooks is not None else None,
        "split": dict(split or {}),
    }
    command = [sys.executable, "-c", _WRITE, str(path), str(arrays), json.dumps(job)]
    subprocess.run(command, env={"PYTHONPATH": str(source.gguf_py)}, check=True)
    return path if path.is_file() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def model_tensors(seed: int) -> tuple[Tensors, Tensors]:
    """The tensors of a model in PTQ1_61 with orders, and of the same model in float32 without."""
    rng = np.random.default_rng(seed)
    common: Tensors = {}
    for name in ("token_embd", "output"):
        common[f"{name}.weight"] = (rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), F32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        common[f"{name}.weight"] = (np.ones(WIDTH, np.float32), F32)
    packed, plain = dict(common), dict(common)
    orders = {name: rng.permutation(shape[1]).astype(np.int32) for name, shape in SHAPES.items() if name not in SHARED}
    for name, order in orders.items():
        packed[f"blk.0.{name}.order"] = (order, I32)
    for name, shape in SHAPES.items():
        arrays = ptq161.quantize((rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32))
        weights = np.empty(shape, np.float32)
        weights[:, orders[SHARED.get(name, name)]] = PACKER.dequantize(arrays)
        packed[f"blk.0.{name}.weight"] = (PACKER.pack(arrays), PTQ1_61)
        plain[f"blk.0.{name}.weight"] = (weights, F32)
    return packed, plain


def logits(model: Path, tokens: list[int], repack: bool = True) -> Array:
    """Answers of the runtime, float32 [tokens, vocabulary], in a process of its own."""
    code = """
import sys, json, numpy as np
from tesseraq_gguf.runtime.load import load_llama_cpp
llama_cpp = load_llama_cpp()
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.use_extra_bufts = json.loads(sys.argv[2])
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
if not model:
    sys.exit(3)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 64, 64, 2, 2
context = llama_cpp.llama_init_from_model(model, settings)
tokens = json.loads(sys.argv[3])
rows = []
for first, last in ((0, len(tokens) - 2), (len(tokens) - 2, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
    batch = llama_cpp.llama_batch_init(64, 0, 1)
    batch.n_tokens = last - first
    for i in range(last - first):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[first + i], first + i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    for i in range(last - first):
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (VOCABULARY,)).copy())
np.save(sys.argv[4], np.stack(rows))
""".replace("VOCABULARY", str(VOCABULARY))
    out = model.with_suffix(".npy")
    command = [sys.executable, "-c", code, str(model), json.dumps(repack), json.dumps(tokens), str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-3000:])
    return np.load(out)


def save(model: Path, copy: Path) -> None:
    """Load a model, in a process of its own, and save it as a file."""
    code = """
import sys
from tesseraq_gguf.runtime.load import load_llama_cpp
llama_cpp = load_llama_cpp()
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.use_extra_bufts = False
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
llama_cpp.llama_model_save_to_file(model, sys.argv[2].encode())
"""
    subprocess.run([sys.executable, "-c", code, str(model), str(copy)], check=True, capture_output=True)


def nmse(got: Array, expected: Array) -> float:
    """Mean squared error, relative to the mean square."""
    return float(((got - expected) ** 2).mean() / (expected**2).mean())
