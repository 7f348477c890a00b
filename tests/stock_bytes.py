"""Bytes of stock types: without a pattern, out of the C library, and compared to the bit."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.packers import packer_of

Array = np.ndarray[Any, Any]

FINITE = np.array([h for h in range(1 << 16) if h >> 10 & 31 != 31], np.uint16).view(np.float16)
"""Every finite half-precision float, negative and denormal ones too."""

NO_TOPS: Mapping[str, int] = MappingProxyType({})


def random_bytes(name: str, rows: int, blocks: int, seed: int, tops: Mapping[str, int] = NO_TOPS) -> Array:
    """Blocks without a pattern, uint8 [rows, bytes of a row]: any bits that are numbers and nowhere above `tops`."""
    random, size = np.random.default_rng(seed), tensor_type(name).block_bytes
    found = np.empty((0, size), np.uint8)
    while len(found) < rows * blocks:
        data = random.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
        arrays = packer_of(name).unpack(data)
        numbers = [(np.isfinite(a) & (a <= tops.get(key, np.inf))).all(axis=1) for key, a in arrays.items()]
        found = np.concatenate([found, data[np.logical_and.reduce(numbers)]])
    return found[: rows * blocks].reshape(rows, blocks * size)


def assert_same(got: Array, want: Array) -> None:
    """Equal to the bit: -0 is not 0."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(want).view(np.uint8))


@cache
def _ggml() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(find_runtime().library("ggml-base")))
    except RuntimeMissingError as error:
        pytest.fail(str(error))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


def pointer(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def quantized_in_c(name: str, weight: Array, importance: Array | None = None) -> Array:
    """Bytes of the rows of weights [rows, columns] as llama-quantize makes them, with an importance matrix or none."""
    kind, (rows, columns) = tensor_type(name), weight.shape
    data = np.empty((rows, columns // kind.block_weights * kind.block_bytes), np.uint8)
    sizes = [ctypes.c_int64(n) for n in (0, rows, columns)]
    given = None if importance is None else pointer(importance)
    assert _ggml().ggml_quantize_chunk(kind.id, pointer(weight), pointer(data), *sizes, given) == data.size
    return data


def dequantized_in_c(name: str, data: Array) -> Array:
    """Weights float32 [rows, columns] of the bytes of rows, which the library must find valid."""
    kind = tensor_type(name)
    out = np.empty((len(data), data.shape[1] // kind.block_bytes * kind.block_weights), np.float32)
    _ggml()[f"dequantize_row_{name.replace('_k', '_K')}"](pointer(data), pointer(out), ctypes.c_int64(out.size))
    assert _ggml().ggml_validate_row_data(kind.id, pointer(data), ctypes.c_size_t(data.size))
    return out
