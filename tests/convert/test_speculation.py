"""Heads for speculation: kept and rounded in the file, left out on request, and not promised where they were lost."""

from __future__ import annotations

import shutil
from math import prod

import pytest
import torch
from byte_pairs import take_for_gpt2
from safetensors.torch import load_file, save_file

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.dequantize import dequantized, own_codebooks
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.speculation import drafts, has_head, head_matrices, head_names
from tesseraq_gguf.types.grids import grid_of


@pytest.fixture(autouse=True)
def _known(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    take_for_gpt2(tmp_path / "site", monkeypatch)


def test_a_head_is_rounded_as_the_blocks_are(drafter, tmp_path):
    out = tmp_path / "out.gguf"
    convert(Recipe(str(drafter.folder), out, type="tsq3", method="rtn", rules=(("mtp.fc", "q8_0"),)))
    file = open_gguf(out)
    tensors = {t.name: t for t in file.tensors}
    inside = {name: t.type for name, t in tensors.items() if name.startswith("blk.2.") and len(t.shape) > 1}
    assert inside.pop("blk.2.nextn.eh_proj.weight") == "q8_0"
    assert len(inside) == 7
    assert set(inside.values()) == {"tsq3"}
    assert drafts(file)
    weight = load_file(drafter.folder / "model.safetensors")["mtp.layers.0.mlp.up_proj.weight"].float()
    grid, up = grid_of("tsq3"), tensors["blk.2.ffn_up.weight"]
    stored = dequantized(up, file.data(up), own_codebooks(file))
    assert torch.equal(torch.from_numpy(stored.copy()).reshape(weight.shape), grid.dequantize(grid.quantize(weight)))


def test_a_budget_counts_a_heads_bits(drafter, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    recipe = Recipe(
        str(drafter.folder), out, target_bpw=3.5, candidates=("tsq4", "tsq2"), method="gptq", calibration=str(text),
        samples=4, seqlen=32,
    )  # fmt: skip
    convert(recipe)
    blocks = [t for t in open_gguf(out).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    matrices = [t for t in blocks if "conv1d" not in t.name]
    assert {t.type for t in matrices if t.name.startswith("blk.2.")} == {"tsq4"}
    assert "tsq2" in {t.type for t in matrices}
    bits, weights = (sum(x) for x in zip(*((8 * t.bytes, prod(t.shape)) for t in matrices), strict=True))
    assert 3 < bits / weights <= 3.5


def test_a_head_is_left_out(drafter, tmp_path):
    out = tmp_path / "out.gguf"
    folder = str(drafter.folder)
    for recipe in (
        Recipe(folder, out, type="q4_0", method="rtn", no_mtp=True),
        Recipe(folder, out, type="f16", no_mtp=True),
    ):
        convert(recipe)
        file = open_gguf(out)
        assert not drafts(file)
        assert not [t.name for t in file.tensors if t.name.startswith("blk.2.")]


def test_a_file_promises_no_head_that_its_model_has_lost(drafter, tmp_path):
    """As transformers leaves it: settings that speak of a head, and no tensors of one."""
    shutil.copytree(drafter.folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if not n.startswith("mtp.")}, file, {"format": "pt"})
    convert(Recipe(str(tmp_path / "copy"), tmp_path / "out.gguf", type="f16"))
    assert not drafts(open_gguf(tmp_path / "out.gguf"))
    with pytest.raises(UsageError, match="has no head for speculation: no_mtp has no meaning"):
        convert(Recipe(str(tmp_path / "copy"), tmp_path / "out.gguf", type="f16", no_mtp=True))


def test_heads_of_both_kinds_are_found(drafter):
    assert has_head(drafter)
    matrices = head_matrices(Decoder(drafter, torch.device("cpu")))
    assert matrices["mtp.fc.weight"] == (64, 128)
    assert len(matrices) == 8
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"]
    assert head_names({"num_hidden_layers": 2}, names) == names[1:]
    assert head_names({"text_config": {"num_hidden_layers": 3}}, names) == []
    assert not head_names({"num_hidden_layers": 2}, ["model.visual.layers.5.up.weight"])


def test_a_model_without_a_head(make_model, tmp_path):
    source: ModelSource = make_model("llama")
    assert not has_head(source)
    with pytest.raises(UsageError, match="no_mtp has no meaning"):
        convert(Recipe(str(source.folder), tmp_path / "out.gguf", no_mtp=True))
