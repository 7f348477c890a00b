"""Attention equals transformers' own, whichever way it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from tesseraq_gguf.models.attention import SHORT, attend

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values."""


def _inputs(length: int, heads: int = 6, groups: int = 2, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, length, 16, generator=generator).to(dtype).requires_grad_() for n in (heads, groups, groups)
    )
    return query, key, value


def _module(heads: int = 6, groups: int = 2) -> nn.Module:
    module = nn.Module()
    vars(module).update(num_key_value_groups=heads // groups, is_causal=True)
    return module.eval()


def _window(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril().triu(-20)


def _grown(out: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out.float() * weights).sum(), inputs))


@pytest.mark.parametrize("masked", ["causal", "window", "added", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_sequences_in_bfloat16_see_what_they_should(masked, autocast):
    inputs = _inputs(48, dtype=torch.float32 if autocast else torch.bfloat16)
    mask = {"window": _window(48), "added": torch.zeros(1, 6, 48, 48).masked_fill(~_window(48), -1e4)}.get(masked)
    given: dict[str, Any] = {"scaling": 0.3, "is_causal": masked == "causal"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, _ = attend(_module(), *inputs, mask, **given)
    wanted, _ = sdpa_attention_forward(_module(), *(x.float() for x in inputs), mask, **given)
    torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.02)
    for got, want in zip(_grown(out, inputs), _grown(wanted, inputs), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("length", [40, SHORT + 8])
def test_capped_scores_are_those_of_gemma_2(length):
    inputs = _inputs(length)
    mask = torch.zeros(1, 1, length, length).masked_fill(~_window(length), -torch.inf)
    got, _ = attend(_module(), *inputs, _window(length), scaling=2.0, softcap=3.0)
    want, _ = eager_attention_forward(_module(), *inputs, mask, scaling=2.0, softcap=3.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_what_is_long_or_in_float32_is_torchs_own():
    for inputs in (_inputs(SHORT + 8, dtype=torch.bfloat16), _inputs(48)):
        got, _ = attend(_module(), *inputs, None)
        want, _ = sdpa_attention_forward(_module(), *inputs, None)
        assert torch.equal(got, want)


def test_stray_options_of_models_change_nothing():
    inputs = _inputs(48, dtype=torch.bfloat16)
    got, _ = attend(_module(), *inputs, None, dropout=0.0, sliding_window=None, is_training=False)
    want, _ = attend(_module(), *inputs, None)
    assert torch.equal(got, want)
