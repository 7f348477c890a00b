"""Packers of stock types: unpack(pack(x)) is x, and numpy equals gguf-py and the C library bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_bytes import (
    FINITE,
    Array,
    assert_same,
    dequantized_in_c,
    quantized_in_c,
    random_bytes,
)

from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.quantized import QuantizedTensor

# columns per entry, and the highest code or None for a half-precision float
LAYOUTS: dict[str, dict[str, tuple[int, int | None]]] = {
    "q1_0": {"q": (1, 1), "d": (128, None)},
    "q2_0": {"q": (1, 3), "d": (64, None)},
    "q4_0": {"q": (1, 15), "d": (32, None)},
    "q4_1": {"q": (1, 15), "d": (32, None), "m": (32, None)},
    "q5_0": {"q": (1, 31), "d": (32, None)},
    "q5_1": {"q": (1, 31), "d": (32, None), "m": (32, None)},
    "q8_0": {"q": (1, 255), "d": (32, None)},
    "iq4_nl": {"q": (1, 15), "d": (32, None)},
    "mxfp4": {"q": (1, 15), "d": (32, 254)},
    "nvfp4": {"q": (1, 15), "d": (16, 255)},
    "q2_k": {"q": (1, 3), "sc": (16, 15), "m": (16, 15), "d": (256, None), "dmin": (256, None)},
    "q3_k": {"q": (1, 7), "sc": (16, 63), "d": (256, None)},
    "q4_k": {"q": (1, 15), "sc": (32, 63), "m": (32, 63), "d": (256, None), "dmin": (256, None)},
    "q5_k": {"q": (1, 31), "sc": (32, 63), "m": (32, 63), "d": (256, None), "dmin": (256, None)},
    "q6_k": {"q": (1, 63), "sc": (16, 255), "d": (256, None)},
    "iq4_xs": {"q": (1, 15), "sc": (32, 63), "d": (256, None)},
}

WITH_HALVES = [name for name, arrays in LAYOUTS.items() if arrays["d"][1] is None]
"""Types whose scales are half-precision floats."""

FP4 = sorted(gguf.quants.MXFP4.kvalues)
"""Levels of 4-bit floats in units of half their least step."""

MIDDLES = {"q2_0": 1, "q4_0": 8, "q5_0": 16, "q8_0": 128, "q3_k": 4, "q6_k": 32}
"""The codes of the value 0, where one has it."""


def random_arrays(name: str, rows: int, blocks: int, seed: int) -> dict[str, Array]:
    """Codes and parameters without a pattern, all that are valid equally likely."""
    random = np.random.default_rng(seed)
    columns = blocks * tensor_type(name).block_weights
    arrays = {}
    for key, (width, top) in LAYOUTS[name].items():
        shape = (rows, columns // width)
        if top is None:
            arrays[key] = random.choice(FINITE, shape)
        else:
            arrays[key] = random.integers(0, top + 1, shape, dtype=np.uint8)
    return arrays


@st.composite
def valid_arrays(draw: st.DrawFn, name: str) -> dict[str, Array]:
    """One to four rows of one to three blocks: each array without a pattern, or one value all over and some others.

    A value drawn for every code would be more than hypothesis takes for one example of a super-block.
    """
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    arrays = random_arrays(name, rows, blocks, draw(st.integers(0, 1 << 32)))
    for key, (_, top) in LAYOUTS[name].items():
        if draw(st.booleans()):
            halves = st.floats(width=16, allow_nan=False, allow_infinity=False)
            elements = halves if top is None else st.integers(0, top)
            arrays[key].fill(draw(elements))
            places = st.integers(0, arrays[key].size - 1)
            for place, value in draw(st.dictionaries(places, elements, max_size=8)).items():
                arrays[key].flat[place] = value
    return arrays


@pytest.mark.parametrize("name", LAYOUTS)
def test_identity(name: str) -> None:
    packer, kind = packer_of(name), tensor_type(name)

    @settings(max_examples=60, deadline=None)
    @given(arrays=valid_arrays(name))
    def check(arrays: dict[str, Array]) -> None:
        data = packer.pack(arrays)
        assert data.dtype == np.uint8
        assert data.shape == (len(arrays["q"]), arrays["q"].shape[1] // kind.block_weights * kind.block_bytes)
        back = packer.unpack(data)
        assert set(back) == set(arrays)
        for key, array in arrays.items():
            assert_same(back[key], array)

    check()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_is_read_back(name: str) -> None:
    """No bit of a block is free: any bytes come back, but for parameters that are no number."""
    tops = {key: top for key, (_, top) in LAYOUTS[name].items() if top is not None}
    data = random_bytes(name, 100, 4, 0, tops)
    assert_same(packer_of(name).pack(packer_of(name).unpack(data)), data)


@pytest.mark.parametrize("name", WITH_HALVES)
def test_every_half_precision_float_is_kept(name: str) -> None:
    arrays = random_arrays(name, len(FINITE), 1, 1)
    arrays["d"] = FINITE[:, None]
    assert_same(packer_of(name).unpack(packer_of(name).pack(arrays))["d"], arrays["d"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_need_not_be_contiguous(name: str) -> None:
    arrays = random_arrays(name, 6, 2, 2)
    data = packer_of(name).pack(arrays)
    every_other = {key: np.asfortranarray(a)[::2] for key, a in arrays.items()}
    assert_same(packer_of(name).pack(every_other), data[::2])
    for key, array in packer_of(name).unpack(data[::2]).items():
        assert_same(array, arrays[key][::2])
    assert_same(packer_of(name).dequantize(every_other), packer_of(name).dequantize(arrays)[::2])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_value_of_a_code(name: str) -> None:
    """The formulas of the documentation, in double precision."""
    arrays = random_arrays(name, 3, 2, 3)
    parameters = {key: a.astype(np.float64) for key, a in arrays.items()}
    q, columns = parameters.pop("q"), arrays["q"].shape[1]
    wide = {key: np.repeat(a, columns // a.shape[1], axis=1) for key, a in parameters.items()}
    d = wide["d"]
    if name == "mxfp4":
        d, q = 2.0 ** (d - 128), np.array(FP4, np.float64)[arrays["q"]]
    elif name == "nvfp4":
        e, m = np.divmod(d % 128, 8)
        d = np.where(d % 256 == 127, 0, np.where(e == 0, m * 2.0**-10, (1 + m / 8) * 2.0 ** (e - 8)))
        q = np.array(FP4, np.float64)[arrays["q"]]
    elif name.startswith("iq4"):
        q = np.array(gguf.quants.IQ4_NL.kvalues, np.float64)[arrays["q"]]
    if "dmin" in wide:
        want = d * wide["sc"] * q - wide["dmin"] * wide["m"]
    elif "m" in wide:
        want = d * q + wide["m"]
    elif name == "q1_0":
        want = d * (2 * q - 1)
    else:
        scale = d * (wide["sc"] - {"q3_k": 32, "q6_k": 128, "iq4_xs": 32}[name]) if "sc" in wide else d
        want = scale * (q - MIDDLES.get(name, 0))
    # the products are exact, only a sum rounds: a double rounded to float32 is what float32 has
    np.testing.assert_array_equal(packer_of(name).dequantize(arrays), want.astype(np.float32))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if hasattr(gguf.quants, name.upper())])
def test_numpy_dequantises_as_gguf_does(name: str) -> None:
    arrays = random_arrays(name, 50, 3, 4)
    theirs = gguf.quants.dequantize(packer_of(name).pack(arrays), gguf.GGMLQuantizationType[name.upper()])
    assert_same(packer_of(name).dequantize(arrays), theirs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_numpy_dequantises_as_torch_does(name: str) -> None:
    arrays = random_arrays(name, 50, 3, 8)
    tensor = QuantizedTensor(name, {key: torch.from_numpy(a) for key, a in arrays.items()})
    assert_same(packer_of(name).dequantize(arrays), grid_of(name).dequantize(tensor).numpy())


@pytest.mark.runtime
@pytest.mark.parametrize("name", LAYOUTS)
def test_numpy_dequantises_as_c_does(name: str) -> None:
    arrays = random_arrays(name, 4000, 3, 5)
    data = packer_of(name).pack(arrays)
    assert_same(packer_of(name).dequantize(arrays), dequantized_in_c(name, data))


@pytest.mark.runtime
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_c_quantised_comes_back(name: str) -> None:
    x = np.random.default_rng(6).standard_normal((16, 512)).astype(np.float32)
    data = quantized_in_c(name, x)
    arrays = packer_of(name).unpack(data)
    assert_same(packer_of(name).pack(arrays), data)
    weights = packer_of(name).dequantize(arrays)
    assert_same(weights, dequantized_in_c(name, data))
    assert np.abs(weights - x).mean() < 0.8 * np.abs(x).mean()  # Q2_0 is rounded that coarsely


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["even", "weighted", "heavy tails"])
@pytest.mark.parametrize("name", ["q1_0", "q5_1", "iq4_nl", "mxfp4", "nvfp4", "q5_k", "q6_k", "iq4_xs"])
def test_a_search_leaves_no_more_than_c_does(name: str, kind: str) -> None:
    random = torch.Generator().manual_seed(9)
    weight = 0.02 * torch.randn(32, 512, generator=random)
    weight = 1e3 * weight**3 if kind == "heavy tails" else weight
    importance = torch.ones(512) if kind == "even" else torch.rand(512, generator=random) ** 4 + 0.001
    data = quantized_in_c(name, weight.numpy(), importance.numpy())
    theirs, grid = torch.from_numpy(dequantized_in_c(name, data)), grid_of(name)
    left = [
        float((importance * (found - weight).double() ** 2).sum())
        for found in (grid.dequantize(grid.quantize(weight, importance)), theirs)
    ]
    assert left[0] < 1.001 * left[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_that_do_not_fit_together(name: str) -> None:
    packer, good = packer_of(name), random_arrays(name, 2, 2, 7)
    columns = good["q"].shape[1]
    packer.pack(good)
    bad: list[dict[str, Array]] = [{"q": np.zeros((2, columns + 1), np.uint8)}, {"q": np.zeros(columns, np.uint8)}]
    for key, (_, top) in LAYOUTS[name].items():
        array = good[key]
        bad += [{key: array[:1]}, {key: array[:, :1]}, {key: array.astype(np.float32)}]
        if top is None:
            bad += [{key: np.full_like(array, value)} for value in (np.nan, np.inf, -np.inf)]
        elif top < 255:
            bad.append({key: np.where(np.arange(array.shape[1]) == 1, np.uint8(top + 1), array)})
    for wrong in bad:
        with pytest.raises(ValueError, match=rf"^{name} (wants|has) "):
            packer.pack(good | wrong)
