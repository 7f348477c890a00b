"""BCQ types: C against numpy and torch, the kernels on their own under sanitizers, and the universal codebooks."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.compute.kernel_arithmetic import codebook_blocks
from tesseraq_gguf.runtime import SourceTree, cache
from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.facts import LAYOUTS, Codebooks

from . import test_arm
from .conftest import pointer
from .test_arm import CC, processor
from .test_graph import instructions, run_sanitized
from .test_vec_dot import activations, dot, kernels, split

__all__ = ["instructions", "processor"]

Array = np.ndarray[Any, Any]

PACKER, BCQ2 = bcq.BCQ4, bcq.BCQ2
UNIVERSAL = bcq.universal(PACKER.shape)


def rows(seed: int, count: int, blocks: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, blocks * 36), dtype=np.uint8)


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
def test_header_json_and_page_have_the_same_codebooks(shape: Codebooks) -> None:
    header = (cache.kernels_dir() / "bcq" / f"{shape.layout}-codebooks.h").read_text()
    codebooks = bcq.universal(shape)
    assert [[int(n) for n in row.split(",")] for row in re.findall(r"\{([^}]*)\}", header)] == codebooks.tolist()
    page = (cache.kernels_dir().parent / "docs" / "formats.md").read_text()
    for i, row in enumerate(codebooks.tolist()):
        assert f"| {i} | {' | '.join(map(str, row))} |\n" in page
    # a block of zeros needs a codebook with a 0
    assert (codebooks == 0).any()


@pytest.mark.runtime
def test_bcq2_is_dequantised_as_the_page_says(ggml: ctypes.CDLL, ggml_cpu: ctypes.CDLL, source: SourceTree) -> None:
    """All scales with all selectors, any indices, in C and in the gguf package of the source."""
    data = np.random.default_rng(0).integers(0, 256, (256, 256, 18), dtype=np.uint8)
    data[:, :, 0], data[:, :, 1] = np.arange(256)[:, None], np.arange(256)
    data = data.reshape(256, -1)
    expected = BCQ2.dequantize(BCQ2.unpack(data))
    for kernel in [ggml.dequantize_row_bcq2, *kernels(ggml_cpu, "ggml_cpu_bcq2_to_fp32")]:
        out = np.empty_like(expected)
        kernel(pointer(data), pointer(out), ctypes.c_int64(out.size))
        assert (out == expected).all(), kernel.__name__
    code = """
import sys, numpy as np, gguf
from gguf.quants import bcq2_dequantize_blocks, dequantize
data, own, out = np.load(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
universal = dequantize(data, gguf.GGMLQuantizationType.BCQ2)
np.save(out, np.stack([universal, bcq2_dequantize_blocks(data.reshape(-1, 18), own).reshape(universal.shape)]))
"""
    own = np.sort(np.random.default_rng(1).integers(-31, 32, (4, 4)).astype(np.int8))
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, name)) for name in ("data.npy", "own.npy", "out.npy")]
        np.save(paths[0], data[:8])
        np.save(paths[1], own)
        subprocess.run([sys.executable, "-c", code, *paths], env={"PYTHONPATH": str(source.gguf_py)}, check=True)
        universal, others = np.load(paths[2])
    assert (universal == expected[:8]).all()
    assert (others == BCQ2.dequantize(BCQ2.unpack(data[:8]) | {"c": bcq.repeated(own, 8)})).all()


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1))
def test_dot_products_of_bcq2(ggml_cpu: ctypes.CDLL, blocks: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (1, blocks * 18), dtype=np.uint8)
    y = activations(np.random.default_rng(seed), blocks)
    da, qa = split(y)
    weights = BCQ2.dequantize(BCQ2.unpack(data)).reshape(-1, 64).astype(np.float64)
    offset = 32 * e5m3.decode(data.reshape(-1, 18)[:, :1]).astype(np.float64)
    expected = (weights * (qa * da[:, None].astype(np.float64))).sum()
    magnitude = ((np.abs(weights) + offset) * np.abs(qa * da[:, None].astype(np.float64))).sum()
    for kernel in kernels(ggml_cpu, "ggml_vec_dot_bcq2_q8_tsq"):
        assert abs(dot(kernel, data[0], y) - expected) <= 5e-7 * magnitude, kernel.__name__


@pytest.mark.runtime
def test_quantising_to_bcq2_finds_what_trying_all_finds(ggml: ctypes.CDLL) -> None:
    """Of normal numbers, within the scales that it tries; importance moves the error to where it matters less."""
    x = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    importance = np.random.default_rng(2).exponential(size=256).astype(np.float32)
    out = np.empty((16, 4 * 18), np.uint8)
    ggml.quantize_bcq2.restype = ctypes.c_size_t
    codebooks = bcq.universal(BCQ2.shape)

    def error(imatrix: Array | None, weights: Array | float) -> float:
        given = pointer(imatrix) if imatrix is not None else None
        assert ggml.quantize_bcq2(pointer(x), pointer(out), ctypes.c_int64(16), ctypes.c_int64(256), given) == out.size
        return float((weights * (BCQ2.dequantize(BCQ2.unpack(out)) - x) ** 2).sum())

    groups = x.reshape(-1, 4, 16).astype(np.float64)
    best = np.full(len(groups), np.inf)
    for scale in e5m3.decode(np.arange(256, dtype=np.uint8)):
        levels = scale * codebooks.astype(np.float64)
        errors = (np.abs(groups[:, :, :, None, None] - levels).min(axis=-1) ** 2).sum(axis=2)
        best = np.minimum(best, errors.min(axis=2).sum(axis=1))
    assert error(None, 1.0) == pytest.approx(best.sum(), rel=1e-3)
    weights = importance * np.sqrt((x**2).mean(axis=1, keepdims=True) + x**2)
    assert error(importance, weights) < 0.97 * error(None, weights)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
@pytest.mark.runtime
def test_sources_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = ["bcq/bcq.c", "bcq/cpu.c", "bcq/repack.cpp", *(["bcq/x86.c", "bcq/x86-repack.cpp"] if instructions else [])]
    options = [*(instructions or ["-DGGML_CPU_GENERIC"]), "-fsanitize=float-cast-overflow"]
    few = 16 if "-mavx512vnni" in instructions else 8 if instructions else 4
    many = 16 if "-mavx512vbmi" in instructions else 4
    assert run_sanitized(source, tmp_path / "bcq", ["gcc"], units, options) == f"{few} and {many} rows: all ok\n"


@pytest.mark.runtime
def test_neon(source: SourceTree, tmp_path: Path, processor: str) -> None:
    units = ["bcq/bcq.c", "bcq/cpu.c", "bcq/repack.cpp", "bcq/arm.c", "bcq/arm-repack.cpp"]
    command = [CC]  # which tells C and C++ apart
    assert test_arm.run(source, tmp_path / "bcq", command, units, processor) == "4 and 4 rows: all ok\n"


@pytest.mark.runtime
def test_dequantising_is_numpys_bit_for_bit(ggml: ctypes.CDLL, ggml_cpu: ctypes.CDLL) -> None:
    """All scales, any selectors and indices."""
    data = rows(0, 64, 256)
    data.reshape(64, 256, 36)[:, :, 0] = np.arange(256)
    expected = PACKER.dequantize(PACKER.unpack(data))
    for kernel in [ggml.dequantize_row_bcq4, *kernels(ggml_cpu, "ggml_cpu_bcq4_to_fp32")]:
        out = np.empty_like(expected)
        kernel(pointer(data), pointer(out), ctypes.c_int64(out.size))
        assert (out.view(np.uint32) == expected.view(np.uint32)).all(), kernel.__name__


@pytest.mark.runtime
def test_quantising_comes_near_the_grids_search(ggml: ctypes.CDLL) -> None:
    from tesseraq_gguf.types.grids import grid_of

    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    importance = np.random.default_rng(2).exponential(size=256).astype(np.float32)
    out = np.empty((64, 4 * 36), np.uint8)
    ggml.quantize_bcq4.restype = ctypes.c_size_t
    sizes = (ctypes.c_int64(64), ctypes.c_int64(256))

    def error(imatrix: Array | None, weights: Array | float) -> float:
        given = pointer(imatrix) if imatrix is not None else None
        assert ggml.quantize_bcq4(pointer(x), pointer(out), *sizes, given) == out.size
        assert (PACKER.pack(PACKER.unpack(out)) == out).all()
        return float((weights * (PACKER.dequantize(PACKER.unpack(out)) - x) ** 2).sum())

    grid = grid_of("bcq4")
    mine = grid.dequantize(grid.quantize(torch.from_numpy(x))).numpy()
    assert error(None, 1.0) <= 1.001 * float(((mine - x) ** 2).sum())
    weights = importance * np.sqrt((x**2).mean(axis=1, keepdims=True) + x**2)
    assert error(importance, weights) < 0.97 * error(None, weights)


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1))
def test_dot_products(ggml_cpu: ctypes.CDLL, blocks: int, seed: int) -> None:
    data = rows(seed, 1, blocks)[0]
    y = activations(np.random.default_rng(seed), blocks)
    da, qa = split(y)
    arrays = PACKER.unpack(data[None])
    codewords = UNIVERSAL[np.repeat(arrays["s"][0], 8), arrays["q"][0]].reshape(-1, 64).astype(np.float64)
    scale = e5m3.decode(arrays["d"][0]).astype(np.float64) * da
    expected = (scale * (codewords * qa).sum(axis=1)).sum()
    magnitude = (scale * ((np.abs(codewords) + 32) * np.abs(qa)).sum(axis=1)).sum()
    for kernel in kernels(ggml_cpu, "ggml_vec_dot_bcq4_q8_tsq"):
        assert abs(dot(kernel, data, y) - expected) <= 5e-7 * magnitude, kernel.__name__


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 35), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_activations_are_those_of_the_simulation(ggml_cpu: ctypes.CDLL, blocks: int, seed: int, exponent: int) -> None:
    """The torch evaluation and every kernel choose the same codewords and the same scales."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((blocks, 64)) * rng.exponential(size=(blocks, 64)) * 10.0**exponent).astype(np.float32)
    x[rng.integers(blocks)] = 0
    expected = codebook_blocks(torch.from_numpy(x)).numpy()
    for kernel in kernels(ggml_cpu, "quantize_row_a4_bcq"):
        y = np.empty(72 * blocks, np.uint8)
        kernel(pointer(x), pointer(y), ctypes.c_int64(x.size))
        d, q = split(y)
        assert (np.abs(q) <= 31).all()
        assert (q * d[:, None] == expected).all(), kernel.__name__


def test_own_codebooks_are_checked() -> None:
    good = np.sort(np.random.default_rng(0).integers(-31, 32, (8, 16)), axis=1)
    assert (bcq.read_codebooks(good.flatten().tolist(), PACKER.shape) == good).all()
    for bad in (good[:, ::-1], good * 2 + 31, good[:7], good / 2):
        with pytest.raises(ValueError, match=r"BCQ codebooks|BCQ codewords"):
            bcq.read_codebooks(bad, PACKER.shape)


def test_a_tensor_with_its_own_codebooks_explains_itself() -> None:
    arrays = PACKER.unpack(rows(3, 5, 2))
    own = np.sort(np.random.default_rng(1).integers(-31, 32, (8, 16)), axis=1).astype(np.int8)
    weights = PACKER.dequantize(arrays | {"c": bcq.repeated(own, 5)})
    assert weights[2, 9] == e5m3.decode(arrays["d"])[2, 0] * own[arrays["s"][2, 1], arrays["q"][2, 9]]
    assert (PACKER.pack(arrays | {"c": bcq.repeated(own, 5)}) == rows(3, 5, 2)).all()
