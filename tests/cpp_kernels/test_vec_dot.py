"""Row by row: Q8_TSQ activations, dot products with them and dequantisation, SIMD against generic C against numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.tsq import packer as tsq

from .conftest import block_bytes, pointer

pytestmark = pytest.mark.runtime

Array = np.ndarray[Any, Any]

GROUP = 16
"""Blocks of a group of Q8_TSQ activations."""


def group_starts(blocks: int) -> range:
    return range(0, blocks, GROUP)


def join(d: Array, qs: Array) -> Array:
    """Q8_TSQ bytes out of scales, float32 [blocks], and numbers, int8 [blocks, 64]."""
    sums = qs.sum(axis=1, dtype=np.int16)
    s = np.stack([-sums, sums], axis=1)
    parts = [part[i : i + GROUP] for i in group_starts(len(d)) for part in (d.astype(np.float32), s, qs)]
    return np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)


def split(y: Array) -> tuple[Array, Array]:
    """Scales, float32 [blocks], and numbers, int8 [blocks, 64], of Q8_TSQ bytes."""
    blocks = len(y) // 72
    d, qs = np.empty(blocks, np.float32), np.empty((blocks, 64), np.int8)
    for i in group_starts(blocks):
        m = min(GROUP, blocks - i)
        group = y[72 * i : 72 * (i + m)]
        d[i : i + m] = group[: 4 * m].view(np.float32)
        qs[i : i + m] = group[8 * m :].view(np.int8).reshape(m, 64)
    return d, qs


def activations(rng: np.random.Generator, blocks: int, scale: float = 0.01) -> Array:
    return join(rng.uniform(0.1, 1, blocks) * scale, rng.integers(-127, 128, (blocks, 64), dtype=np.int8))


def exact(data: Array, y: Array, bits: int) -> tuple[float, float]:
    """The dot product in float64, and the sum of the magnitudes of what is added up."""
    q, d, z = tsq.unpack(data[None], bits)
    da, qa = split(y)
    scale = e5m3.decode(d[0]).astype(np.float64) * da.astype(np.float64)
    zero = tsq.decode_zero(z[0], bits).astype(np.float64)
    codes = q.reshape(-1, 64).astype(np.float64) * qa
    shifts = zero[:, None] * qa
    total = scale * (codes - shifts).sum(axis=1)
    magnitude = scale * (np.abs(codes) + np.abs(shifts)).sum(axis=1)
    return float(total.sum()), float(magnitude.sum())


def kernels(library: ctypes.CDLL, name: str) -> list[Any]:
    """The SIMD kernel and, where it has another name, the generic one."""
    return [getattr(library, name) for name in (name, f"{name}_generic") if hasattr(library, name)]


def dot(kernel: Any, data: Array, y: Array) -> float:
    return dot_with(kernel, data, y, len(y) // 72 * 64)


def dot_with(kernel: Any, data: Array, y: Array, n: int) -> float:
    """What `ggml_vec_dot_*` makes of a row of n weights and activations."""
    out = ctypes.c_float(float("nan"))
    zero = ctypes.c_size_t(0)
    kernel(ctypes.c_int(n), ctypes.byref(out), zero, pointer(data), zero, pointer(y), zero, ctypes.c_int(1))
    return out.value


def check(library: ctypes.CDLL, bits: int, data: Array, y: Array) -> None:
    expected, magnitude = exact(data, y, bits)
    for kernel in kernels(library, f"ggml_vec_dot_tsq{bits}_q8_tsq"):
        assert abs(dot(kernel, data, y) - expected) <= 5e-7 * magnitude + 1e-37, kernel.__name__


@settings(max_examples=200, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1))
def test_random_rows(ggml_cpu: ctypes.CDLL, bits: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, blocks * block_bytes(bits), dtype=np.uint8)
    check(ggml_cpu, bits, data, activations(rng, blocks))


@pytest.mark.parametrize("blocks", [1, GROUP])
def test_every_scale_and_zero_point(ggml_cpu: ctypes.CDLL, bits: int, blocks: int) -> None:
    """In a group that is full and in one that is not."""
    rng = np.random.default_rng(0)
    y = activations(rng, blocks)
    codes = [c for c in range(65536) if c % 7 == 0 or c // 256 in (0, 255) or c % 256 in (0, 64, 255)]
    for i in range(0, len(codes), blocks):
        data = rng.integers(0, 256, (blocks, block_bytes(bits)), dtype=np.uint8)
        chosen = np.resize(codes[i : i + blocks], blocks)
        data[:, 0], data[:, 1] = chosen // 256, chosen % 256
        check(ggml_cpu, bits, data.reshape(-1), y)


def test_extreme_codes_and_activations(ggml_cpu: ctypes.CDLL, bits: int) -> None:
    """All codes as large as can be and activations -128 or 127: the largest sums that integers must hold."""
    for q in (0, 0xFF):
        for a in (-128, -127, 127):
            for blocks in (5, GROUP + 9):
                data = np.full(blocks * block_bytes(bits), q, np.uint8)
                check(ggml_cpu, bits, data, join(np.ones(blocks), np.full((blocks, 64), a, np.int8)))


@pytest.mark.parametrize("scale", [1e-41, 1e-37, 1e28])
def test_extreme_activation_scales(ggml_cpu: ctypes.CDLL, bits: int, scale: float) -> None:
    """Also those that float32 has no normal numbers for, with the smallest scale of weights."""
    rng = np.random.default_rng(1)
    y = activations(rng, GROUP + 7, scale)
    data = rng.integers(0, 256, (GROUP + 7, block_bytes(bits)), dtype=np.uint8)
    data[:, 0] = 0 if scale < 1 else data[:, 0]
    check(ggml_cpu, bits, data.reshape(-1), y)


def test_each_weight_meets_its_activation(ggml_cpu: ctypes.CDLL, bits: int) -> None:
    """One weight, one activation at a time: planes, halves and blocks are not mixed up."""
    highest = (1 << bits) - 1
    weights = 64 * (GROUP + 2)
    y = join(np.ones(GROUP + 2), (np.arange(weights) % 241 - 120).astype(np.int8).reshape(-1, 64))
    for i in range(weights):
        q = np.zeros((1, weights), np.uint8)
        q[0, i] = 1 + i % highest
        data = tsq.pack(q, np.full((1, GROUP + 2), 192, np.uint8), np.full((1, GROUP + 2), 64, np.uint8), bits)[0]
        for kernel in kernels(ggml_cpu, f"ggml_vec_dot_tsq{bits}_q8_tsq"):
            assert dot(kernel, data, y) == (1 + i % highest) * (i % 241 - 120), (kernel.__name__, i)


@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-40, 30))
def test_activations_from_float(ggml_cpu: ctypes.CDLL, blocks: int, seed: int, exponent: int) -> None:
    """All kernels write the same bytes; each number is within half a step; sums belong to the numbers."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((blocks, 64)) * 10.0**exponent).astype(np.float32)
    x[rng.integers(blocks)] = 0
    results = []
    for kernel in kernels(ggml_cpu, "quantize_row_q8_tsq"):
        y = np.empty(72 * blocks, np.uint8)
        kernel(pointer(x), pointer(y), ctypes.c_int64(x.size))
        results.append(y)
    assert all((y == results[0]).all() for y in results)
    d, qs = split(results[0])
    assert (join(d, qs) == results[0]).all()
    step = np.abs(x).max(axis=1).astype(np.float64) / 127
    error = np.abs(qs * d[:, None].astype(np.float64) - x)
    assert (error <= 0.50001 * step[:, None] + 1e-36).all()


def test_dequantisation_is_that_of_the_reference(ggml_cpu: ctypes.CDLL, bits: int, dequantize: Any) -> None:
    """Bit for bit, for every scale with every zero-point."""
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (256, 256, block_bytes(bits)), dtype=np.uint8)
    data[:, :, 0], data[:, :, 1] = np.arange(256)[:, None], np.arange(256)
    data = data.reshape(256, -1)
    expected = dequantize(data)
    for kernel in kernels(ggml_cpu, f"ggml_cpu_tsq{bits}_to_fp32"):
        out = np.empty_like(expected)
        kernel(pointer(data), pointer(out), ctypes.c_int64(out.size))
        assert (out.view(np.uint32) == expected.view(np.uint32)).all(), kernel.__name__
