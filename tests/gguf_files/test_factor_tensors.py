"""Factors beside matrices of a file: which tensors are such, and what they must be."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.factors import bytes_of_factor, factors_of, of_rows
from tesseraq_gguf.gguf_files.inspection import inspect, open_gguf


def written(path, factors: dict[str, np.ndarray]):
    """A file with a matrix and a stack of two of NVFP4, a matrix in floats, and tensors beside them."""
    writer = gguf.GGUFWriter(path, "llama")
    data = np.zeros((3, 36), np.uint8)
    kind = gguf.GGMLQuantizationType.NVFP4
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.stack([data, data]), raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((3, 64), np.float32))
    for name, values in factors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_which_tensors_are_factors(tmp_path):
    beside = {
        "blk.0.attn_q.scale": np.array([0.25], np.float32),
        "blk.0.ffn_up_exps.scale": np.array([2, 3], np.float32),
        "blk.0.ffn_down.scale": np.array([7], np.float32),  # of a matrix of floats: the architecture's own
    }
    path = written(tmp_path / "a.gguf", beside)
    found = factors_of(open_gguf(path))
    assert {name: values.tolist() for name, values in found.items()} == {
        "blk.0.attn_q.weight": [0.25],
        "blk.0.ffn_up_exps.weight": [2, 3],
    }
    assert of_rows(found["blk.0.ffn_up_exps.weight"], 6)[:, 0].tolist() == [2, 2, 2, 3, 3, 3]
    seen = inspect(path)
    assert seen.weights == 64 * (3 + 6 + 3) + 1
    matrices = 9 * 36 + 4 * 64 * 3
    assert seen.block_bpw == round(8 * (matrices + 4 + 8) / (64 * 12), 4)


def test_what_one_takes_in_a_file(tmp_path):
    plain = written(tmp_path / "a.gguf", {}).stat().st_size
    names = [f"blk.{i}.attn_q" for i in range(8)]  # headers are padded: eight of them show what one takes
    size = written(tmp_path / "b.gguf", {f"{n}.scale": np.ones(9, np.float32) for n in names}).stat().st_size
    assert 0 <= size - plain + 31 - sum(bytes_of_factor(f"{n}.weight", 9) for n in names) < 63


@pytest.mark.parametrize("values", [np.ones(2, np.float32), np.array([np.nan], np.float32), np.ones(1, np.int32)])
def test_what_is_no_factor_is_refused(values, tmp_path):
    path = written(tmp_path / "a.gguf", {"blk.0.attn_q.scale": values})
    with pytest.raises(FileFormatError, match=r"attn_q\.scale is no factor of blk\.0\.attn_q\.weight, 1 finite"):
        factors_of(open_gguf(path))
