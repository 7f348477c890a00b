"""Preprocessing in a conversion: another file, and a killed run that ends with the same one."""

from __future__ import annotations

from typing import Any

import pytest
from conversions import Listener, recipe_of
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import convert
from tesseraq_gguf.gguf_files.inspection import inspect

pytestmark = pytest.mark.slow


class Stopper(Listener):
    """Stops a conversion after some steps of the preprocessing."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left, self.stage_now = steps, ""

    def stage(self, text: str) -> None:
        self.stage_now = text

    def advance(self, done: int, total: int) -> None:
        if self.stage_now.startswith("Learning on the quantised model"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


def test_preprocessing_makes_another_file_and_resumes(make_model, long_text, tmp_path):  # noqa: F811
    source, whole = make_model("llama-256"), tmp_path / "whole.gguf"
    options: dict[str, Any] = {"type": "ptq1_61", "method": "ptq161", "embedding_type": "f16"}
    plain = recipe_of(source, tmp_path / "plain.gguf", long_text, **options)
    options |= {"preprocess": str(long_text), "preprocess_steps": 4}
    told = Listener()
    convert(plain, told)
    convert(recipe_of(source, whole, long_text, **options), told)
    assert whole.read_bytes() != plain.out.read_bytes()
    assert "preprocessed" in str(inspect(whole).tesseraq["method"])
    broken = recipe_of(source, tmp_path / "broken.gguf", long_text, **options)
    with pytest.raises(KeyboardInterrupt):
        convert(broken, Stopper(2))
    told = Listener()
    convert(broken, told)
    assert [r.resumed for r in told.results] == [True, True, False, False]  # blocks of the first, then of the last
    assert broken.out.read_bytes() == whole.read_bytes()
