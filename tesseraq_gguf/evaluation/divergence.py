"""What quantising did to a model's answers, on sequences that nothing was learned on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.evaluation.simulation import final_states
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.quantised import Quantised

_POSITIONS = 128
"""Answers, of two models, that are in memory at a time."""


@torch.no_grad()
def divergence(
    original: Decoder,
    model: Quantised,
    tokens: Tensor,
    report: Callable[[int, int], None] = lambda *_: None,
) -> float:
    """Mean Kullback-Leibler divergence KL(p || p̂) of answers in nats per token, over all positions.

    Args:
        original: whose answers are p.
        model: whose answers are p̂; products with both models' output matrices are in its autocast.
        tokens: int64 [sequences, length].
        report: called with (blocks done, blocks in all), those of both models.

    Raises:
        NotFiniteError: it is not finite.
    """
    steps = 2 * len(original)
    wanted = final_states(original, tokens, lambda done, _: report(done, steps))
    got = final_states(
        model.decoder,
        tokens,
        lambda done, _: report(len(original) + done, steps),
        model.rounding,
        lambda block: block.adopt(model.blocks(block.index)),
        model.embeddings,
    )
    true = _answers(Quantised(original, lambda _: {}, autocast=model.autocast))
    answers = _answers(model)
    total = 0.0
    for at in torch.arange(tokens.numel()).split(_POSITIONS):
        p, q = true(wanted.flatten(0, 1)[at]), answers(got.flatten(0, 1)[at])
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    found = total / tokens.numel()
    if not math.isfinite(found):
        raise NotFiniteError(
            f"the answers of the quantised model are not finite: their divergence from the original's is {found}. "
            "Give more bits to its matrices (--type, --tensor-type)"
        )
    return max(0.0, found)


def _answers(model: Quantised) -> Callable[[Tensor], Tensor]:
    """From final hidden states [positions, hidden] to log-probabilities, with what was learned in place."""
    decoder, head = model.decoder, model.decoder.head
    given = model.embeddings.get(decoder.output_name())
    weight = (decoder.output_weight() if given is None else given.to(decoder.device)).to(model.autocast)
    vectors = {n.removeprefix(head.prefix): t.arrays["values"].to(decoder.device) for n, t in model.final.items()}
    return lambda hidden: head.logits(hidden.to(decoder.device), weight, vectors).log_softmax(-1)
