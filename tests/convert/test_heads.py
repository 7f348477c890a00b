"""Models whose logits are more than a matrix' products reach llama.cpp with all of their heads."""

from __future__ import annotations

import pytest
import torch
from byte_pairs import take_for_gpt2, write_tokenizer
from saved_logits import answered, logit_error, saved_logits
from tiny_models import TEXT, VOCABULARY, save_model

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.types.grids import grid_of


@pytest.mark.runtime
def test_a_bias_of_the_output_matrix_reaches_llama_cpp(tmp_path, monkeypatch):
    """And the matrix has the type that is asked for it."""
    folder, text = tmp_path / "phi", tmp_path / "text"
    save_model("phi", folder, 0.05)
    write_tokenizer(folder, TEXT, VOCABULARY)
    take_for_gpt2(tmp_path, monkeypatch)
    text.write_text(TEXT * 20)
    out = tmp_path / "out.gguf"
    recipe = Recipe(str(folder), out, type="tsq4", method="rtn", embedding_type="q8_0", output_type="tsq3")
    assert convert(recipe).fallbacks == {}
    types = {t.name: t.type for t in inspect(out).tensors if not t.name.startswith("blk.")}
    assert (types["token_embd.weight"], types["output.weight"]) == ("q8_0", "tsq3")
    assert types["output.bias"] == "f32"

    tokens, got, _ = saved_logits(out, text, 64, 1)
    decoder = Decoder(ModelSource("phi", folder), torch.device("cpu"))
    four, three = grid_of("tsq4"), grid_of("tsq3")

    def weights(block):
        return {name: four.dequantize(four.quantize(m.weight)) for name, m in block.matrices().items()}

    hidden = answered(final_states(decoder, tokens, weights=weights))[0]
    with torch.no_grad():
        expected = decoder.head.logits(hidden, three.dequantize(three.quantize(decoder.output_weight())))
    assert logit_error(got[0], expected) < 1e-2
