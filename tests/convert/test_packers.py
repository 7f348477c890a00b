"""Truth 1 for numpy: unpack(pack(x)) is x, and the registry holds together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tesseraq_gguf.converter.packers import PACKERS, packer_of
from tesseraq_gguf.converter.tensor_types import TENSOR_TYPES, tensor_type
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.grids import GRIDS, grid_of
from tesseraq_gguf.quantized import QuantizedTensor


@st.composite
def tsq_arrays(draw, bits):
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    codes = st.integers(0, (1 << bits) - 1)
    return {
        "q": draw(hnp.arrays(np.uint8, (rows, groups * 64), elements=codes)),
        "d": draw(hnp.arrays(np.uint8, (rows, groups))),
        "z": draw(hnp.arrays(np.uint8, (rows, groups))),
    }


@settings(max_examples=200, deadline=None)
@given(arrays=tsq_arrays(2))
def test_tsq2_identity(arrays):
    packer = packer_of("tsq2")
    kind = tensor_type("tsq2")
    data = packer.pack(arrays)
    assert data.dtype == np.uint8
    assert data.shape == (len(arrays["q"]), arrays["q"].shape[1] // kind.block_weights * kind.block_bytes)
    back = packer.unpack(data)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    np.testing.assert_array_equal(packer.pack(back), data)


@settings(max_examples=200, deadline=None)
@given(arrays=tsq_arrays(2))
def test_tsq2_numpy_dequantises_as_torch_does(arrays):
    tensor = QuantizedTensor("tsq2", {name: torch.from_numpy(a) for name, a in arrays.items()})
    ours = packer_of("tsq2").dequantize(arrays)
    np.testing.assert_array_equal(ours.view(np.uint32), grid_of("tsq2").dequantize(tensor).numpy().view(np.uint32))


def test_every_byte_is_read_back():
    data = np.random.default_rng(0).integers(0, 256, (300, 18 * 3), dtype=np.uint8)
    packer = packer_of("tsq2")
    np.testing.assert_array_equal(packer.pack(packer.unpack(data)), data)


def test_arrays_that_do_not_fit_together():
    good = {"q": np.zeros((2, 64), np.uint8), "d": np.zeros((2, 1), np.uint8), "z": np.zeros((2, 1), np.uint8)}
    for bad in (
        {"q": np.zeros((2, 65), np.uint8)},
        {"d": np.zeros((2, 2), np.uint8)},
        {"z": np.zeros((1, 1), np.uint8)},
        {"q": np.full((2, 64), 4, np.uint8)},
    ):
        with pytest.raises(ValueError, match="TSQ"):
            packer_of("tsq2").pack(good | bad)


def test_the_registries_agree():
    assert set(PACKERS) == set(GRIDS)
    assert set(PACKERS) <= set(TENSOR_TYPES)
    assert {t.name for t in TENSOR_TYPES.values() if t.custom} <= set(PACKERS)
    with pytest.raises(UsageError, match=r"no packer for type 'q9'. Types that can be packed: .*tsq2"):
        packer_of("q9")
