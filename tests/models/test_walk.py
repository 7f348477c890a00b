"""Blocks of any architecture are found, are handed what the model hands them, and compute what they compute in it."""

from __future__ import annotations

import pytest
import torch
from asked_models import ASKED

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.methods.building import method_of
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.folding import folds

CPU = torch.device("cpu")
# longer than the sliding windows
TOKENS = torch.randint(4, 300, (2, 72), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=ASKED)
def asked(request, make_asked):
    return make_asked(request.param)


def whole_model(source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval().requires_grad_(False)


def walked(decoder: Decoder, state: torch.Tensor, arguments) -> torch.Tensor:
    for index, given in enumerate(arguments):
        state = decoder.load_block(index).run(state, given)
    return state


def test_the_walk_equals_the_whole_model(asked):
    expected = whole_model(asked)(TOKENS, use_cache=False).logits
    decoder = Decoder(asked, CPU)
    with torch.no_grad():
        state, inputs = decoder.stem(TOKENS)
        together = walked(decoder, state, inputs.arguments)
        each = torch.cat([walked(decoder, s, inputs.arguments) for s in state.split(1)])
        got = [torch.stack([decoder.head.logits(s, decoder.output_weight()) for s in end]) for end in (together, each)]
    assert expected.std() > 0.3
    for logits in got:  # two samples at a time, and one
        assert (logits - expected).norm() < 1e-5 * expected.norm()


def test_gradients_are_the_whole_models(asked):
    """Through keys that blocks share as well: with respect to the embedding's rows, through the first block."""
    whole, decoder = whole_model(asked), Decoder(asked, CPU)
    seen = []

    def watch(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.detach().requires_grad_())
        return ((seen[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": seen[0]})

    whole.get_submodule(decoder.walk.names[0]).register_forward_pre_hook(watch, with_kwargs=True)
    some = torch.randn(320, generator=torch.Generator().manual_seed(1))
    (whole(TOKENS[:1], use_cache=False).logits @ some).sum().backward()
    state, inputs = decoder.stem(TOKENS[:1])
    state.requires_grad_()
    (decoder.head.logits(walked(decoder, state, inputs.arguments)[0], decoder.output_weight()) @ some).sum().backward()
    assert state.grad is not None
    got = decoder.walk.state.hidden(state.grad)
    assert (got - seen[0].grad).norm() < 1e-4 * seen[0].grad.norm()


def test_samples_are_told_apart_whatever_their_order(make_asked):
    decoder = Decoder(make_asked("inputs for every block, shared keys"), CPU)
    with torch.no_grad():
        state, inputs = decoder.stem(TOKENS)
        more = decoder.stem(TOKENS.flip(1), inputs=inputs)[0]
        ends = walked(decoder, torch.cat([more[1:], state]), inputs.arguments)
        for tokens, end in zip((TOKENS.flip(1)[1:], TOKENS[:1], TOKENS[1:]), ends, strict=True):
            alone, own = decoder.stem(tokens)
            alone = walked(decoder, alone, own.arguments)
            width = decoder.hidden_size
            torch.testing.assert_close(end[:, :width], alone[0, :, :width], rtol=1e-4, atol=1e-4)


def test_most_models_hand_on_hidden_states_alone(make_model):
    decoder = Decoder(make_model("gemma3"), CPU)
    assert decoder.walk.state.plain
    assert decoder.width == decoder.hidden_size
    assert decoder.stem(TOKENS)[0].shape == (*TOKENS.shape, decoder.hidden_size)


def test_a_walk_that_is_wrong_is_refused(make_model, monkeypatch):
    """Here the model does something between its blocks, which no block tells of."""
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def moved(self, *args, **kwargs):
        handles = [layer.register_forward_hook(lambda _m, _a, out: out + out.roll(1, -1)) for layer in self.layers[:1]]
        try:
            return forward(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(LlamaModel, "forward", moved)
    with pytest.raises(ModelError, match=r"cannot be learned: .* run one by one, do not make what they make") as caught:
        _ = Decoder(make_model("llama"), CPU).head
    assert "\n" not in str(caught.value)


def test_a_model_without_blocks_is_refused(make_model, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(LlamaDecoderLayer, "named_children", lambda self: iter(()))
    monkeypatch.setattr(LlamaDecoderLayer, "children", lambda self: iter(()))
    with pytest.raises(ModelError, match="no decoder blocks that hand hidden states on"):
        Decoder(make_model("llama"), CPU)


def test_of_large_tables_rows_are_read(make_asked, monkeypatch):
    from tesseraq_gguf.models import decoder as module

    decoder = Decoder(make_asked("inputs for every block, shared keys"), CPU)
    assert set(decoder.walk.tables) == {"embed_tokens", "embed_tokens_per_layer"}
    whole, read = decoder.stem(TOKENS), []
    rows = decoder.weights.rows
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(decoder.weights, "rows", lambda name, some: read.append(name) or rows(name, some))
    parts = decoder.stem(TOKENS)
    assert len(read) == 2
    assert torch.equal(parts[0], whole[0])
    with torch.no_grad():
        ends = [walked(decoder, state, inputs.arguments) for state, inputs in (whole, parts)]
    assert torch.equal(*ends)
    positions = Decoder(make_asked("matrices that multiply from the left"), CPU)
    assert positions.walk.tables == ("wte",)


def test_norms_are_told_from_vectors_of_a_state_space(make_asked):
    block = Decoder(make_asked("state space alone"), CPU).load_block(0)
    assert set(block.norms()) == {"norm.weight"}
    vectors = {name for name, p in block.module.named_parameters() if p.dim() == 1}
    assert vectors >= {"mixer.D", "mixer.conv1d.bias", "mixer.dt_proj.bias"}


def test_factors_move_into_a_norm_that_heads_share(make_asked):
    decoder = Decoder(make_asked("linear attention"), CPU)
    state, inputs = decoder.stem(TOKENS[:1])
    block = decoder.load_block(0)
    found = {fold.producer: fold for fold in folds(block, inputs.arguments[0], state, block.matrices().keys())}
    fold = found["linear_attn.norm"]
    assert (fold.channels, len(fold.spread), fold.consumers) == (32, 128, ("linear_attn.out_proj",))
    before = block.run(state, inputs.arguments[0])
    fold.apply(block, torch.linspace(0.5, 2, 32))
    torch.testing.assert_close(block.run(state, inputs.arguments[0]), before, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["awq", "gptq", "tesseraq"])
def test_a_matrix_that_nothing_runs_is_rounded_and_named(method, make_asked):
    decoder = Decoder(make_asked("a matrix that is no layer's"), CPU)
    types = dict.fromkeys(decoder.matrix_shapes(), "tsq3")
    settings = Settings(steps=1, batch=1, rounding_rate=1e-3, parameter_rate=1e-3, width=128)
    walk = Reconstruction(decoder, method_of(method, "awq", settings), types, 0, torch.float32)
    for result in walk.run(TOKENS, [torch.ones(2, 128)] * 2, lambda _: None):
        assert result.rare == (f"backbone.layers.{result.index}.mixer.dt_proj.weight",)
        assert set(result.tensors) >= {name for name in types if f".{result.index}." in name}


@pytest.mark.parametrize("kind", ["streams, inputs for every block, shared keys", "kinds of blocks"])
def test_blocks_of_any_inside_are_learned(kind, make_asked):
    """What only passes through a block, such as keys that others made, is not counted as its loss."""
    decoder = Decoder(make_asked(kind), CPU)
    sensitivity = measure_sensitivity(decoder, TOKENS, 0)
    assert sensitivity.output_moment.shape == (128, 128)
    assert sensitivity.embedding.shape == (128,)
    assert all(weights.shape == (2, decoder.width) for weights in sensitivity.blocks)
    settings = Settings(steps=1, batch=1, rounding_rate=1e-3, parameter_rate=1e-3, width=128)

    def losses(type: str) -> list[float]:
        types = {name: type for name, shape in decoder.matrix_shapes().items() if shape[1] % 64 == 0}
        walk = Reconstruction(decoder, method_of("gptq", "none", settings), types, 0, torch.float32)
        return [result.loss_after or 0.0 for result in walk.run(TOKENS, sensitivity.blocks, lambda _: None)]

    for fine, coarse in zip(losses("q8_0"), losses("tsq3"), strict=True):
        assert 0 < fine < 0.05 * coarse
    for index in range(len(decoder)):
        made = decoder.walk.state.made(index)
        assert (made is None) == (decoder.width == decoder.hidden_size)
        assert made is None or 0 < int(made.sum()) < decoder.width
