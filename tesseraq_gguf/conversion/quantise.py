"""Quantisation of a model: what earlier runs have kept, then the walk over the blocks that are left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from tesseraq_gguf.compute.hidden_states import Place, choose_place
from tesseraq_gguf.compute.schemes import Range
from tesseraq_gguf.conversion.identity import SENSITIVITY_TOKENS
from tesseraq_gguf.conversion.outside import dequantized_outside, round_outside, types_outside
from tesseraq_gguf.conversion.report import BlockReport, block_report
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import work_folder
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.reconstruction import BlockResult, Reconstruction
from tesseraq_gguf.learning.rounding import round_blocks
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.methods.building import method_of
from tesseraq_gguf.methods.rare_experts import RARE
from tesseraq_gguf.methods.table import BOTH_CHAINS, start_row
from tesseraq_gguf.models.experts import expert_of

_NAMED = 8
"""Experts that are named where calibration hardly visited them; more are counted."""


@dataclass(frozen=True)
class Told:
    """What a quantisation tells besides what it leaves in the work directory.

    Attributes:
        blocks: how each block went.
        ranges: static ranges of what matrices are fed, by checkpoint name, where the scheme has them.
    """

    blocks: tuple[BlockReport, ...]
    ranges: Mapping[str, Range]


def quantise(run: Run, model: Model) -> Told:
    """Quantise the model and keep each block as soon as it is finished."""
    blocks, ranges = list[BlockReport](), dict[str, Range]()
    for result in _results(run, model):
        if not result.resumed:
            run.work.keep(result)
        blocks.append(block_report(result))
        if result.rare:
            run.progress.note(_rare(result))
        ranges |= result.ranges
        run.progress.block(result, len(model.decoder))
    return Told(tuple(blocks), ranges)


def _results(run: Run, model: Model) -> Iterator[BlockResult]:
    if run.calibration is None:
        return _rounded(run, model)
    stored = [run.work.finished(index) for index in range(len(model.decoder))]
    if None in stored or types_outside(run.work) != model.plan.outside:
        return _learned(run, model, run.calibration, finished=None not in stored)
    return iter([result for result in stored if result is not None])


def _rounded(run: Run, model: Model) -> Iterator[BlockResult]:
    """Round to nearest."""
    types, decoder = model.plan.types, model.decoder
    round_outside(run, model, None)
    run.progress.stage(f"Rounding {len(types)} matrices in {len(decoder)} blocks")
    yield from round_blocks(decoder, types, run.work.finished, model.grids(run.recipe.granularity), run.weighed)


def _learned(run: Run, model: Model, calibration: Calibration, finished: bool) -> Iterator[BlockResult]:
    """Learn; where all blocks are `finished`, only matrices outside have other types than before."""
    recipe, decoder, types = run.recipe, model.decoder, model.plan.types
    walk = walk_of(run, model, calibration)
    with run.memory_explained():
        run.progress.stage("Measuring which channels the model's answer depends on")
        few = calibration.first(SENSITIVITY_TOKENS)
        sensitivity = run.team.from_first(lambda: measure_sensitivity(decoder, few, recipe.seed, run.progress.advance))
        round_outside(run, model, sensitivity)
        if finished:
            yield from (result for index in range(len(decoder)) if (result := run.work.finished(index)))
            return
        run.progress.stage(
            f"Learning {len(types)} matrices in {len(decoder)} blocks with {recipe.method} on {decoder.device}"
        )
        yield from walk.run(
            calibration.tokens,
            sensitivity.blocks,
            run.work.finished,
            lambda: dequantized_outside(run.work),
            calibration.held_out,
        )


def walk_of(run: Run, model: Model, calibration: Calibration) -> Reconstruction:
    """Return what walks over the blocks, as the recipe says."""
    recipe, decoder = run.recipe, model.decoder
    settings = replace(recipe.method_settings(decoder.hidden_size), given=run.start.__getitem__ if run.start else None)
    return Reconstruction(
        decoder=decoder,
        method=method_of(recipe.method, recipe.start, settings),
        types=model.plan.types,
        seed=recipe.seed,
        autocast=run.autocast,
        report=lambda block, done, total, doing: run.progress.step(block, len(decoder), done, total, doing),
        granularity=recipe.granularity,
        activations=recipe.scheme,
        codebooks=model.codebooks,
        scaled=model.plan.scaled,
        salient=recipe.method_row.salient,
        team=run.team,
        empty=place_of(run, calibration).empty,
        importance=run.weighed,
        originals=BOTH_CHAINS if start_row(recipe.method_row.start or recipe.start).both_chains else 0,
    )


def place_of(run: Run, calibration: Calibration) -> Place:
    """Return where the hidden states of the two chains are kept."""
    recipe, decoder = run.recipe, run.original
    tokens = sum(run.team.share(sequences).numel() for sequences in (calibration.tokens, calibration.held_out))
    size = 2 * tokens * decoder.width * torch.float32.itemsize
    place = choose_place(size, decoder.device, recipe.memory_budget, work_folder(recipe))
    if place.name == "disk":
        run.progress.note(
            f"{size / 1e9:.1f} GB of activations are kept in {place.folder}: a larger budget would be faster"
        )
    return place


def _rare(result: BlockResult) -> str:
    """What is said of the experts of a block that calibration hardly visited, and of matrices that nothing runs."""
    numbers = [expert_of(name) for name in result.rare]
    experts = list(dict.fromkeys(str(number) for number in numbers if number is not None))
    if not experts:
        return f"block {result.index + 1}: what {', '.join(result.rare)} multiplies is not seen: rounded, not learned"
    if len(experts) > _NAMED:
        named = f"{len(experts)} experts were"
    else:
        named = f"expert {experts[0]} was" if len(experts) == 1 else f"experts {', '.join(experts)} were"
    return f"block {result.index + 1}: {named} fed fewer than {RARE} calibration tokens: rounded with care, not learned"
