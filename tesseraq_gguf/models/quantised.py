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
