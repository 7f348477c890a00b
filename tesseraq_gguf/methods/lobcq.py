"""LO-BCQ's codebook design (arXiv 2502.05376): cluster blocks of scalars by the codebook that serves them best.

A tensor is cut into block arrays of L_A neighbouring scalars, each scaled so that its largest magnitude is 31, and each
array into blocks of L_b. Every block names one of N_c codebooks of 16 numbers, or of 4 in BCQ2. Locally optimal
clustering alternates

    (i)  assign every block to the codebook with the least squared error
    (ii) refit every codebook to the blocks assigned to it: 1-D Lloyd-Max

from initial codebooks, until the mean squared error stops falling. Neither step can raise it. At the end the codewords
are rounded to integers of 6 bits; what that loses is partly won back by moving single codewords by one where the error
falls, in turns with step (i).

Initial codebooks come from N_c seed blocks, drawn at random or as k-means++ draws them; every block joins the nearest
seed, and Lloyd-Max fits a codebook to each cluster. Order inside a block means nothing to a codebook, so blocks are
sorted before distances between them are taken.

Codebooks of few levels serve best where they leave outliers out. Then arrays are scaled beyond the largest codeword,
each as far as serves it best, and the design is repeated from the codebooks that there are.

Scalars are put on a fine lattice first: then a codebook's errors are one small table, a cluster is a histogram, and a
step over millions of blocks is a few gathers. No weight is changed by any of this; `types/bcq/grid.py` encodes with
what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tesseraq_gguf.types.bcq.grid import select, tried
from tesseraq_gguf.types.levels import nearest_indices

LARGEST = 31
"""Largest magnitude of an INT6 codeword; block arrays are scaled to it."""

_FINE = 16
"""Lattice points between two integers."""

_ROUNDS = 10
"""Designs with arrays scaled anew, at most."""

_REACH = 2 * LARGEST
"""Largest magnitude of an array that is scaled beyond the largest codeword."""

_LLOYD_STEPS = 30
"""Lloyd-Max steps of a refit, at most: on a histogram they cost next to nothing."""

_PART = 16384
"""Blocks assigned at a time: what is made of them on the way stays in a processor's cache."""

_SEED_BLOCKS = 16384
"""Blocks that seeds are drawn from and first clusters are made of."""


@dataclass(frozen=True)
class Sought:
    """What a design is to find.

    Attributes:
        block: L_b, scalars that share a codebook.
        count: N_c, codebooks.
        levels: codewords of each.
        reach: largest magnitude of a scalar; what is larger counts as that.
    """

    block: int
    count: int
    levels: int = 16
    reach: int = LARGEST


@dataclass(frozen=True)
class Patience:
    """When a design has done enough.

    Attributes:
        steps: alternations of both steps, at most.
        tolerance: relative fall of the error in an alternation below which it stops.
    """

    steps: int = 100
    tolerance: float = 3e-4


@dataclass(frozen=True)
class Design:
    """What a design came to.

    Attributes:
        codebooks: INT6 codewords, int8 [N_c, levels], ascending in every row.
        errors: mean squared error after every step, of codewords that are not rounded yet; never rising.
        rounded_error: the same with INT6 codewords and blocks assigned anew.
    """

    codebooks: Tensor
    errors: tuple[float, ...]
    rounded_error: float


def block_arrays(tensor: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw block arrays of a tensor, each scaled so that its largest magnitude is 31.

    Args:
        tensor: any shape, its last dimension a multiple of `length`.
        length: L_A, scalars of a block array.
        count: arrays to draw, at most.
        generator: of the draw.

    Returns:
        float32 [arrays, length]; arrays of zeros are left out.
    """
    arrays = tensor.reshape(-1, length)
    if len(arrays) > count:
        arrays = arrays[torch.randperm(len(arrays), generator=generator)[:count].to(arrays.device)]
    arrays = arrays.float()
    largest = arrays.abs().amax(1, keepdim=True)
    return (arrays / largest * LARGEST)[largest[:, 0] > 0]


def design(
    arrays: Tensor,
    sought: Sought,
    generator: torch.Generator,
    start: str | Tensor = "k-means++",
    patience: Patience = Patience(),
) -> Design:
    """Design codebooks for scaled block arrays.

    Args:
        arrays: float32 [arrays, L_A], scaled as `block_arrays` does.
        sought: what is to be found.
        generator: of the seeds.
        start: `k-means++`, `random`, or codebooks [N_c, levels] to begin from.
        patience: when to stop.
    """
    reach = sought.reach
    blocks = on_lattice(arrays, reach).reshape(-1, sought.block)
    if isinstance(start, Tensor):
        codebooks = start.float().to(blocks.device)
    else:
        codebooks = _initial(blocks, sought, start, generator)
    errors: list[float] = []
    while len(errors) < 2 * patience.steps:
        chosen, error = assign(blocks, codebooks, reach)
        errors.append(error)
        codebooks, error = refit(blocks, chosen, codebooks, reach)
        errors.append(error)
        if len(errors) > 2 and errors[-3] - error < patience.tolerance * error:
            break
    rounded, error = _rounded(blocks, codebooks, reach, patience)
    return Design(rounded.to(torch.int8).cpu(), tuple(errors), error)


def clipped(arrays: Tensor, found: Design, block: int, tolerance: float = 1e-3) -> Design:
    """Repeat a design with arrays scaled beyond the largest codeword, each as far as serves it best.

    Args:
        arrays: float32 [arrays, L_A], scaled as `block_arrays` does.
        found: where to begin.
        block: L_b, scalars that share a codebook.
        tolerance: relative fall of the error in a round below which it stops.

    Returns:
        The best codebooks of all rounds, one of which holds a 0. Their `rounded_error` is that of the arrays as they
        were.
    """
    count, levels = found.codebooks.shape
    sought = Sought(block, count, levels, _REACH)
    best, codebooks = replace(found, rounded_error=torch.inf), found.codebooks
    for _ in range(_ROUNDS):
        # codewords are as fine as they can be where the largest is 31
        spread = codebooks.float() * (LARGEST / codebooks.abs().max())
        scaled, _ = widened(arrays, spread.round().to(torch.int8), block)
        again = design(scaled, sought, torch.Generator(), spread)
        codebooks = _with_zero(again.codebooks)
        _, error = widened(arrays, codebooks, block)
        falls = error < best.rounded_error * (1 - tolerance)
        if error < best.rounded_error:
            best = replace(again, codebooks=codebooks, rounded_error=error)
        if not falls:
            break
    return best


def _with_zero(codebooks: Tensor) -> Tensor:
    """Codebooks in which the codeword nearest to 0 is 0, so that zeros stay what they are: int8 [N_c, levels]."""
    flat = codebooks.flatten().clone()
    flat[flat.abs().argmin()] = 0
    return flat.view_as(codebooks)


def widened(arrays: Tensor, codebooks: Tensor, block: int) -> tuple[Tensor, float]:
    """Scale each array as far as serves it best: the arrays, and the mean squared error of what they were before.

    Args:
        arrays: float32 [arrays, L_A], scaled as `block_arrays` does.
        codebooks: INT6, int8 [N_c, levels].
        block: L_b, scalars that share a codebook.
    """
    near = codebooks.float().gather(1, nearest_indices(codebooks)).to(arrays.device)
    alike = torch.ones_like(arrays)
    best, factor = arrays.new_full((len(arrays), 1), torch.inf), torch.ones_like(arrays[:, :1])
    for step in tried(codebooks.shape[1]):
        wide = 2.0 ** (-step / 8)  # eight E5M3 codes double a scale
        error = select(arrays * wide, alike, near, block)[0].sum(1, keepdim=True) / wide**2
        factor, best = torch.where(error < best, wide, factor), torch.minimum(error, best)
    return arrays * factor, float(best.double().sum()) / arrays.numel()


def on_lattice(scaled: Tensor, reach: int = LARGEST) -> Tensor:
    """Nearest lattice points of scalars from -reach to reach: int32 of the same shape, counted from 0."""
    return ((scaled + reach) * _FINE).round_().to(torch.int32).clamp_(0, _count(reach) - 1)


def assign(blocks: Tensor, codebooks: Tensor, reach: int = LARGEST) -> tuple[Tensor, float]:
    """Step (i): the best codebook of each block, int64 [blocks], and the mean squared error per scalar.

    Args:
        blocks: lattice points, int32 [blocks, L_b].
        codebooks: float32 [N_c, levels], ascending in every row.
        reach: largest magnitude on the lattice.
    """
    points = _points(_count(reach), codebooks.device)
    tables = [(codebook[nearest(points, codebook)] - points).square() for codebook in codebooks]
    chosen, total = [], 0.0
    for part in blocks.split(_PART):
        flat = part.flatten()
        errors = torch.stack([table.index_select(0, flat).view(part.shape).sum(1) for table in tables])
        best, index = errors.min(0)
        chosen.append(index)
        total += float(best.double().sum())
    return torch.cat(chosen), total / blocks.numel()


def refit(blocks: Tensor, chosen: Tensor, codebooks: Tensor, reach: int = LARGEST) -> tuple[Tensor, float]:
    """Step (ii): codebooks fitted to their blocks, float32 [N_c, levels] ascending, and the mean squared error."""
    histograms = _histograms(blocks, chosen, len(codebooks), reach)
    fitted, total = [], 0.0
    for histogram, codebook in zip(histograms, codebooks, strict=True):
        levels = lloyd_max(histogram, codebook.double(), _LLOYD_STEPS)
        total += _error(histogram, levels)
        fitted.append(levels)
    return torch.stack(fitted).float(), total / blocks.numel()


def lloyd_max(histogram: Tensor, levels: Tensor, steps: int) -> Tensor:
    """Move levels, float64 [levels] ascending, to the means of what is nearest to them until they stay.

    Args:
        histogram: how many scalars stand on each lattice point, float64 [points].
        levels: where to begin.
        steps: at most.
    """
    points = _points(len(histogram), histogram.device).double()
    for _ in range(steps):
        index = nearest(points, levels)
        count = torch.zeros_like(levels).index_add_(0, index, histogram)
        total = torch.zeros_like(levels).index_add_(0, index, histogram * points)
        moved = torch.where(count > 0, total / count.clamp_min(1), levels)  # a level that serves nothing stays
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def round_levels(histogram: Tensor, levels: Tensor) -> Tensor:
    """Integers from -31 to 31 near levels, float64 ascending: rounded, then moved by one while the error falls."""
    levels = levels.round().clamp(-LARGEST, LARGEST)
    best = _error(histogram, levels)
    for _ in range(len(levels) * 2 * LARGEST):  # no level can move further
        moving = False
        for index in range(len(levels)):
            for step in (-1, 1):
                other = levels.clone()
                other[index] = (other[index] + step).clamp(-LARGEST, LARGEST)
                other = other.sort().values
                error = _error(histogram, other)
                if error < best:
                    levels, best, moving = other, error, True
        if not moving:
            break
    return levels


def _rounded(blocks: Tensor, codebooks: Tensor, reach: int, patience: Patience) -> tuple[Tensor, float]:
    """INT6 codebooks, float32 [N_c, levels] ascending, and the mean squared error with them."""
    best, least = codebooks.round().clamp(-LARGEST, LARGEST), torch.inf
    chosen, _ = assign(blocks, codebooks, reach)
    for _ in range(patience.steps):
        histograms = _histograms(blocks, chosen, len(codebooks), reach)
        fitted = [lloyd_max(h, c.double(), _LLOYD_STEPS) for h, c in zip(histograms, codebooks, strict=True)]
        codebooks = torch.stack([round_levels(h, c) for h, c in zip(histograms, fitted, strict=True)]).float()
        chosen, error = assign(blocks, codebooks, reach)
        if error < least:
            best = codebooks
        if not error < least * (1 - patience.tolerance):
            return best, min(error, least)
        least = error
    return best, least


def _histograms(blocks: Tensor, chosen: Tensor, count: int, reach: int) -> Tensor:
    """How many scalars of each codebook's blocks stand on each lattice point: float64 [N_c, points]."""
    points = _count(reach)
    offset = blocks + (chosen.to(torch.int32) * points)[:, None]
    return torch.bincount(offset.flatten(), minlength=count * points).view(-1, points).double()


def _error(histogram: Tensor, levels: Tensor) -> float:
    """Sum of the squared errors of a histogram's scalars."""
    points = _points(len(histogram), histogram.device).double()
    return float(((levels[nearest(points, levels)] - points).square() * histogram).sum())


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, int64 of the shape of `x`; between two of them the upper one."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, right=True)


def _count(reach: int) -> int:
    """Lattice points from -reach to reach."""
    return 2 * reach * _FINE + 1


def _points(count: int, device: torch.device) -> Tensor:
    """Values of so many lattice points, which stand evenly around 0, float32."""
    return torch.arange(count, device=device) / _FINE - (count - 1) // (2 * _FINE)


def _initial(blocks: Tensor, sought: Sought, start: str, generator: torch.Generator) -> Tensor:
    """First codebooks, float32 [N_c, levels]: Lloyd-Max on clusters of blocks around seeds."""
    some = blocks[torch.randperm(len(blocks), generator=generator)[:_SEED_BLOCKS].to(blocks.device)]
    ordered = some.float().sort(1).values
    levels, seeds = sought.levels, _seeds(ordered, sought.count, start, generator)
    joined = torch.cdist(ordered, seeds).argmin(1)
    shares = torch.linspace(0.5 / levels, 1 - 0.5 / levels, levels, device=blocks.device)
    points = _points(_count(sought.reach), blocks.device)
    codebooks = []
    for index in range(sought.count):
        scalars = some[joined == index].flatten()
        if scalars.numel() < levels:
            scalars = some.flatten()
        histogram = torch.bincount(scalars, minlength=len(points)).double()
        begin = points[scalars.float().quantile(shares).long()].double()
        codebooks.append(lloyd_max(histogram, begin, _LLOYD_STEPS))
    return torch.stack(codebooks).float()


def _seeds(ordered: Tensor, count: int, start: str, generator: torch.Generator) -> Tensor:
    """Seed blocks, float32 [count, L_b]."""
    if start == "random":
        return ordered[torch.randperm(len(ordered), generator=generator)[:count].to(ordered.device)]
    if start != "k-means++":
        raise ValueError(f"unknown start '{start}'. There are: k-means++, random")
    seeds = ordered[torch.randint(len(ordered), (1,), generator=generator).to(ordered.device)]
    while len(seeds) < count:
        distance = torch.cdist(ordered, seeds).amin(1).square().cpu()
        drawn = torch.multinomial(distance.clamp_min(1e-12), 1, generator=generator)
        seeds = torch.cat([seeds, ordered[drawn.to(ordered.device)]])
    return seeds
