"""Codebooks in use: models of one process share them, whatever files they are in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tesseraq_gguf.runtime import Runtime, SourceTree

from .llamas import BCQ4, F32, SHAPES, VOCABULARY, WIDTH, Array, Tensors, save, write_model

pytestmark = pytest.mark.runtime

OWN = np.sort(np.random.default_rng(0).integers(-31, 32, (8, 16)), axis=1).astype(np.int8)


def bcq_tensors() -> Tensors:
    """A model with any blocks of BCQ4."""
    rng = np.random.default_rng(1)
    tensors: Tensors = {}
    for name in ("token_embd", "output"):
        tensors[f"{name}.weight"] = (rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), F32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = (np.ones(WIDTH, np.float32), F32)
    for name, (rows, columns) in SHAPES.items():
        blocks = rng.integers(0, 256, (rows, columns // 64, 36), dtype=np.uint8)
        blocks[:, :, 0] = 120  # a scale of 2^-9
        tensors[f"blk.0.{name}.weight"] = (blocks.reshape(rows, -1), BCQ4)
    return tensors


LOAD = """
import sys
from tesseraq_gguf.runtime.load import load_llama_cpp
llama_cpp = load_llama_cpp()
llama_cpp.llama_backend_init()
load = lambda path: llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
first, second = load(sys.argv[1]), load(sys.argv[2])
print(bool(first), bool(second), end=" ")
llama_cpp.llama_model_free(first)
print(bool(second or load(sys.argv[2])))
"""


@pytest.mark.parametrize(
    "split",
    [
        pytest.param({}, id="one file"),
        pytest.param({"split_max_tensors": 6}, id="parts"),
        pytest.param({"split_max_tensors": 20, "small_first_shard": True}, id="metadata first"),
    ],
)
@pytest.mark.parametrize("own", [None, OWN[::-1].copy()], ids=["universal", "own"])
def test_other_codebooks_wait(
    runtime: Runtime, source: SourceTree, tmp_path: Path, split: Mapping[str, int | bool], own: Array | None
) -> None:
    """The second model is refused while the first is loaded, and welcome when it is gone."""
    tensors = bcq_tensors()
    first = write_model(source, tmp_path / "first.gguf", tensors, own, split)
    assert ("-00001-of-" in first.name) == bool(split)
    second = write_model(source, tmp_path / "second.gguf", tensors, OWN)
    answer = subprocess.run([sys.executable, "-c", LOAD, str(first), str(second)], capture_output=True, text=True)
    assert answer.stdout == "True False True\n", answer.stderr
    assert "a model with other ones is loaded" in answer.stderr


@pytest.mark.parametrize("own", [None, OWN], ids=["universal", "own"])
def test_a_copy_of_a_loaded_model_has_its_codebooks(
    runtime: Runtime, source: SourceTree, tmp_path: Path, own: Array | None
) -> None:
    from tesseraq_gguf.gguf_files.gguf_file import open_gguf

    model, copy = write_model(source, tmp_path / "model.gguf", bcq_tensors(), own), tmp_path / "copy.gguf"
    save(model, copy)
    entries = [open_gguf(path).entries.get("tesseraq.bcq.codebooks") for path in (model, copy)]
    assert (entries[1] is None) == (own is None)
    assert entries[0] == entries[1]
