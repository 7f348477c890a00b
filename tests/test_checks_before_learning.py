"""What `convert` finds out about a model before it learns anything, and what it does not need to know."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert, pipeline
from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.pipeline import SilentProgress

DOWN = "model.layers.1.mlp.down_proj.weight"


class Stages(SilentProgress):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def _changed(source, folder, name, change):
    shutil.copytree(source.folder, folder)
    file = folder / source.weight_map()[name].name
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"preset": "fast", "samples": 8, "seqlen": 32}])
def test_a_number_that_is_not_finite_stops_the_work_before_it_begins(options, make_model, tmp_path):  # noqa: F811
    def spoil(tensors):
        tensors[DOWN][3, 5] = float("nan")

    folder, told = _changed(make_model("llama"), tmp_path / "damaged", DOWN, spoil), Stages()
    with pytest.raises(ModelError, match=rf"{DOWN} holds a number that is not finite .* at \[3, 5\]"):
        convert(Recipe(str(folder), tmp_path / "out.gguf", type="q4_0", device="cpu", **options), told)
    assert told.stages[-1] == "Checking the model's weights"
    assert not (tmp_path / "out.gguf").exists()


def test_weights_are_looked_at_once(make_model, tmp_path, monkeypatch):  # noqa: F811
    recipe = Recipe(
        str(make_model("llama").folder), tmp_path / "out.gguf", method="rtn", device="cpu", work_dir=tmp_path / "work"
    )
    convert(recipe)
    monkeypatch.setattr(pipeline.Decoder, "check_weights", lambda *_: pytest.fail("again"))
    told = Stages()
    convert(recipe, told)
    assert "Checking the model's weights" not in told.stages


def test_what_is_only_written_need_not_be_known_to_the_learner(make_model, tmp_path, monkeypatch):  # noqa: F811
    """Weights that only llama.cpp's converter reads, in an architecture that the learner cannot learn."""
    source = make_model("llama")
    monkeypatch.setattr(pipeline, "Decoder", lambda *_: pytest.fail("the learner's view was built"))
    report = convert(Recipe(str(source.folder), tmp_path / "out.gguf", type="f16"))
    assert report.blocks == 2
    old = tmp_path / "old"
    shutil.copytree(source.folder, old)
    weights = {}
    for file in old.glob("model*"):
        weights |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    torch.save(weights, old / "pytorch_model.bin")
    config = json.loads((old / "config.json").read_text())
    del config["architectures"]
    (old / "config.json").write_text(json.dumps(config))
    again = convert(Recipe(str(old), tmp_path / "again.gguf", type="f16"))
    assert (again.blocks, again.bytes) == (2, report.bytes)
