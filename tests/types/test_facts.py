"""The table against gguf-py, which knows the stock types too. Against the C library: cpp_kernels/test_header.py."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from tesseraq_gguf.types.facts import TENSOR_TYPES, TensorType
from tesseraq_gguf.types.grids import GRIDS

STOCK = [t for t in TENSOR_TYPES.values() if not t.custom]


@pytest.mark.parametrize("t", STOCK, ids=lambda t: t.name)
def test_ids_and_sizes_are_those_of_gguf(t: TensorType) -> None:
    if t.name.upper() not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"this gguf does not know {t.name}")
    kind = gguf.GGMLQuantizationType[t.name.upper()]
    assert kind == t.id
    assert gguf.GGML_QUANT_SIZES[kind] == (t.block_weights, t.block_bytes)


@pytest.mark.parametrize("t", STOCK, ids=lambda t: t.name)
def test_file_types_are_those_of_one_type_alone(t: TensorType) -> None:
    if t.name == "q2_0" and "MOSTLY_Q2_0" not in gguf.LlamaFileType.__members__:
        pytest.skip("this gguf does not know q2_0")
    small = "_S" if t.name.endswith("_k") and t.name != "q6_k" else ""
    prefix, end = "ALL" if t.name == "f32" else "MOSTLY", "_MOE" if t.name == "mxfp4" else small
    assert gguf.LlamaFileType(t.file_type).name == f"{prefix}_{t.name.upper()}{end}"


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0"])
def test_plain_types_are_written_by_gguf(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    assert TENSOR_TYPES[name].plain
    gguf.quants.quantize(x, gguf.GGMLQuantizationType(TENSOR_TYPES[name].id))


def test_a_fallback_can_be_learned_and_fits_where_the_type_does_not() -> None:
    for t in TENSOR_TYPES.values():
        assert t.fallback is None or not t.custom
        if t.fallback is not None:
            assert t.fallback in GRIDS
            assert TENSOR_TYPES[t.fallback].block_weights < t.block_weights
        elif not t.custom:
            assert t.block_weights <= 32 or t.name in (
                "q1_0",
                "nvfp4",
            )  # llama-quantize refuses what that does not divide


@pytest.mark.parametrize("name", GRIDS)
def test_a_row_says_what_its_grid_is(name: str) -> None:
    row, grid = TENSOR_TYPES[name], GRIDS[name]
    assert grid.type == name
    assert row.ordered == grid.ordered
    assert not (row.codebooks and grid.uniform)
    own = {"c"} if row.codebooks else set()
    assert grid.shared == own
    assert grid is GRIDS[name]
    if row.without_order is not None:
        assert TENSOR_TYPES[row.without_order].block_weights <= row.block_weights
        assert not GRIDS[row.without_order].ordered
