"""What an importance matrix has of a model: for each matrix of the blocks the squares of what it is fed, summed.

Blocks are run as they are, in full precision, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tesseraq_gguf.compute.hidden_states import Empty
from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.learning.mixture import TOGETHER
from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.models.finite import TAKE_ANOTHER

Sums = dict[str, tuple[Tensor, int]]
"""By checkpoint name: sums of squares, float64 [in], and over how many tokens."""


@torch.no_grad()
def input_squares(
    decoder: Decoder, tokens: Tensor, empty: Empty = torch.empty, report: Callable[[int, int], None] = lambda *_: None
) -> Sums:
    """Sum the squares of what the matrices of all blocks are fed; those that are fed nothing are not among them.

    Args:
        decoder: the model.
        tokens: int64 [samples, length].
        empty: makes the tensors that hidden states are kept in.
        report: called with (blocks done, blocks in all).

    Raises:
        NotFiniteError: a block overflows.
    """
    hidden, recorded = decoder.stem(tokens, empty=empty)
    sums: Sums = {}
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        with _summed(block) as found:
            for some in hidden.split(TOGETHER if block.mixtures else 1):
                some.copy_(block.run(some.to(decoder.device), recorded.arguments[index]))
        for name, (squares, count) in found.items():
            if not torch.isfinite(squares).all():
                raise NotFiniteError(f"{block.prefix}{name}: what it is fed overflows. {TAKE_ANOTHER}")
            sums[f"{block.prefix}{name}.weight"] = squares.cpu(), count
        report(index + 1, len(decoder))
    return sums


@contextmanager
def _summed(block: LoadedBlock) -> Iterator[Sums]:
    """Sum the squares of what a block's matrices are fed, by module name, whatever runs it meanwhile."""
    sums: Sums = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if len(rows):
            squares, count = sums.get(name, (torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device), 0))
            sums[name] = squares.add_(rows.square().sum(0)), count + len(rows)

    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: see(name, args[0]))
        for name, module in block.matrices().items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
