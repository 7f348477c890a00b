"""What quantising did to a model's answers, on sequences that nothing was learned on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.evaluation.simulation import final_states
from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.types.quantized import QuantizedTensor

_POSITIONS = 128
"""Answers, of two models, that are in memory at a time."""


@dataclass(frozen=True)
class Quantised:
    """A model as its file will have it.

    Attributes:
        decoder: gives what was not learned.
        blocks: gives what was learned for a block, by checkpoint name.
        embeddings: embedding and output matrix, dequantised, by checkpoint name, where they were rounded with care. Of
            those in floats or 8 bits what is lost is not felt.
        final: parameters of the final norm that were learned, by checkpoint name.
        rounding: gives what rounds a block's activations, or None.
    """

    decoder: Decoder
    blocks: Callable[[int], Mapping[str, QuantizedTensor]]
    embeddings: Mapping[str, Tensor]
    final: Mapping[str, QuantizedTensor]
    rounding: Callable[[LoadedBlock], ActivationRounding | None] = lambda _: None


@torch.no_grad()
def divergence(
    original: Decoder,
    model: Quantised,
    tokens: Tensor,
    autocast: torch.dtype,
    report: Callable[[int, int], None] = lambda *_: None,
) -> float:
    """Mean Kullback-Leibler divergence KL(p || p̂) of answers in nats per token, over all positions.

    Args:
        original: whose answers are p.
        model: whose answers are p̂.
        tokens: int64 [sequences, length].
        autocast: dtype of the products with output matrices.
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
    true = _answers(original, {}, {}, autocast)
    answers = _answers(model.decoder, model.embeddings, model.final, autocast)
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


def _answers(
    decoder: Decoder, embeddings: Mapping[str, Tensor], final: Mapping[str, QuantizedTensor], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """From final hidden states [positions, hidden] to log-probabilities, with what was learned in place."""
    head, given = decoder.head, embeddings.get(decoder.output_name())
    weight = (decoder.output_weight() if given is None else given.to(decoder.device)).to(dtype)
    vectors = {n.removeprefix(head.prefix): t.arrays["values"].to(decoder.device) for n, t in final.items()}
    return lambda hidden: head.logits(hidden.to(decoder.device), weight, vectors).log_softmax(-1)
