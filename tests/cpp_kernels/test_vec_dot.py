"""Dot products with Q8_1 activations: SIMD against generic C against numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.converter.packers import tsq

from .conftest import block_bytes, pointer

pytestmark = pytest.mark.runtime

Array = np.ndarray[Any, Any]

Q8_1 = np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)])


def activations(rng: np.random.Generator, blocks: int, scale: float = 0.01) -> Array:
    """Q8_1 blocks as the backend makes them: s = d * sum(qs)."""
    y = np.zeros(blocks, Q8_1)
    y["qs"] = rng.integers(-127, 128, (blocks, 32))
    y["d"] = rng.uniform(0.1, 1, blocks) * scale
    y["s"] = y["d"].astype(np.float32) * y["qs"].sum(axis=1, dtype=np.int32)
    return y


def exact(data: Array, y: Array, bits: int) -> tuple[float, float]:
    """The dot product in float64, and the sum of the magnitudes of what is added up."""
    q, d, z = tsq.unpack(data[None], bits)
    qa = (q.reshape(-1, 32).astype(np.int64) * y["qs"]).sum(axis=1).reshape(-1, 2)
    scale = tsq.decode_scale(d[0]).astype(np.float64)[:, None]
    zero = tsq.decode_zero(z[0], bits).astype(np.float64)[:, None]
    codes = scale * y["d"].astype(np.float64).reshape(-1, 2) * qa
    shifts = scale * zero * y["s"].astype(np.float64).reshape(-1, 2)
    return float((codes - shifts).sum()), float(np.abs(codes).sum() + np.abs(shifts).sum())


def kernels(library: ctypes.CDLL, bits: int) -> list[Any]:
    """The SIMD kernel and, where it has another name, the generic one."""
    names = [f"ggml_vec_dot_tsq{bits}_q8_1", f"ggml_vec_dot_tsq{bits}_q8_1_generic"]
    return [getattr(library, name) for name in names if hasattr(library, name)]


def dot(kernel: Any, data: Array, y: Array) -> float:
    out = ctypes.c_float(float("nan"))
    n = 32 * len(y)
    zero = ctypes.c_size_t(0)
    kernel(ctypes.c_int(n), ctypes.byref(out), zero, pointer(data), zero, pointer(y), zero, ctypes.c_int(1))
    return out.value


def check(library: ctypes.CDLL, bits: int, data: Array, y: Array) -> None:
    expected, magnitude = exact(data, y, bits)
    for kernel in kernels(library, bits):
        assert abs(dot(kernel, data, y) - expected) <= 4e-7 * np.sqrt(data.size) * magnitude + 1e-30, kernel.__name__


@settings(max_examples=200, deadline=None)
@given(blocks=st.integers(1, 33), seed=st.integers(0, 2**32 - 1))
def test_random_rows(ggml_cpu: ctypes.CDLL, bits: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(
        ggml_cpu, bits, rng.integers(0, 256, blocks * block_bytes(bits), dtype=np.uint8), activations(rng, 2 * blocks)
    )


def test_every_scale_and_zero_point(ggml_cpu: ctypes.CDLL, bits: int) -> None:
    rng = np.random.default_rng(0)
    y = activations(rng, 2)
    for code in range(65536):
        if code % 7 and code // 256 not in (0, 255) and code % 256 not in (0, 64, 255):
            continue
        data = rng.integers(0, 256, block_bytes(bits), dtype=np.uint8)
        data[:2] = divmod(code, 256)
        check(ggml_cpu, bits, data, y)


def test_extreme_codes_and_activations(ggml_cpu: ctypes.CDLL, bits: int) -> None:
    """All codes as large as can be and activations -127 or 127: the largest sums that integers must hold."""
    for q in (0, 0xFF):
        for a in (-128, -127, 127):
            data = np.full(5 * block_bytes(bits), q, np.uint8)
            y = np.zeros(10, Q8_1)
            y["qs"], y["d"], y["s"] = a, 1, 32 * a
            check(ggml_cpu, bits, data, y)


def test_denormal_activation_scales(ggml_cpu: ctypes.CDLL, bits: int) -> None:
    rng = np.random.default_rng(1)
    y = activations(rng, 14, scale=1e-7)
    assert (y["d"].astype(np.float32) < 6.1e-5).all()
    data = rng.integers(0, 256, 7 * block_bytes(bits), dtype=np.uint8)
    data.reshape(7, block_bytes(bits))[:, 0] = 0  # and the smallest weight scale
    check(ggml_cpu, bits, data, y)


def test_each_weight_meets_its_activation(ggml_cpu: ctypes.CDLL, bits: int) -> None:
    """One weight, one activation at a time: planes and halves are not mixed up."""
    highest = (1 << bits) - 1
    for i in range(128):
        q = np.zeros((1, 128), np.uint8)
        q[0, i] = 1 + i % highest
        data = tsq.pack(q, np.full((1, 2), 192, np.uint8), np.full((1, 2), 64, np.uint8), bits)[0]
        y = np.zeros(4, Q8_1)
        y["d"] = 1
        y["qs"] = (np.arange(128) - 60).reshape(4, 32)
        for kernel in kernels(ggml_cpu, bits):
            assert dot(kernel, data, y) == (1 + i % highest) * (i - 60), (kernel.__name__, i)
