"""Tensors are read from where headers of safetensors files say that they are: as safetensors itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.stored import stored_tensors

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(-9, 9, (5, 3, 4), generator=random)
    tensors = {f"{'zyxwvutsrqpo'[i]}.{dtype}": numbers.to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(3.0), "vector": torch.arange(7.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_tensors_are_what_safetensors_reads(file):
    with safe_open(file, "pt") as tensors:
        expected = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (no mapping)
    found = stored_tensors(dict.fromkeys(expected, file))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        got = found[name].read()
        assert found[name].shape == tuple(tensor.shape)
        assert got.dtype == tensor.dtype
        assert torch.equal(got.double(), tensor.double())
        if len(tensor) if tensor.dim() else 0:
            rows = torch.tensor([len(tensor) - 1, 0, 2])
            assert torch.equal(found[name].read(rows).double(), tensor.double()[rows])


def test_other_files_tensors_are_not_taken(file):
    assert not stored_tensors({"vector": file, "number": file}).keys() - {"vector", "number"}


def test_a_file_that_was_cut_since_is_an_error(file):
    vector = stored_tensors({"z.torch.float64": file})["z.torch.float64"]
    with file.open("rb+") as stream:
        stream.truncate(vector.start + 8)
    with pytest.raises(ModelError, match="has become shorter"):
        vector.read()
