"""Block reconstruction: walk the decoder blocks, let a method learn each, carry two chains of activations.

The full-precision chain gives each block's target, the chain through the blocks already quantised gives its input:

    Y = F(X_fp, W)      the method minimises the distance of F(X_q, Ŵ) to Y
    X_fp <- Y           X_q <- F(X_q, Ŵ)

Sequences that are held out go along on both chains; methods that learn are judged by them (`held_out.py`).

The engine knows no method and no file format. A finished block leaves as `QuantizedTensor`s in a `BlockResult`; a
block that an earlier run finished comes back through `finished` and is only run, not learned.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.hidden_states import Empty
from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.compute.schemes import ActivationScheme, Range
from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.learning.column_order import Score
from tesseraq_gguf.learning.mixture import TOGETHER, Mixture, dequantized, of_the_first
from tesseraq_gguf.learning.reordering import InputWatch, plan_moves
from tesseraq_gguf.methods.held_out import HeldOut, Verdict
from tesseraq_gguf.methods.problem import BlockProblem, Mark, Method, Weights
from tesseraq_gguf.methods.rare_experts import Visits, counted, in_all, on_both_chains, rarely, round_rare
from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.models.finite import TAKE_ANOTHER, finite, origin
from tesseraq_gguf.models.handed import Arguments
from tesseraq_gguf.types.grids import Grid, MatrixGrids, OwnCodebooks
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor, column_order, plain_vector

Finished = Callable[[int], "BlockResult | None"]
"""Gives what an earlier run learned for a block, or None."""

_REPORTED_SAMPLES = 32
"""Losses told to the user are means over so many samples: what they cost should not be felt."""

_ORDINARY = 4.0
"""How many times the median a target is long that is still an ordinary one."""

_MORE_BITS = "Give its matrices a type of more bits (--tensor-type), or take another --method"
"""What to do about a block that is finite until it is quantised."""


@dataclass(frozen=True)
class BlockResult:
    """What the engine says of a finished block.

    Attributes:
        index: the block's position.
        tensors: learned matrices, and vectors that changed along with them, by checkpoint name.
        loss_before: mean loss over some samples with round-to-nearest weights in the same types; None if not measured.
        loss_after: the same with the learned weights.
        seconds: time it took.
        resumed: True if an earlier run had learned it.
        ranges: static ranges of what the matrices are fed, by checkpoint name, where the scheme has them.
        rare: matrices of experts that calibration hardly visited, by checkpoint name: they were rounded, not learned.
        verdict: how learning ended on the sequences held out; None where nothing was learned or none are held out.
        curve: how the loss went while the block was learned.
    """

    index: int
    tensors: dict[str, QuantizedTensor]
    loss_before: float | None
    loss_after: float | None
    seconds: float
    resumed: bool = False
    ranges: Mapping[str, Range] = field(default_factory=dict)
    rare: tuple[str, ...] = ()
    verdict: Verdict | None = None
    curve: tuple[Mark, ...] = ()


@dataclass
class Reconstruction:
    """The walk over the blocks.

    Attributes:
        decoder: the model.
        method: learns each block.
        types: tensor type of each matrix to learn, by checkpoint name; matrices not named keep their weights.
        seed: makes a run repeatable.
        autocast: dtype of matrix products while learning.
        report: told of a block how learning goes on.
        granularity: what shares a scale: `group` or `channel`.
        activations: how activations of the quantised chain are rounded.
        codebooks: those that the model brings.
        scaled: matrices that can have a factor in the file, by checkpoint name.
        salient: which channels come to salient places, where a type has these.
        team: the processes that learn together.
        empty: makes the tensors that hidden states are kept in.
        importance: weights of the squared errors of columns, float32 [in] by checkpoint name, where rounding to nearest
            goes by an importance matrix.
        originals: sequences of the full-precision chain that the method looks at before a block, at most.
    """

    decoder: Decoder
    method: Method
    types: Mapping[str, str]
    seed: int
    autocast: torch.dtype
    report: Callable[[int, int, int, str], None] = lambda *_: None
    granularity: str = "group"
    activations: ActivationScheme = field(default_factory=ActivationScheme)
    codebooks: OwnCodebooks = field(default_factory=dict)
    scaled: Collection[str] = frozenset()
    salient: Score = "error"
    team: Team = field(default_factory=Team)
    empty: Empty = torch.empty
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    originals: int = 0

    def run(
        self,
        tokens: Tensor,
        sensitivity: Sequence[Tensor],
        finished: Finished,
        embeddings: Callable[[], Mapping[str, Tensor]] = dict,
        held_out: Tensor | None = None,
    ) -> Iterator[BlockResult]:
        """Learn block after block.

        Args:
            tokens: calibration tokens of all processes, int64 [samples, length].
            sensitivity: for each block the weights of its squared error, float32 [2, hidden]: in the first position,
                and in all others.
            finished: gives what an earlier run learned.
            embeddings: gives matrices outside the blocks that are quantised, dequantised, by checkpoint name.
            held_out: tokens that nothing is learned on, int64 [sequences, length], of all processes.

        Yields:
            One result per block, in order. The caller keeps it before asking for the next.

        Raises:
            NotFiniteError: a block of the model, or what was learned for it, overflows.
        """
        samples, apart = len(tokens), 0 if held_out is None else len(held_out)
        tokens = self.team.share(tokens)
        here = len(tokens)
        if held_out is not None:
            tokens = torch.cat([tokens, self.team.share(held_out)])
        full, recorded = self.decoder.stem(tokens, empty=self.empty)
        outside = embeddings()
        quantised = (
            self.decoder.stem(tokens, outside, self.empty, recorded)[0]
            if outside
            else self.empty(full.shape).copy_(full)
        )
        del outside
        for index in range(len(self.decoder)):
            block = self.decoder.load_block(index)
            problem = self._problem(block, full[:here], quantised[:here], sensitivity[index], recorded.arguments[index])
            problem.samples = samples
            if apart:
                problem.held_out = HeldOut(quantised[here:], full[here:], apart)
            result, weights = self._settle(problem, finished(index))
            _run_in_place(quantised, partial(problem.quantised, weights=weights), problem, _MORE_BITS)
            # what the caller has kept does not wait in memory for the next block's
            del block, problem, weights
            yield result
            del result

    def beside(
        self, block: LoadedBlock, full: Tensor, quantised: Tensor, held_out: int, arguments: Arguments
    ) -> BlockResult:
        """Learn a block that stands beside the model's own, for its own output.

        Args:
            block: with its full-precision weights.
            full: what enters it in the model, float32 [sequences, length, hidden]; what leaves it takes its place.
            quantised: what enters it in the quantised model, of the same shape.
            held_out: how many of the sequences, the last, nothing is learned on.
            arguments: what it is handed besides.
        """
        here = len(full) - held_out
        sensitivity = torch.ones(2, full.shape[-1])
        problem = self._problem(block, full[:here], quantised[:here], sensitivity, arguments)
        if held_out:
            problem.held_out = HeldOut(quantised[here:], full[here:], held_out)
        return self._settle(problem, None)[0]

    def _settle(self, problem: BlockProblem, result: BlockResult | None) -> tuple[BlockResult, Weights]:
        """Learn a block, or take over what was learned before; give the weights that it is run with as well.

        The targets, which are full-precision inputs until here, are replaced in place: two activation caches, whatever
        the depth.
        """
        started = time.monotonic()
        problem.report(0, 0, "running it on what it is fed")
        if result is None and self.originals:
            first = problem.targets[: self.team.count(min(self.originals, problem.samples or len(problem.targets)))]
            problem.originals = self.empty(first.shape).copy_(first)
        ordered = [name for name, grid in problem.grids.items() if grid.ordered and result is None]
        watch = InputWatch()
        with watch.watching(problem.block, ordered), counted(problem) as visits:
            _run_in_place(problem.targets, problem.forward, problem, TAKE_ANOTHER)
        visits = in_all(visits, self.team)
        problem.usual = self.team.from_first(lambda: _usual_length(problem.targets))
        if problem.held_out:
            _run_in_place(problem.held_out.targets, problem.forward, problem, TAKE_ANOTHER)
        if result is not None:
            weights = problem.block.adopt(result.tensors)
            self._round(problem, problem.block.by_module(result.ranges))
            return result, weights
        if ordered:
            self._reorder(problem, watch)
        ranges = problem.input_ranges() if self.activations.static else {}
        self._round(problem, ranges)
        if problem.block.mixtures:
            before, (learned, rare) = None, self._learn_in_parts(problem, visits)
        else:
            before = _mean_loss(problem, dequantized(problem, _round_to_nearest(problem)))
            visits = on_both_chains(problem, visits)
            # processes have the same variables in every step; what leaves is the first one's to the bit
            learned, rare = of_the_first(problem, self._learn(problem, visits)), rarely(visits)
        weights = dequantized(problem, learned)
        after = _mean_loss(problem, weights)
        if not math.isfinite(after):
            raise _overflow(problem, partial(problem.quantised, weights=weights), problem.inputs, _MORE_BITS)
        result = BlockResult(
            problem.block.index,
            leaving(problem.block, problem.grids, learned),
            before,
            after,
            time.monotonic() - started,
            ranges={problem.full_name(name): r for name, r in ranges.items()},
            rare=tuple(map(problem.full_name, rare)),
            verdict=problem.verdict,
            curve=tuple(problem.curve),
        )
        return result, weights

    def _learn(self, problem: BlockProblem, visits: Visits) -> dict[str, QuantizedTensor]:
        """Let the method learn what calibration says enough about; the rest is rounded before."""
        grids = dict(problem.grids)
        rounded = round_rare(problem, visits)
        learned = self.method.learn(problem) if problem.grids else {}
        problem.grids = grids | problem.grids
        return learned | rounded

    def _learn_in_parts(
        self, problem: BlockProblem, visits: Visits
    ) -> tuple[dict[str, QuantizedTensor], Sequence[str]]:
        """Learn a block with many experts, and say which of its matrices were rounded."""
        mixture = Mixture(problem, self.method, self.empty, visits)
        return mixture.learn(), mixture.rare

    def _reorder(self, problem: BlockProblem, watch: InputWatch) -> None:
        """Bring columns into the order that their types want; the block stays the same function."""
        statistics = watch.statistics(self.team)
        hidden = problem.inputs[:1].to(problem.device)
        for move in self.team.from_first(
            lambda: plan_moves(problem.block, problem.arguments, hidden, problem.grids, statistics, self.salient)
        ):
            move.apply(problem.block)

    def _round(self, problem: BlockProblem, ranges: Mapping[str, Range]) -> None:
        if self.activations.rounds:
            problem.rounding = ActivationRounding(self.activations, ranges, self.codebooks)

    def _problem(
        self, block: LoadedBlock, full: Tensor, quantised: Tensor, sensitivity: Tensor, arguments: Arguments
    ) -> BlockProblem:
        index, matrices = block.index, block.matrices()
        grids = MatrixGrids(self.granularity, self.codebooks, self.scaled)
        named = {name: self.types.get(f"{block.prefix}{name}.weight") for name in matrices}
        made = self.decoder.walk.state.made(index)
        if made is not None:  # what only passes through is not the block's to answer for
            sensitivity = sensitivity * made.to(sensitivity.device)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {index}".encode()).digest()[:7], "big")
        return BlockProblem(
            block=block,
            grids={
                name: grids.of_layer(f"{block.prefix}{name}.weight", matrices[name], t)
                for name, t in named.items()
                if t is not None
            },
            inputs=quantised,
            targets=full,
            sensitivity=sensitivity.to(self.decoder.device),
            arguments=arguments,
            device=self.decoder.device,
            autocast=self.autocast,
            generator=torch.Generator().manual_seed(seed),
            report=partial(self.report, index),
            team=self.team,
            importance={n: h.to(self.decoder.device) for n, h in block.by_module(self.importance).items()},
        )


def _round_to_nearest(problem: BlockProblem) -> dict[str, QuantizedTensor]:
    return {name: problem.grids[name].quantize(w) for name, w in problem.matrices().items()}


def leaving(
    block: LoadedBlock, grids: Mapping[str, Grid], learned: Mapping[str, QuantizedTensor]
) -> dict[str, QuantizedTensor]:
    """Return what leaves a block, by checkpoint name: matrices, vectors that changed, and orders of columns."""
    matrices = {f"{name}.weight": grids[name].stored(tensor) for name, tensor in learned.items()}
    vectors = {name: plain_vector(v) for name, v in block.replaced.items() if name not in matrices}
    orders = {f"{name}{ORDER}": column_order(order) for name, order in block.orders.items()}
    return {block.prefix + name: tensor for name, tensor in (matrices | vectors | orders).items()}


@torch.no_grad()
def _run_in_place(activations: Tensor, run: Callable[[Tensor], Tensor], problem: BlockProblem, advice: str) -> None:
    """Replace activations [samples, length, hidden] by what `run` makes of them, sample by sample.

    Raises:
        NotFiniteError: that is not finite; the message ends with the advice.
    """
    step = TOGETHER if problem.block.mixtures else 1
    for sample in activations.split(step) if len(activations) else ():
        out = run(sample.to(problem.device))
        if not finite(out):
            raise _overflow(problem, run, sample, advice)
        sample.copy_(out)


@torch.no_grad()
def _overflow(
    problem: BlockProblem, run: Callable[[Tensor], Tensor], activations: Tensor, advice: str
) -> NotFiniteError:
    """The error for activations [samples, length, hidden] of which `run` makes what is not finite, or too large."""

    def run_all() -> None:
        for sample in activations.split(1):
            run(sample.to(problem.device))

    where = origin(problem.block, run_all)
    return NotFiniteError(f"block {problem.block.index + 1}: its output overflows, {where}. {advice}")


@torch.no_grad()
def _usual_length(targets: Tensor) -> float | None:
    """The length of targets [samples, length, hidden] beyond which one is out of the ordinary; None if all have none.

    The first position of a sequence is weighed by what the answers feel of it, and does not count.
    """
    lengths = targets[:_REPORTED_SAMPLES, 1:].norm(dim=-1)
    median = float(lengths.median()) if lengths.numel() else 0.0
    return _ORDINARY * median if median > 0 else None


def _mean_loss(problem: BlockProblem, weights: Weights) -> float:
    samples = min(problem.samples or len(problem.inputs), _REPORTED_SAMPLES)
    some = torch.arange(problem.team.count(samples))
    losses = (len(b) * float(problem.loss(weights, b)) for b in some.split(TOGETHER if problem.block.mixtures else 1))
    total = torch.tensor(sum(losses), dtype=torch.float64)
    problem.team.add_up([total])
    return float(total) / samples
