"""Experts that calibration hardly visits are rounded with care and named; models with experts reach llama.cpp."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from saved_logits import answered, logit_error, saved_logits
from tiny_models import TEXT, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.compute.schemes import ActivationScheme, scheme_of
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.learning.bit_budget import CostMeter
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.methods.awq import AWQ, ClipSearch
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.lrq import lrq
from tesseraq_gguf.methods.omniquant import OmniQuant
from tesseraq_gguf.methods.rare_experts import RARE
from tesseraq_gguf.methods.rotated import Rotated
from tesseraq_gguf.methods.start import AsItStarts
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.quantized import QuantizedTensor

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


LATE = 64.0
"""What channel 0 is raised by in sequences that the rigged router takes for late ones."""
BEGINNING = {"samples": 2}
"""Statistics are measured on the first two sequences, where these suffice."""
METHODS = {
    "gptq": AsItStarts(GPTQ(**BEGINNING)),
    "clip search": AsItStarts(ClipSearch(**BEGINNING)),
    "awq": AWQ(AsItStarts(ClipSearch(**BEGINNING)), points=3, **BEGINNING),
    "omniquant": AsItStarts(OmniQuant(steps=2, batch=2, ranges=ClipSearch(**BEGINNING))),
    "tesseraq": TesseraQ(steps=1, batch=2, initialisation=ClipSearch(**BEGINNING)),
    "lrq": lrq(2, 2, 4, ClipSearch(**BEGINNING)),
    "flexround": flexround(2, 2, GPTQ(**BEGINNING)),
    "rotated": Rotated(AWQ(AsItStarts(GPTQ(**BEGINNING)), points=3, **BEGINNING)),
}


@pytest.fixture
def rigged(make_model, monkeypatch):  # noqa: F811
    """Return a function that learns a mixture one expert of which is chosen in late sequences alone, and by all there.

    It takes a method, and which of six sequences are late on the full-precision chain and on the quantised one. The
    latter begins at an embedding of its own, which is how the two stems are told apart.
    """
    load, stem = Decoder.load_block, Decoder.stem
    late: dict[bool, tuple[int, ...]] = {}

    def marked(self, tokens, embeddings=None, empty=torch.empty, inputs=None):
        hidden, recorded = stem(self, tokens, embeddings, empty, inputs)
        for sequence in late[bool(embeddings)]:
            hidden[sequence, :, 0] += LATE
        return hidden, recorded

    def biased(self, index, hollow=()):
        block = load(self, index, hollow)
        mark = {}

        def enter(_module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            mark["late"] = bool(hidden[..., 0].mean() > LATE / 2)

        def choose(_module, _args, out):
            logits, weights, chosen = out
            other = torch.where(chosen == NEVER, (NEVER + 1) % 4, chosen)
            other[:, 0] = NEVER if mark["late"] else other[:, 0]
            return logits, weights, other

        block.module.register_forward_pre_hook(enter, with_kwargs=True)
        block.module.mlp.gate.register_forward_hook(choose)
        return block

    monkeypatch.setattr(Decoder, "load_block", biased)
    monkeypatch.setattr(Decoder, "stem", marked)

    def learn(method, full, quantised, activations=None):
        late.update({False: full, True: quantised})
        decoder = Decoder(make_model("qwen3-moe"), CPU)
        name = decoder.embedding_name()
        engine = Reconstruction(
            decoder, method, dict.fromkeys(decoder.matrix_shapes(), "tsq3"), seed=0, autocast=torch.float32,
            activations=activations or ActivationScheme(),
        )  # fmt: skip
        sensitivity = [torch.ones(2, decoder.hidden_size)] * 2
        given = {name: decoder.matrix(name)}
        return decoder, list(engine.run(TOKENS, sensitivity, lambda _: None, lambda: given))

    return learn


def _late_matrices(decoder, index):
    return {f"{decoder.block_prefix(index)}mlp.experts.{NEVER}.{kind}_proj.weight" for kind in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, "none") for name in METHODS), ("awq", "a8"), ("gptq", "a8-static")]
)
def test_an_expert_that_comes_late_is_learned(name, scheme, rigged):
    decoder, results = rigged(METHODS[name], (4, 5), (4, 5), scheme_of(scheme, None))
    for result in results:
        assert result.rare == ()
        assert result.tensors.keys() >= set(decoder.matrix_shapes()) & {
            n for n in decoder.matrix_shapes() if n.startswith(decoder.block_prefix(result.index))
        }
        for matrix in _late_matrices(decoder, result.index):
            learned = grid_of("tsq3").dequantize(result.tensors[matrix])
            weight = decoder.matrix(matrix)
            assert float((learned - weight).square().sum() / weight.square().sum()) < 0.1


class Moments:
    """A method that measures second moments of the first sequences, and rounds."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def learn(self, problem) -> dict[str, QuantizedTensor]:
        expected = {}
        for name, module in problem.block.matrices().items():
            seen: list[torch.Tensor] = []
            handle = module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].flatten(0, -2)))
            for sequence in range(len(problem.inputs)):
                if sequence >= 2 and (not stack_of(name) or sum(map(len, seen)) >= RARE):
                    break
                problem.forward(problem.inputs[sequence : sequence + 1])
                tokens = (sequence + 1) * problem.inputs.shape[1]
            handle.remove()
            expected[name] = torch.cat(seen).T @ torch.cat(seen) / tokens
        self.found.append((problem.second_moments(2), expected))
        return {name: problem.grids[name].quantize(w) for name, w in problem.matrices().items()}


def test_moments_of_a_late_expert_are_measured_where_it_is(rigged):
    method = Moments()
    rigged(method, (4, 5), (4, 5))
    for found, expected in method.found:
        assert found.keys() == expected.keys()
        for name, moment in expected.items():
            torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("full", "quantised"), [((4, 5), ()), ((), (4, 5)), ((), ())])
def test_an_expert_of_one_chain_alone_is_rounded_and_named(name, full, quantised, rigged):
    decoder, results = rigged(METHODS[name], full, quantised)
    for result in results:
        assert set(result.rare) == _late_matrices(decoder, result.index)
        assert set(result.rare) <= result.tensors.keys()


def test_an_expert_that_no_token_comes_to_has_no_costs(rigged, make_model):  # noqa: F811
    """And does not stop the pass that measures them."""
    rigged(METHODS["gptq"], (), ())
    decoder = Decoder(make_model("qwen3-moe"), CPU)
    meter = CostMeter({name: ["tsq3"] for name in decoder.matrix_shapes()})
    measure_sensitivity(decoder, TOKENS, 0, witness=meter)
    missing = decoder.matrix_shapes().keys() - meter.costs.keys()
    assert missing == _late_matrices(decoder, 0) | _late_matrices(decoder, 1)


@pytest.mark.runtime
def test_a_mixture_reaches_llama_cpp(make_model, tmp_path):  # noqa: F811
    """Logits of the file through llama.cpp are those of the rounded model in torch."""
    source, text = make_model("mixtral", 0.1), tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    out = tmp_path / "out.gguf"
    report = convert(Recipe(str(source.folder), out, type="tsq4", method="rtn", embedding_type="f16"))
    assert report.fallbacks == {}
    stacks = [t for t in inspect(out).tensors if "_exps" in t.name]
    assert {(t.type, len(t.shape)) for t in stacks} == {("tsq4", 3)}
    assert len(stacks) == 6
    tokens, found, _ = saved_logits(out, text, 64, 3)

    decoder, grid = Decoder(source, CPU), grid_of("tsq4")
    weight = decoder.output_weight()

    def logits(change):
        def weights(block):
            rounded = {name: grid.dequantize(grid.quantize(m.weight)) for name, m in block.matrices().items()}
            return {name: change(w) if stack_of(name) else w for name, w in rounded.items()}

        hidden = answered(final_states(decoder, tokens, weights=weights))
        return decoder.head.logits(hidden.flatten(0, 1), weight).view(*hidden.shape[:2], -1)

    with torch.no_grad():
        assert logit_error(found, logits(lambda w: w)) < 2e-2  # routers choose otherwise here and there
        assert logit_error(found, logits(torch.zeros_like)) > 0.5
        assert logit_error(found, logits(torch.neg)) > 0.5


def test_experts_of_one_stack_have_one_type(make_model, tmp_path):  # noqa: F811
    source = make_model("mixtral")
    with pytest.raises(UsageError, match="become one tensor"):
        rules = ((r"experts\.1\.w1", "tsq4"),)
        convert(Recipe(str(source.folder), tmp_path / "out.gguf", type="tsq2", method="rtn", rules=rules))


class Noted(SilentProgress):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_budget_gives_all_experts_of_a_stack_one_type(make_model, tmp_path):  # noqa: F811
    source, text = make_model("mixtral"), tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    out = tmp_path / "out.gguf"
    recipe = Recipe(str(source.folder), out, target_bpw=2.9, method="rtn", calibration=str(text), samples=4, seqlen=32)
    convert(recipe)
    tensors = [t for t in inspect(out).tensors if t.name.startswith("blk.") and t.type.startswith("tsq")]
    assert len({t.type for t in tensors}) > 1
    assert 8 * sum(t.bytes for t in tensors) / sum(math.prod(t.shape) for t in tensors) <= 2.9


def test_what_was_rare_is_said(make_model, tmp_path):  # noqa: F811
    source, text = make_model("mixtral"), tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    progress = Noted()
    recipe = Recipe(
        str(source.folder), tmp_path / "out.gguf", method="gptq", calibration=str(text), samples=1, seqlen=16
    )
    convert(dataclasses.replace(recipe, type="tsq2"), progress)
    # 16 tokens go to 2 of 4 experts each: no expert sees 32
    assert [n for n in progress.notes if n.startswith("block 1: experts 0, 1, 2, 3 were fed fewer than 32")]
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
