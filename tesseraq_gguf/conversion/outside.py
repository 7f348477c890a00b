"""Embedding and output matrix in the work directory: rounded once, kept, and given to what learns above them."""

from __future__ import annotations

from torch import Tensor

from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import EMBEDDINGS, WorkDirectory
from tesseraq_gguf.learning.embeddings import dequantized, round_embeddings
from tesseraq_gguf.learning.sensitivity import Sensitivity
from tesseraq_gguf.types.quantized import QuantizedTensor


def round_outside(run: Run, model: Model, sensitivity: Sensitivity | None) -> None:
    """Round the matrices outside the blocks, as far as no earlier run has rounded them to the same types."""
    work, types = run.work, model.plan.outside
    if types_outside(work) == types or not work.writes:
        return
    kept = {name: tensor for name, tensor in _outside(work).items() if types.get(name) == tensor.type}
    new = {name: type for name, type in types.items() if name not in kept}
    if new:
        run.progress.stage(f"Rounding {' and '.join(new)}")
        kept |= round_embeddings(model.decoder, new, sensitivity, run.progress.advance, model.grids(), run.weighed)
    if kept:
        work.keep_tensors(EMBEDDINGS, kept)
    else:
        work.forget(EMBEDDINGS)


def types_outside(work: WorkDirectory) -> dict[str, str]:
    """Return the types that embedding and output matrix are kept in, by checkpoint name."""
    return {name: tensor.type for name, tensor in _outside(work).items()}


def dequantized_outside(work: WorkDirectory) -> dict[str, Tensor]:
    """Return what is kept of embedding and output matrix as float32 matrices, by checkpoint name."""
    return dequantized(_outside(work))


def _outside(work: WorkDirectory) -> dict[str, QuantizedTensor]:
    stored = work.tensors(EMBEDDINGS)
    return stored[0] if stored else {}
