"""Tensors on a disk that does not take them: one line for users."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tesseraq_gguf.errors import ConversionError
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.tensor_files import write_tensors


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4, dtype=torch.bfloat16)}
    write_tensors(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    found = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    line = f"^{tmp_path} cannot be written to: No space left on device. Free .* --work-dir on another disk$"
    with pytest.raises(ConversionError, match=line), temporary_sibling(tmp_path / "t.safetensors") as partial:
        write_tensors({"a": torch.ones(4)}, partial, {})
    assert list(tmp_path.iterdir()) == []


def test_what_torch_reads_back_is_data_and_no_code() -> None:
    """A pickle may call anything; older releases of torch obey it unless they are told not to."""
    root = Path(__file__).parent.parent
    for folder in ("tesseraq_gguf", "convert", "scripts"):
        for file in [*(root / folder).rglob("*.py")]:
            calls = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", file.read_text(encoding="utf-8"))
            assert all("weights_only=True" in call for call in calls), file
