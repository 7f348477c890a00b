"""Codebooks in use: models of one process share them, whatever files they are in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tesseraq_gguf.runtime import Runtime, SourceTree

from .llamas import BCQ2, BCQ4, F32, SHAPES, VOCABULARY, WIDTH, Array, Tensors, save, write_model

pytestmark = pytest.mark.runtime

OWN = {
    BCQ4: np.sort(np.random.default_rng(0).integers(-31, 32, (8, 16)), axis=1).astype(np.int8),
    BCQ2: np.sort(np.random.default_rng(0).integers(-31, 32, (4, 4)), axis=1).astype(np.int8),
}
"""Codebooks that are not the universal ones, by `ggml_type`."""

KEYS = {BCQ4: "tesseraq.bcq.codebooks", BCQ2: "tesseraq.bcq2.codebooks"}

of_each_layout = pytest.mark.parametrize("layout", [BCQ4, BCQ2], ids=["bcq4", "bcq2"])


def bcq_tensors(layout: int) -> Tensors:
    """A model with any blocks of a layout."""
    rng = np.random.default_rng(1)
    tensors: Tensors = {}
    for name in ("token_embd", "output"):
        tensors[f"{name}.weight"] = (rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), F32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = (np.ones(WIDTH, np.float32), F32)
    for name, (rows, columns) in SHAPES.items():
        blocks = rng.integers(0, 256, (rows, columns // 64, {BCQ4: 36, BCQ2: 18}[layout]), dtype=np.uint8)
        blocks[:, :, 0] = 120  # a scale of 2^-9
        tensors[f"blk.0.{name}.weight"] = (blocks.reshape(rows, -1), layout)
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
@pytest.mark.parametrize("has_own", [False, True], ids=["universal", "own"])
@of_each_layout
def test_other_codebooks_wait(
    runtime: Runtime, source: SourceTree, tmp_path: Path, layout: int, split: Mapping[str, int | bool], has_own: bool
) -> None:
    """The second model is refused while the first is loaded, and welcome when it is gone."""
    tensors = bcq_tensors(layout)
    own = OWN[layout][::-1].copy() if has_own else None
    first = write_model(source, tmp_path / "first.gguf", tensors, own, split)
    assert ("-00001-of-" in first.name) == bool(split)
    second = write_model(source, tmp_path / "second.gguf", tensors, OWN[layout])
    answer = subprocess.run([sys.executable, "-c", LOAD, str(first), str(second)], capture_output=True, text=True)
    assert answer.stdout == "True False True\n", answer.stderr
    assert "a model with other ones is loaded" in answer.stderr


@of_each_layout
def test_the_codebooks_of_one_layout_are_nothing_to_the_other(
    runtime: Runtime, source: SourceTree, tmp_path: Path, layout: int
) -> None:
    other = BCQ4 if layout == BCQ2 else BCQ2
    first = write_model(source, tmp_path / "first.gguf", bcq_tensors(layout), OWN[layout])
    second = write_model(source, tmp_path / "second.gguf", bcq_tensors(other), OWN[other])
    answer = subprocess.run([sys.executable, "-c", LOAD, str(first), str(second)], capture_output=True, text=True)
    assert answer.stdout == "True True True\n", answer.stderr


@pytest.mark.parametrize("has_own", [False, True], ids=["universal", "own"])
@of_each_layout
def test_a_copy_of_a_loaded_model_has_its_codebooks(
    runtime: Runtime, source: SourceTree, tmp_path: Path, layout: int, has_own: bool
) -> None:
    own: Array | None = OWN[layout] if has_own else None
    model, copy = write_model(source, tmp_path / "model.gguf", bcq_tensors(layout), own), tmp_path / "copy.gguf"
    save(model, copy)
    read = """
import sys, gguf
fields = [gguf.GGUFReader(path).fields.get(sys.argv[1]) for path in sys.argv[2:]]
print([field and field.contents() for field in fields])
"""
    command = [sys.executable, "-c", read, KEYS[layout], str(model), str(copy)]
    answer = subprocess.run(
        command, env={"PYTHONPATH": str(source.gguf_py)}, capture_output=True, text=True, check=True
    )
    codebooks = own.flatten().tolist() if own is not None else None
    assert answer.stdout == f"{[codebooks, codebooks]}\n"
