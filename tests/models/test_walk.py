"""Blocks of any architecture are found, are handed what the model hands them, and compute what they compute in it."""

from __future__ import annotations

import pytest
import torch
from asked_models import ASKED

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder

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
