"""Codebooks of BCQ types: what counts as one, and where the universal ones are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.facts import LAYOUTS, Codebooks

ROOT = Path(__file__).resolve().parents[2]
BCQ4 = LAYOUTS["bcq4"]

each = pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)


def _even(shape: Codebooks) -> NDArray[np.int64]:
    return np.tile(np.linspace(-31, 31, shape.levels).round().astype(int), (shape.count, 1))


@each
def test_codewords_ascend_and_may_be_equal(shape: Codebooks) -> None:
    even = _even(shape)
    assert np.array_equal(bcq.read_codebooks(even.flatten().tolist(), shape), even)
    assert bcq.read_codebooks(even, shape).dtype == np.int8
    equal = even.copy()
    equal[3, 1] = equal[3, 2]
    assert np.array_equal(bcq.read_codebooks(equal, shape), equal)


@each
@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((0, -1), 32, "magnitudes up to 31"),
        ((-1, 0), -32, "magnitudes up to 31"),
        ((0, 0), -128, "magnitudes"),
        ((2, 1), 30, "ascend"),
    ],
)
def test_other_codewords_are_refused(shape: Codebooks, place: tuple[int, int], value: int, said: str) -> None:
    wrong = _even(shape).astype(np.int8)
    wrong[place] = value
    with pytest.raises(ValueError, match=said):
        bcq.read_codebooks(wrong, shape)


@pytest.mark.parametrize("wrong", [np.zeros((8, 15), int), np.zeros((8, 16)), [1, 2], "codebooks"])
def test_other_shapes_and_kinds_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="8 times 16 integers"):
        bcq.read_codebooks(wrong, BCQ4)


@each
def test_universal_codebooks_are_written_as_they_stand(
    shape: Codebooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files of the tree are what `write_universal` makes; an installed package has no C sources to write into."""
    family = tmp_path / "tesseraq_gguf" / "types" / "bcq"
    family.mkdir(parents=True)
    universal = bcq.universal(shape)
    monkeypatch.setattr(bcq, "_HOME", family)
    bcq.write_universal(universal, shape)
    assert not (tmp_path / "cpp_kernels").exists()
    (tmp_path / "cpp_kernels" / "bcq").mkdir(parents=True)
    bcq.write_universal(universal, shape)
    for name in (f"tesseraq_gguf/types/bcq/{shape.layout}.json", f"cpp_kernels/bcq/{shape.layout}-codebooks.h"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
    assert np.array_equal(json.loads((family / f"{shape.layout}.json").read_text()), universal)


@each
def test_a_matrix_has_its_own_codebooks_or_the_universal_ones(shape: Codebooks) -> None:
    own = bcq.universal(shape)[::-1].copy()
    arrays = {"c": bcq.repeated(own, 3)}
    assert arrays["c"].shape == (3, shape.count * shape.levels)
    assert np.array_equal(bcq.codebooks_of(arrays, shape), own)
    assert np.array_equal(bcq.codebooks_of({}, shape), bcq.universal(shape))


def test_universal_codebooks_hold_a_zero() -> None:
    for shape in LAYOUTS.values():
        assert (bcq.universal(shape) == 0).any()
