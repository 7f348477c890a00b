"""A file from a GGUF file: its metadata and tensors, but for what was learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.converter.answers import Emit, note_fallbacks
from tesseraq_gguf.converter.deferred import DeferredTensor, array, packed
from tesseraq_gguf.converter.learned import LearnedTensors
from tesseraq_gguf.converter.original import Original
from tesseraq_gguf.converter.plain_types import fitting_type, is_kept, smaller_type
from tesseraq_gguf.converter.plan import Plan
from tesseraq_gguf.converter.ranges import checked_range
from tesseraq_gguf.converter.upstream import Converter
from tesseraq_gguf.errors import ConversionError
from tesseraq_gguf.gguf_files.column_orders import SUFFIX, natural, orders_of
from tesseraq_gguf.gguf_files.dequantize import FileCodebooks, dequantized, own_codebooks
from tesseraq_gguf.gguf_files.factors import Factors, factors_of, of_rows, place_of
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo, open_gguf
from tesseraq_gguf.types.facts import TENSOR_TYPES, tensor_type

_DROPPED = ("general.file_type", "general.quantization_version", "general.quantized_by", "general.alignment")
_DROPPED_PREFIXES = ("tesseraq.", "quantize.imatrix.", "split.")


_CHUNK = 1 << 23  # weights requantised at a time


def from_gguf(
    job: dict[str, Any], learned: LearnedTensors, plan: Plan | None, probe: Converter | Original | None, emit: Emit
) -> Any:
    """Take metadata and tensors over from the file that a model came as, but for what was learned."""
    import gguf

    source = open_gguf(Path(job["gguf"]))
    read = _Read(orders_of(source), own_codebooks(source), factors_of(source))
    own_factors = {place_of(weight) for weight in read.factors}
    writer = _raw_writer(source)
    vectors: dict[str, NDArray[Any]] = {}
    if plan is not None and probe is not None:
        for name in learned.vectors:
            vectors |= {target: v.float().numpy() for target, v in probe.modified(name, learned.vector(name))}
    fallbacks = []
    for tensor in source.tensors:
        if tensor.name.endswith(SUFFIX) or tensor.name in own_factors:  # written anew, or undone
            continue
        if plan is not None and tensor.name in plan.by_target:
            layers = plan.by_target[tensor.name]
            deferred, kind = packed(learned, layers), learned.types[layers[0][0]]
        elif tensor.name in vectors:
            deferred, kind = array(vectors.pop(tensor.name)), "f32"
        else:
            kind = _type_in_copy(tensor, job)
            deferred = _copied(source, tensor, kind, read)
            if kind == tensor.type and tensor.name in read.factors:
                own = array(read.factors[tensor.name])
                writer.add_tensor(place_of(tensor.name), own, raw_dtype=gguf.GGMLQuantizationType.F32)
            if plan is not None and kind != "f32":
                fallbacks.append((tensor.name, kind, tensor.shape[0]))
        shape = None if deferred.dtype == np.uint8 else tuple(reversed(tensor.shape))
        type_id = gguf.GGMLQuantizationType(tensor_type(kind).id if kind in TENSOR_TYPES else tensor.type_id)
        writer.add_tensor(tensor.name, deferred, raw_shape=shape, raw_dtype=type_id)
    if vectors:
        raise ConversionError(f"{', '.join(vectors)}: changed while learning, but not in {source.path.name}")
    if plan is not None:
        for name, order in plan.orders(learned).items():
            writer.add_tensor(name, array(order), raw_dtype=gguf.GGMLQuantizationType.I32)
        for name, factors in plan.factors(learned).items():
            writer.add_tensor(name, array(factors), raw_dtype=gguf.GGMLQuantizationType.F32)
    note_fallbacks(fallbacks, emit)
    main = learned.main_type() if learned.types else job["type"]
    writer.add_file_type(tensor_type(main).file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _raw_writer(source: GgufFile) -> Any:
    """A writer with the metadata of a file in it, byte for byte."""
    import gguf

    class RawWriter(gguf.GGUFWriter):  # type: ignore[misc,unused-ignore]
        def _pack_val(self, val: Any, *args: Any, **kwargs: Any) -> bytes:
            return bytes(val.raw if hasattr(val, "raw") else super()._pack_val(val, *args, **kwargs))

    writer = RawWriter(None, source.get("general.architecture", ""))
    for key, entry in source.entries.items():
        if key not in _DROPPED and not key.startswith(_DROPPED_PREFIXES):
            writer.kv_data[0][key] = gguf.GGUFValue(entry, gguf.GGUFValueType.UINT8)
    return writer


def _type_in_copy(tensor: TensorInfo, job: dict[str, Any]) -> str:
    """The type of a tensor that was not learned: what is asked for; its own if that is smaller, and nothing asked."""
    if is_kept(tensor):
        return tensor.type
    if asked := job["types"].get(tensor.name):
        return str(asked)
    return smaller_type(tensor, job["type"]) if job["learned"] else fitting_type(job["type"], tensor.shape[0])


@dataclass(frozen=True)
class _Read:
    """What the tensors of a file are read with: orders of columns and factors by their names, and codebooks."""

    orders: Mapping[str, NDArray[np.int32]]
    codebooks: FileCodebooks
    factors: Mapping[str, Factors]


def _copied(source: GgufFile, tensor: TensorInfo, kind: str, read: _Read) -> DeferredTensor:
    import gguf

    data = source.data(tensor)
    if kind == tensor.type:
        if tensor.type in ("f32", "f16"):  # the writer counts these in elements
            dtype = np.dtype("<f4" if tensor.type == "f32" else "<f2")
            return DeferredTensor(tuple(reversed(tensor.shape)), dtype, lambda: [data])
        return DeferredTensor((*reversed(tensor.shape[1:]), data.shape[1]), np.uint8, lambda: [data])
    want = gguf.GGMLQuantizationType(tensor_type(kind).id)
    step = max(1, _CHUNK // tensor.shape[0])
    outer = tuple(reversed(tensor.shape[1:]))

    factors = of_rows(read.factors[tensor.name], tensor.rows) if tensor.name in read.factors else None

    def weights(start: int, stop: int) -> NDArray[np.float32]:
        found = natural(dequantized(tensor, data[start:stop], read.codebooks), read.orders.get(tensor.name))
        return found if factors is None else found * factors[start:stop]

    sample = gguf.quants.quantize(weights(0, 1), want)

    def parts() -> Iterator[NDArray[Any]]:
        for start in range(0, tensor.rows, step):
            yield checked_range(tensor.name, gguf.quants.quantize(weights(start, start + step), want), want)

    return DeferredTensor((*outer, sample.shape[1]), sample.dtype, parts)
