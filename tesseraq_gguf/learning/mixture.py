"""Blocks with many experts, learned in parts: what every token goes through, then one expert after the other.

Together they do not fit: an expert's weights, what is measured of its inputs and what is learned of it take more memory
than the file has for it, and there are hundreds. So the rest of the block is learned first, against the block's output,
with what the experts give held as it is in the full-precision block. Then tokens are routed by what was learned, and
each expert learns on its own to do for them what it did:

    minimise  E[(p·(E(x, Ŵ) - E(x, W)))²]     x: what the expert is fed,  p: how much its answer counts

over the tokens that come to it. No more than one expert is in memory at a time. Of several processes each learns every
n-th expert, on the tokens of all.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.hidden_states import Empty
from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.compute.schemes import ActivationScheme
from tesseraq_gguf.methods.held_out import HeldOut
from tesseraq_gguf.methods.problem import BlockProblem, Method, Report
from tesseraq_gguf.methods.rare_experts import RARE, Visits
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.experts import Expert, Experts
from tesseraq_gguf.types.quantized import QuantizedTensor

TOGETHER = 8
"""Samples that a block with many experts is run on at a time: each expert is read once for all of them."""

_STATISTICS = 512
"""Tokens of an expert that what its last matrix is fed is measured on, at most."""

Learned = dict[str, QuantizedTensor]


class Rest(LoadedBlock):
    """A block whose experts give what they gave before: it is handed that behind its hidden states."""

    def matrices(self) -> dict[str, nn.Linear]:
        """Return the linear layers outside the experts by module name."""
        inside = tuple(f"{name}." for name in self.mixtures)
        return {name: m for name, m in super().matrices().items() if not name.startswith(inside)}

    def run(self, hidden: Tensor, arguments: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on [batch, length, width + what experts give]."""
        widths = {name: experts.form.slots[-1].shape[0] for name, experts in self.mixtures.items()}
        state, *gave = hidden.split([hidden.shape[-1] - sum(widths.values()), *widths.values()], -1)
        for experts, out in zip(self.mixtures.values(), gave, strict=True):
            experts.tap = lambda *_, out=out: out.flatten(0, 1)  # type: ignore[misc]
        try:
            return super().run(state, arguments, *args, **kwargs)
        finally:
            for experts in self.mixtures.values():
                experts.tap = None


class ExpertAlone(LoadedBlock):
    """One expert as a block of its own: it is handed how much its answer counts in a last channel."""

    def run(
        self,
        hidden: Tensor,
        arguments: Any,
        weights: Mapping[str, Tensor] | None = None,
        vectors: Mapping[str, Tensor] | None = None,
        rounding: ActivationRounding | None = None,
    ) -> Tensor:
        """Run the expert on [batch, length, in + 1]."""
        replaced = {f"{name}.weight": w for name, w in (weights or {}).items()} | dict(vectors or {})
        with self._rounded(rounding, arguments):
            out = functional_call(self.module, replaced, (hidden[..., :-1],))
        return out * hidden[..., -1:]


@dataclass
class Routed:
    """The tokens of a module of experts.

    Attributes:
        fed: what experts are fed, float32 [tokens, in].
        chosen: which experts, int64 [tokens, of each].
        weights: how much each counts, float32 [tokens, of each].
        places: where each token stands among those of all processes, int64 [tokens].
    """

    fed: Tensor
    chosen: Tensor
    weights: Tensor
    places: Tensor

    def visits(self, experts: int, team: Team) -> Tensor:
        """How many tokens come to each expert in all processes, int64 [experts]."""
        counts = torch.bincount(self.chosen.flatten(), minlength=experts)
        team.add_up([counts])
        return counts

    def of(self, expert: int, team: Team) -> Tensor:
        """What an expert is fed in all processes, and how much each answer counts: float32 [tokens, in + 1]."""
        token, place = torch.where(self.chosen == expert)
        rows = torch.cat([self.fed[token], self.weights[token, place, None]], 1)
        return team.gathered(rows, self.places[token])


@dataclass
class Mixture:
    """A block with many experts.

    Attributes:
        problem: of the whole block; its targets are there.
        method: learns the rest and each expert.
        empty: makes the tensors that activations are kept in.
        visited: tokens that came to matrices of experts on the full-precision chain, by module name.
        rare: matrices that too few tokens come to, by module name, once it is learned.
    """

    problem: BlockProblem
    method: Method
    empty: Empty
    visited: Visits
    rare: list[str] = field(default_factory=list)
    _learned: int = 0

    def learn(self) -> Learned:
        """Learn all matrices of the block; what leaves is on the CPU and the same in all processes."""
        problem = self.problem
        learned = self._learn_rest()
        tokens = {name: self._routed(name, problem.inputs, learned) for name in problem.block.mixtures}
        apart = problem.held_out
        held = {name: self._routed(name, apart.inputs, learned) if apart else None for name in problem.block.mixtures}
        for name, experts in problem.block.mixtures.items():
            learned |= self._learn_experts(name, experts, tokens[name], held[name])
        return learned

    def _learn_rest(self) -> Learned:
        problem = self.problem
        block = problem.block
        rest = Rest(block.index, block.prefix, block.module, block.replaced, block.orders)
        grids = {name: grid for name, grid in problem.grids.items() if name in rest.matrices()}
        if not grids:
            return {}
        if any(experts.form.dense for experts in block.mixtures.values()):  # a number of rows that changes with tokens
            part = replace(problem, grids=grids)
        else:
            apart = problem.held_out
            part = replace(
                problem,
                block=rest,
                grids=grids,
                inputs=self._with_answers(problem.inputs),
                originals=None if problem.originals is None else self._with_answers(problem.originals),
                held_out=apart and replace(apart, inputs=self._with_answers(apart.inputs)),
            )
        part.report = self._reported(0)
        learned = self.method.learn(part)
        problem.verdict = part.verdict
        return of_the_first(problem, learned)

    def _reported(self, part: int) -> Report:
        """Report steps of a part of the block: the first is the rest, the others are experts."""
        problem = self.problem
        parts = 1 + sum(-(-len(experts) // problem.team.size) for experts in problem.block.mixtures.values())
        named = f"part {part + 1} of {parts}: " if parts > 1 else ""
        return lambda done, total, doing: problem.report(part * total + done, parts * total, named + doing)

    @torch.no_grad()
    def _with_answers(self, inputs: Tensor) -> Tensor:
        """Put what experts give behind what the block is handed, [samples, length, width + that]."""
        problem, mixtures = self.problem, self.problem.block.mixtures
        widths = [experts.form.slots[-1].shape[0] for experts in mixtures.values()]
        out = self.empty(torch.Size((*inputs.shape[:2], inputs.shape[2] + sum(widths))))
        answers: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, made: Tensor) -> None:
                answers[name] = made

            return hook

        handles = [experts.register_forward_hook(keep(name)) for name, experts in mixtures.items()]
        try:
            for first in range(0, len(inputs), TOGETHER):
                some = inputs[first : first + TOGETHER]
                problem.forward(some.to(problem.device))
                parts = [answers[name].view(*some.shape[:2], -1).to(some.device) for name in mixtures]
                out[first : first + TOGETHER].copy_(torch.cat([some, *parts], -1))
        finally:
            for handle in handles:
                handle.remove()
        return out

    @torch.no_grad()
    def _routed(self, name: str, inputs: Tensor, learned: Mapping[str, QuantizedTensor]) -> Routed:
        """Run the block up to a module of experts, the rest of it as it was learned."""
        problem = self.problem
        weights = {n: _dequantized(problem, n, t) for n, t in learned.items()}
        found: list[tuple[Tensor, ...]] = []

        def tap(hidden: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
            found.append((hidden.cpu(), chosen.cpu(), counts.float().cpu()))
            return torch.zeros_like(hidden)

        with _tapped(problem.block, name, tap):
            for first in range(0, len(inputs), TOGETHER):
                problem.quantised(inputs[first : first + TOGETHER].to(problem.device), weights)
        return self._together(found, len(inputs))

    def _together(self, found: list[tuple[Tensor, ...]], samples: int) -> Routed:
        """Join what was found of samples, piece by piece."""
        team, rows = self.problem.team, sum(len(fed) for fed, *_ in found)
        if not rows:
            nothing = torch.empty(0, 0)
            return Routed(nothing, nothing, nothing, torch.empty(0, dtype=torch.int64))
        fed = self.empty(torch.Size((rows, found[0][0].shape[1])))
        chosen, counts = (torch.cat([parts[which] for parts in found]) for which in (1, 2))
        first = 0
        for index, (part, *_) in enumerate(found):
            fed[first : first + len(part)] = part
            first += len(part)
            found[index] = ()  # let go of at once
        row, each = torch.arange(rows), max(1, rows // samples)
        # samples are dealt out one by one, so this is where one process would have them
        return Routed(fed, chosen, counts, (row // each * team.size + team.rank) * each + row % each)

    def _learn_experts(self, name: str, experts: Experts, tokens: Routed, held: Routed | None) -> Learned:
        problem, team = self.problem, self.problem.team
        counts = tokens.visits(len(experts), team)
        last = experts.form.slots[-1].name
        common, kept = _Common(tokens, last), _Kept(len(experts))
        learned: Learned = {}
        for first in range(0, len(experts), team.size):
            mine: Learned = {}
            for index in range(first, min(first + team.size, len(experts))):
                fed = tokens.of(index, team)
                apart = held.of(index, team) if held else None
                if index % team.size != team.rank:
                    continue
                alone = self._alone(f"{name}.{index}", experts[index])  # type: ignore[arg-type]
                if len(fed):
                    common.see(alone, fed)
                mine |= self._learn_expert(f"{name}.{index}", alone, fed, apart, int(counts[index]))
            learned |= {n: kept.keep(n.removeprefix(f"{name}."), t) for n, t in team.merged(mine).items()}
        names = {slot.name for slot in experts.form.slots}
        wanted = {n for n in problem.grids if n.startswith(f"{name}.") and n.rpartition(".")[2] in names}
        rare = sorted(wanted - learned.keys(), key=_natural)
        importance = common.importance(team)
        for matrix in rare:
            weight = problem.block.matrices()[matrix].weight.detach()
            kind = last if matrix.rpartition(".")[2] == last else ""
            rounded = problem.grids[matrix].quantize(weight, problem.importance.get(matrix, importance.get(kind)))
            learned[matrix] = kept.keep(matrix.removeprefix(f"{name}."), _on_cpu(rounded))
        self.rare += rare
        return learned

    def _alone(self, name: str, streamed: Expert) -> ExpertAlone:
        """An expert with its weights, as a block of its own."""
        problem = self.problem
        made = streamed.resident().to(problem.device).eval()
        return ExpertAlone(problem.block.index, f"{problem.block.prefix}{name}.", made)

    def _learn_expert(self, name: str, alone: ExpertAlone, fed: Tensor, apart: Tensor | None, visits: int) -> Learned:
        """Learn an expert that enough is known of; nothing else."""
        problem = self.problem
        names = [n for n in alone.matrices() if f"{name}.{n}" in problem.grids]
        known = min([visits, *(self.visited[f"{name}.{n}"] for n in names)])
        if not names or known < RARE:
            return {}
        inputs = _samples(fed, problem.samples or len(problem.inputs))
        part = replace(
            problem,
            block=alone,
            grids={n: problem.grids[f"{name}.{n}"] for n in names},
            inputs=inputs,
            targets=_answers(alone, inputs, problem),
            sensitivity=self._sensitivity(alone),
            arguments={},
            generator=_generator(problem, name),
            report=self._reported(1 + self._learned),
            rounding=_rounding(problem.rounding, name),
            team=Team(),
            samples=len(inputs),
            held_out=None,
            curve=[],
            usual=None,
            originals=None,
            importance={n: problem.importance[f"{name}.{n}"] for n in names if f"{name}.{n}" in problem.importance},
        )
        if apart is not None and len(apart):
            given = apart[None]
            part.held_out = HeldOut(given, _answers(alone, given, problem), 1)
        self._learned += 1
        learned = self.method.learn(part)
        return {f"{name}.{n}": _on_cpu(tensor) for n, tensor in learned.items()}

    def _sensitivity(self, alone: ExpertAlone) -> Tensor:
        """Weights of the squared error of what an expert gives: those of the channels that it is added to."""
        width = alone.module.form.slots[-1].shape[0]  # type: ignore[union-attr,index]
        others = self.problem.sensitivity[1]
        others = others[:width] if len(others) >= width else torch.ones_like(others[:1]).expand(width)
        return others.expand(2, -1)


class _Common:
    """What is common to experts: E[x²] of what their matrices are fed.

    Args:
        tokens: of all experts.
        last: name of the matrix that is fed what is inside.
    """

    def __init__(self, tokens: Routed, last: str) -> None:
        self._last = last
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self._counts: dict[str, float] = defaultdict(float)
        if len(tokens.fed):
            parts = (part.double().square().sum(0) for part in tokens.fed.split(4096))
            self._add("", sum(parts, torch.zeros((), dtype=torch.float64)), len(tokens.fed))

    def _add(self, kind: str, squares: Tensor, rows: int) -> None:
        self._sums[kind] = self._sums[kind] + squares
        self._counts[kind] += rows

    @torch.no_grad()
    def see(self, alone: ExpertAlone, fed: Tensor) -> None:
        """Look at what an expert's last matrix is fed."""
        some = fed[:_STATISTICS]

        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(self._last, args[0].double().square().sum(0).cpu(), len(some))

        handle = alone.matrices()[self._last].register_forward_pre_hook(look)
        try:
            alone.module(some[:, :-1].to(next(alone.module.parameters()).device))
        finally:
            handle.remove()

    def importance(self, team: Team) -> dict[str, Tensor]:
        """Return E[x²], float32, of what first matrices are fed, under no name, and of the last one under its own."""
        together: dict[str, tuple[Tensor, float]] = {}
        for sums, counts in team.all(lambda: (dict(self._sums), dict(self._counts))):
            for kind, squares in sums.items():
                before = together.get(kind, (torch.zeros((), dtype=torch.float64), 0.0))
                together[kind] = before[0] + squares, before[1] + counts[kind]
        return {kind: (squares / count).float() for kind, (squares, count) in together.items()}


class _Kept:
    """What was learned of experts, one stack for all: thousands of small tensors would leave holes in memory.

    Args:
        experts: how many there are.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._stacks: dict[tuple[str, str], Tensor] = {}

    def keep(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """Return the same for a matrix, such as `7.up_proj`, with its arrays in the stacks."""
        expert, _, slot = name.partition(".")
        arrays = {}
        for key, array in tensor.arrays.items():
            if (slot, key) not in self._stacks:
                self._stacks[slot, key] = array.new_empty(self._experts, *array.shape)
            arrays[key] = self._stacks[slot, key][int(expert)].copy_(array)
        return QuantizedTensor(tensor.type, arrays)


def _samples(fed: Tensor, samples: int) -> Tensor:
    """Deal tokens out to samples of equal length, [samples, length, in + 1]; the last few are left out."""
    length = max(1, len(fed) // samples)
    return fed[: len(fed) // length * length].view(-1, length, fed.shape[1])


@torch.no_grad()
def _answers(alone: ExpertAlone, inputs: Tensor, problem: BlockProblem) -> Tensor:
    return torch.cat([alone.run(some.to(problem.device), {}).to(some.device) for some in inputs.split(TOGETHER)])


def _generator(problem: BlockProblem, name: str) -> torch.Generator:
    """An expert's own random numbers: a function of the block's and of its name alone."""
    seed = hashlib.sha256(f"{problem.generator.initial_seed()} {name}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))


def _rounding(rounding: ActivationRounding | None, name: str) -> ActivationRounding | None:
    """What rounds the activations of a block, for one expert: no keys and values, and ranges by its own names."""
    if rounding is None:
        return None
    scheme: ActivationScheme = replace(rounding.scheme, key_value_bits=None)
    inside = {n.removeprefix(f"{name}."): r for n, r in rounding.ranges.items() if n.startswith(f"{name}.")}
    return replace(rounding, scheme=scheme, ranges=inside)


def _dequantized(problem: BlockProblem, name: str, tensor: QuantizedTensor) -> Tensor:
    return problem.grids[name].dequantize(tensor).to(problem.device)


def dequantized(problem: BlockProblem, learned: Mapping[str, QuantizedTensor]) -> Mapping[str, Tensor]:
    """Return learned matrices dequantised by module name, those of experts whenever they are used."""

    def make(name: str) -> Callable[[], Tensor]:
        return lambda: _dequantized(problem, name, learned[name])

    return problem.block.held({name: make(name) for name in learned})


def _on_cpu(tensor: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(tensor.type, {key: array.cpu() for key, array in tensor.arrays.items()})


def of_the_first(problem: BlockProblem, learned: Learned) -> Learned:
    """Give all processes what the first one learned, and replaced in its block."""
    if problem.team.size == 1:
        return learned
    own = {name: value.cpu() for name, value in problem.block.replaced.items()}
    tensors, replaced = problem.team.from_first(lambda: ({n: _on_cpu(t) for n, t in learned.items()}, own))
    for name, value in replaced.items():
        problem.block.replace(name, value.to(problem.device))
    return tensors


@contextmanager
def _tapped(block: LoadedBlock, name: str, tap: Callable[..., Tensor]) -> Iterator[None]:
    """Let a module of experts tell what it is handed, and the others of the block give nothing."""
    for other, experts in block.mixtures.items():
        experts.tap = tap if other == name else lambda hidden, *_: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for experts in block.mixtures.values():
            experts.tap = None


def _natural(name: str) -> list[tuple[bool, int | str]]:
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in name.split(".")]
