"""Routes: channels inside a decoder block that may change places, since what makes them and what reads them can follow.

    Σⱼ W[:, j]·x[j]  =  Σⱼ W[:, π(j)]·x[π(j)]

Rows of gate and up move with the columns of down; rows of the values, within each head, with the columns of the
attention's output, in every query head that reads them. As in `folding`, no architecture is known by name: candidates
are tried on the block.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.folding import Trace, of_rows, row_slices
from tesseraq_gguf.models.handed import Arguments

_MOVED = 1e-4
"""Relative change of an output that a permutation may make: it changes no product, only the order of sums. Heads that
attend almost alike are almost exchangeable, and must be told apart."""


@dataclass(frozen=True)
class Route:
    """Channels inside a block that may change places: rows that make them and columns that read them move together.

    Attributes:
        producers: (module name, first row) of the linears whose rows make the channels: gate and up, or values.
        channels: how many channels.
        run: neighbouring channels that may change places among themselves; those of one head of the values.
        consumers: module names of the linears that read the channels, in the order they run.
        spread: which channel each input of a consumer reads, int64 [inputs]; in runs.
    """

    producers: tuple[tuple[str, int], ...]
    channels: int
    run: int
    consumers: tuple[str, ...]
    spread: Tensor = field(compare=False, repr=False)

    def on(self, device: torch.device) -> Route:
        """Return the same on another device."""
        return replace(self, spread=self.spread.to(device))

    def inputs(self, order: Tensor) -> Tensor:
        """Which input takes each place when the channel of every place is `order`, int64 [channels]: int64 [inputs]."""
        runs = self.spread.view(-1, self.run)
        moved = order.view(-1, self.run)[runs[:, 0] // self.run] % self.run
        return (moved + torch.arange(0, len(self.spread), self.run, device=moved.device)[:, None]).flatten()

    def channel_scores(self, of_inputs: Tensor, reduce: str) -> Tensor:
        """Put numbers of inputs together for the channels that they read, by `sum`, `mean` or `amax`."""
        zeros = torch.zeros(self.channels, dtype=of_inputs.dtype, device=of_inputs.device)
        return zeros.scatter_reduce(0, self.spread.to(of_inputs.device), of_inputs, reduce, include_self=False)

    def parameters(self, block: LoadedBlock, order: Tensor) -> dict[str, Tensor]:
        """Return the parameters that moving channels changes, by name within the block, with their new values.

        Args:
            block: the block, which is not changed.
            order: the channel that comes to every place, int64 [channels]; channels stay in their run.
        """
        changed: dict[str, Tensor] = {}
        for producer, first in self.producers:
            module = block.module.get_submodule(producer)
            for key in ("weight", "bias"):
                name = f"{producer}.{key}"
                if getattr(module, key, None) is not None:
                    value = changed.get(name, getattr(module, key).detach().clone())
                    value[first : first + self.channels] = value[first + order]
                    changed[name] = value
        inputs = self.inputs(order)
        for name in self.consumers:
            changed[f"{name}.weight"] = block.module.get_parameter(f"{name}.weight").detach()[:, inputs]
        return changed

    def apply(self, block: LoadedBlock, order: Tensor) -> None:
        """Move the channels for good."""
        for name, value in self.parameters(block, order).items():
            block.replace(name, value)


@torch.no_grad()
def readers(block: LoadedBlock, arguments: Arguments, hidden: Tensor) -> list[tuple[str, ...]]:
    """Return the linears of a block in the order they run, those with the same input together, by module name."""
    inputs = Trace(block, arguments, hidden).inputs
    found: list[list[str]] = []
    for name, x in inputs.items():
        group = next((g for g in found if inputs[g[0]] is x), None)
        if group is None:
            found.append([name])
        else:
            group.append(name)
    return [tuple(group) for group in found]


@torch.no_grad()
def routes(
    block: LoadedBlock,
    arguments: Arguments,
    hidden: Tensor,
    learnable: Set[str],
    wanted: Sequence[tuple[str, ...]],
    multiple: int,
) -> list[Route]:
    """Find channels that may change places without a change of what the block computes.

    Like folds, they are tried on the block: random permutations of the rows of one linear, or of two that make the
    same number of channels, against the columns of those that read them; of all channels first, then of ever
    shorter runs. Unlike a factor, a permutation also passes through activations.

    Args:
        block: the block.
        arguments: what the model hands to it besides hidden states.
        hidden: hidden states to try it on, float32 [samples, length, hidden] on the block's device.
        learnable: module names of the matrices that may change.
        wanted: groups of consumers, of those that `readers` gives.
        multiple: what runs must be a multiple of.
    """
    trace = Trace(block, arguments, hidden)
    order = [name for name in trace.inputs if name in learnable]
    found = []
    for consumers in wanted:
        if not learnable >= set(consumers):
            continue
        earlier = order[: order.index(consumers[0])]
        route = _route(trace, earlier, consumers, multiple)
        if route is not None:
            found.append(route)
    return found


def _route(trace: Trace, earlier: list[str], consumers: tuple[str, ...], multiple: int) -> Route | None:
    width = trace.linear(consumers[0]).in_features
    own = torch.arange(width, device=trace.inputs[consumers[0]].device)
    scaled = [fold for producer in earlier if (fold := of_rows(trace, producer, [consumers[0]]))]
    slices = [
        (producer, first)
        for producer in earlier
        for first, count in row_slices(trace.linear(producer).out_features, {width})
        if count == width
    ]
    candidates: list[tuple[tuple[tuple[str, int], ...], int, Tensor]] = []
    for fold in scaled:  # what a factor passes through alone, or beside what multiplies it
        candidates.append((((fold.producer, fold.first),), fold.channels, fold.spread))
    for fold in scaled:
        others = [s for s in slices if s != (fold.producer, fold.first)] if fold.channels == width else []
        candidates += [(((fold.producer, fold.first), other), width, fold.spread) for other in others]
    if not scaled:  # what passes an activation
        candidates += [((one,), width, own) for one in slices]
        candidates += [((a, b), width, own) for i, a in enumerate(slices) for b in slices[:i]]
    for producers, channels, spread in candidates:
        for run in (channels // n for n in range(1, channels // multiple + 1) if channels % (n * multiple) == 0):
            route = Route(producers, channels, run, consumers, spread)
            if in_runs(route.spread, channels, run) and _movable(trace, route):
                return route
    return None


def in_runs(spread: Tensor, channels: int, run: int) -> bool:
    """Whether inputs that read the channels `spread`, int64 [inputs], read whole runs of them."""
    if len(spread) % run or channels % run:
        return False
    runs = spread.view(-1, run)
    return bool((runs == runs[:, :1] + torch.arange(run, device=runs.device)).all() and (runs[:, 0] % run == 0).all())


def _movable(trace: Trace, route: Route) -> bool:
    random = torch.Generator().manual_seed(0)
    order = torch.cat(
        [first + torch.randperm(route.run, generator=random) for first in range(0, route.channels, route.run)]
    )
    changed = route.parameters(trace.block, order.to(route.spread.device))
    return trace.unchanged(changed, {name for name, _ in route.producers}, _MOVED)
