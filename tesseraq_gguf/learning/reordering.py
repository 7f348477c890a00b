"""Bring the columns of a block's matrices into the order that their types want, before anything is learned.

An order belongs to an input, and all matrices that read it share it. Where rows of earlier matrices make the input,
these are moved (`models.routes`), and nothing remains to be done at run time; elsewhere the block gathers its input,
and the order goes into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.learning.column_order import InputStatistics, Score, likeness, order_of, score
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.handed import Arguments
from tesseraq_gguf.models.routes import Route, readers, routes
from tesseraq_gguf.types.grids import Grid


@dataclass(frozen=True)
class Move:
    """One order to apply.

    Attributes:
        names: module names of the matrices that get it.
        order: the channel of every place, int64 on the CPU.
        route: what moves it into the rows of earlier matrices; None if the input is gathered.
    """

    names: tuple[str, ...]
    order: Tensor
    route: Route | None

    def apply(self, block: LoadedBlock) -> None:
        """Change the block for good."""
        device = next(block.module.parameters()).device
        if self.route is None:
            block.reorder(self.names, self.order.to(device))
        else:
            self.route.on(device).apply(block, self.order.to(device))


class InputWatch:
    """Measures what matrices of a block are fed."""

    def __init__(self) -> None:
        self._peak: dict[str, Tensor] = {}
        self._energy: dict[str, Tensor] = {}
        self._tokens = 0

    @contextmanager
    def watching(self, block: LoadedBlock, names: list[str]) -> Iterator[None]:
        """Measure while the block is run."""

        def hook(name: str) -> Callable[..., None]:
            return lambda _module, args: self._see(name, args[0].flatten(0, -2).float(), name == names[0])

        modules = block.matrices()
        handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, x: Tensor, counts: bool) -> None:
        peak, energy = x.abs().amax(0), x.square().sum(0)
        self._tokens += len(x) if counts else 0
        if name in self._peak:
            peak, energy = torch.maximum(peak, self._peak[name]), energy + self._energy[name]
        self._peak[name], self._energy[name] = peak, energy

    def statistics(self, team: Team) -> dict[str, InputStatistics]:
        """Return what all processes of a team have seen, by module name."""
        tokens = torch.tensor([float(self._tokens)], dtype=torch.float64)
        team.add_up([*self._energy.values(), tokens])
        team.highest(self._peak.values())
        return {n: InputStatistics(p, self._energy[n] / float(tokens)) for n, p in self._peak.items()}


@torch.no_grad()
def plan_moves(
    block: LoadedBlock,
    arguments: Arguments,
    hidden: Tensor,
    grids: Mapping[str, Grid],
    statistics: Mapping[str, InputStatistics],
    kind: Score = "error",
) -> list[Move]:
    """Find the orders that a block's matrices want.

    Args:
        block: the block with its full-precision weights, not changed.
        arguments: what the model hands to it besides hidden states.
        hidden: hidden states to try things on, float32 [1, length, hidden] on the block's device.
        grids: of the matrices that will be quantised, by module name.
        statistics: of their inputs, where these were watched.
        kind: which channels are salient.
    """
    ordered = {name for name, grid in grids.items() if grid.ordered}
    if not ordered:
        return []
    groups = [group for group in readers(block, arguments, hidden) if ordered & set(group)]
    places = {grid.places for grid in grids.values() if grid.places}
    assert len(places) == 1, "matrices that read the same need the same places"
    block_size, salient = places.pop()
    found = {r.consumers: r for r in routes(block, arguments, hidden, grids.keys(), groups, block_size)}
    moves = []
    for group in groups:
        names, route = tuple(name for name in group if name in ordered), found.get(group)
        weights = [block.module.get_parameter(f"{name}.weight").detach() for name in names]
        scores, alike = score(weights, statistics.get(names[0]), kind), likeness(weights)
        if route is not None:
            scores = route.channel_scores(scores, "amax" if kind == "peak" else "sum")
            alike = route.channel_scores(alike, "mean")
        order = order_of(scores, alike, None if route is None else route.run, block_size, salient)
        moves.append(Move(names, order.cpu(), route and route.on(torch.device("cpu"))))
    return moves
