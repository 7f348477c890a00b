"""NVFP4 with factors, where llama.cpp's graph reads them: what is written is what llama.cpp computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conversions import Listener, recipe_of
from safetensors.torch import load_file, save_file
from saved_logits import answered, logit_error, saved_logits
from tiny_models import LOUD, TEXT, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert, plan
from tesseraq_gguf.gguf_files.factors import factors_of
from tesseraq_gguf.gguf_files.inspection import inspect, open_gguf
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.experts import expert_of
from tesseraq_gguf.models.gguf_model import GgufCheckpoint, Places
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.models.source import gguf_source

pytestmark = pytest.mark.slow

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
READ = {
    "llama": (*ATTENTION, *DENSE),
    "qwen3": (*ATTENTION, *DENSE),
    "mixtral": (*ATTENTION, *STACKS),
    "gemma3": ATTENTION,  # its graph leaves out those of the feed-forward network
    "llama-bias": ATTENTION,  # biases come before factors there, which llama.cpp refuses
}


def uneven(source: ModelSource, folder: Path) -> ModelSource:
    """A model whose experts have matrices of different size, so that each has another factor."""
    shutil.copytree(source.folder, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if (number := expert_of(name)) is not None:
                tensors[name] = weight * 2.0**-number
        save_file(tensors, file, {"format": "pt"})
    return ModelSource(source.name, folder)


def decoder_of(file) -> Decoder:
    return Decoder(gguf_source(file, file.stem), torch.device("cpu"))


def logits_of(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return answered(decoder.answers()(final_states(decoder, tokens)[0])[None])


def said_of(file) -> int:
    """Bytes that say how a file was made."""
    return sum(8 + len(key) + len(entry.raw) for key, entry in file.entries.items() if key.startswith("tesseraq."))


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("kind", "method", "near"),  # what matrices are fed has 8 bits in llama.cpp, which moves tokens to other experts
    [
        ("llama", "rtn", 5e-3),
        ("llama", "gptq", 5e-3),
        ("mixtral", "gptq", 2e-2),
        ("gemma3", "rtn", 5e-3),
        ("llama-bias", "rtn", 5e-3),
        ("qwen3", "rtn", 5e-3),
    ],
)
def test_llama_cpp_computes_what_torch_does(kind, method, near, make_model, long_text, tmp_path):  # noqa: F811
    out, text, source = tmp_path / "out.gguf", tmp_path / "text", uneven(make_model(kind, LOUD), tmp_path / "model")
    ends = {} if kind in ("gemma3", "qwen3") else {"output_type": "nvfp4"}
    recipe = recipe_of(source, out, long_text, type="nvfp4", method=method, **ends)
    planned = plan(recipe).bytes
    convert(recipe)
    file = open_gguf(out)
    factors = factors_of(file)
    wanted = {f"blk.{block}.{name}.weight" for block in (0, 1) for name in READ[kind]}
    assert factors.keys() == wanted | ({"output.weight"} if ends else set())
    assert all((factor != 1).all() for factor in factors.values())
    text.write_text(TEXT * 40)
    tokens, got, _ = saved_logits(out, text, 64, 1)
    assert logit_error(got, logits_of(decoder_of(out), tokens)) < near
    assert 0 <= out.stat().st_size - planned - said_of(file) < 32  # the header is padded


@pytest.fixture(scope="module")
def made(make_model, tmp_path_factory):  # noqa: F811
    """Experts in NVFP4, rounded to nearest: the model, and the file."""
    folder = tmp_path_factory.mktemp("made")
    source, file = uneven(make_model("mixtral", LOUD), folder / "model"), folder / "nvfp4.gguf"
    convert(Recipe(str(source.folder), file, type="nvfp4", method="rtn"))
    return source, file


def weights_of(file, ending: str = ".weight") -> dict[str, np.ndarray]:
    """Matrices of the blocks as gguf dequantises them, by name in the file, times their factors."""
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("blk.") and name.endswith(ending) and len(tensor.shape) > 1:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            scale = tensors.get(name.replace(".weight", ".scale"))
            found[name] = weights if scale is None else weights * scale.data.reshape(-1, *[1] * (weights.ndim - 1))
    return found


def test_a_file_is_read_with_its_factors(made):
    _, file = made
    factors = factors_of(open_gguf(file))
    assert all((f[:-1] > f[1:]).all() and len(f) == 4 for name, f in factors.items() if "exps" in name)
    checkpoint = decoder_of(file).weights
    assert isinstance(checkpoint, GgufCheckpoint)
    wanted, places = weights_of(file), Places(checkpoint.described)
    seen = 0
    for name in checkpoint:
        place = places[name]
        if place.tensor.name in factors:
            expected = wanted[place.tensor.name]
            expected = expected if place.layer is None else expected[place.layer]
            expected = expected if place.rows is None else expected[place.rows]
            np.testing.assert_array_equal(checkpoint.read(name).numpy(), expected)
            np.testing.assert_array_equal(checkpoint.rows(name, torch.tensor([3, 1])).numpy(), expected[[3, 1]])
            seen += 1
    assert seen == 2 * (4 + 3 * 4)


@pytest.mark.parametrize("options", [{"type": "f32"}, {"type": "q8_0", "rules": {"w1|w2|w3": "f32"}, "method": "rtn"}])
def test_factors_are_multiplied_in_where_another_type_takes_the_matrix(options, made, tmp_path):
    _, file = made
    out = tmp_path / "out.gguf"
    convert(Recipe(str(file), out, **options))
    assert not any(t.name.endswith(".scale") for t in inspect(out).tensors)
    wanted, got = weights_of(file), weights_of(out)
    for name, weights in wanted.items():
        if "exps" in name or options["type"] == "f32":
            np.testing.assert_array_equal(got[name], weights)


def test_a_matrix_that_stays_keeps_its_factor(made, tmp_path):
    """Rows of 192 are no whole blocks of Q1_0: all matrices of the experts are copied."""
    _, file = made
    out = tmp_path / "out.gguf"
    recipe = Recipe(str(file), out, type="q1_0", method="rtn")
    planned = plan(recipe).bytes
    convert(recipe)
    before, after = factors_of(open_gguf(file)), factors_of(open_gguf(out))
    assert after.keys() == {f"blk.{block}.{name}.weight" for block in (0, 1) for name in STACKS}
    assert all(np.array_equal(before[name], factors) for name, factors in after.items())
    wanted, got = (weights_of(where, "_exps.weight") for where in (file, out))
    assert all(np.array_equal(wanted[name], got[name]) for name in after)
    size = out.stat().st_size - said_of(open_gguf(out))
    counted = planned - said_of(open_gguf(file))  # what the file says of itself is counted with it
    assert abs(size - counted) < 32


def test_learning_from_a_file_keeps_its_factors(made, long_text, tmp_path):
    source, file = made
    out, told = tmp_path / "out.gguf", Listener()
    recipe = recipe_of(source, out, long_text, init=f"file:{file}", method="tesseraq")
    planned = plan(recipe).bytes
    convert(recipe, told)
    before, after = factors_of(open_gguf(file)), factors_of(open_gguf(out))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(result.loss_after < result.loss_before for result in told.results)
    assert 0 <= out.stat().st_size - planned - said_of(open_gguf(out)) < 32
