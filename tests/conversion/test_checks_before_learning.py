"""What `convert` finds out about a model before it learns anything, and what it does not need to know."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from split_files import split, write_gguf_file
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.conversion import pipeline
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import ModelError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.runtime import ensure_source

DOWN = "model.layers.1.mlp.down_proj.weight"


class Stages(SilentProgress):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.told = (0, 0)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def advance(self, done: int, total: int) -> None:
        self.told = (done, total)


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


@pytest.mark.parametrize("work_dir", [None, "work"])
def test_a_mended_model_is_taken_after_a_refusal(work_dir, make_model, tmp_path):  # noqa: F811
    source = make_model("llama")
    folder = _changed(source, tmp_path / "model", DOWN, lambda tensors: tensors[DOWN].fill_(float("inf")))
    place = work_dir and tmp_path / work_dir
    recipe = Recipe(str(folder), tmp_path / "out.gguf", type="q4_0", method="rtn", device="cpu", work_dir=place)
    with pytest.raises(ModelError, match="not finite"):
        convert(recipe)
    shard = source.weight_map()[DOWN]
    save_file(load_file(shard), folder / shard.name)  # of a time of its own
    assert convert(recipe).resumed == 0


def test_weights_are_looked_at_once(make_model, tmp_path, monkeypatch):  # noqa: F811
    recipe = Recipe(
        str(make_model("llama").folder), tmp_path / "out.gguf", method="rtn", device="cpu", work_dir=tmp_path / "work"
    )
    convert(recipe)
    monkeypatch.setattr(pipeline.Decoder, "check_weights", lambda *_: pytest.fail("again"))
    told = Stages()
    convert(recipe, told)
    assert "Checking the model's weights" not in told.stages


@pytest.fixture
def unknown(make_model, tmp_path):  # noqa: F811
    """A GGUF file of an architecture that the learner does not know."""
    plain = open_gguf(write_plain(make_model("llama"), tmp_path / "plain.gguf", "f16").path)
    entries = {key.replace("llama.", "rwkv7.", 1): entry.raw for key, entry in plain.entries.items()}
    entries["general.architecture"] = struct.pack("<IQ", 8, 5) + b"rwkv7"
    write_gguf_file(tmp_path / "model.gguf", entries, plain, plain.tensors)
    return open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("parts", [1, 3])
def test_a_gguf_file_of_any_architecture_is_copied(parts, unknown, tmp_path, monkeypatch):
    tree = ensure_source()  # the new cache has none
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "ensure_source", lambda _: tree)
    file = unknown.path if parts == 1 else split(unknown.path, tmp_path, [9, 5])[0]
    (tmp_path / "config.json").write_text("{}")  # of another model, and beside it
    told = Stages()
    report = convert(Recipe(str(file), tmp_path / "out.gguf", type="f16"), told)
    made = open_gguf(report.out)
    assert report.blocks == 2
    assert told.told[-1] == sum(tensor.bytes for tensor in unknown.tensors)
    assert made.get("general.architecture") == "rwkv7"
    assert [(t.name, t.type, t.shape) for t in made.tensors] == [(t.name, t.type, t.shape) for t in unknown.tensors]
    for mine, other in zip(made.tensors, unknown.tensors, strict=True):
        assert np.array_equal(made.data(mine), unknown.data(other)), mine.name
    assert not list(tmp_path.glob("cache/models/*")), "it was read as a model"
    mixed = convert(Recipe(str(file), tmp_path / "mixed.gguf", type="bf16", embedding_type="q8_0")).out
    types = {t.name: t.type for t in open_gguf(mixed).tensors}
    assert (types["token_embd.weight"], types["blk.1.ffn_up.weight"]) == ("q8_0", "bf16")
    rules = (("mlp", "q8_0"),)  # which name matrices as the learner does
    for options in ({"type": "q4_0", "method": "rtn"}, {"type": "f16", "rules": rules}):
        with pytest.raises(ModelError, match="'rwkv7'") as caught:
            convert(Recipe(str(file), tmp_path / "no.gguf", **options))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is the model itself"):
        convert(Recipe(str(file), file, type="f16"))


def test_what_is_only_written_need_not_be_known_to_the_learner(make_model, tmp_path, monkeypatch):  # noqa: F811
    """Weights that only llama.cpp's converter reads, in an architecture that the learner cannot learn."""
    source = make_model("llama")
    monkeypatch.setattr(pipeline, "Decoder", lambda *_: pytest.fail("the learner's view was built"))
    report = convert(Recipe(str(source.folder), tmp_path / "out.gguf", type="f16"))
    assert report.blocks == 2
    old = tmp_path / "old"
    shutil.copytree(source.folder, old)
    weights: dict[str, torch.Tensor] = {}
    for file in old.glob("model*"):
        weights |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    torch.save(weights, old / "pytorch_model.bin")
    config = json.loads((old / "config.json").read_text())
    del config["architectures"]
    (old / "config.json").write_text(json.dumps(config))
    again = convert(Recipe(str(old), tmp_path / "again.gguf", type="f16"))
    assert (again.blocks, again.bytes) == (2, report.bytes)
