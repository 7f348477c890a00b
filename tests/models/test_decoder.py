"""The block-by-block walk equals the model that transformers loads whole, for every architecture we name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, LOUD

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder, ModelSource

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (2, 96), generator=torch.Generator().manual_seed(0))


def _walk(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    hidden, inputs = decoder.stem(tokens)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        with torch.no_grad():
            hidden = torch.cat([block.run(h, inputs.arguments[index]) for h in hidden.split(1)])
    return hidden


def _copy(source: ModelSource, folder) -> ModelSource:
    shutil.copytree(source.folder, folder)
    return ModelSource("copy", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_equals_the_whole_model(kind, make_model):
    from transformers import AutoModelForCausalLM

    source = make_model(kind, LOUD)
    whole = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    decoder = Decoder(source, CPU)
    # longer than the sliding windows, so that masks differ between blocks
    states = _walk(decoder, TOKENS)
    with torch.no_grad():
        expected = whole(TOKENS).logits
        got = torch.stack([decoder.head.logits(h, decoder.output_weight()) for h in states])
        loss = torch.stack([whole(t[None], labels=t[None]).loss for t in TOKENS]).mean()
    assert expected.std() > 0.3
    assert (got - expected).square().mean() < 1e-8 * expected.var()
    assert decoder.mean_loss(states, TOKENS) == pytest.approx(float(loss), rel=1e-5)


def test_blocks_are_loaded_one_at_a_time(make_model):
    decoder = Decoder(make_model("llama"), CPU)
    decoder.load_block(0)
    assert all(p.is_meta for p in decoder._model.parameters())
    decoder.stem(TOKENS)
    assert all(p.is_meta for p in decoder._model.parameters())


def test_matrix_shapes_are_those_of_the_files(make_model):
    source = make_model("gemma3")
    shapes = Decoder(source, CPU).matrix_shapes()
    stored = {n: tuple(t.shape) for f in source.folder.glob("*.safetensors") for n, t in load_file(f).items()}
    assert len(shapes) == 14
    assert all(stored[name] == shape for name, shape in shapes.items())


def test_weights_can_be_replaced(make_model):
    decoder = Decoder(make_model("qwen2"), CPU)
    hidden, inputs = decoder.stem(TOKENS)
    block = decoder.load_block(0)
    own = {name: m.weight for name, m in block.matrices().items()}
    zero = {name: torch.zeros_like(w) for name, w in own.items()}
    with torch.no_grad():
        plain = block.run(hidden[:1], inputs.arguments[0])
        assert torch.equal(plain, block.run(hidden[:1], inputs.arguments[0], own))
        changed = block.run(hidden[:1], inputs.arguments[0], zero)
    # with no attention and no feed-forward output the residual stream passes through
    assert torch.equal(changed, hidden[:1])
    assert not torch.equal(plain, changed)


def test_an_encoder_is_refused(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not a decoder-only language model .*BertForMaskedLM"):
        Decoder(ModelSource("bert", tmp_path), CPU)


def test_an_unknown_architecture_is_refused(make_model, tmp_path):
    source = _copy(make_model("llama"), tmp_path / "copy")
    config = source.config() | {"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}
    (source.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="nonesuch"):
        Decoder(source, CPU)


def test_a_missing_shard_is_named(make_model, tmp_path):
    source = _copy(make_model("llama-576"), tmp_path / "copy")
    shard = sorted(source.folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        Decoder(source, CPU)


def test_a_truncated_shard_is_named(make_model, tmp_path):
    source = _copy(make_model("llama"), tmp_path / "copy")
    shard = sorted(source.folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=shard.name):
        Decoder(source, CPU)


def test_a_missing_tensor_is_named(make_model, tmp_path):
    source = make_model("llama")
    tensors = {n: t for f in source.folder.glob("*.safetensors") for n, t in load_file(f).items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    shutil.copy(source.folder / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    decoder = Decoder(ModelSource("holed", tmp_path), CPU)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        decoder.load_block(1)


def test_a_tensor_of_another_shape_is_named(make_model, tmp_path):
    source = _copy(make_model("llama"), tmp_path / "copy")
    (source.folder / "config.json").write_text(json.dumps(source.config() | {"intermediate_size": 256}))
    with pytest.raises(ModelError, match=r"has shape .* config\.json implies"):
        Decoder(source, CPU).load_block(0)


def test_an_architecture_is_found_by_its_model_type(make_model, tmp_path):
    source = _copy(make_model("llama"), tmp_path / "copy")
    config = source.config()
    del config["architectures"]
    (source.folder / "config.json").write_text(json.dumps(config))
    assert source.architectures() == ["LlamaForCausalLM"]
    assert len(Decoder(source, CPU)) == 2
    (source.folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="names no architectures"):
        Decoder(source, CPU)


@pytest.mark.parametrize(
    "entry", [{"num_attention_heads": "four"}, {"hidden_act": "nonesuch"}, {"rope_parameters": {"rope_type": "x"}}]
)
def test_odd_entries_of_a_config_are_one_line(entry, make_model, tmp_path):
    source = _copy(make_model("llama"), tmp_path / "copy")
    (source.folder / "config.json").write_text(json.dumps(source.config() | entry))
    with pytest.raises(ModelError, match=r"transformers cannot build this model: .+") as caught:
        Decoder(source, CPU)
    assert "\n" not in str(caught.value)


def test_tokens_without_rows_are_refused(make_model):
    decoder = Decoder(make_model("llama"), CPU)
    decoder.check_tokens(torch.tensor([[0, 319]]))
    with pytest.raises(ModelError, match=r"its tokenizer gives token 320, but its embedding has 320 rows"):
        decoder.check_tokens(torch.tensor([[0, 320]]))
