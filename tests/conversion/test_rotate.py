"""Rotation in a conversion: the file gives the model's own answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conversions import Listener
from gguf_sources import gguf_model
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.quantised import final_states

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("origin", ["folder", "gguf"])
@pytest.mark.parametrize("kind", ["llama-odd", "gemma3"])
def test_a_rotated_model_gives_the_same_answers(kind, origin, make_model, long_text, tmp_path):  # noqa: F811
    source, told = make_model(kind), Listener()
    if origin == "gguf":
        write_plain(source, tmp_path / "source.gguf", "f32")
        source = resolve_model(str(tmp_path / "source.gguf"))
    options: dict[str, Any] = {"type": "q8_0", "method": "rtn", "rotate": True, "embedding_type": "f32"}
    model = str(source.gguf or source.folder)
    convert(Recipe(model, tmp_path / "out.gguf", calibration=str(long_text), samples=2, seqlen=32, **options), told)
    whole = kind == "llama-odd" and origin == "folder"
    assert ("an output matrix of its own" in " ".join(told.notes)) == whole
    assert ("output.weight" in {t.name for t in inspect(tmp_path / "out.gguf").tensors}) == whole
    assert [file.name for file in tmp_path.iterdir() if "work" in file.name] == []
    tokens = torch.randint(4, 300, (1, 32), generator=torch.Generator().manual_seed(0))
    got, expected = (
        decoder.answers()(final_states(decoder, tokens)[0])
        for decoder in (
            Decoder(gguf_model(tmp_path / "out.gguf", tmp_path / "expanded"), torch.device("cpu")),
            Decoder(source, torch.device("cpu")),
        )
    )
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 1e-3
    with pytest.raises(UsageError, match="keeps apart"):
        convert(Recipe(model, tmp_path / "o.gguf", type="ptq1_61", rotate=True, method="gptq"))
