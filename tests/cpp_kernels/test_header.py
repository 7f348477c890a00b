"""One fact in two places: the C header, the library, gguf-py and tesseraq_gguf/types/facts.py agree."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import pytest

from tesseraq_gguf.runtime import SourceTree, cache
from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.facts import TENSOR_TYPES
from tesseraq_gguf.types.ptq161 import packer as ptq161
from tesseraq_gguf.types.tsq import packer as tsq

from .conftest import kernel_types

CUSTOM = [t for t in TENSOR_TYPES.values() if t.custom]

ACTIVATIONS = {"q8_tsq": (510, 64, 72), "a4_bcq": (511, 64, 72), "q8_ptq": (512, 128, 144)}
"""Id, numbers and bytes of a block of activations, which no file has and Python has no other use for."""


def test_the_lists_of_c_and_python_are_equal() -> None:
    types = kernel_types()
    known = {t.name: (t.id, t.block_weights, t.block_bytes) for t in CUSTOM}
    assert {name: (int(i), int(weights), int(size)) for _, name, i, weights, size in types} == known
    assert all(upper == lower.upper() for upper, lower, *_ in types)
    assert all(t.id == t.file_type for t in CUSTOM)
    header = (cache.kernels_dir() / "types.h").read_text()
    activations = re.findall(r"^ +X\((\w+), +(\w+), +(\d+), +(\d+), +(\d+)\)", header, re.MULTILINE)
    assert {name: (int(i), int(n), int(size)) for _, name, i, n, size in activations} == ACTIVATIONS
    assert f"#define TESSERAQ_TYPE_END {max(i for i, *_ in ACTIVATIONS.values()) + 1}\n" in header


def test_header_constants() -> None:
    header = "".join((cache.kernels_dir() / name / f"{name}.h").read_text() for name in ("tsq", "bcq", "ptq"))
    assert re.search(rf"#define QK_TSQ {tsq.BLOCK}\b", header)
    assert re.search(rf"#define QK_BCQ +{bcq.BLOCK}\b", header)
    assert re.search(rf"#define QK_PTQ +{ptq161.BLOCK}\b", header)
    assert re.search(rf"#define PTQ_SALIENT +{ptq161.SALIENT}\b", header)


@pytest.mark.runtime
@pytest.mark.parametrize("t", TENSOR_TYPES.values(), ids=lambda t: t.name)
def test_library_traits(ggml: ctypes.CDLL, t: object) -> None:
    assert ggml.ggml_type_name(t.id).decode().lower() == t.name  # type: ignore[attr-defined]
    assert ggml.ggml_blck_size(t.id) == t.block_weights  # type: ignore[attr-defined]
    assert ggml.ggml_type_size(t.id) == t.block_bytes  # type: ignore[attr-defined]


@pytest.mark.runtime
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_a_type(ggml: ctypes.CDLL, name: str) -> None:
    number, block, size = ACTIVATIONS[name]
    assert ggml.ggml_type_name(number) == name.encode()
    assert ggml.ggml_blck_size(number) == block
    assert ggml.ggml_type_size(number) == size


@pytest.mark.runtime
def test_other_ids_are_empty(ggml: ctypes.CDLL) -> None:
    ours = [*(t.id for t in CUSTOM), *(number for number, *_ in ACTIVATIONS.values())]
    for i in sorted({*range(43, 513)} - {*ours}):
        assert ggml.ggml_type_name(i) is None
        assert ggml.ggml_blck_size(i) == 0


@pytest.mark.runtime
def test_gguf_py_of_the_source(source: SourceTree) -> None:
    code = """
import sys, numpy as np, gguf
from gguf.quants import bcq2_dequantize_blocks, bcq_dequantize_blocks, dequantize
from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.tsq import packer as tsq
from tesseraq_gguf.types.facts import TENSOR_TYPES, WITH_CODEBOOKS
from tesseraq_gguf.types.packers import packer_of
assert gguf.__file__.startswith(sys.argv[1]), gguf.__file__
for t in TENSOR_TYPES.values():
    assert gguf.GGMLQuantizationType[t.name.upper()] == t.id
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t.id)] == (t.block_weights, t.block_bytes)
    name = gguf.LlamaFileType(t.file_type).name
    assert name == "ALL_F32" if t.name == "f32" else name.startswith("MOSTLY_" + t.name.upper()), name
for bits in (2, 3, 4):
    data = np.random.default_rng(0).integers(0, 256, (20, 3 * (2 + 8 * bits)), dtype=np.uint8)
    expected = tsq.dequantize(*tsq.unpack(data, bits), bits)
    got = dequantize(data, gguf.GGMLQuantizationType[f"TSQ{bits}"])
    assert (got.view(np.uint32) == expected.view(np.uint32)).all()
own_blocks = {"bcq2": bcq2_dequantize_blocks, "bcq4": bcq_dequantize_blocks, "bcq4_a4": bcq_dequantize_blocks}
for name in WITH_CODEBOOKS:
    kind, packer, shape = TENSOR_TYPES[name], packer_of(name), bcq.shape_of(name)
    data = np.random.default_rng(0).integers(0, 256, (20, 3 * kind.block_bytes), dtype=np.uint8)
    arrays = packer.unpack(data)
    assert (dequantize(data, gguf.GGMLQuantizationType[name.upper()]) == packer.dequantize(arrays)).all()
    own = np.sort(np.random.default_rng(1).integers(-31, 32, shape.shape).astype(np.int8))
    got = own_blocks[name](data.reshape(-1, kind.block_bytes), own.reshape(-1)).reshape(20, -1)
    assert (got == packer.dequantize(arrays | {"c": bcq.repeated(own, 20)})).all()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(source.gguf_py)],
        env={"PYTHONPATH": str(source.gguf_py)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
