"""How far the quantised model's answers are from the original's, on sequences that nothing was learned on."""

from __future__ import annotations

from collections.abc import Mapping

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.schemes import Range
from tesseraq_gguf.conversion.outside import dequantized_outside
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import FINAL
from tesseraq_gguf.evaluation.divergence import divergence
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.quantised import Quantised


def measure(run: Run, model: Model, ranges: Mapping[str, Range]) -> float | None:
    """Return the divergence in nats per token, None where nothing is calibrated.

    Args:
        run: the run.
        model: what was quantised.
        ranges: static ranges of what matrices are fed, by checkpoint name, where the scheme has them.
    """
    if run.calibration is None:
        return None
    run.progress.stage("Measuring the model's answers on sequences held out")
    quantised = quantised_of(run, model, ranges)
    with run.memory_explained():
        return divergence(run.original, quantised, run.calibration.held_out, run.progress.advance)


def quantised_of(run: Run, model: Model, ranges: Mapping[str, Range]) -> Quantised:
    """Return the model as the file will have it.

    Args:
        run: the run.
        model: what was quantised.
        ranges: static ranges of what matrices are fed, by checkpoint name, where the scheme has them.
    """
    scheme = run.recipe.scheme
    final = run.work.tensors(FINAL) if run.finishes else None

    def rounding(block: LoadedBlock) -> ActivationRounding | None:
        return ActivationRounding(scheme, block.by_module(ranges), model.codebooks) if scheme.rounds else None

    return Quantised(
        model.decoder,
        lambda index: run.work.block(index, run.finishes),
        dequantized_outside(run.work),
        final[0] if final else {},
        rounding,
        run.autocast,
    )
