"""MODEL: folders, GGUF files, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.gguf_model import check_tokens


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing-there", "no model at nothing-there"),
        ("./nowhere/at/all", "no model at"),
        ("gone.gguf", "no model at gone.gguf"),
        ("empty", "has no config.json"),
        ("text.txt", "neither a model folder nor a .gguf file"),
        ("fake.gguf", "not a GGUF file"),
        ("broken", "config.json cannot be read"),
        ("adapter", r"holds an adapter for base/model, not a model: merge it first"),
        ("adapted", r"holds an adapter, not a model: merge it first"),
        ("list", "holds no settings of a model"),
        ("someone/unreachable", "the hub did not give it"),
        ("demo:other", "hub id such as .*, or 'demo' or 'demo:smollm2'"),
    ],
)
def test_what_is_no_model(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "fake.gguf").write_bytes(b"not this")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base/model"}')
    (tmp_path / "adapted").mkdir()
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapted" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_truncated_gguf_leaves_nothing_in_the_cache(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    write_plain(make_model("llama"), whole, "f16", tree=_tree(monkeypatch))
    cut.write_bytes(whole.read_bytes()[:20000])
    with pytest.raises(ModelError, match=r"cut\.gguf is truncated"):
        resolve_model(str(cut))
    assert not list(tmp_path.glob("cache/models/*"))


def test_a_gguf_file_becomes_the_same_model(make_model, tmp_path, monkeypatch):
    tree = _tree(monkeypatch)
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    source = make_model("llama")
    file = tmp_path / "tiny.gguf"
    write_plain(source, file, "f32", tree=tree)
    before = file.read_bytes()
    said: list[str] = []
    read = resolve_model(str(file), said.append)
    again = resolve_model(str(file), said.append)
    assert (read.gguf, again.folder) == (file, read.folder)
    assert len(said) == 1  # the second time it is there already
    assert file.read_bytes() == before
    ours, theirs = Decoder(source, torch.device("cpu")), Decoder(read, torch.device("cpu"))
    for name, module in ours.load_block(1).matrices().items():
        assert torch.equal(theirs.load_block(1).matrices()[name].weight, module.weight)


def test_the_fingerprint_follows_the_weights(make_model, tmp_path):
    import shutil

    from tesseraq_gguf.models import ModelSource

    shutil.copytree(make_model("llama").folder, tmp_path / "copy")
    source = ModelSource("copy", tmp_path / "copy")
    first = source.fingerprint()
    assert source.fingerprint() == first
    shard = sorted(source.folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes())
    assert source.fingerprint() != first


def _tree(monkeypatch):
    """Return the patched source from the user's own cache, before a test moves the cache."""
    from tesseraq_gguf.runtime.source import ensure_source

    return ensure_source()


class _Tokenizer:
    """A vocabulary of words, and letters that it falls back to if its merges are lost."""

    def __init__(self, merges: bool) -> None:
        words = ["\u2581about", "\u2581house", "\u2581river", "\u2581green"]
        self._merges, self._vocabulary = merges, {token: number for number, token in enumerate(["<pad>", *words])}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        whole = [self._vocabulary["\u2581" + word] for word in text.split()]
        return whole if self._merges else [100 + ord(letter) for letter in text]


def test_a_tokenizer_without_its_merges_is_refused():
    check_tokens(_Tokenizer(merges=True), Path("model.gguf"))
    with pytest.raises(ModelError, match=r"transformers \S+ cuts text of model\.gguf .*\(4 of 4 words"):
        check_tokens(_Tokenizer(merges=False), Path("model.gguf"))


def _shards(source, folder, names=(), index=True):
    """Copy a model of two shards, with further weight files of the same content, with or without its index."""
    import shutil

    from tesseraq_gguf.models import ModelSource

    shutil.copytree(source.folder, folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    for name in names:
        shutil.copy(first, folder / name)
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    return ModelSource("copy", folder), first, second


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        (["model.safetensors"], True, r"model\.safetensors and model-00001-of-00002\.safetensors stand side by side"),
        (["model.safetensors"], False, r"model\.safetensors and model-00001-of-00002\.safetensors stand side by side"),
        (["adapter_model.safetensors", "consolidated.safetensors"], True, None),
        (["model-00001-of-00003.safetensors"], True, None),  # what is left of another save, which nobody takes
        (["model-00001-of-00003.safetensors"], False, r"model-00002-of-00003\.safetensors is not there"),
        ([], False, None),
        ([], True, None),
    ],
)
def test_weight_files_are_those_that_transformers_and_the_converter_take(names, index, message, make_model, tmp_path):
    source, first, second = _shards(make_model("llama"), tmp_path / "copy", names, index)
    if message is None:
        assert set(source.weight_map().values()) == {first, second}
        assert source.weight_map().keys() == make_model("llama").weight_map().keys()
        return
    with pytest.raises(ModelError, match=message) as caught:
        source.weight_map()
    assert "\n" not in str(caught.value)


def test_an_index_must_name_all_and_nothing_else(make_model, tmp_path):
    import json

    source, first, second = _shards(make_model("llama"), tmp_path / "copy")
    index = source.folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]

    def write(kept):
        index.write_text(json.dumps({"weight_map": kept}))

    write({n: f for n, f in listed.items() if f != second.name})
    with pytest.raises(ModelError, match=rf"{second.name} is not listed in .* {first.name} is one of 2 parts"):
        source.weight_map()
    write({n: f for n, f in listed.items() if n != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is in the weight files but not in"):
        source.weight_map()
    write(listed | {"model.more.weight": first.name})
    with pytest.raises(ModelError, match=r"model\.more\.weight is not where it should be"):
        source.weight_map()
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json cannot be read \('weight_map'\)"):
        source.weight_map()
    first.unlink()
    write(listed)
    with pytest.raises(ModelError, match=rf"{first.name} is listed in"):
        source.weight_map()


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer.json", "vocab.json", "qwen.tiktoken", "vocab.txt", None]
)
def test_a_folder_without_a_tokenizer_is_called_so(name, make_model, tmp_path):
    import shutil

    from tesseraq_gguf.learning.calibration import tokens_of
    from tesseraq_gguf.models import ModelSource

    shutil.copytree(make_model("llama").folder, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer.model"))
    source = ModelSource("m", tmp_path / "m")
    if name:
        (tmp_path / "m" / name).write_text("")
    assert source.has_tokenizer() == bool(name)
    if not name:  # transformers would make one that knows no word
        with pytest.raises(ModelError, match="no tokenizer in its folder: put the files"):
            tokens_of(source, "a")
