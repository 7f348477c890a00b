"""A block as a method sees it: what it is to come to, what it is fed, and how its error is weighed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.compute.schemes import Range
from tesseraq_gguf.methods.held_out import HeldOut, Verdict
from tesseraq_gguf.methods.rare_experts import RARE
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite
from tesseraq_gguf.models.folding import Fold, folds
from tesseraq_gguf.models.handed import Arguments
from tesseraq_gguf.types.grid import Grid
from tesseraq_gguf.types.quantized import QuantizedTensor

Weights = Mapping[str, Tensor]
"""Weights of a block's matrices by module name, float32 [out, in]."""


Report = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done); 0 in all where they are not counted."""


@dataclass(frozen=True)
class Mark:
    """How far the loss was at a point of learning.

    Attributes:
        doing: what was done.
        steps: done of it until then.
        loss: mean over the steps since the last mark.
    """

    doing: str
    steps: int
    loss: float


@dataclass
class BlockProblem:
    """One block to learn.

    Attributes:
        block: the block with its full-precision weights.
        grids: the grid of each matrix to learn, by module name.
        inputs: X_q, float32 [samples, length, hidden], on the device or not.
        targets: Y, the same shape.
        sensitivity: weights of the squared error of each channel, float32 [2, hidden]: in the first position, and in
            all others.
        arguments: what the model hands to this block besides hidden states.
        device: where to compute.
        autocast: dtype of matrix products while learning; float32 means no autocast.
        generator: the block's own random numbers, a function of the run's seed and the block's index alone.
        report: told how learning goes on.
        rounding: rounds activations of the quantised chain; None leaves them.
        team: the processes that learn together; inputs and targets are this one's share.
        samples: samples of all processes together; None means that these are all.
        held_out: sequences that nothing is learned on, for methods that learn to be judged by; None judges none.
        verdict: how learning ended on these, once a method has (`held_out.better`).
        importance: weights of the squared errors of columns, float32 [in] by module name, of an importance matrix that
            rounding to nearest goes by.
        curve: how the loss of what this process learned on went.
        usual: the length that targets have at most, as a rule; None where they have no length to compare.
        originals: X, what the block is fed in the full-precision model, float32 [fewer samples, length, hidden], for
            starts that make up for what inputs have lost; None where it is not known.
    """

    block: LoadedBlock
    grids: dict[str, Grid]
    inputs: Tensor
    targets: Tensor
    sensitivity: Tensor
    arguments: Arguments
    device: torch.device
    autocast: torch.dtype
    generator: torch.Generator
    report: Report
    rounding: ActivationRounding | None = None
    team: Team = field(default_factory=Team)
    samples: int | None = None
    held_out: HeldOut | None = None
    verdict: Verdict | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    curve: list[Mark] = field(default_factory=list)
    usual: float | None = None
    originals: Tensor | None = None

    def full_name(self, name: str) -> str:
        """Return the checkpoint name of a matrix of the block, by its module name."""
        return f"{self.block.prefix}{name}.weight"

    def matrices(self) -> dict[str, Tensor]:
        """Return the full-precision weights to learn, float32 [out, in], by module name."""
        modules = self.block.matrices()
        return {name: modules[name].weight.detach() for name in self.grids}

    def forward(self, hidden: Tensor, weights: Weights | None = None) -> Tensor:
        """Run the block on hidden states [batch, length, hidden], with `weights` in place of its own where given."""
        return self.block.run(hidden, self.arguments, weights)

    def quantised(self, hidden: Tensor, weights: Weights, vectors: Weights | None = None) -> Tensor:
        """Run the block as the file will: with `weights`, and with activations rounded where the scheme says so.

        `vectors` take the place of the block's own, by name within the block.
        """
        return self.block.run(hidden, self.arguments, weights, vectors, self.rounding)

    def loss(self, weights: Weights, samples: Tensor) -> Tensor:
        """Weighted squared error of the block's output, summed over channels, mean over tokens.

        Args:
            weights: to use in place of the block's own.
            samples: which samples to run, int64.
        """
        hidden, target = self.inputs[samples].to(self.device), self.targets[samples].to(self.device)
        with self.precision():
            out = self.quantised(hidden, weights)
        return self.weighted((out.float() - target).pow(2), target)

    def weighted(self, error: Tensor, target: Tensor) -> Tensor:
        """Sum squared errors over channels as the answers feel these; mean over tokens.

        Blocks look at the direction of what they are handed, through a norm. So where a target is far longer than
        others are, as those of a token that attention rests on, its error counts in proportion to its length.

        Args:
            error: squared, float32 [batch, length, hidden].
            target: what it is the error of, of the same shape.
        """
        first, rest = error[:, 0] @ self.sensitivity[0], error[:, 1:] @ self.sensitivity[1]
        if self.usual is not None:
            rest = rest * (self.usual / target[:, 1:].norm(dim=-1)).clamp(max=1).square()
        return (first.sum() + rest.sum()) / (first.numel() + rest.numel())

    def precision(self) -> torch.autocast:
        """Return the context in which matrix products are made while learning."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast != torch.float32)

    def draw(self, count: int) -> Tensor:
        """Draw this process' share of `count` different samples, one of every stratum (`parallel.py`), as indices."""
        samples = self.samples or len(self.inputs)
        count = min(count, samples)
        strata = [range(first, samples, count) for first in range(count)]
        drawn = [s[int(torch.randint(len(s), (), generator=self.generator))] for s in strata]
        return torch.tensor([d // self.team.size for d in drawn if d % self.team.size == self.team.rank])

    def average_gradients(self, variables: Iterable[Tensor]) -> None:
        """Average the gradients of variables over the processes: to be called between backward pass and step."""
        if any(map(stack_of, self.grids)):  # a process' share of a step may have no token of an expert's
            self.team.average_some(variables)
        else:
            self.team.average_gradients(variables)

    def input_ranges(self) -> dict[str, Range]:
        """Return lowest and highest input of each matrix on the quantised chain, activations not rounded, by name."""
        ranges: dict[str, Range] = {}

        def see(name: str, x: Tensor) -> None:
            low, high = x.aminmax()
            before = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(before[0], float(low)), max(before[1], float(high))

        self.observe(self.samples or len(self.inputs), see)
        seen = self.team.merged(dict.fromkeys(ranges))
        ranges = {name: self.team.widest(*ranges.get(name, (0.0, 0.0))) for name in self.grids if name in seen}
        named = {self.full_name(name): torch.tensor(ends) for name, ends in ranges.items()}
        check_finite(named, "the ends of what it is fed", TAKE_ANOTHER)
        return ranges

    def folds(self) -> list[Fold]:
        """Find the exact foldings of the block among the matrices to learn, the same in all processes."""

        def found(device: torch.device) -> list[Fold]:
            sample = self.inputs[:1].to(self.device)
            return [fold.on(device) for fold in folds(self.block, self.arguments, sample, self.grids.keys())]

        if self.team.size == 1 or not any(map(stack_of, self.grids)):
            return found(self.device)
        # each process' sample comes to other experts
        return [fold.on(self.device) for fold in self.team.from_first(lambda: found(torch.device("cpu")))]

    def tokens_of(self, samples: int) -> int:
        """Return how many tokens the first `samples` samples have, at most, over all processes."""
        return min(samples, self.samples or len(self.inputs)) * self.inputs.shape[1]

    @torch.no_grad()
    def observe(self, samples: int, see: Callable[[str, Tensor], None], least: int = 0) -> dict[str, int]:
        """Run the block as it is on the quantised chain and show what its matrices are fed.

        Args:
            samples: how many samples are run, at most, by all processes together.
            see: called with the name of a matrix to learn and its input, [1, length, in], once for every sample. Where
                matrices have the same input, it is the same object.
            least: tokens that matrices of experts must be fed: those that were fed fewer are shown further samples.

        Returns:
            How many tokens the samples have that each matrix was shown, by module name.
        """
        modules = self.block.matrices()
        shown, fed = set(self.grids), Counter[str]()
        tokens = dict.fromkeys(self.grids, self.tokens_of(samples))

        def show(name: str, x: Tensor) -> None:
            fed[name] += x.shape[:-1].numel()
            if name in shown:
                see(name, x)

        def hook(name: str) -> Callable[..., None]:
            return lambda _module, args: show(name, args[0])

        handles = [modules[name].register_forward_pre_hook(hook(name)) for name in self.grids]
        first = self.team.count(samples)
        try:
            for index, sample in enumerate(self.inputs.split(1)):
                if index >= first:
                    shown = {name for name in self.grids if stack_of(name) and fed[name] < least}
                    if not shown:
                        break
                    for name in shown:
                        tokens[name] += sample.shape[1]
                with self.precision():
                    self.forward(sample.to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        return self._in_all(tokens, self.tokens_of(samples))

    def _in_all(self, tokens: dict[str, int], first: int) -> dict[str, int]:
        """Tokens that matrices were shown by all processes, beyond the `first` that they were shown together."""
        if self.team.size == 1 or not any(map(stack_of, tokens)):
            return tokens
        further = torch.tensor([count - first for count in tokens.values()], dtype=torch.int64)
        self.team.add_up([further])
        return {name: first + count for name, count in zip(tokens, further.tolist(), strict=True)}

    def second_moments(self, samples: int) -> dict[str, Tensor]:
        """Return mean x·xᵀ of the inputs of each matrix on the quantised chain, float32 [in, in] by module name.

        Matrices with the same input share one tensor. At most the first `samples` samples are run, and as many more as
        experts need that come late.

        Raises:
            NotFiniteError: some of them overflow.
        """
        sums: dict[str, Tensor] = {}
        latest: dict[str, Tensor] = {}
        leader: dict[str, str] = {}

        def add(name: str, x: Tensor) -> None:
            leader[name] = first = next((n for n, seen in latest.items() if seen is x), name)
            if first == name:
                latest[name] = x
                x = x.reshape(-1, x.shape[-1]).float()
                with torch.autocast(self.device.type, enabled=False):
                    sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

        tokens = self.observe(samples, add, RARE)
        if self.team.size > 1 and any(map(stack_of, self.grids)):  # of experts, each process may have seen others
            leader = self.team.merged(leader)
            widths = {name: m.in_features for name, m in self.block.matrices().items()}
            found = {name: sums.get(name) for name in self.grids if leader.get(name) == name}
            sums = {
                n: torch.zeros(widths[n], widths[n], device=self.device) if s is None else s for n, s in found.items()
            }
        self.team.add_up(sums.values())
        for name, moment in sums.items():
            moment /= tokens[name]
        named = {self.full_name(name): moment for name, moment in sums.items()}
        check_finite(named, "the second moments of what it is fed", TAKE_ANOTHER)
        return {name: sums[leader[name]] for name in self.grids}


class Method(Protocol):
    """A way to learn the matrices of a block on their grids. Knows losses and schedules; knows no bytes."""

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Return the learned matrices by module name.

        Parameters that the method changes along with them, such as norms, it changes by `LoadedBlock.replace`.
        """
        ...
