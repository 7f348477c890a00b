"""Foldings: exact moves of per-channel factors between the parameters of one decoder block.

A producer makes channels, linears consume them. Dividing what the producer makes by s, channel by channel, and
multiplying the consumers' columns by s leaves the block's function as it is:

    (W·diag(s)) · (x / s) = W·x

Producers are norms (their weight, and bias if any) and rows of linears: the factor of a gated MLP that passes no
activation (up → down) and the values of attention (v → o), of which every query head of a group reads the same.

No architecture is known by name. Candidates come from running the block: a norm whose output is what linears read, and
rows of a linear of which a later linear's input is seen to be a multiple, channel by channel. Each candidate is then
tried on the block, and one that changes what it computes is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.handed import Arguments

_TOLERANCE = 1e-3
"""Relative change of an output that float32 (or TF32) arithmetic may make; a wrong fold makes several per cent."""


@dataclass(frozen=True)
class Fold:
    """Channels that a factor can move through.

    Attributes:
        producer: module name of the norm or linear that makes the channels.
        first: the producer's row that makes channel 0.
        channels: how many channels; the producer's rows `first` to `first + channels` make them.
        offset: what the producer adds to its stored weight before it multiplies by it: 1 for norms such as Gemma's.
        consumers: module names of the linears that read the channels, in the order they run.
        spread: which channel each input of a consumer reads, int64 [inputs].
        orders: of consumers whose columns have an order of their own, the input of each column, int64 [inputs].
    """

    producer: str
    first: int
    channels: int
    offset: float
    consumers: tuple[str, ...]
    spread: Tensor = field(compare=False, repr=False)
    orders: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> Fold:
        """Return the same with tensors on a device."""
        orders = {name: order.to(device) for name, order in self.orders.items()}
        return replace(self, spread=self.spread.to(device), orders=orders)

    def columns(self, name: str, s: Tensor) -> Tensor:
        """Give what belongs to channels, [channels], to the columns of a consumer that read them, [inputs]."""
        spread = s[self.spread]
        return spread[self.orders[name]] if name in self.orders else spread

    def inputs(self, name: str, of_columns: Tensor) -> Tensor:
        """Bring what belongs to a consumer's columns into the order of its inputs, both [inputs]."""
        return of_columns[self.orders[name].argsort()] if name in self.orders else of_columns

    def parameters(self, block: LoadedBlock, s: Tensor) -> dict[str, Tensor]:
        """Return the parameters that folding changes, by name within the block, with their new values.

        Args:
            block: the block, which is not changed.
            s: positive factors, float32 [channels]: channels are divided by them, columns multiplied.
        """
        module = block.module.get_submodule(self.producer)
        changed = {}
        for key, offset in (("weight", self.offset), ("bias", 0.0)):
            stored = getattr(module, key, None)
            if stored is None:
                continue
            value = stored.detach().clone()
            rows = value[self.first : self.first + self.channels]
            rows.add_(offset).div_(s.view(-1, *(1,) * (rows.dim() - 1))).sub_(offset)
            changed[f"{self.producer}.{key}"] = value
        for name in self.consumers:
            weight = block.module.get_parameter(f"{name}.weight").detach()
            changed[f"{name}.weight"] = weight * self.columns(name, s)
        return changed

    def scaled(self, block: LoadedBlock, r: Tensor) -> dict[str, Tensor]:
        """Return the producer's parameters, by name within the block, that multiply channels by r, float32 [channels].

        Consumers stay as they are, so this changes what the block computes. It is differentiable in r.
        """
        module = block.module.get_submodule(self.producer)
        inside = slice(self.first, self.first + self.channels)
        changed = {}
        for key, offset in (("weight", self.offset), ("bias", 0.0)):
            stored = getattr(module, key, None)
            if stored is not None:
                rows = stored.detach()[inside]
                moved = (rows + offset) * r.view(-1, *(1,) * (rows.dim() - 1)) - offset
                changed[f"{self.producer}.{key}"] = torch.cat(
                    [stored[: self.first].detach(), moved, stored[inside.stop :].detach()]
                )
        return changed

    def apply(self, block: LoadedBlock, s: Tensor) -> None:
        """Fold factors, float32 [channels], into the block for good."""
        for name, value in self.parameters(block, s).items():
            block.replace(name, value)


@torch.no_grad()
def folds(block: LoadedBlock, arguments: Arguments, hidden: Tensor, learnable: Set[str]) -> list[Fold]:
    """Find the exact foldings of a block, in the order in which their consumers run.

    Matrices outside `learnable` are never changed: their values come from the original model.

    Args:
        block: the block.
        arguments: what the model hands to it besides hidden states.
        hidden: hidden states to try it on, float32 [samples, length, hidden] on the block's device.
        learnable: module names of the matrices that may change.
    """
    trace = Trace(block, arguments, hidden)
    found = norm_folds(trace, learnable)
    taken = {name for fold in found for name in fold.consumers}
    found += linear_folds(trace, learnable, taken)
    order = list(trace.inputs)
    return sorted(found, key=lambda fold: order.index(fold.consumers[0]))


class Trace:
    """One run of a block as it is, and what it takes to compare other runs with it.

    Attributes:
        inputs: what each linear read, by module name, in the order they ran.
        norms: modules with one weight for each channel of their output: (arguments, keyword arguments, output).
    """

    def __init__(self, block: LoadedBlock, arguments: Arguments, hidden: Tensor) -> None:
        self.block = block
        self._arguments = arguments
        self._hidden = hidden
        self._linears = block.matrices()
        self.norms: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
        with self._watching_norms():
            self.inputs, self._outputs = self._run({})

    def linear(self, name: str) -> nn.Linear:
        """Return a linear by module name."""
        return self._linears[name]

    def orders(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the orders of columns of those linears that have one."""
        return {name: order for name, order in self.block.orders.items() if name in set(names)}

    def exact(self, fold: Fold) -> bool:
        """Whether folding arbitrary factors leaves what every linear and the whole block compute as it is."""
        random = torch.Generator().manual_seed(0)
        s = torch.exp2(torch.rand(fold.channels, generator=random) * 2 - 1).to(self._hidden.device)
        return self.unchanged(fold.parameters(self.block, s), {fold.producer}, _TOLERANCE)

    def unchanged(self, parameters: dict[str, Tensor], but: Set[str], tolerance: float) -> bool:
        """Whether other parameters leave what linears, except some, and the whole block compute as it is."""
        _, outputs = self._run(parameters)
        return all(
            name in outputs and _close(outputs[name], before, tolerance)  # experts may be chosen anew
            for name, before in self._outputs.items()
            if name not in but
        )

    def scaled(self, producer: str, factors: Tensor) -> dict[str, Tensor]:
        """Return what each linear reads when the output of a linear is multiplied by factors [its outputs]."""
        handle = self._linears[producer].register_forward_hook(lambda _module, _args, out: out * factors)
        try:
            return self._run({})[0]
        finally:
            handle.remove()

    def _run(self, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what each linear read and computed, and under '' what the block added to the hidden states.

        What a linear read is told before its columns' order is applied to it.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Linear) -> Iterator[torch.utils.hooks.RemovableHandle]:
            def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs[name] = args[0]

            def made(_module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
                outputs[name] = out

            yield module.register_forward_pre_hook(read, prepend=True)
            yield module.register_forward_hook(made)

        def routed(name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
            def keep(*given: Tensor) -> None:
                outputs.update({f"{name} {place}": x for place, x in enumerate(given) if x.is_floating_point()})

            return keep

        handles = [handle for name, module in self._linears.items() for handle in watch(name, module)]
        handles += [experts.watch(routed(name)) for name, experts in self.block.mixtures.items()]
        try:
            out = self.block.run(self._hidden, self._arguments, vectors=parameters)
        finally:
            for handle in handles:
                handle.remove()
        outputs[""] = out - self._hidden[..., : out.shape[-1]]
        return inputs, outputs

    @contextmanager
    def _watching_norms(self) -> Iterator[None]:
        def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                if isinstance(out, Tensor):
                    self.norms[name] = (args, kwargs, out)

            return module.register_forward_hook(keep, with_kwargs=True)

        handles = [
            watch(name, module)
            for name, module in self.block.module.named_modules()
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 1
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def norm_folds(trace: Trace, learnable: Set[str]) -> list[Fold]:
    """Find norms whose output is what linears read, all of them learnable."""
    found = []
    for name, (args, kwargs, out) in trace.norms.items():
        norm = trace.block.module.get_submodule(name)
        channels = norm.get_parameter("weight").numel()
        consumers = tuple(linear for linear, x in trace.inputs.items() if _same_memory(x, out))
        if not consumers or not learnable >= set(consumers) or out.shape[-1] != channels:
            continue
        offset = norm_offset(norm, args, kwargs)
        if offset is None:
            continue
        widths = {trace.linear(linear).in_features for linear in consumers}
        if len(widths) > 1 or (width := widths.pop()) % channels:
            continue
        spread = torch.arange(channels, device=out.device).repeat(width // channels)  # heads may share a norm
        fold = Fold(name, 0, channels, offset, consumers, spread, trace.orders(consumers))
        if trace.exact(fold):
            found.append(fold)
    return found


def norm_offset(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Return what a norm adds to its stored weight, by which weight makes its output vanish; None if neither does."""
    for offset in (0.0, 1.0):
        vanishing = {
            name: torch.full_like(p, -offset if name == "weight" else 0.0) for name, p in norm.named_parameters()
        }
        if not functional_call(norm, vanishing, args, kwargs).any():
            return offset
    return None


def linear_folds(trace: Trace, learnable: Set[str], taken: Set[str] = frozenset()) -> list[Fold]:
    """Find linears that read multiples of rows of an earlier linear, both learnable and the former not taken."""
    found: list[Fold] = []
    order = [name for name in trace.inputs if name in learnable]
    consumers = [name for name in order if name not in taken]
    for position, producer in enumerate(order):
        later = [name for name in order[position + 1 :] if name in consumers and _beside(producer, name)]
        fold = of_rows(trace, producer, later)
        if fold is not None:
            found.append(fold)
            consumers.remove(fold.consumers[0])
    return found


def _beside(producer: str, consumer: str) -> bool:
    """Whether a matrix may read rows of another: those of an expert read rows of the same expert alone."""
    inside = [name.rpartition(".")[0] for name in (producer, consumer) if stack_of(name)]
    return not inside or (len(inside) == 2 and inside[0] == inside[1])


def of_rows(trace: Trace, producer: str, consumers: list[str]) -> Fold | None:
    """Find rows of a linear of which the input of one of the consumers is a multiple, channel by channel."""
    rows = trace.linear(producer).out_features
    widths = {name: trace.linear(name).in_features for name in consumers}
    for first, count in row_slices(rows, set(widths.values())):
        readers = {name: width for name, width in widths.items() if width % count == 0}
        if not readers:
            continue
        probe = torch.exp2(torch.linspace(-1, 1, count, device=trace.inputs[producer].device))
        factors = torch.ones(rows, device=probe.device)
        factors[first : first + count] = probe
        scaled = trace.scaled(producer, factors)
        for name in readers:
            spread = _sources(trace.inputs[name], scaled[name], probe) if name in scaled else None
            if spread is None:
                continue
            fold = Fold(producer, first, count, 0.0, (name,), spread, trace.orders((name,)))
            if trace.exact(fold):
                return fold
    return None


def row_slices(rows: int, widths: Set[int]) -> list[tuple[int, int]]:
    """Rows (first, count) of a linear that may make channels for linears of these widths.

    All of them; one half, where gate and up are one matrix; the last, where queries, keys and values are.
    """
    slices = [(0, rows)]
    if rows % 2 == 0:
        slices += [(rows // 2, rows // 2), (0, rows // 2)]
    slices += [(rows - (rows - n) // 2, (rows - n) // 2) for n in sorted(widths) if rows > n and (rows - n) % 2 == 0]
    return list(dict.fromkeys(slices))


def _sources(before: Tensor, after: Tensor, probe: Tensor) -> Tensor | None:
    """Which channel each input reads, when multiplying channel c by probe[c] turned inputs `before` into `after`.

    Args:
        before, after: [..., inputs].
        probe: distinct factors, evenly spaced logarithms, [channels].

    Returns:
        Channels, int64 [inputs]; None if some input is not a multiple of one channel.
    """
    if before.shape != after.shape:
        return None
    x, y = before.flatten(0, -2).double(), after.flatten(0, -2).double()
    energy = x.square().sum(0)
    ratio = (x * y).sum(0) / energy
    alive = energy > 0
    constant = (y - ratio * x).square().sum(0) <= _TOLERANCE**2 * y.square().sum(0)
    position = (ratio.log2() + 1) / 2 * (len(probe) - 1)
    channel = position.round()
    certain = (position - channel).abs() < 0.25
    inside = (channel >= 0) & (channel < len(probe))
    if len(probe) == x.shape[1]:
        # a neuron that is off for every token says nothing; its neighbours say that the order is kept
        own = torch.arange(len(probe), device=x.device)
        channel = torch.where(alive, channel, own)
    elif not alive.all():
        return None
    return channel.long() if bool((~alive | constant & certain & inside).all()) else None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    return float((a - b).norm()) <= tolerance * float(b.norm()) and math.isfinite(float(a.norm()))
