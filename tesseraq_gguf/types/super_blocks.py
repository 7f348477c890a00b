"""Super-blocks: groups of weights whose scales are integers times a half float that they share.

While codes are learned, scales are any numbers until they settle. Where codes stay, as in fine tuning, the integers of
the groups stay with them, and the half floats alone move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types.grid import Arrays, Grid, through
from tesseraq_gguf.types.stock.grid import half


@dataclass(frozen=True)
class SuperBlockGrid(Grid):
    """What such grids share. Their half floats are arrays float16 [rows, super-blocks]."""

    @property
    def halves(self) -> tuple[str, ...]:
        """Names of the half floats."""
        return ("d",)

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return self.span // self.group

    def of_groups(self, shared: Tensor) -> Tensor:
        """Repeat what super-blocks have, [rows, super-blocks], for their groups: float32 [rows, groups]."""
        return shared.float().repeat_interleave(self.groups, -1)

    @override
    def relax(self, arrays: Mapping[str, Tensor]) -> Arrays:
        """Give variables of the half floats alone: the integers of the groups stay."""
        return {key: torch.zeros_like(arrays[key], dtype=torch.float32) for key in self.halves}

    @override
    def realise(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        there = {**arrays, **self._moved(relaxed, arrays)}
        return self.scale(there), self.zero(there)

    @override
    @torch.no_grad()
    def tighten(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Arrays:
        return {**arrays, **{key: moved.half() for key, moved in self._moved(relaxed, arrays).items()}}

    def _moved(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Arrays:
        """The half floats times exp(relaxed), as they would be stored, float32 with straight-through gradients."""
        wanted = {key: arrays[key].float() * relaxed[key].exp() for key in self.halves}
        return {key: through(value, half(value.detach()).float()) for key, value in wanted.items()}
