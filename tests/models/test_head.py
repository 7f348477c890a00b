"""Heads of every kind: logits, their gradients and their matrix are those of the whole model in transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HEAD_KINDS

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.learning.embeddings import EndsPassed, embedding_costs
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.types.grids import grid_of

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (2, 40), generator=torch.Generator().manual_seed(0))
OUTPUTS = {
    "llama": "lm_head.weight",
    "granite": "lm_head.weight",
    "cohere": "model.embed_tokens.weight",
    "phi": "lm_head.weight",
    "gpt-neox": "embed_out.weight",
    "gemma2-capped": "model.embed_tokens.weight",
}


def finished(kind: str, products: torch.Tensor, whole) -> torch.Tensor:
    """What an architecture makes of the products of its output matrix, written down here a second time."""
    if kind == "granite":
        return products / 8
    if kind == "cohere":
        return products * 0.0625
    if kind == "phi":
        return products + whole.lm_head.bias
    return 2 * torch.tanh(products / 2) if kind == "gemma2-capped" else products


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Normalised squared error of logits; what all of a position share, which softmax does not see, is left out."""
    got, expected = got - got.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    return float((got - expected).square().sum() / expected.square().sum())


def walk(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    hidden, inputs = decoder.stem(tokens)
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            hidden = torch.cat([block.run(h, inputs.arguments[index]) for h in hidden.split(1)])
    return hidden


@pytest.fixture(params=OUTPUTS)
def kind(request):
    return request.param


@pytest.fixture
def wide(kind, make_model, tmp_path) -> ModelSource:
    """The model in float32."""
    return in_float32(make_model(kind), tmp_path / "wide")


def in_float32(source: ModelSource, folder) -> ModelSource:
    tensors = {n: t.float() for file in source.folder.glob("*.safetensors") for n, t in load_file(file).items()}
    folder.mkdir()
    shutil.copy(source.folder / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSource(source.name, folder)


@pytest.fixture
def whole(wide):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(wide.folder, dtype=torch.float32).requires_grad_(False)


def test_logits_are_the_models(kind, wide, whole):
    decoder = Decoder(wide, CPU)
    assert decoder.output_name() == OUTPUTS[kind]
    hidden, expected = walk(decoder, TOKENS), whole(TOKENS).logits
    assert expected.std() > 0.1
    with torch.no_grad():
        got = decoder.head.logits(hidden.flatten(0, 1), decoder.output_weight())
    assert error(got, expected.flatten(0, 1)) < 1e-9
    assert decoder.mean_loss(hidden, TOKENS) == pytest.approx(float(whole(TOKENS, labels=TOKENS).loss), rel=1e-5)
    torch.testing.assert_close(decoder.answers()(hidden[0]), expected[0].log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_the_divergence_and_its_gradient_are_autograds(kind, wide, whole):
    decoder = Decoder(wide, CPU)
    random = torch.Generator().manual_seed(0)
    student = torch.randn(300, decoder.hidden_size, generator=random, requires_grad=True)
    teacher = torch.randn(300, decoder.hidden_size, generator=random)
    norm, weight = decoder.final_norm()[1], decoder.output_weight()
    other = weight + 0.1 * torch.randn(weight.shape, generator=random)
    vectors = {name: p + 0.1 for name, p in norm.named_parameters()}
    got, slope, to_norm = decoder.head.divergence(student.detach(), teacher, vectors, other, weight)
    p = finished(kind, norm(teacher) @ weight.T, whole).log_softmax(-1)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.copy_(vectors[name])
    norm.requires_grad_()
    q = finished(kind, norm(student) @ other.T, whole).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(slope, student.grad, rtol=1e-3, atol=1e-6)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(to_norm[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [1000, 100, 7])
def test_answers_feel_what_they_feel_in_the_whole_model(rows, kind, wide, whole):
    decoder = Decoder(wide, CPU)
    hidden = walk(decoder, TOKENS)
    random = torch.Generator().manual_seed(3)
    got = decoder.head.answer_gradient(hidden, lambda: decoder.output_rows(rows), random)
    h = hidden[0].requires_grad_()
    logits = finished(kind, decoder.final_norm()[1](h) @ decoder.output_weight().T, whole)
    uniform = torch.rand(len(h), 1, generator=torch.Generator().manual_seed(3))
    drawn = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), uniform).clamp_max(logits.shape[-1] - 1)
    logits.log_softmax(-1).gather(1, drawn).sum().backward()
    torch.testing.assert_close(got[0], h.grad, rtol=1e-3, atol=1e-5)


def test_what_the_output_matrix_costs_is_what_it_does_to_answers(kind, wide, whole):
    """To second order: the divergence that rounding it alone makes."""
    decoder = Decoder(wide, CPU)
    hidden, weight = walk(decoder, TOKENS), decoder.output_weight()

    class Ends:
        final = bottom = torch.empty(0)

        def ends(self, final, bottom):
            self.final, self.bottom = final, bottom

        def block(self, *_):
            pass

    ends = Ends()
    measure_sensitivity(decoder, TOKENS, 0, witness=ends)
    ends.bottom = torch.zeros_like(ends.bottom)  # leaves what a tied matrix does as the embedding out
    passed = EndsPassed(TOKENS, ends.final, ends.bottom)
    cost = embedding_costs(decoder, decoder.output_name(), ["tsq4"], passed)["tsq4"]
    x = decoder.final_norm()[1](hidden)
    grid = grid_of("tsq4")
    rounded = grid.dequantize(grid.quantize(weight, x.square().mean((0, 1))))
    p, q = (finished(kind, x @ w.T, whole).log_softmax(-1) for w in (weight, rounded))
    assert cost == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.15)


def test_few_positions_have_answers_at_a_time(make_model, monkeypatch):
    decoder = Decoder(make_model("llama"), CPU)
    head, seen = decoder.head, []
    forward = head._shell.forward
    monkeypatch.setattr(
        head._shell, "forward", lambda **given: seen.append(given["input_ids"].shape[1]) or forward(**given)
    )
    weight = decoder.output_weight()
    head.divergence(torch.zeros(600, 128), torch.zeros(600, 128), dict(head.norm.named_parameters()), weight, weight)
    assert seen == [256, 256, 256, 256, 88, 88]


def test_an_output_matrix_that_is_missing_is_named(make_model, tmp_path):
    source = in_float32(make_model("llama"), tmp_path / "copy")
    tensors = load_file(source.folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor lm_head\.weight"):
        Decoder(source, CPU).output_name()
    config = source.config() | {"tie_word_embeddings": True}
    (source.folder / "config.json").write_text(json.dumps(config))
    assert Decoder(source, CPU).output_name() == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda logits: logits.log_softmax(-1), "not one for each row"),
        (lambda logits: logits.cumsum(1), "not what its norm|not one for each row"),
        (lambda logits: logits[..., :-1], "not one for each row"),
    ],
)
def test_logits_that_depend_on_each_other_are_refused(spoil, said, make_model, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def other(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = spoil(out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", other)
    with pytest.raises(ModelError, match=said):
        _ = Decoder(make_model("llama"), CPU).head


def test_whatever_stands_behind_the_blocks_is_run(make_model, monkeypatch):
    """Whether it is a module or not."""
    from transformers import AutoModelForCausalLM, LlamaModel

    forward, create = LlamaModel.forward, LlamaModel.__init__

    def more(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = 2 * self.more(out[0])
        return out

    def larger(self, config):
        create(self, config)
        self.more = torch.nn.LayerNorm(config.hidden_size)

    def given(self):
        return torch.linspace(0.5, 2, self.hidden_size)

    monkeypatch.setattr(LlamaModel, "__init__", larger)
    monkeypatch.setattr(LlamaModel, "forward", more)
    source = make_model("llama")
    decoder = Decoder(source, CPU)
    weights = {"model.more.weight": given(decoder), "model.more.bias": -given(decoder)}
    decoder._find = lambda name: name  # type: ignore[method-assign]
    read = decoder.weights.read
    monkeypatch.setattr(decoder, "_read", lambda name: weights[name] if name in weights else read(name))
    whole = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    whole.model.more.load_state_dict({name.rpartition(".")[2]: w for name, w in weights.items()})
    with torch.no_grad():
        expected = whole(TOKENS).logits
        got = decoder.head.logits(walk(decoder, TOKENS).flatten(0, 1), decoder.output_weight())
    assert error(got, expected.flatten(0, 1)) < 1e-9
    assert set(decoder.head.vectors) == {"norm.weight", "more.weight", "more.bias"}
    assert decoder.head.prefix == "model."


def test_every_kind_is_tried(make_model):
    assert set(OUTPUTS) == {"llama", *HEAD_KINDS}
