"""A quantised model, as whatever runs it before there is a file needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.types.quantized import QuantizedTensor


@dataclass(frozen=True)
class Quantised:
    """A model with what was learned in place of its weights.

    Attributes:
        decoder: gives what was not learned.
        blocks: gives what was learned for a block, by checkpoint name.
        embeddings: embedding and output matrix, dequantised, by checkpoint name, where they were rounded with care. Of
            those in floats or 8 bits what is lost is not felt.
        final: parameters of the final norm that were learned, by checkpoint name.
        rounding: gives what rounds a block's activations, or None.
        autocast: dtype of matrix products; float32 means no autocast.
    """

    decoder: Decoder
    blocks: Callable[[int], dict[str, QuantizedTensor]]
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    final: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    rounding: Callable[[LoadedBlock], ActivationRounding | None] = lambda _: None
    autocast: torch.dtype = torch.float32

    def states(self, tokens: Tensor, report: Callable[[int, int], None] = lambda *_: None) -> Tensor:
        """Return the hidden states before the final norm, as `final_states` does."""
        return final_states(
            self.decoder,
            tokens,
            report,
            self.rounding,
            lambda block: block.adopt(self.blocks(block.index)),
            self.embeddings,
        )


@torch.no_grad()
def final_states(
    decoder: Decoder,
    tokens: Tensor,
    report: Callable[[int, int], None] = lambda *_: None,
    rounding: Callable[[LoadedBlock], ActivationRounding | None] = lambda _: None,
    weights: Callable[[LoadedBlock], Mapping[str, Tensor]] = lambda _: {},
    embeddings: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the hidden states before the final norm, float32 [sequences, length, hidden] on the CPU.

    Args:
        decoder: the model.
        tokens: int64 [sequences, length].
        report: called with (blocks done, blocks in all).
        rounding: gives what rounds a block's activations, or None.
        weights: gives matrices to use in place of a block's own, by module name.
        embeddings: matrices outside the blocks to use in place of the model's own, by checkpoint name.
    """
    hidden, recorded = decoder.stem(tokens, embeddings)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        rounds, given = rounding(block), weights(block)
        for sequence in range(len(hidden)):
            states = hidden[sequence : sequence + 1].to(decoder.device)
            hidden[sequence] = block.run(states, recorded.arguments[index], given, rounding=rounds)[0].float().cpu()
        report(index + 1, len(decoder))
    return hidden
