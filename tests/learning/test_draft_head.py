"""A head for speculation is rounded for what it is fed: it ends nearer to itself than rounded to nearest."""

from __future__ import annotations

import pytest
import torch
from tiny_drafters import drafter  # noqa: F401  (a fixture)
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.learning.draft_head import head_moments, round_draft_head
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.speculation import load_head
from tesseraq_gguf.types.grids import grid_of

TOKENS = torch.randint(3, 320, (16, 48), generator=torch.Generator().manual_seed(0))
FRESH = torch.randint(3, 320, (16, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def decoder(drafter):  # noqa: F811
    return Decoder(drafter, torch.device("cpu"))


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
    moment = head_moments(decoder, head, TOKENS)["mtp.fc.weight"]
    normed = [norm(x).flatten(0, 1) for norm, x in ((head.enorm, embeddings), (head.hnorm, states))]
    x = torch.cat(normed, -1)
    # the last position, which has no token behind it, is counted with its own
    assert torch.allclose(moment, x.T @ x / len(x), atol=0.1 * float(moment.diagonal().mean()))
    wanted = decoder.weights.read("mtp.pre_fc_norm_hidden.weight").float()
    rms = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
    assert torch.allclose(head.hnorm(states), rms * (1 + wanted), atol=1e-5)


def test_errors_are_fed_forward(decoder):
    head = load_head(decoder)
    assert head is not None
    felt = head_moments(decoder, head, FRESH)
    types = dict.fromkeys(head.names.values(), "tsq3")
    assert felt.keys() == types.keys()

    def errors(tokens):
        rounded = round_draft_head(decoder, types, tokens)
        moved = {n: grid_of("tsq3").dequantize(tensor) - decoder.matrix(n) for n, tensor in rounded.items()}
        return {n: float(((d @ felt[n]) * d).sum()) for n, d in moved.items()}

    learned, nearest = errors(TOKENS), errors(None)
    assert all(learned[name] < nearest[name] for name in types)
    assert sum(learned.values()) < 0.95 * sum(nearest.values())


def test_a_model_without_a_head(make_model):  # noqa: F811
    assert load_head(Decoder(make_model("llama"), torch.device("cpu"))) is None
