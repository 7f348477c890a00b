"""PTQ1_61: C against numpy, and the kernels on their own under sanitizers."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.runtime import SourceTree
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.ptq161 import packer as ptq161

from . import test_arm
from .conftest import pointer
from .test_arm import CC, processor
from .test_graph import instructions, run_sanitized
from .test_vec_dot import dot_with, kernels

__all__ = ["instructions", "processor"]

Array = np.ndarray[Any, Any]

PACKER = packer_of("ptq1_61")

GROUP = 16
"""Blocks of a group of Q8_PTQ activations."""

UNITS = ["ptq/ptq.c", "ptq/cpu.c", "ptq/repack.cpp"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
@pytest.mark.runtime
def test_sources_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = [*UNITS, *(["ptq/x86.c", "ptq/x86-repack.cpp"] if instructions else [])]
    options = [*(instructions or ["-DGGML_CPU_GENERIC"]), "-fsanitize=float-cast-overflow"]
    lines = 16 if "-mavx512vnni" in instructions else 8 if instructions else 4
    assert run_sanitized(source, tmp_path / "ptq", ["gcc"], units, options) == f"{lines} rows: all ok\n"


@pytest.mark.runtime
def test_neon(source: SourceTree, tmp_path: Path, processor: str) -> None:
    units = [*UNITS, "ptq/arm.c", "ptq/arm-repack.cpp"]
    assert test_arm.run(source, tmp_path / "ptq", [CC], units, processor) == "4 rows: all ok\n"


@pytest.mark.runtime
def test_dequantising_is_numpys_bit_for_bit(ggml: ctypes.CDLL, ggml_cpu: ctypes.CDLL) -> None:
    """All scales, any codes and signs."""
    data = np.random.default_rng(0).integers(0, 256, (64, 256, 27), dtype=np.uint8)
    data[:, :, 0], data[:, :, 1] = np.arange(256), np.arange(256)[::-1]
    data = data.reshape(64, -1)
    expected = PACKER.dequantize(PACKER.unpack(data))
    for kernel in [ggml.dequantize_row_ptq1_61, *kernels(ggml_cpu, "ggml_cpu_ptq1_61_to_fp32")]:
        out = np.empty_like(expected)
        kernel(pointer(data), pointer(out), ctypes.c_int64(out.size))
        assert (out.view(np.uint32) == expected.view(np.uint32)).all(), kernel.__name__


@pytest.mark.runtime
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-45, 15))
def test_quantising_is_numpys_bit_for_bit(ggml: ctypes.CDLL, seed: int, exponent: int) -> None:
    """With an importance matrix too, also such as is zero for some blocks, or for one kind of their weights."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((8, 512)) * rng.exponential(size=(8, 512)) * 10.0**exponent).astype(np.float32)
    x[rng.integers(8), 128:256] = 0
    importance = rng.exponential(size=512).astype(np.float32)
    importance[100:280] = 0
    ggml.quantize_ptq1_61.restype = ctypes.c_size_t

    def in_c(imatrix: Array | None) -> Array:
        out = np.empty((8, 4 * 27), np.uint8)
        given = pointer(imatrix) if imatrix is not None else None
        sizes = (ctypes.c_int64(8), ctypes.c_int64(512))
        assert ggml.quantize_ptq1_61(pointer(x), pointer(out), *sizes, given) == out.size
        return out

    assert (in_c(None) == PACKER.pack(ptq161.quantize(x))).all()
    mean_square = np.cumsum(x * x, axis=1, dtype=np.float32)[:, -1:] / np.float32(512)
    weights = importance * np.sqrt(mean_square + x * x)
    assert (in_c(importance) == PACKER.pack(ptq161.quantize(x, weights))).all()


def split(y: Array) -> tuple[Array, Array, Array]:
    """Scales, float32 [blocks, 2], sums, int32 [blocks, 2], and numbers, int8 [blocks, 128], in the weights' order."""
    blocks = len(y) // 144
    d, s, qs = np.empty((blocks, 2), np.float32), np.empty((blocks, 2), np.int32), np.empty((blocks, 128), np.int8)
    for i in range(0, blocks, GROUP):
        m = min(GROUP, blocks - i)
        group = y[144 * i : 144 * (i + m)]
        d[i : i + m] = group[: 8 * m].view(np.float32).reshape(2, m).T
        s[i : i + m] = group[8 * m : 16 * m].view(np.int32).reshape(2, m).T
        qs[i : i + m] = np.roll(group[16 * m :].view(np.int8).reshape(m, 128), 24, axis=1)
    return d, s, qs


def quantize_activations(library: ctypes.CDLL, x: Array) -> list[Array]:
    """Q8_PTQ bytes of a row of floats, by every kernel."""
    results = []
    for kernel in kernels(library, "quantize_row_q8_ptq"):
        y = np.empty(x.size // 128 * 144, np.uint8)
        kernel(pointer(x), pointer(y), ctypes.c_int64(x.size))
        results.append(y)
    return results


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-40, 30))
def test_activations_from_float(ggml_cpu: ctypes.CDLL, blocks: int, seed: int, exponent: int) -> None:
    """All kernels write the same bytes; each number is within half a step of its kind; sums belong to the numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((blocks, 128)) * np.where(np.arange(128) < 24, 50.0, 1.0)
    x = (x * 10.0**exponent).astype(np.float32)
    x[rng.integers(blocks), : rng.integers(129)] = 0
    first, *others = quantize_activations(ggml_cpu, x)
    assert all((y == first).all() for y in others)
    d, s, qs = split(first)
    for kind, part, lack in ((0, slice(0, 24), -60), (1, slice(24, 128), -32)):
        assert (s[:, kind] == lack * qs[:, part].sum(axis=1, dtype=np.int32)).all()
        step = np.abs(x[:, part]).max(axis=1).astype(np.float64) / 127
        error = np.abs(qs[:, part] * d[:, kind, None].astype(np.float64) - x[:, part])
        assert (error <= 0.50001 * step[:, None] + 1e-36).all()


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1))
def test_dot_products(ggml_cpu: ctypes.CDLL, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, blocks * 27, dtype=np.uint8)
    x = (rng.standard_normal((blocks, 128)) * np.where(np.arange(128) < 24, 50.0, 1.0)).astype(np.float32)
    y = quantize_activations(ggml_cpu, x)[0]
    d, _, qs = split(y)
    weights = PACKER.dequantize(PACKER.unpack(data[None])).reshape(blocks, 128).astype(np.float64)
    a = qs * np.repeat(d.astype(np.float64), (24, 104), axis=1)
    # kernels take as much as the largest weight out of the products again
    largest = np.repeat(np.abs(weights.reshape(blocks, 128)[:, [0, 24]]), (24, 104), axis=1)
    largest[:, :24] = np.abs(weights[:, :24]).max(axis=1, keepdims=True) * 15
    expected, magnitude = (weights * a).sum(), ((np.abs(weights) + largest) * np.abs(a)).sum()
    for kernel in kernels(ggml_cpu, "ggml_vec_dot_ptq1_61_q8_ptq"):
        assert abs(dot_with(kernel, data, y, blocks * 128) - expected) <= 5e-7 * magnitude, kernel.__name__
