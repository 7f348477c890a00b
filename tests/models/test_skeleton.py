"""The text part of a checkpoint of any kind: what is walked answers as the whole model does to text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_vision import VISION_KINDS

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder, ModelSource

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 290, (2, 24), generator=torch.Generator().manual_seed(0))


def _logits(decoder: Decoder) -> torch.Tensor:
    hidden, inputs = decoder.stem(TOKENS)
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            hidden = torch.cat([block.run(h, inputs.arguments[index]) for h in hidden.split(1)])
        return torch.stack([decoder.head.logits(h, decoder.output_weight()) for h in hidden])


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_the_text_part_answers_as_the_whole_model(kind, make_vision_model):
    from transformers import AutoModelForMultimodalLM

    source = make_vision_model(kind)
    whole = AutoModelForMultimodalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    decoder = Decoder(source, CPU)
    decoder.check_weights()
    with torch.no_grad():
        expected = whole(input_ids=TOKENS).logits
    assert expected.std() > 0.3
    assert (_logits(decoder) - expected).square().mean() < 1e-8 * expected.var()


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_names_are_those_of_the_files(kind, make_vision_model):
    source = make_vision_model(kind)
    decoder = Decoder(source, CPU)
    stored = source.weight_map()
    prefix, _ = decoder.final_norm()
    assert {*decoder.matrix_shapes(), decoder.embedding_name(), decoder.output_name(), f"{prefix}weight"} <= set(stored)
    assert not any("vision" in name or "visual" in name for name in decoder.matrix_shapes())


def test_towers_are_not_read(make_vision_model, tmp_path):
    from safetensors.torch import load_file, save_file

    source = make_vision_model("gemma3-vision")
    shutil.copytree(source.folder, tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    tower = next(name for name in weights if "vision_tower" in name)
    weights[tower] = torch.full_like(weights[tower], torch.nan)
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    decoder = Decoder(ModelSource("copy", tmp_path / "copy"), CPU)
    decoder.check_weights()
    assert torch.equal(_logits(decoder), _logits(Decoder(source, CPU)))


@pytest.mark.parametrize("kind", ["BertModel", "T5ForConditionalGeneration", "LlamaForSequenceClassification"])
def test_what_makes_no_text_is_refused(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [kind], "model_type": "llama"}))
    with pytest.raises(ModelError, match=rf"is not a decoder-only language model .*{kind}") as caught:
        Decoder(_with_weights(tmp_path), CPU)
    assert "\n" not in str(caught.value)


def _with_weights(folder) -> ModelSource:
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    return ModelSource("model", folder)
