"""A head for speculation is learned as a block is: on fresh text it ends nearer to itself than rounded to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_drafters import drafter  # noqa: F401  (a fixture)
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.draft_head import joined, learn_draft_head, round_draft_head
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.methods.building import method_of
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.models.speculation import head_matrices, load_head
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.types.grids import grid_of


def drawn(seed, samples=16, length=48):
    return torch.randint(3, 320, (samples, length), generator=torch.Generator().manual_seed(seed))


TOKENS = drawn(0)


@pytest.fixture(scope="module")
def decoder(drafter):  # noqa: F811
    return Decoder(drafter, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(decoder):
    """The model with blocks rounded to 8 bits."""
    grid, rounded = grid_of("q8_0"), []
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        rounded.append({f"{block.prefix}{n}.weight": grid.quantize(m.weight) for n, m in block.matrices().items()})
    return Quantised(decoder, rounded.__getitem__)


def _fed(decoder, tokens):
    """What the head is fed, by transformers' own forward: final states, and embeddings of the tokens that followed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(decoder.source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        return states, model.get_input_embeddings()(tokens[:, 1:]), model


def test_a_head_is_fed_final_states_and_embeddings(decoder):
    states, embeddings, model = _fed(decoder, TOKENS)
    head = load_head(decoder)
    assert head is not None
    fed = joined(head, Quantised(decoder, lambda _: {}), TOKENS)
    normed = torch.cat([head.enorm(embeddings), head.hnorm(states)], -1)
    # the last position has no token behind it
    torch.testing.assert_close(fed[:, :-1], normed, atol=1e-4, rtol=1e-4)
    wanted = decoder.weights.read("mtp.pre_fc_norm_hidden.weight").float()
    rms = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
    assert torch.allclose(head.hnorm(states), rms * (1 + wanted), atol=1e-5)


def settings(decoder):
    return Recipe("m", Path("o.gguf")).method_settings(decoder.hidden_size)


def error(decoder, model, tensors, tokens):
    """How far the head's output is from what it is in the model, where it is fed by the quantised model."""
    arguments = decoder.stem(tokens[:1])[1].arguments[-1]

    def out(fed_by, tensors):
        head = load_head(decoder)
        assert head is not None
        join = tensors.get(head.join_name)
        join = head.join if join is None else grid_of(join.type).dequantize(join)
        inside = {name: t for name, t in tensors.items() if name.startswith(head.block.prefix)}
        return torch.cat([
            head.block.run(x[None] @ join.T, arguments, head.block.adopt(inside)) for x in joined(head, fed_by, tokens)
        ])  # fmt: skip

    with torch.no_grad():
        return float((out(model, tensors) - out(Quantised(decoder, lambda _: {}), {})).square().mean())


@pytest.mark.parametrize(("method", "start", "less"), [("gptq", "none", 0.9), ("tesseraq", "awq", 0.8)])
def test_a_head_is_learned_by_the_runs_method(method, start, less, decoder, model):
    types = dict.fromkeys(head_matrices(decoder), "tsq3")
    walk = Reconstruction(decoder, method_of(method, start, settings(decoder)), {}, 0, torch.float32)
    calibration = Calibration("drawn", drawn(0, 32), drawn(2, 4))
    learned = learn_draft_head(walk, model, types, calibration)
    assert {name: t.type for name, t in learned.items() if t.is_matrix} == types
    fresh = drawn(1)
    nearest = round_draft_head(decoder, types)
    assert error(decoder, model, learned, fresh) < less * error(decoder, model, nearest, fresh)


def test_what_a_head_shares_with_no_block_is_rounded_to_nearest(decoder, model):
    walk = Reconstruction(decoder, method_of("gptq", "none", settings(decoder)), {}, 0, torch.float32)
    name = "mtp.fc.weight"
    other = decoder.embedding_name()
    calibration = Calibration("drawn", drawn(0, 4), drawn(2, 1))
    learned = learn_draft_head(walk, model, {name: "tsq3", other: "tsq4"}, calibration)
    assert list(learned) == [name, other]
    assert torch.equal(learned[other].arrays["q"], grid_of("tsq4").quantize(decoder.matrix(other)).arrays["q"])


def test_a_model_without_a_head(make_model):  # noqa: F811
    assert load_head(Decoder(make_model("llama"), torch.device("cpu"))) is None
