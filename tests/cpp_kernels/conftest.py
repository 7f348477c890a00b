"""The built runtime, its libraries and the TSQ types, for tests that hold C and numpy together."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import Runtime, SourceTree, cache, ensure_source, find_runtime
from tesseraq_gguf.types.facts import tensor_type

TSQ_BITS = (2, 3, 4)
"""Bits of a code of the TSQ types."""


def kernel_types() -> list[tuple[str, str, str, str, str]]:
    """The rows of `types.h`: name in upper and in lower case, id, weights and bytes of a block."""
    header = (cache.kernels_dir() / "types.h").read_text()
    return re.findall(r"^ +X\((\w+), +(\w+), +\w+, +\w+, +(\d+), +(\d+), +(\d+), ", header, re.MULTILINE)


@pytest.fixture(scope="session", params=TSQ_BITS, ids=lambda bits: f"tsq{bits}")
def bits(request: pytest.FixtureRequest) -> int:
    """Each TSQ type in turn, by the bits of its codes."""
    return int(request.param)


def type_id(bits: int) -> int:
    """`ggml_type` of a TSQ type."""
    return tensor_type(f"tsq{bits}").id


def block_bytes(bits: int) -> int:
    """Bytes of a block of 64 weights of a TSQ type."""
    return tensor_type(f"tsq{bits}").block_bytes


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    try:
        return find_runtime()
    except RuntimeMissingError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def source() -> SourceTree:
    return ensure_source()


@pytest.fixture(scope="session")
def ggml(runtime: Runtime) -> ctypes.CDLL:
    """libggml-base, with the signatures of what the tests call."""
    library = ctypes.CDLL(str(runtime.library("ggml-base")))
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    for bits in TSQ_BITS:
        getattr(library, f"quantize_tsq{bits}").restype = ctypes.c_size_t
    return library


@pytest.fixture(scope="session")
def ggml_cpu(runtime: Runtime, ggml: ctypes.CDLL) -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime.library("ggml-cpu")))
    library.ggml_cpu_init()  # fills the table of half-precision floats that the generic kernels read
    return library


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    """A C pointer to the first element; the array must be contiguous."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="session")
def dequantize(ggml: ctypes.CDLL, bits: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """`dequantize_row_tsq*`: uint8 [rows, bytes] to float32 [rows, weights]."""

    def call(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        out = np.empty((data.shape[0], data.shape[1] // block_bytes(bits) * 64), np.float32)
        getattr(ggml, f"dequantize_row_tsq{bits}")(pointer(data), pointer(out), ctypes.c_int64(out.size))
        return out

    return call


@pytest.fixture(scope="session")
def quantize(ggml: ctypes.CDLL, bits: int) -> Callable[..., np.ndarray[Any, Any]]:
    """`quantize_tsq*`: float32 [rows, weights] and an optional importance [weights] to uint8 [rows, bytes]."""

    def call(x: np.ndarray[Any, Any], importance: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        out = np.empty((x.shape[0], x.shape[1] // 64 * block_bytes(bits)), np.uint8)
        imatrix = pointer(importance) if importance is not None else None
        size = getattr(ggml, f"quantize_tsq{bits}")(
            pointer(x), pointer(out), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]), imatrix
        )
        assert size == out.size
        return out

    return call
