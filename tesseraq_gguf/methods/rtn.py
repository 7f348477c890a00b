"""Round to nearest: every group gets the parameters with the least squared error of its weights.

No data, no learning, no order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from tesseraq_gguf.grids import grid_for
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.reconstruction import BlockResult, Finished


def round_blocks(
    decoder: Decoder, types: Mapping[str, str], finished: Finished, granularity: str = "group"
) -> Iterator[BlockResult]:
    """Round the matrices of every block: the baseline every method must beat.

    Args:
        decoder: the model.
        types: tensor type of each matrix to round, by checkpoint name.
        finished: gives what an earlier run rounded.
        granularity: what shares a scale: `group` or `channel`.

    Yields:
        One result per block, in order, without losses: nothing is run.
    """
    for index in range(len(decoder)):
        started = time.monotonic()
        if (stored := finished(index)) is not None:
            yield stored
            continue
        block = decoder.load_block(index)
        named = {f"{block.prefix}{name}.weight": module.weight for name, module in block.matrices().items()}
        tensors = {}
        for name, weight in named.items():
            if name in types:
                grid = grid_for(types[name], weight.shape[1], granularity)
                tensors[name] = grid.stored(grid.quantize(weight.detach()))
        yield BlockResult(index, tensors, None, None, time.monotonic() - started)
