"""Orders of columns in files: where they stand, who reads which, and that damaged ones are refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from tesseraq_gguf.converter.verify import Expected, verify
from tesseraq_gguf.errors import FileFormatError, VerificationError
from tesseraq_gguf.gguf_files.column_orders import lost_orders, natural, orders_of, places, stored_orders
from tesseraq_gguf.gguf_files.gguf_file import TensorInfo, open_gguf
from tesseraq_gguf.types.facts import register_with_gguf
from tesseraq_gguf.types.packers import packer_of

A, B = np.random.default_rng(0).permutation(256).astype(np.int32), np.arange(256, dtype=np.int32)[::-1]
NATURAL = np.arange(256, dtype=np.int32)


def found(weight, stored):
    return next((stored[place] for place in places(weight) if place in stored), None)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("blk.3.attn_q.weight", ("blk.3.attn_q.order",)),
        ("blk.3.attn_k.weight", ("blk.3.attn_k.order", "blk.3.attn_q.order")),
        ("blk.3.attn_v.weight", ("blk.3.attn_v.order", "blk.3.attn_q.order")),
        ("blk.3.ffn_gate.weight", ("blk.3.ffn_gate.order",)),
        ("blk.3.ffn_up.weight", ("blk.3.ffn_up.order", "blk.3.ffn_gate.order")),
        ("blk.3.ffn_down.weight", ("blk.3.ffn_down.order",)),
        ("blk.3.attn_qkv.weight", ("blk.3.attn_qkv.order",)),
    ],
)
def test_places(weight, expected):
    assert places(weight) == expected


@pytest.mark.parametrize(
    ("types", "lost"),
    [
        ({"attn_q": "ptq1_61", "attn_q.order": "i32"}, []),
        ({"attn_q": "f32", "attn_q.order": "i32"}, ["attn_q"]),
        # an order that another matrix shares is in use
        ({"attn_q": "q8_0", "attn_k": "ptq1_61", "attn_q.order": "i32"}, []),
        ({"attn_q": "q8_0", "attn_k": "ptq1_61", "attn_q.order": "i32", "attn_k.order": "i32"}, ["attn_q"]),
        # what is named like an order, and is none
        ({"attn_q": "f32", "attn_q.order": "f32"}, []),
        ({"other.order": "i32"}, []),
    ],
)
def test_lost_orders(types, lost):
    names = {name if name.endswith(".order") else f"{name}.weight": type for name, type in types.items()}
    tensors = [TensorInfo(f"blk.0.{name}", type, 0, (256, 1), 0, 0) for name, type in names.items()]
    assert lost_orders(tensors) == [f"blk.0.{name}.weight" for name in lost]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({"attn_v": A, "attn_k": A, "attn_q": A}, {"attn_q"}),
        ({"ffn_up": A, "ffn_gate": A, "ffn_down": None}, {"ffn_gate"}),
        ({"ffn_up": A, "ffn_down": B}, {"ffn_up", "ffn_down"}),
        ({"attn_q": A, "attn_k": B, "attn_v": A}, {"attn_q", "attn_k"}),
        ({"attn_q": A, "attn_k": A, "attn_v": None}, {"attn_q", "attn_v"}),
        ({"attn_k": A, "attn_v": A}, {"attn_k", "attn_v"}),
        ({"attn_q": None, "attn_k": None}, set()),
    ],
)
def test_every_reader_finds_its_order(wanted, names):
    wanted = {f"blk.0.{name}.weight": order for name, order in wanted.items()}
    stored = stored_orders(wanted)
    assert stored.keys() == {f"blk.0.{name}.order" for name in names}
    for weight, order in wanted.items():
        got = found(weight, stored)
        assert np.array_equal(NATURAL if got is None else got, NATURAL if order is None else order)


def test_natural_undoes_an_order():
    weights = np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    assert np.array_equal(natural(weights[:, A], A), weights)
    assert natural(weights, None) is weights


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file with one PTQ1_61 matrix and an order, and gives it with its weights."""

    def write(order, dtype=np.int32):
        register_with_gguf(gguf)
        random = np.random.default_rng(2)
        packer = packer_of("ptq1_61")
        data = packer.pack(packer.unpack(random.integers(0, 256, (3, 54), dtype=np.uint8)))
        file = tmp_path / "some.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_tensor("blk.0.attn_k.weight", data, raw_dtype=gguf.GGMLQuantizationType(505))
        writer.add_tensor("blk.0.attn_q.order", order.astype(dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file, packer.dequantize(packer.unpack(data))

    return write


def test_orders_of_a_file(write):
    file, weights = write(A)
    assert {name: order.tolist() for name, order in orders_of(open_gguf(file)).items()} == {
        "blk.0.attn_k.weight": A.tolist()
    }
    wanted = [Expected("blk.0.attn_k.weight", "ptq1_61", weights, A), Expected("blk.0.attn_q.order", "i32", A)]
    assert verify(file, wanted) == 2


@pytest.mark.parametrize("order", [B, None])
def test_verify_notices_another_order(write, order):
    file, weights = write(A)
    with pytest.raises(VerificationError, match=r"attn_k\.weight .* another order"):
        verify(file, [Expected("blk.0.attn_k.weight", "ptq1_61", weights, order)])


@pytest.mark.parametrize(
    ("order", "dtype"),
    [
        (np.where(A == 7, 8, A), np.int32),
        (np.where(A == 255, 256, A), np.int32),
        (np.where(A == 0, -1, A), np.int32),
        (A[:255], np.int32),
        (np.append(A, 256), np.int32),
        (A, np.float32),
    ],
)
def test_what_is_no_permutation_is_refused(write, order, dtype):
    file, _ = write(order, dtype)
    with pytest.raises(FileFormatError, match=r"attn_q\.order is no order of the 256 columns of blk\.0\.attn_k"):
        orders_of(open_gguf(file))
