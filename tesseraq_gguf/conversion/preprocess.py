"""Quantisation preprocessing as a stage: quantise once, learn on the dequantised model, go on with the merged one."""

from __future__ import annotations

from dataclasses import replace

from tesseraq_gguf.conversion.identity import schedule_of
from tesseraq_gguf.conversion.quantise import quantise
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import BEFORE, CARRIED, PREPROCESSED, WorkDirectory
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.types.quantized import QuantizedTensor


def preprocess(run: Run, model: Model) -> Model:
    """Make a model that takes quantisation better, as far as no earlier run has, where the recipe asks for it."""
    text, decoder = run.texts.preprocessing, model.decoder
    if text is None:
        return model
    merged = run.work.folder / PREPROCESSED
    with _first(run) as first:
        if not merged.is_dir():
            quantise(run.inside(first), model)
            run.progress.stage("Learning on the quantised model")
        with run.memory_explained():
            source = schedule_of(run.recipe).run(
                Quantised(decoder, first.block, autocast=run.autocast),
                text.tokens,
                run.recipe.seed,
                merged,
                run.progress.advance,
            )
    return replace(model, decoder=Decoder(source, decoder.device))


def carry(run: Run, model: Model) -> None:
    """Keep vectors that only the first quantisation changed: the model that was quantised last has them."""
    if run.texts.preprocessing is None:
        return
    first, carried = _first(run), dict[str, QuantizedTensor]()
    for index in range(len(model.decoder)):
        again = run.work.block(index, run.finishes).keys()
        carried |= {name: t for name, t in first.block(index).items() if t.plain and name not in again}
    if carried:
        run.work.keep_tensors(CARRIED, carried)


def _first(run: Run) -> WorkDirectory:
    """Where what the first quantisation makes is kept: it does not depend on the preprocessing."""
    return run.work.part(BEFORE, without="preprocess")
