"""Truth 1 for numpy: unpack(pack(x)) is x, and the registry holds together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.facts import LAYOUTS, TENSOR_TYPES, tensor_type
from tesseraq_gguf.types.grids import GRIDS, grid_of
from tesseraq_gguf.types.packers import PACKERS, packer_of
from tesseraq_gguf.types.ptq161 import packer as ptq161
from tesseraq_gguf.types.quantized import QuantizedTensor


@st.composite
def tsq_arrays(draw, bits):
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    codes = st.integers(0, (1 << bits) - 1)
    return {
        "q": draw(hnp.arrays(np.uint8, (rows, groups * 64), elements=codes)),
        "d": draw(hnp.arrays(np.uint8, (rows, groups))),
        "z": draw(hnp.arrays(np.uint8, (rows, groups))),
    }


@pytest.mark.parametrize("bits", [2, 3, 4])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tsq_identity(bits, data):
    arrays = data.draw(tsq_arrays(bits))
    packer = packer_of(f"tsq{bits}")
    kind = tensor_type(f"tsq{bits}")
    packed = packer.pack(arrays)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(arrays["q"]), arrays["q"].shape[1] // kind.block_weights * kind.block_bytes)
    back = packer.unpack(packed)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    np.testing.assert_array_equal(packer.pack(back), packed)


@pytest.mark.parametrize("bits", [2, 3, 4])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tsq_numpy_dequantises_as_torch_does(bits, data):
    arrays = data.draw(tsq_arrays(bits))
    tensor = QuantizedTensor(f"tsq{bits}", {name: torch.from_numpy(a) for name, a in arrays.items()})
    ours = packer_of(f"tsq{bits}").dequantize(arrays)
    torchs = grid_of(f"tsq{bits}").dequantize(tensor).numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), torchs.view(np.uint32))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_byte_is_read_back(bits):
    packer = packer_of(f"tsq{bits}")
    row_bytes = tensor_type(f"tsq{bits}").block_bytes * 3
    data = np.random.default_rng(0).integers(0, 256, (300, row_bytes), dtype=np.uint8)
    np.testing.assert_array_equal(packer.pack(packer.unpack(data)), data)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_weight_stands_where_the_formats_page_says(bits):
    """One bit of one code at a time: byte and bit in the block, in the words of docs/formats.md."""
    for i in range(64):
        for bit in range(bits):
            q = np.zeros((1, 64), np.uint8)
            q[0, i] = 1 << bit
            params = np.array([[7]], np.uint8)
            block = packer_of(f"tsq{bits}").pack({"q": q, "d": params, "z": params + 1})[0]
            if bits == 4:
                place = (2 + i % 32, 4 * (i // 32) + bit)
            elif bit < 2:
                place = (2 + i % 16, 2 * (i // 16) + bit)
            else:
                place = (18 + i % 8, i // 8)
            expected = np.zeros(len(block), np.uint8)
            expected[0], expected[1], expected[place[0]] = 7, 8, 1 << place[1]
            np.testing.assert_array_equal(block, expected)


BCQ2 = bcq.universal(LAYOUTS["bcq2"]).tolist()
# weights 0 to 15 have codebook 2, all others codebook 0
BCQ2_EXAMPLE: dict[int, float] = dict.fromkeys(range(1, 16), BCQ2[2][0]) | {
    0: BCQ2[2][3],
    16: BCQ2[0][2],
    32: BCQ2[0][1],
}
BCQ4_EXAMPLE: dict[int, float] = {0: 15, 32: -12, **dict.fromkeys(range(1, 8), -7)}

EXAMPLES: dict[str, tuple[str, int, dict[int, float], float]] = {
    "tsq2": ("c8 78 1b", 18, {0: 2.5, 16: 0.5, 32: -1.5, 48: -3.5}, -3.5),
    "tsq3": ("c8 78 1b" + " 00" * 15 + " 81", 26, {0: 7, 16: -3, 32: -5, 48: -7, 56: 1}, -7.0),
    "tsq4": ("c8 78 1b", 34, {0: 8, 32: -12}, -14.0),
    "bcq2": ("c0 02 1b", 18, BCQ2_EXAMPLE, float(BCQ2[0][0])),
    "bcq4": ("c0 05 00 00 2f", 36, BCQ4_EXAMPLE, -19.0),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_formats_page(name):
    head, size, some, others = EXAMPLES[name]
    data = np.frombuffer(bytes.fromhex(head).ljust(size, b"\0"), np.uint8)[None]
    expected = np.full(64, others, np.float32)
    for i, value in some.items():
        expected[i] = value
    packer = packer_of(name)
    np.testing.assert_array_equal(packer.dequantize(packer.unpack(data))[0], expected)


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


@st.composite
def bcq_arrays(draw):
    name = draw(st.sampled_from(["bcq2", "bcq4"]))
    shape = TENSOR_TYPES[name].codebooks
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    selectors = hnp.arrays(np.uint8, (rows, blocks * 64 // shape.group), elements=st.integers(0, shape.count - 1))
    return name, {
        "q": draw(hnp.arrays(np.uint8, (rows, blocks * 64), elements=st.integers(0, shape.levels - 1))),
        "s": draw(selectors),
        "d": draw(hnp.arrays(np.uint8, (rows, blocks))),
    }


@settings(max_examples=100, deadline=None)
@given(bcq_arrays())
def test_bcq_unpack_inverts_pack(named):
    name, arrays = named
    packer, kind = packer_of(name), TENSOR_TYPES[name]
    data = packer.pack(arrays)
    assert data.shape == (len(arrays["q"]), arrays["d"].shape[1] * kind.block_bytes)
    for key, array in packer.unpack(data).items():
        np.testing.assert_array_equal(array, arrays[key])


@pytest.mark.parametrize("name", ["bcq2", "bcq4"])
def test_any_bytes_are_a_bcq_block(name):
    data = np.random.default_rng(0).integers(0, 256, (5, 3 * TENSOR_TYPES[name].block_bytes), dtype=np.uint8)
    packer = packer_of(name)
    arrays = packer.unpack(data)
    np.testing.assert_array_equal(packer.pack(arrays), data)
    tensor = QuantizedTensor(name, {key: torch.from_numpy(a) for key, a in arrays.items()})
    np.testing.assert_array_equal(packer.dequantize(arrays), grid_of(name).dequantize(tensor).numpy())


def test_bcq2_bits_stand_where_the_page_says():
    """Selector k at bit 2k of byte 1; weight i in byte 2 + i % 16, from bit 2(i / 16) up."""
    zeros = {"q": np.zeros((1, 64), np.uint8), "s": np.zeros((1, 4), np.uint8), "d": np.array([[7]], np.uint8)}
    for k in range(4):
        arrays = {key: a.copy() for key, a in zeros.items()}
        arrays["s"][0, k] = 3
        assert packer_of("bcq2").pack(arrays)[0, :2].tolist() == [7, 3 << 2 * k]
    for i in range(64):
        arrays = {key: a.copy() for key, a in zeros.items()}
        arrays["q"][0, i] = 2
        expected = np.zeros(18, np.uint8)
        expected[0], expected[2 + i % 16] = 7, 2 << 2 * (i // 16)
        np.testing.assert_array_equal(packer_of("bcq2").pack(arrays)[0], expected)


@pytest.mark.parametrize("bad", [{"q": np.full((1, 64), 4)}, {"s": np.full((1, 4), 4)}, {"s": np.zeros((1, 8))}])
def test_bcq2_arrays_that_do_not_fit(bad):
    good = {"q": np.zeros((1, 64), np.uint8), "s": np.zeros((1, 4), np.uint8), "d": np.zeros((1, 1), np.uint8)}
    with pytest.raises(ValueError, match="BCQ"):
        packer_of("bcq2").pack(good | {key: a.astype(np.uint8) for key, a in bad.items()})


@st.composite
def ptq_arrays(draw):
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    salient = draw(hnp.arrays(np.uint8, (rows, blocks, 24), elements=st.integers(0, 15)))
    binary = draw(hnp.arrays(np.uint8, (rows, blocks, 104), elements=st.integers(0, 1)))
    return {
        "q": np.concatenate([salient, binary], axis=2).reshape(rows, -1),
        "d": draw(hnp.arrays(np.uint8, (rows, blocks))),
        "s": draw(hnp.arrays(np.uint8, (rows, blocks))),
    }


@settings(max_examples=100, deadline=None)
@given(arrays=ptq_arrays())
def test_ptq_identity(arrays):
    packer, kind = packer_of("ptq1_61"), tensor_type("ptq1_61")
    packed = packer.pack(arrays)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(arrays["q"]), arrays["q"].shape[1] // kind.block_weights * kind.block_bytes)
    back = packer.unpack(packed)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_every_byte_of_ptq_is_read_back():
    data = np.random.default_rng(0).integers(0, 256, (300, 27 * 3), dtype=np.uint8)
    packer = packer_of("ptq1_61")
    np.testing.assert_array_equal(packer.pack(packer.unpack(data)), data)


def test_each_ptq_weight_stands_where_the_formats_page_says():
    packer = packer_of("ptq1_61")
    for i in range(128):
        for bit in range(4 if i < 24 else 1):
            q = np.zeros((1, 128), np.uint8)
            q[0, i] = 1 << bit
            block = packer.pack({"q": q, "d": np.array([[7]], np.uint8), "s": np.array([[8]], np.uint8)})[0]
            place = (2 + i % 12, 4 * (i // 12) + bit) if i < 24 else (14 + (i - 24) // 8, (i - 24) % 8)
            expected = np.zeros(27, np.uint8)
            expected[0], expected[1], expected[place[0]] = 7, 8, 1 << place[1]
            np.testing.assert_array_equal(block, expected)


def test_the_ptq_example_of_the_formats_page():
    data = np.frombuffer(bytes.fromhex("c0 c8 1f" + " 00" * 11 + " 05").ljust(27, b"\0"), np.uint8)[None]
    expected = np.full(128, -1, np.float32)
    expected[:24] = -15
    expected[[0, 12, 24, 26]] = 15, -13, 1, 1
    packer = packer_of("ptq1_61")
    np.testing.assert_array_equal(packer.dequantize(packer.unpack(data))[0], expected)


def test_ptq_arrays_that_do_not_fit_together():
    q, d = np.zeros((2, 128), np.uint8), np.zeros((2, 1), np.uint8)
    high = q.copy()
    high[1, 23] = 16
    for bad in (
        {"q": np.zeros((2, 192), np.uint8)},
        {"d": np.zeros((2, 2), np.uint8)},
        {"s": np.zeros((1, 1), np.uint8)},
        {"q": high},
        {"q": np.roll(high >> 3, 1, axis=1)},
    ):
        with pytest.raises(ValueError, match="PTQ1_61"):
            packer_of("ptq1_61").pack({"q": q, "d": d, "s": d} | bad)


@pytest.mark.parametrize("weighted", [False, True])
def test_quantising_ptq_finds_values_that_are_there_and_the_nearest_to_others(weighted):
    rng = np.random.default_rng(weighted)
    packer = packer_of("ptq1_61")
    importance = rng.exponential(size=(40, 384)).astype(np.float32) if weighted else None
    data = rng.integers(0, 256, (40, 3 * 27), dtype=np.uint8)
    data[:, 2::27] |= 0x0F  # the largest code, which the search of s begins with
    there = packer.dequantize(packer.unpack(data))
    np.testing.assert_array_equal(packer.pack(ptq161.quantize(there, importance)), data)

    x = rng.standard_normal((40, 384)).astype(np.float32)
    w = np.ones_like(x) if importance is None else importance
    arrays = ptq161.quantize(x, importance)
    errors = (w * (packer.dequantize(arrays) - x) ** 2).reshape(40, 3, 128)
    for name, part in (("s", slice(0, 24)), ("d", slice(24, 128))):
        for step in np.array([-1, 1]):
            other = arrays | {name: (arrays[name] + step).astype(np.uint8)}
            if name == "s":
                ratio = x.reshape(40, 3, 128)[:, :, :24] / e5m3.decode(other["s"])[..., None]
                other["q"] = other["q"].copy()
                other["q"].reshape(40, 3, 128)[:, :, :24] = np.clip(np.floor(ratio + 8), 0, 15)
            others = (w * (packer.dequantize(other) - x) ** 2).reshape(40, 3, 128)
            assert (errors[:, :, part].sum(axis=2) <= others[:, :, part].sum(axis=2) * (1 + 1e-6)).all()


def test_scales_of_ptq_end_where_codes_do():
    scales = np.array([0.0, 2.0**-40, 2.0**-24, 1.0, 240.0, 250.0, 1e6], np.float32)
    assert e5m3.encode(scales).tolist() == [0, 0, 0, 24 * 8, 255, 255, 255]
    huge = np.linspace(-3e3, 3e3, 128, dtype=np.float32)[None]
    arrays = ptq161.quantize(huge)
    assert (int(arrays["s"][0, 0]), int(arrays["d"][0, 0])) == (255, 255)


def test_a_part_whose_importances_are_all_zero_counts_evenly():
    x = np.random.default_rng(5).standard_normal((3, 128)).astype(np.float32)
    importance = np.full_like(x, 2.0)
    even = ptq161.quantize(x, importance)
    importance[0, :24] = importance[1, 24:] = 0
    for key, array in ptq161.quantize(x, importance).items():
        np.testing.assert_array_equal(array, even[key])


def test_quantising_zeros_to_ptq_is_as_the_formats_page_says():
    data = packer_of("ptq1_61").pack(ptq161.quantize(np.zeros((1, 128), np.float32)))
    assert data.tobytes() == b"\0\0" + b"\x88" * 12 + b"\xff" * 13


def test_the_registries_agree():
    # PTQ1_61 has two kinds of weights, which no grid describes
    assert set(PACKERS) == set(GRIDS) | {"ptq1_61"}
    assert set(PACKERS) <= set(TENSOR_TYPES)
    assert {t.name for t in TENSOR_TYPES.values() if t.custom} <= set(PACKERS)
    with pytest.raises(UsageError, match=r"no packer for type 'q9'. Types that can be packed: .*tsq2"):
        packer_of("q9")
