"""What a conversion made, as its caller is told."""

from __future__ import annotations

import math
import time
from collections.abc import Set
from dataclasses import dataclass, fields
from pathlib import Path

from tesseraq_gguf.conversion.type_plan import TypePlan
from tesseraq_gguf.gguf_files.column_orders import SUFFIX
from tesseraq_gguf.gguf_files.factors import place_of
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.methods.held_out import Verdict
from tesseraq_gguf.methods.problem import Mark
from tesseraq_gguf.types.facts import WITH_FACTOR


@dataclass(frozen=True)
class BlockReport:
    """How a block went.

    Attributes:
        index: its position, from 0.
        loss_before: mean loss over some samples with weights rounded to nearest; None if not measured.
        loss_after: the same with the learned weights.
        verdict: how learning ended on the sequences held out; None where nothing was learned or none are held out.
        seconds: time it took, in whichever run.
        resumed: whether an earlier run had learned it.
        curve: how the loss went.
    """

    index: int
    loss_before: float | None
    loss_after: float | None
    verdict: Verdict | None
    seconds: float
    resumed: bool
    curve: tuple[Mark, ...]

    @property
    def kept_start(self) -> bool:
        """Whether learning ended worse than it began, and was undone."""
        return self.verdict is not None and self.verdict.kept_start


def block_report(result: BlockResult) -> BlockReport:
    """Return a result without what was learned."""
    return BlockReport(**{field.name: getattr(result, field.name) for field in fields(BlockReport)})


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made.

    Attributes:
        out: the file; of a split file the first part.
        bytes: its size, all parts together.
        bits_per_weight: of the whole file.
        block_bits_per_weight: of the matrices that were learned; 0 if none was.
        blocks: decoder blocks.
        resumed: how many of them an earlier run had finished.
        seconds: time this run took.
        fallbacks: matrices of the blocks that were not learned, with the reason.
        runs_on: where the file runs.
        divergence: mean Kullback-Leibler divergence of its answers from the original's, in nats per token, on sequences
            that nothing was learned on; None where nothing was calibrated.
        held_out: tokens of these sequences.
        kept_start: blocks in which learning ended worse than it began on these sequences, and was undone.
        learned: how each block went; empty where nothing was learned.
        parts: files that it is in.
    """

    out: Path
    bytes: int
    bits_per_weight: float
    block_bits_per_weight: float
    blocks: int
    resumed: int
    seconds: float
    fallbacks: dict[str, str]
    runs_on: str
    divergence: float | None = None
    held_out: int = 0
    kept_start: int = 0
    learned: tuple[BlockReport, ...] = ()
    parts: int = 1


def report_on(
    out: Path, started: float, learned: Set[str] = frozenset(), fallbacks: dict[str, str] | None = None
) -> ConversionReport:
    """Return what a finished file says, and what is told beside it.

    Args:
        out: the file.
        started: when the work on it began, by `time.monotonic`.
        learned: what was learned in its blocks, by name in the file.
        fallbacks: matrices of the blocks that were not learned, with the reason.
    """
    seen = inspect(out)
    grids = [t for t in seen.tensors if t.name in learned]
    weights = sum(math.prod(t.shape) for t in grids)
    factors = {place_of(t.name) for t in grids if t.type in WITH_FACTOR}
    beside = [t for t in seen.tensors if t.name.endswith(SUFFIX) or t.name in factors]
    size = sum(t.bytes for t in (*grids, *beside))
    return ConversionReport(
        out=out,
        bytes=seen.bytes,
        bits_per_weight=seen.bpw,
        block_bits_per_weight=8 * size / weights if weights else 0.0,
        blocks=len({t.name.split(".")[1] for t in seen.tensors if t.name.startswith("blk.")}),
        resumed=0,
        seconds=time.monotonic() - started,
        parts=seen.parts,
        fallbacks=fallbacks or {},
        runs_on=seen.runs_on,
    )


@dataclass(frozen=True)
class PlanReport:
    """What a conversion would make.

    Attributes:
        types: tensor types of the matrices, by name in the file.
        bytes: size of the file, but for some hundreds that say how it was made.
        bits_per_weight: of the matrices.
        type_bytes: bytes of all matrices of a type.
        divergence: what the types leave before anything is learned, in nats per token; None where no budget asked for
            it to be measured.
        fallbacks: matrices that do not get the type that was asked for, with the reason.
    """

    types: dict[str, str]
    bytes: int
    bits_per_weight: float
    type_bytes: dict[str, int]
    divergence: float | None
    fallbacks: dict[str, str]


def report_on_plan(plan: TypePlan) -> PlanReport:
    """Return what a plan comes to."""
    types, sizes = plan.in_file(), dict[str, int]()
    for target, matrix in plan.file.items():
        sizes[types[target]] = sizes.get(types[target], 0) + plan.bytes_in_file(matrix)
    weights = sum(matrix.weights for matrix in plan.file.values())
    bits = 8 * sum(sizes.values()) / weights
    return PlanReport(types, plan.file_bytes(), bits, sizes, plan.divergence, plan.fallbacks)
