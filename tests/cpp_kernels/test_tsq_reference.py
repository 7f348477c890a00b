"""The C reference of the TSQ types against the numpy packer, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.tsq import packer as tsq

from .conftest import block_bytes, pointer, type_id

pytestmark = pytest.mark.runtime

Array = np.ndarray[Any, Any]


def numpy_dequantize(data: Array, bits: int) -> Array:
    return tsq.dequantize(*tsq.unpack(data, bits), bits)


def test_dequantize_every_scale_and_zero_point(dequantize: Callable[[Array], Array], bits: int) -> None:
    d, z = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    q = np.random.default_rng(0).integers(0, 1 << bits, (256, 256 * 64), dtype=np.uint8)
    data = tsq.pack(q, d, z, bits)
    expected = numpy_dequantize(data, bits)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(dequantize(data).view(np.uint32), expected.view(np.uint32))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_dequantize_any_bytes(dequantize: Callable[[Array], Array], bits: int, data: st.DataObject) -> None:
    shape = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 11]).map(lambda blocks: blocks * block_bytes(bits)))
    rows = data.draw(arrays(np.uint8, shape))
    np.testing.assert_array_equal(dequantize(rows).view(np.uint32), numpy_dequantize(rows, bits).view(np.uint32))


@settings(max_examples=50, deadline=None)
@given(x=arrays(np.float32, (2, 128), elements=st.floats(-200, 200, width=32)))
def test_quantize_unpack_pack_is_the_identity(quantize: Callable[..., Array], bits: int, x: Array) -> None:
    data = quantize(x)
    np.testing.assert_array_equal(tsq.pack(*tsq.unpack(data, bits), bits), data)


@pytest.mark.parametrize("importance", [None, np.zeros(128, np.float32), np.ones(128, np.float32)])
def test_zero_block(quantize: Callable[..., Array], bits: int, importance: Array | None) -> None:
    q, _, z = tsq.unpack(quantize(np.zeros((1, 128), np.float32), importance), bits)
    assert (q == 0).all()
    assert (z == 64).all()
    assert not numpy_dequantize(quantize(np.zeros((1, 128), np.float32)), bits).any()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.013, -77.0, 3e-6, 900.0])
def test_constant_block(quantize: Callable[..., Array], bits: int, value: float) -> None:
    y = numpy_dequantize(quantize(np.full((1, 64), value, np.float32)), bits)
    np.testing.assert_allclose(y, value, rtol=0.02)


def test_values_beyond_the_grid_saturate(quantize: Callable[..., Array], bits: int) -> None:
    y = numpy_dequantize(quantize(np.full((1, 64), 1e30, np.float32)), bits)
    assert (y == 240 * ((1 << bits) - 1 + (1 << (bits - 1)))).all()
    tiny = numpy_dequantize(quantize(np.linspace(-1e-9, 1e-9, 64, dtype=np.float32)[None]), bits)
    assert np.abs(tiny).max() < 2.0**-24


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 17])
def test_not_finite_input_gives_finite_weights(
    quantize: Callable[..., Array], bits: int, bad: float, where: int
) -> None:
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    x[0, where] = bad
    assert np.isfinite(numpy_dequantize(quantize(x), bits)).all()


def test_search_comes_near_the_optimum(quantize: Callable[..., Array], bits: int) -> None:
    """Against every scale and zero-point there is: the search loses less than 1.5 % in squared error."""
    x = np.random.default_rng(2).standard_normal((16, 64)).astype(np.float32)
    d = e5m3.decode(np.arange(256, dtype=np.uint8))[:, None, None]
    z = tsq.decode_zero(np.arange(256, dtype=np.uint8), bits)[:, None]
    best = []
    for row in x:
        q = np.clip(np.rint(row / d + z), 0, (1 << bits) - 1)
        best.append(((d * (q - z) - row) ** 2).sum(axis=2).min())
    got = ((numpy_dequantize(quantize(x), bits) - x) ** 2).sum()
    assert got <= 1.015 * np.sum(best)


def test_importance_lowers_the_weighted_error(quantize: Callable[..., Array], bits: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((32, 256)).astype(np.float32)
    importance = rng.exponential(size=256).astype(np.float32) ** 2
    weights = importance * np.sqrt((x**2).mean(axis=1, keepdims=True) + x**2)
    plain = (weights * (numpy_dequantize(quantize(x), bits) - x) ** 2).sum()
    weighted = (weights * (numpy_dequantize(quantize(x, importance), bits) - x) ** 2).sum()
    assert weighted < 0.9 * plain


def test_quantize_chunk_starts_at_a_row(ggml: ctypes.CDLL, quantize: Callable[..., Array], bits: int) -> None:
    x = np.random.default_rng(4).standard_normal((4, 192)).astype(np.float32)
    row_bytes = 3 * block_bytes(bits)
    out = np.zeros((4, row_bytes), np.uint8)
    size = ggml.ggml_quantize_chunk(
        type_id(bits), pointer(x), pointer(out), ctypes.c_int64(2 * 192), ctypes.c_int64(2), ctypes.c_int64(192), None
    )
    assert size == 2 * row_bytes
    np.testing.assert_array_equal(out, np.concatenate([np.zeros((2, row_bytes), np.uint8), quantize(x[2:])]))


def test_every_byte_pattern_is_valid(ggml: ctypes.CDLL, bits: int) -> None:
    data = np.random.default_rng(5).integers(0, 256, block_bytes(bits) * 1000, dtype=np.uint8)
    assert ggml.ggml_validate_row_data(type_id(bits), pointer(data), ctypes.c_size_t(data.size))
    assert not ggml.ggml_validate_row_data(type_id(bits), pointer(data), ctypes.c_size_t(17))
