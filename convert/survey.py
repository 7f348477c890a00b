"""What a conversion class would make of a Hugging Face folder, before anything is learned or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tesseraq_gguf.converter.graph_factors import factors_read
from tesseraq_gguf.converter.plan import Plan
from tesseraq_gguf.converter.upstream import Converter, feed
from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.weights import SafetensorsCheckpoint


class Survey:
    """What a conversion class makes of a folder when it is told to write; no weights are read.

    Args:
        job: of the worker.
        learned: whether weights are read as the learner reads them.
    """

    def __init__(self, job: dict[str, Any], learned: bool) -> None:
        converter = Converter(job, "bf16")  # a type that fits any rows: what has another has it by force
        feed(job, converter, learned)
        self._model = converter.model
        force = self._model.tensor_force_quant
        self._made: dict[str, tuple[str, bool]] = {}

        def tensor_force_quant(name: str, new_name: str, block: int | None, dimensions: int) -> Any:
            forced = force(name, new_name, block, dimensions)
            self._made[new_name] = name, not isinstance(forced, bool)
            return forced

        self._model.tensor_force_quant = tensor_force_quant
        self._model.prepare_tensors()
        self._model.prepare_metadata(vocab_only=False)

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        for part in self._model.gguf_writer.tensors:
            yield from part.items()

    def matrices(self, job: dict[str, Any], namer: Converter, plan: Plan) -> dict[str, dict[str, Any]]:
        """Return the matrices by name in the file: `FileMatrix` as JSON."""
        import gguf

        ours = namer.names_of(job["matrices"])
        there = {target for target, _ in self._tensors()}
        torn = {target for target, places in plan.by_target.items() if any(p.at is not None for _, p in places)}
        read = factors_read(Path(job["llama_cpp"]), self._model.gguf_writer.arch, there) - torn
        found = {}
        for target, info in self._tensors():
            if len(info.shape) > 1 and target in self._made:
                name, forced = self._made[target]
                names = [name for name, _ in plan.by_target.get(target, ())] or [ours.get(name, name)]
                type = gguf.GGMLQuantizationType(info.dtype).name.lower()
                columns, weights = int(info.shape[-1]), int(np.prod(info.shape, dtype=object))
                insisted = type if forced or type != "bf16" else None
                found[target] = {
                    "names": names,
                    "columns": columns,
                    "weights": weights,
                    "forced": insisted,
                    "layers": int(info.shape[0]) if len(info.shape) > 2 else 1,
                    "factor": target in read,
                }
        return found

    def rest(self, place: Path) -> int:
        """Return how many bytes a file has besides its matrices.

        Args:
            place: a file that can be written, and removed.
        """
        writer = self._model.gguf_writer
        writer.write_header_to_file(path=place)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = place.stat().st_size
        place.unlink()
        vectors = (info for target, info in self._tensors() if len(info.shape) < 2 or target not in self._made)
        return header + sum(-(-info.nbytes // _ALIGNED) * _ALIGNED for info in vectors)


_ALIGNED = 32
"""Bytes that a tensor's data are a multiple of in a file."""


def write_outline(job: dict[str, Any], path: Path) -> None:
    """Write the file that the conversion class makes, in f16, without its weights: they are a hole in it."""
    import gguf

    converter = Converter(job, "f16")
    feed(job, converter, bool(job["compared"]))
    converter.model.prepare_tensors()
    converter.model.prepare_metadata(vocab_only=False)
    writer = converter.model.gguf_writer
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    parts = [path.stat().st_size, *(info.nbytes for info in writer.tensors[0].values())]
    os.truncate(path, sum(gguf.GGUFWriter.ggml_pad(size, writer.data_alignment) for size in parts))


_COMPARED_ROWS = 16

_DEQUANTISED = 5e-3
"""Relative difference that rounding of scales and products to bfloat16 can make."""


def compare(job: dict[str, Any], converter: Converter) -> None:
    """Hold weights as the learner reads them against what llama.cpp's converter reads, before anything is learned."""
    import torch

    weights = SafetensorsCheckpoint(ModelSource(job["name"], Path(job["folder"])))
    for name, shape, theirs in converter.read(weights, job["compared"].values()):
        if not shape:  # a number
            continue
        picked = torch.linspace(0, shape[0] - 1, min(shape[0], _COMPARED_ROWS if len(shape) > 1 else shape[0])).long()
        mine, other = weights.rows(name, picked), theirs(picked)
        if name in weights.dequantized:
            tolerance = {"rtol": _DEQUANTISED, "atol": 1e-6 * float(other.abs().max())}
        else:
            tolerance = {"rtol": 0.0, "atol": 0.0}
        if mine.shape != other.shape or not torch.allclose(mine, other, **tolerance, equal_nan=True):
            raise ModelError(
                f"{job['name']}: {name} is not read as llama.cpp's converter reads it, so nothing was learned. "
                "Take the original model, in 16 or 32 bits, and please report this with the model's name"
            )
