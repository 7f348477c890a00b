"""Weights of scales and levels, and their gradients, against autograd on the formula."""

from __future__ import annotations

import pytest
import torch

from tesseraq_gguf.compute.affine import Affine


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gradients_are_autograds_whatever_levels_are(dtype):
    random = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 16, (3, 4, 8), generator=random).to(dtype)
    kept, pull = levels.clone(), torch.randn(3, 4, 8, generator=random)
    scale, zero = (torch.randn(3, 4, generator=random).requires_grad_() for _ in range(2))
    weights = Affine.apply(levels, scale, zero)
    (weights * pull).sum().backward()
    assert torch.equal(levels, kept)
    found = [scale.grad.clone(), zero.grad.clone()]
    scale.grad = zero.grad = None
    wanted = scale[..., None] * (levels.float() - zero[..., None])
    (wanted * pull).sum().backward()
    torch.testing.assert_close(weights, wanted)
    for got, variable in zip(found, (scale, zero), strict=True):
        torch.testing.assert_close(got, variable.grad, rtol=1e-4, atol=1e-5)
