"""Round to nearest: every group gets the parameters with the least squared error of its weights.

No data, but for an importance matrix that weighs the errors; no learning. With codebooks this is LO-BCQ (arXiv
2502.05376), which updates no weight, with the scale of every 64 weights searched. Where a type has salient places, the
channels that it would cost most to binarise get them, by the weights alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tesseraq_gguf.learning.reconstruction import BlockResult, Finished, leaving
from tesseraq_gguf.learning.reordering import plan_moves
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.types.grids import GROUPED, MatrixGrids, grid_of

_LENGTH = 32
"""Tokens that are run to find out which matrices read the same."""


def round_blocks(
    decoder: Decoder,
    types: Mapping[str, str],
    finished: Finished,
    matrix_grids: MatrixGrids = GROUPED,
    importance: Mapping[str, Tensor] | None = None,
) -> Iterator[BlockResult]:
    """Round the matrices of every block: the baseline every method must beat.

    Args:
        decoder: the model.
        types: tensor type of each matrix to round, by checkpoint name.
        finished: gives what an earlier run rounded.
        matrix_grids: gives the matrices their grids.
        importance: weights of the squared errors of columns, float32 [in] by checkpoint name; others count alike.

    Yields:
        One result per block, in order, without losses: nothing is calibrated.
    """
    needs_order = any(grid_of(type).ordered for type in types.values())
    # any hidden states will do to see which matrices read the same
    hidden, recorded = decoder.stem(_some_tokens(decoder)) if needs_order else (None, None)
    for index in range(len(decoder)):
        started = time.monotonic()
        if (stored := finished(index)) is not None:
            yield stored
            continue
        block = decoder.load_block(index)
        modules = block.matrices()
        named = {name: types.get(f"{block.prefix}{name}.weight") for name in modules}
        grids = {
            name: matrix_grids.of_layer(f"{block.prefix}{name}.weight", modules[name], type)
            for name, type in named.items()
            if type is not None
        }
        if hidden is not None and recorded is not None:
            for move in plan_moves(block, recorded.arguments[index], hidden.to(decoder.device), grids, {}):
                move.apply(block)
        weighed = {name: h.to(decoder.device) for name, h in block.by_module(importance or {}).items()}
        rounded = {n: grid.quantize(modules[n].weight.detach(), weighed.get(n)) for n, grid in grids.items()}
        tensors = leaving(block, grids, rounded)
        yield BlockResult(index, tensors, None, None, time.monotonic() - started)


def _some_tokens(decoder: Decoder) -> Tensor:
    """Tokens from all over the vocabulary, int64 [1, length]."""
    return torch.linspace(0, decoder.config.vocab_size - 1, _LENGTH).long()[None]
