"""What learning leaves on llama.cpp's types, on what it did not learn from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from problems import loss_of, mlp_problem

from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.start import Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.types.facts import names

STOCK = names(lambda t: t.family and not t.custom and not t.plain)
"""Types that any llama.cpp reads, and that rounding to nearest is not good enough for."""


@pytest.mark.parametrize("tensor_type", STOCK)
def test_gptq_and_tesseraq_leave_less_than_rounding(tensor_type):
    seen = mlp_problem(tensor_type, 256, 512)
    unseen = replace(seen, inputs=seen.inputs[6:], targets=seen.targets[6:])
    learned_from = replace(seen, inputs=seen.inputs[:6], targets=seen.targets[:6])
    rounded, compensated = (
        {name: s.tensor for name, s in start.start(learned_from).items()} for start in (Nearest(), GPTQ())
    )
    tuned = TesseraQ(steps=4, batch=4, rounding_rate=0.02).learn(learned_from)
    losses = [loss_of(unseen, tensors) for tensors in (rounded, compensated, tuned)]
    assert losses[1] < 0.4 * losses[0]
    assert losses[2] < 0.2 * losses[0]
    assert losses[2] < 1.03 * losses[1]
    assert all({t.type for t in tensors.values()} == {tensor_type} for tensors in (compensated, tuned))
