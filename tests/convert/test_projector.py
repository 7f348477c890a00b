"""Vision-language models: their text part in one file, the projector in another, as llama.cpp's converter has them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_vision import VISION_KINDS

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.converter.writer import check_projector, write_projector
from tesseraq_gguf.errors import ModelError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.models import resolve_model


@pytest.mark.parametrize("kind", ["gemma3-vision", "mistral3", "smolvlm"])
def test_the_text_part_is_written_with_all_that_was_rounded(kind, make_vision_model, tmp_path):
    source, out = make_vision_model(kind), tmp_path / "out.gguf"
    report = convert(Recipe(str(source.folder), out, type="q4_0", method="rtn"))
    assert not report.fallbacks
    types = {t.name: t.type for t in open_gguf(out).tensors}
    layers = VISION_KINDS[kind][1]["num_hidden_layers"]
    rounded = [n for n, type in types.items() if type == "q4_0"]
    assert len(rounded) == 7 * layers
    assert not any(name.startswith(("v.", "mm.")) for name in types)


def test_the_projector_holds_the_weights_of_the_tower(make_vision_model, tmp_path):
    source, out, projector = make_vision_model("gemma3-vision"), tmp_path / "out.gguf", tmp_path / "mmproj.gguf"
    convert(Recipe(str(source.folder), out, type="f16", mmproj=projector, mmproj_type="f32"))
    file = open_gguf(projector)
    assert (file.get("general.type"), file.get("clip.projector_type")) == ("mmproj", "gemma3")
    weights = load_file(source.folder / "model.safetensors")
    tensors = {t.name: t for t in file.tensors}
    for layer in range(2):
        tower = weights[f"vision_tower.vision_model.encoder.layers.{layer}.mlp.fc1.weight"].float().numpy()
        stored = file.data(tensors[f"v.blk.{layer}.ffn_up.weight"]).view(np.float32).reshape(tower.shape)
        assert np.array_equal(stored, tower)
    assert inspect(projector).runs_on == "any llama.cpp, beside the file of its model (--mmproj)"
    with pytest.raises(ModelError, match="no model: give the file of the model itself"):
        resolve_model(str(projector))


def test_types_of_projectors(make_vision_model, tmp_path):
    source = make_vision_model("gemma3-vision")
    for type in ("q8_0", "bf16"):
        write_projector(source, tmp_path / "mmproj.gguf", type)
        types = {t.name: t.type for t in open_gguf(tmp_path / "mmproj.gguf").tensors}
        assert types["v.blk.0.attn_q.weight"] == type


def test_a_model_of_text_has_no_projector(make_model, tmp_path):
    with pytest.raises(ModelError, match=r"is a model of text alone .* has no projector"):
        convert(Recipe(str(make_model("llama").folder), tmp_path / "out.gguf", mmproj=tmp_path / "mmproj.gguf"))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_a_projector(make_vision_model, tmp_path):
    import shutil

    from tesseraq_gguf.models import ModelSource

    source, out = make_vision_model("gemma3-vision"), tmp_path / "out.gguf"
    with pytest.raises(UsageError, match="is the output itself"):
        Recipe(str(source.folder), out, mmproj=out)
    with pytest.raises(UsageError, match="no projector is written"):
        Recipe(str(source.folder), out, mmproj_type="q8_0")
    shutil.copytree(source.folder, tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"there is no preprocessor_config\.json"):
        check_projector(ModelSource("copy", tmp_path / "copy"))
