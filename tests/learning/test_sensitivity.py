"""The sensitivity of channels against gradients through the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)


def test_sensitivity_is_the_fisher_diagonal(make_model):  # noqa: F811
    """Against gradients through the whole model at once."""
    from transformers import AutoModelForCausalLM

    from tesseraq_gguf.learning.sensitivity import measure_sensitivity
    from tesseraq_gguf.models import Decoder

    source = make_model("llama")
    tokens = torch.randint(4, 300, (40, 12), generator=torch.Generator().manual_seed(0))
    ours = measure_sensitivity(Decoder(source, torch.device("cpu")), tokens, seed=3)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    drawn, energy = torch.Generator().manual_seed(3), []
    for t in tokens:
        out = model(t[None], output_hidden_states=True)
        hidden = out.hidden_states[1]  # after block 0
        probabilities = out.logits[0].detach().softmax(-1)
        uniform = torch.rand(len(t), 1, generator=drawn)
        y = torch.searchsorted(probabilities.cumsum(-1), uniform).clamp_max(probabilities.shape[-1] - 1)
        score = out.logits[0].log_softmax(-1).gather(1, y).sum()
        energy.append(torch.autograd.grad(score, hidden)[0][0].square())
    expected = torch.stack(energy).mean(0)[1:].mean(0)
    expected /= expected.mean()
    assert len(ours.blocks) == 2
    assert ours.blocks[0].shape == (2, 128)
    # the file's embedding is bfloat16, so a few draws at the edge of two tokens differ
    assert float((ours.blocks[0][1] - expected).abs().mean()) < 0.05
    assert float(ours.blocks[0][1].mean()) == pytest.approx(1, abs=1e-3)
    assert ours.embedding.shape == (128,)
    with torch.no_grad():
        x = torch.cat([model.model(t[None]).last_hidden_state[0] for t in tokens])
    torch.testing.assert_close(ours.output_moment, x.T @ x / len(x), rtol=0.02, atol=0.02)
