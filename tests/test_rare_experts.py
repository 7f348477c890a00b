"""Experts that calibration hardly visits are rounded with care and named; models with experts reach llama.cpp."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_models import TEXT, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.calibration import tokens_of
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.evaluation import evaluate
from tesseraq_gguf.grids import grid_of
from tesseraq_gguf.inspection import inspect
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.start import AsItStarts
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.pipeline import SilentProgress
from tesseraq_gguf.quantized import QuantizedTensor
from tesseraq_gguf.reconstruction import Reconstruction
from tesseraq_gguf.simulation import chunks_of, final_states, measure

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (6, 32), generator=torch.Generator().manual_seed(0))
NEVER = 2
"""The expert that the router is kept from."""


class Kept:
    """A method that remembers what it was asked to learn."""

    def __init__(self) -> None:
        self.asked: list[set[str]] = []

    def learn(self, problem) -> dict[str, QuantizedTensor]:
        self.asked.append(set(problem.matrices()))
        return AsItStarts(GPTQ()).learn(problem)


@pytest.fixture
def walk(make_model, monkeypatch):  # noqa: F811
    """Return the results of learning a model whose router never chooses one expert."""
    load = Decoder.load_block

    def biased(self, index, hollow=()):
        block = load(self, index, hollow)
        block.module.mlp.gate.register_forward_hook(_without(NEVER))
        return block

    monkeypatch.setattr(Decoder, "load_block", biased)
    decoder, method = Decoder(make_model("qwen3-moe"), CPU), Kept()
    types = dict.fromkeys(decoder.matrix_shapes(), "tsq3")
    engine = Reconstruction(decoder, method, types, seed=0, autocast=torch.float32)
    sensitivity = [torch.ones(2, decoder.hidden_size)] * 2
    return decoder, method, list(engine.run(TOKENS, sensitivity, lambda _: None))


def _without(expert):
    def hook(_module, _args, out):
        logits, weights, chosen = out
        return logits, weights, torch.where(chosen == expert, (expert + 1) % 4, chosen)

    return hook


def test_rare_experts_are_rounded_and_named(walk):
    decoder, method, results = walk
    for result, asked in zip(results, method.asked, strict=True):
        prefix = decoder.block_prefix(result.index)
        rare = {name.removeprefix(prefix).removesuffix(".weight") for name in result.rare}
        assert rare == {f"mlp.experts.{NEVER}.{kind}_proj" for kind in ("gate", "up", "down")}
        assert not asked & rare
        assert asked | rare == set(decoder.load_block(0).matrices())
        # and are in the result all the same
        assert set(result.tensors) == {f"{prefix}{name}.weight" for name in asked | rare}
        grid = grid_of("tsq3")
        for name in rare:
            weight = decoder.matrix(f"{prefix}{name}.weight")
            got = grid.dequantize(result.tensors[f"{prefix}{name}.weight"])
            nearest = grid.dequantize(grid.quantize(weight))
            assert float((got - weight).norm()) < 1.2 * float((nearest - weight).norm())
            assert not torch.equal(got, nearest)  # squares of what the others are fed were weights


def test_a_mixture_reaches_llama_cpp(make_model, tmp_path):  # noqa: F811
    """Perplexity of the file through llama.cpp is that of the rounded model in torch."""
    source, text = make_model("mixtral"), tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    out = tmp_path / "out.gguf"
    report = convert(Recipe(str(source.folder), out, type="tsq4", method="rtn", embedding_type="f16"))
    assert report.fallbacks == {}
    stacks = [t for t in inspect(out).tensors if "_exps" in t.name]
    assert {(t.type, len(t.shape)) for t in stacks} == {("tsq4", 3)}
    assert len(stacks) == 6
    found = evaluate(out, text, ctx=64, chunks=3)

    decoder = Decoder(source, CPU)
    begin, ids = tokens_of(source, text.read_text(), special=False)
    tokens = chunks_of(ids, begin[0] if begin else None, 64, 3)
    grid = grid_of("tsq4")

    def weights(block):
        return {name: grid.dequantize(grid.quantize(m.weight)) for name, m in block.matrices().items()}

    expected = measure(final_states(decoder, tokens, weights=weights), tokens, decoder.answers())[0]
    assert math.log(found.perplexity) == pytest.approx(math.log(expected), rel=2e-3)


def test_experts_of_one_stack_have_one_type(make_model, tmp_path):  # noqa: F811
    source = make_model("mixtral")
    with pytest.raises(UsageError, match="become one tensor"):
        rules = ((r"experts\.1\.w1", "tsq4"),)
        convert(Recipe(str(source.folder), tmp_path / "out.gguf", type="tsq2", method="rtn", rules=rules))


def test_a_budget_gives_all_experts_of_a_stack_one_type(make_model, tmp_path):  # noqa: F811
    source, text = make_model("mixtral"), tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    notes = []
    progress = SilentProgress()
    progress.note = notes.append
    out = tmp_path / "out.gguf"
    recipe = Recipe(str(source.folder), out, target_bpw=2.9, method="rtn", calibration=str(text), samples=4, seqlen=32)
    convert(recipe, progress)
    tensors = [t for t in inspect(out).tensors if t.name.startswith("blk.") and t.type.startswith("tsq")]
    assert len({t.type for t in tensors}) > 1
    assert 8 * sum(t.bytes for t in tensors) / sum(math.prod(t.shape) for t in tensors) <= 2.9


def test_what_was_rare_is_said(make_model, tmp_path):  # noqa: F811
    source, text = make_model("mixtral"), tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    notes = []
    progress = SilentProgress()
    progress.note = notes.append
    recipe = Recipe(
        str(source.folder), tmp_path / "out.gguf", method="gptq", calibration=str(text), samples=1, seqlen=16
    )
    convert(dataclasses.replace(recipe, type="tsq2"), progress)
    # 16 tokens go to 2 of 4 experts each: no expert sees 32
    assert [n for n in notes if n.startswith("block 1: experts 0, 1, 2, 3 were fed fewer than 32")]
    assert any(stack_of(name) for name in Decoder(source, CPU).matrix_shapes())


def test_experts_have_no_order_of_columns(make_model, tmp_path):  # noqa: F811
    """A type whose columns are gathered is another one in experts, and that is said."""
    out = tmp_path / "out.gguf"
    report = convert(Recipe(str(make_model("mixtral").folder), out, type="ptq1_61", method="rtn"))
    found = {t.name.split(".", 2)[2]: t.type for t in inspect(out).tensors if t.name.startswith("blk.0.")}
    assert found["attn_q.weight"] == "ptq1_61"
    assert found["ffn_gate_exps.weight"] == "tsq2"
    said = [said for name, said in report.fallbacks.items() if "experts.0.w1" in name]
    assert said == ["is tsq2, not ptq1_61: experts cannot have an order of columns"] * 2


def test_experts_cannot_be_preprocessed(make_model, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    recipe = Recipe(
        str(make_model("mixtral").folder), tmp_path / "out.gguf", method="rtn", preprocess=str(text), preprocess_steps=2
    )
    with pytest.raises(UsageError, match="adapters to experts"):
        convert(recipe)
    assert not (tmp_path / "out.gguf").exists()
