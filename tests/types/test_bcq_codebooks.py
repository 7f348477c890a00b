"""Codebooks of BCQ types: what counts as one, and where the universal ones are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tesseraq_gguf.types.bcq import packer as bcq

ROOT = Path(__file__).resolve().parents[2]


def test_codewords_ascend_and_may_be_equal() -> None:
    even = np.tile(np.linspace(-31, 31, 16).round().astype(int), (8, 1))
    assert np.array_equal(bcq.read_codebooks(even.flatten().tolist()), even)
    assert bcq.read_codebooks(even).dtype == np.int8
    equal = even.copy()
    equal[3, 5] = equal[3, 6]
    assert np.array_equal(bcq.read_codebooks(equal), equal)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [((0, 15), 32, "magnitudes up to 31"), ((7, 0), -32, "magnitudes up to 31"), ((2, 4), 30, "ascend")],
)
def test_other_codewords_are_refused(place: tuple[int, int], value: int, said: str) -> None:
    wrong = np.tile(np.linspace(-31, 31, 16).round().astype(int), (8, 1))
    wrong[place] = value
    with pytest.raises(ValueError, match=said):
        bcq.read_codebooks(wrong)


@pytest.mark.parametrize("wrong", [np.zeros((8, 15), int), np.zeros((8, 16)), [1, 2], "codebooks"])
def test_other_shapes_and_kinds_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="8 times 16 integers"):
        bcq.read_codebooks(wrong)


def test_universal_codebooks_are_written_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files of the tree are what `write_universal` makes; an installed package has no C sources to write into."""
    family = tmp_path / "tesseraq_gguf" / "types" / "bcq"
    family.mkdir(parents=True)
    monkeypatch.setattr(bcq, "__file__", str(family / "packer.py"))
    monkeypatch.setattr(bcq, "_FILE", family / "codebooks.json")
    bcq.write_universal(bcq.UNIVERSAL)
    assert not (tmp_path / "cpp_kernels").exists()
    (tmp_path / "cpp_kernels" / "bcq").mkdir(parents=True)
    bcq.write_universal(bcq.UNIVERSAL)
    for name in ("tesseraq_gguf/types/bcq/codebooks.json", "cpp_kernels/bcq/bcq4-codebooks.h"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
    assert np.array_equal(json.loads((family / "codebooks.json").read_text()), bcq.UNIVERSAL)


def test_a_matrix_has_its_own_codebooks_or_the_universal_ones() -> None:
    own = bcq.UNIVERSAL[::-1].copy()
    arrays = {"c": bcq.repeated(own, 3)}
    assert arrays["c"].shape == (3, 128)
    assert np.array_equal(bcq.codebooks_of(arrays), own)
    assert np.array_equal(bcq.codebooks_of({}), bcq.UNIVERSAL)
