"""The child process that writes: llama.cpp's conversion library lives here, and its `gguf` which knows our types.

The parent may have imported another `gguf` (transformers does), and the library keeps state in its modules; so it gets
a process of its own. `python -m tesseraq_gguf.converter.worker JOB.json` reads a job, answers in JSON lines on its
standard output, and leaves the library's chatter on its standard error. It ends when its standard input closes: a
parent that is gone leaves no writer behind.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.converter.original import Original
from tesseraq_gguf.converter.plain_types import KEPT, fitting_type, is_kept, smaller_type
from tesseraq_gguf.converter.row_order import Kept, Placement, Unplaceable, block_index, moved_groups, placements
from tesseraq_gguf.converter.verify import Expected, verify
from tesseraq_gguf.errors import ConversionError, ModelError, TesseraqError
from tesseraq_gguf.gguf_files.column_orders import SUFFIX, natural, orders_of, stored_orders
from tesseraq_gguf.gguf_files.dequantize import FileCodebooks, dequantized, own_codebooks
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo, open_gguf
from tesseraq_gguf.models.experts import aliases, stack_of
from tesseraq_gguf.models.pieces import Piece, Stored, stored_tensors, whole
from tesseraq_gguf.models.prequantised import scheme_of
from tesseraq_gguf.models.source import NO_TOKENIZER, ModelSource
from tesseraq_gguf.models.speculation import has_head
from tesseraq_gguf.models.weights import SafetensorsCheckpoint
from tesseraq_gguf.types.facts import (
    FORMAT_VERSION,
    ORDERED_TYPES,
    TENSOR_TYPES,
    TensorType,
    register_with_gguf,
    tensor_type,
)
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor, load_tensors

Emit = Callable[[dict[str, Any]], None]

_DROPPED = ("general.file_type", "general.quantization_version", "general.quantized_by", "general.alignment")
_DROPPED_PREFIXES = ("tesseraq.", "quantize.imatrix.", "split.")

_CHUNK = 1 << 23  # weights requantised at a time

_RUNTIME_HINT = "needs the tesseraq-gguf runtime: pip install tesseraq-gguf; tesseraq-gguf runtime build"
_STOCK_HINT = "any llama.cpp"


class DeferredTensor:
    """Stands for an array in a `GGUFWriter` until it is written; then its parts are made one by one.

    Attributes:
        shape: of the array; for quantised tensors in bytes.
        dtype: of the array.
        nbytes: size of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, parts: Callable[[], Iterable[NDArray[Any]]]) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        self._parts = parts

    def tofile(self, file: IO[bytes]) -> None:
        """Write all parts."""
        for part in self._parts():
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


class LearnedTensors:
    """The learner's tensors by checkpoint name, of which one block file is in memory at a time.

    Attributes:
        types: tensor type of every learned matrix.
        vectors: names of the vectors that changed along with matrices.
        orders: of matrices whose columns have one, int32 [columns].
    """

    def __init__(self, files: list[Path]) -> None:
        self.types: dict[str, str] = {}
        self.vectors: list[str] = []
        self.orders: dict[str, NDArray[np.int32]] = {}
        self._file: dict[str, Path] = {}
        self._loaded: tuple[Path | None, dict[str, QuantizedTensor]] = (None, {})
        for file in files:
            for name, tensor in self._load(file).items():
                if name in self._file:
                    raise ConversionError(f"{name} was learned twice: in {self._file[name]} and in {file}")
                self._file[name] = file
                if tensor.plain:
                    self.vectors.append(name)
                elif tensor.is_order:
                    self.orders[f"{name.removesuffix(ORDER)}.weight"] = tensor.arrays["values"].numpy()
                else:
                    self.types[name] = tensor.type

    def _load(self, file: Path) -> dict[str, QuantizedTensor]:
        if self._loaded[0] != file:
            try:
                self._loaded = (file, load_tensors(file)[0])
            except Exception as error:
                raise ConversionError(f"{file} cannot be read as learned tensors: {error}") from error
        return self._loaded[1]

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._load(self._file[name])[name]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return [rows, columns] of every learned matrix."""
        return {name: self.weights_shape(name) for name in self.types}

    def vector(self, name: str) -> Any:
        """Return the values of a vector, float32."""
        return self[name].arrays["values"]

    def weights_shape(self, name: str) -> tuple[int, int]:
        """Return [rows, columns] of one."""
        rows, columns = self[name].arrays["q"].shape
        return int(rows), int(columns)

    def codebooks(self) -> dict[str, list[int]]:
        """Return the codebooks that matrices bring, flat, by their key in the file."""
        found: dict[str, list[int] | None] = {}
        for name, kind in self.types.items():
            shape = tensor_type(kind).codebooks
            if shape is not None and shape.key not in found:  # all of a layout have the same
                arrays = self[name].arrays
                found[shape.key] = arrays["c"][0].tolist() if "c" in arrays else None
        return {key: codewords for key, codewords in found.items() if codewords is not None}

    def main_type(self) -> str:
        """Return the type that most matrices have."""
        return Counter(self.types.values()).most_common(1)[0][0]


class Converter:
    """One conversion class of llama.cpp for one Hugging Face folder.

    Args:
        job: names the folder.
        file_type: type of the matrices that nobody decides about; f16 for those it does not fit.
        projector: take the class that writes what images and sound go through, not the one for text.

    Attributes:
        model: the class' instance. It reads the checkpoint by itself until it is fed.
    """

    def __init__(self, job: dict[str, Any], file_type: str, projector: bool = False) -> None:
        import gguf
        from conversion import ModelBase

        self._job, folder = job, Path(job["folder"])
        source = ModelSource(job["name"], folder)
        # transformers, which reads the settings, keeps some under other names than classes know
        parameters = source.config() | ModelBase.load_hparams(folder, False)
        if not parameters.get("architectures"):
            parameters["architectures"] = source.architectures()
        load = ModelBase.load_hparams  # classes read the folder's settings again
        ModelBase.load_hparams = staticmethod(
            lambda where, *more, **named: (
                copy.deepcopy(parameters) if Path(where) == folder else load(where, *more, **named)
            )
        )
        kind = _conversion_class(job["name"], parameters, projector)
        if not projector and _leaves_head_out(job, kind):
            kind.no_mtp = True
        guess = gguf.LlamaFileType(tensor_type(file_type).file_type)
        name = job["name"].rpartition("/")[2]
        model = kind(folder, guess, Path(job["out"]), model_name=name)
        self.model: Any = getattr(model, "impl", model)  # some let another class do all of the work
        if folder.name != name:
            self.model.dir_model_card = _named_card(folder, Path(job["scratch"]) / name)
        self._names = self._checkpoint_names()

    def _checkpoint_names(self) -> dict[str, str]:
        """Names as the class calls them, also by what they are called with and without the usual prefix."""
        stored, names = self._stored_names(), dict[str, str]()
        own = dict.fromkeys([*self.model.model_tensors, *stored.values()])
        for name in own:
            names[f"model.{name}"] = name
            names[name.removeprefix("model.")] = name
        return names | stored | {name: name for name in own}

    def _stored_names(self) -> dict[str, str]:
        """What the class calls tensors of the weight files, as far as it takes notice of them.

        Matrices that are packed there have the names that they have unpacked.
        """
        folder = Path(self._job["folder"])
        if self._job["gguf"] or not any(folder.glob("model*.safetensors")):
            return {}
        source = ModelSource(self._job["name"], folder)
        with contextlib.suppress(ModelError):  # the class may read it nevertheless
            if scheme_of(source) is not None:
                return self._owned(SafetensorsCheckpoint(source))
        called = {name: self._filtered(name) for name in source.weight_map()}
        return {name: own for name, own in called.items() if own is not None and own in self.model.model_tensors}

    def _owned(self, weights: SafetensorsCheckpoint) -> dict[str, str]:
        """What the class calls the tensors of a checkpoint of which it takes notice, by stored name."""
        tensors, found = self.model.model_tensors, {}
        for name in weights:
            own = self._filtered(name)
            codes = self._filtered(weights.parts(name)[0]) if name in weights.dequantized else own
            if own is not None and codes in tensors:
                found[name] = own
        return found

    def name(self, checkpoint_name: str) -> str:
        """Return what the class calls a tensor."""
        found = next((self._names[alias] for alias in aliases(checkpoint_name) if alias in self._names), None)
        if found is None:
            raise Unplaceable("llama.cpp's converter does not know it")
        return found

    def names_of(self, checkpoint_names: Iterable[str]) -> dict[str, str]:
        """Return checkpoint names by what the class calls them; those that it does not know are left out."""
        found = {}
        for name in checkpoint_names:
            with contextlib.suppress(Unplaceable):
                found[self.name(name)] = name
        return found

    def feed(self, weights: SafetensorsCheckpoint) -> None:
        """Give the class all weights as the learner reads them, dequantised, in place of what it would read."""
        from conversion.base import LazyTorchTensor

        model, fed = self.model, {}
        for name, own in self._owned(weights).items():
            meta = LazyTorchTensor.meta_with_dtype_and_shape(weights.dtype(name), weights.shape(name))
            fed[own] = partial(LazyTorchTensor, meta=meta, args=(name,), func=weights.read)
        for name in weights.hidden:
            model.model_tensors.pop(self._filtered(name), None)
        model.model_tensors.update(fed)
        model.hparams.pop("quantization_config", None)

        def dequant_model() -> None:
            """It is done: nothing is repacked, and the file's type is the one that is asked for."""
            model._is_nvfp4 = model._is_mxfp4 = False

        model.dequant_model = dequant_model

    def reads_its_own(self) -> bool:
        """Whether the class has a way of its own to read quantised checkpoints, for its architecture alone."""
        from conversion import ModelBase

        return type(self.model).dequant_model is not ModelBase.dequant_model

    def read(
        self, weights: SafetensorsCheckpoint, names: Iterable[str]
    ) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
        """Give the tensors of the checkpoint as llama.cpp reads them, where it knows how.

        Args:
            weights: the same checkpoint.
            names: which tensors, by stored name.

        Yields:
            The name, the shape, and what gives rows of it, float32.
        """
        from conversion.base import LazyTorchTensor

        tensors = self.model.model_tensors
        known = bool(not weights.dequantized or self._dequantized(weights))
        for name in names:
            own = self._filtered(name)
            if own in tensors and (known or name not in weights.dequantized):
                tensor = tensors[own]()

                def part(rows: Any, tensor: Any = tensor) -> Any:
                    return LazyTorchTensor.to_eager(tensor[rows]).float()

                yield name, tuple(tensor.shape), part

    def _dequantized(self, weights: SafetensorsCheckpoint) -> bool:
        """Let the class dequantise its tensors; tell whether it knew how."""
        try:
            self.model.dequant_model()
        except Exception:  # assertions, missing keys, whatever a scheme that it does not know leads it to
            return False
        scales = {part for name in weights.dequantized for part in weights.parts(name) if part != name}
        return not any(self._filtered(name) in self.model.model_tensors for name in scales)

    def _filtered(self, name: str) -> str | None:
        """What the class calls a tensor of the files; None if it takes no notice of it."""
        item = self.model.filter_tensors((name, None))
        return item[0] if item else None

    def placements(self, tensors: Sequence[Stored]) -> dict[str, list[Placement]]:
        """Find where the rows of matrices go, by checkpoint name.

        Args:
            tensors: what the matrices are stored in, by checkpoint name.

        Raises:
            Unplaceable: the class does more than to move rows.
        """
        return placements(self.model.modify_tensors, [replace(t, name=self.name(t.name)) for t in tensors])

    def modified(self, name: str, weights: Any) -> list[tuple[str, Any]]:
        """Return what the class makes of weights."""
        own = self.name(name)
        return list(self.model.modify_tensors(weights, own, block_index(own)))


def _leaves_head_out(job: dict[str, Any], kind: Any) -> bool:
    """Whether a class is to write no head for speculation: it was asked for, or the files have lost it.

    Raises:
        ModelError: the class always writes it.
    """
    folder = Path(job["folder"])
    safetensors = any(folder.glob("model*.safetensors"))
    there = not safetensors or has_head(ModelSource(job["name"], folder))
    if there and not job["keeps_head"] and not kind.supports_mtp_export and not getattr(kind, "skip_mtp", False):
        raise ModelError(
            f"{job['name']}: llama.cpp's converter cannot leave the head for speculation of this model out"
        )
    return bool(kind.supports_mtp_export and not (there and job["keeps_head"]))


def _conversion_class(model: str, parameters: dict[str, Any], projector: bool) -> Any:
    """The class of llama.cpp that writes the text part of a model, or its projector."""
    from conversion import ModelType, get_model_architecture, get_model_class

    wanted = ModelType.MMPROJ if projector else ModelType.TEXT
    names = [get_model_architecture(parameters, wanted), *parameters["architectures"]]
    if not projector:  # the class that its language model would have on its own
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        inside = parameters.get("text_config") or {}
        names.append(str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(inside.get("model_type")))))
    for name in names:
        with contextlib.suppress(NotImplementedError):
            return get_model_class(name, mmproj=projector)
    if projector:
        raise ModelError(f"{model}: llama.cpp writes no projector for the architecture {names[0]}")
    raise ModelError(f"{model}: llama.cpp does not know the architecture {names[0]}")


def _named_card(folder: Path, card: Path) -> Path:
    """Copy what a model says of itself into a folder of its name: a hub's snapshot is called by its commit.

    The converter reads base name, size and fine-tune out of the folder's name.
    """
    card.mkdir(exist_ok=True)
    for file in ("README.md", "config.json", "generation_config.json"):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, card / file)
    return card


_GROUPS = tuple(1 << n for n in range(10, -1, -1))
"""Columns that may stay together; blocks of tensor types have powers of two."""


class Plan:
    """Where the learned matrices go.

    Attributes:
        by_matrix: placements by checkpoint name.
        by_target: checkpoint names and placements by name in the file: one, or the layers of a stack in their order.
        dropped: learned matrices that cannot be placed, with the reason.
    """

    def __init__(
        self,
        converter: Converter | Original,
        shapes: dict[str, tuple[int, int]],
        pieces: dict[str, Piece] | None = None,
    ) -> None:
        self.by_matrix: dict[str, list[Placement]] = {}
        self.by_target: dict[str, list[tuple[str, Placement]]] = {}
        self.dropped: dict[str, str] = {}
        places = {name: (pieces or {}).get(name) or whole(name, shape) for name, shape in shapes.items()}
        self._tensors = list(stored_tensors(places, shapes))
        kept: dict[int | None, list[Stored]] = {}
        for family in _families(self._tensors):
            try:
                self._place(converter, family)
            except Kept:
                kept.setdefault(block_index(family[0].name), []).extend(family)
        for tensors in kept.values():
            with contextlib.suppress(Kept):
                self._place(converter, tensors)
        for layers in self.by_target.values():
            layers.sort(key=lambda layer: layer[1].layer or 0)

    def _place(self, converter: Converter | Original, tensors: list[Stored]) -> None:
        """Place the matrices in tensors that a converter must see together, or drop them.

        Raises:
            Kept: it must see others as well.
        """
        names = [name for tensor in tensors for name in tensor.pieces]
        try:
            found = converter.placements(tensors)
        except Unplaceable as reason:
            self.dropped |= dict.fromkeys(names, str(reason))
            if isinstance(reason, Kept):
                raise
            return
        for name, places in found.items():
            self.dropped.pop(name, None)
            self.by_matrix[name] = places
            for place in places:
                self.by_target.setdefault(place.name, []).append((name, place))

    def groups(self) -> dict[str, int]:
        """Return how many columns stay together in matrices whose columns are moved, by checkpoint name."""
        found = dict[str, int]()
        for name, places in self.by_matrix.items():
            for columns in (place.columns for place in places if place.columns is not None):
                sizes = (size for size in _GROUPS if moved_groups(columns, size) is not None)
                found[name] = min(next(sizes), found.get(name, _GROUPS[0]))
        return found

    def tensors(self) -> Iterator[Stored]:
        """Yield the tensors of the checkpoint that learned matrices are written from."""
        return (tensor for tensor in self._tensors if tensor.pieces.keys() <= self.by_matrix.keys())

    def orders(self, learned: LearnedTensors) -> dict[str, NDArray[np.int32]]:
        """Return the orders of columns to write, by name in the file."""
        wanted = {
            target: learned.orders.get(name)
            for target, ((name, _), *_) in self.by_target.items()
            if learned.types[name] in ORDERED_TYPES
        }
        return stored_orders(wanted)


def _families(tensors: Iterable[Stored]) -> list[list[Stored]]:
    """Tensors that a converter must see together: the experts of a block; each other tensor is on its own."""
    families: dict[str, list[Stored]] = {}
    for tensor in tensors:
        stack = stack_of(tensor.name)
        families.setdefault(stack.partition("*")[0] if stack else tensor.name, []).append(tensor)
    return list(families.values())


def _pieces(job: dict[str, Any]) -> dict[str, Piece]:
    return {name: Piece(**piece | {"shape": tuple(piece["shape"])}) for name, piece in job["pieces"].items()}


def check(job: dict[str, Any], emit: Emit) -> None:
    """Answer which matrices cannot be placed, and fail where writing would fail: unknown architecture or tokenizer."""
    converter = Converter(job, "f16")
    shapes = {name: (rows, columns) for name, (rows, columns) in job["matrices"].items()}
    plan = Plan(converter, shapes, _pieces(job))
    converter.model.prepare_metadata(vocab_only=False)
    if job["compared"]:
        _compare(job, Converter(job, "f16"))
    file = _matrices_of_folder(job, converter, plan)
    emit({"event": "done", "dropped": plan.dropped, "file": file, "groups": plan.groups()})


def _matrices_of_folder(job: dict[str, Any], namer: Converter, plan: Plan) -> dict[str, dict[str, Any]]:
    """The matrices that the conversion class makes, by name in the file: `FileMatrix` as JSON. No weights are read."""
    import gguf

    converter = Converter(job, "bf16")  # a type that fits any rows: what has another has it by force
    _feed(job, converter, bool(job["compared"]))
    survey = converter.model
    force, made = survey.tensor_force_quant, {}

    def tensor_force_quant(name: str, new_name: str, block: int | None, dimensions: int) -> Any:
        forced = force(name, new_name, block, dimensions)
        made[new_name] = name, not isinstance(forced, bool)
        return forced

    survey.tensor_force_quant = tensor_force_quant
    survey.prepare_tensors()
    ours = namer.names_of(job["matrices"])
    found = {}
    for target, info in ((target, info) for part in survey.gguf_writer.tensors for target, info in part.items()):
        if len(info.shape) > 1 and target in made:
            name, forced = made[target]
            names = [name for name, _ in plan.by_target.get(target, ())] or [ours.get(name, name)]
            type = gguf.GGMLQuantizationType(info.dtype).name.lower()
            columns, weights = int(info.shape[-1]), int(np.prod(info.shape, dtype=object))
            insisted = type if forced or type != "bf16" else None
            found[target] = {"names": names, "columns": columns, "weights": weights, "forced": insisted}
    return found


_COMPARED_ROWS = 16

_DEQUANTISED = 5e-3
"""Relative difference that rounding of scales and products to bfloat16 can make."""


def _compare(job: dict[str, Any], converter: Converter) -> None:
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


def write(job: dict[str, Any], emit: Emit) -> None:
    """Write the file of a job and verify it."""
    learned = LearnedTensors([Path(f) for f in job["learned"]])
    plan = probe = None
    if learned.types:
        probe = Converter(job, "f32") if job["gguf"] is None else Original(Path(job["gguf"]))
        plan = Plan(probe, learned.shapes(), _pieces(job))
        for name, reason in plan.dropped.items():
            emit({"event": "note", "text": f"{name}: what was learned is not used, because {reason}"})
        if not plan.by_matrix:
            raise ConversionError(
                f"{job['name']}: none of the learned matrices can be written, the first because {reason}"
            )
    if job["gguf"] is None:
        writer = _from_folder(job, learned, plan, emit)
    else:
        writer = _from_gguf(job, learned, plan, probe, emit)
    _add_metadata(writer, job, learned)
    _write_file(writer, Path(job["out"]), emit)
    emit({"event": "stage", "text": "verifying"})
    compared = 0
    if plan is not None and probe is not None:
        compared = verify(Path(job["out"]), _expected(probe, plan, learned))
    else:
        open_gguf(Path(job["out"]))
    emit({"event": "done", "verified": compared})


def _expected(probe: Converter | Original, plan: Plan, learned: LearnedTensors) -> Iterator[Expected]:
    """The learner's weights, dequantised by its grid and moved by the converter itself, not by our row maps.

    Of a model that came as a GGUF file they are moved back to where its rows were read from.
    """
    from tesseraq_gguf.types.grids import grid_of

    def weights(name: str) -> Any:
        return grid_of(learned.types[name]).dequantize(learned[name])

    for tensor in plan.tensors():
        # stacks come with the last of a block's experts, all at once
        for target, moved in probe.modified(tensor.name, tensor.filled(weights)):
            first = plan.by_target[target][0][0]
            yield Expected(target, learned.types[first], moved.numpy(), learned.orders.get(first))
    for name, order in plan.orders(learned).items():
        yield Expected(name, "i32", order)
    for name in learned.vectors:
        for target, moved in probe.modified(name, learned.vector(name)):
            yield Expected(target, "f32", moved.float().numpy())


def _packed(learned: LearnedTensors, places: list[tuple[str, Placement]]) -> DeferredTensor:
    """A tensor made of one matrix or of parts of several, layer by layer if it is a stack."""
    first, place = places[0]
    kind = tensor_type(learned.types[first])
    columns = learned.weights_shape(first)[1]
    layers = [list(layer) for _, layer in groupby(places, lambda each: each[1].layer)]
    rows = sum(learned.weights_shape(name)[0] if p.rows is None else len(p.rows) for name, p in layers[0])
    shape = rows, columns // kind.block_weights * kind.block_bytes

    def packed(name: str, place: Placement) -> NDArray[np.uint8]:
        arrays = {key: place.take(a.numpy()) for key, a in learned[name].arrays.items()}
        return _blocks_moved(packer_of(kind.name).pack(arrays), place, kind)

    def parts() -> Iterator[NDArray[Any]]:
        for layer in layers:
            whole = np.empty(shape, np.uint8)
            for name, place in layer:
                whole[slice(None) if place.at is None else place.at] = packed(name, place)
            yield whole

    return DeferredTensor(shape if place.layer is None else (len(layers), *shape), np.uint8, parts)


def _blocks_moved(packed: NDArray[np.uint8], place: Placement, kind: TensorType) -> NDArray[np.uint8]:
    """Packed rows whose blocks are in the order of the file."""
    if place.columns is None:
        return packed
    order = moved_groups(place.columns, kind.block_weights)
    if order is None:
        raise ConversionError(f"{place.name}: the converter moves columns, and tears blocks of {kind.name} apart")
    return packed.reshape(len(packed), -1, kind.block_bytes)[:, order].reshape(packed.shape)


def _from_folder(job: dict[str, Any], learned: LearnedTensors, plan: Plan | None, emit: Emit) -> Any:
    """Let the conversion class do all of it, except for what was learned and the types of the rest."""
    import gguf

    converter = Converter(job, job["type"])
    model = converter.model
    _feed(job, converter, bool(learned.types))
    modify, force = model.modify_tensors, model.tensor_force_quant
    own = {converter.name(t.name): t for t in plan.tensors()} if plan else {}
    added = set[str]()
    changed = {converter.name(name): name for name in learned.vectors}

    def modify_tensors(data: Any, name: str, block: int | None) -> Any:
        if name in changed:
            return modify(learned.vector(changed[name]), name, block)
        if plan is None or name not in own:
            return modify(data, name, block)
        targets = dict.fromkeys(place.name for inside in own[name].pieces for place in plan.by_matrix[inside])
        for target in targets:
            if target not in added:  # a stack is added with its first layer
                places = plan.by_target[target]
                kind = gguf.GGMLQuantizationType(tensor_type(learned.types[places[0][0]]).id)
                model.gguf_writer.add_tensor(target, _packed(learned, places), raw_dtype=kind)
                added.add(target)
        return []

    def tensor_force_quant(name: str, new_name: str, block: int | None, dimensions: int) -> Any:
        forced, asked = force(name, new_name, block, dimensions), job["types"].get(new_name)
        return gguf.GGMLQuantizationType(tensor_type(asked).id) if isinstance(forced, bool) and asked else forced

    model.modify_tensors, model.tensor_force_quant = modify_tensors, tensor_force_quant
    _keep_within_range(model.gguf_writer)
    model.prepare_tensors()
    if plan is not None:
        for name, order in plan.orders(learned).items():
            model.gguf_writer.add_tensor(name, _array(order), raw_dtype=gguf.GGMLQuantizationType.I32)
        model.ftype = gguf.LlamaFileType(tensor_type(learned.main_type()).file_type)
        written = [
            (name, gguf.GGMLQuantizationType(info.dtype).name.lower(), int(info.shape[-1]))
            for name, info in model.gguf_writer.tensors[0].items()
            if len(info.shape) > 1 and name not in plan.by_target and not any(k in name for k in KEPT)
        ]
        _note_fallbacks(written, emit)
    model.prepare_metadata(vocab_only=False)
    return model.gguf_writer


def check_projector(job: dict[str, Any], emit: Emit) -> None:
    """Fail where writing the projector would fail: llama.cpp has no class for it, or something of it is missing."""
    converter = Converter(job, job["type"], projector=True)
    converter.model.prepare_metadata(vocab_only=False)
    emit({"event": "done"})


def project(job: dict[str, Any], emit: Emit) -> None:
    """Write what images and sound go through on their way to the model, all of it as llama.cpp's converter does."""
    converter = Converter(job, job["type"], projector=True)
    _feed(job, converter, learned=False)
    _keep_within_range(converter.model.gguf_writer)
    converter.model.prepare_tensors()
    converter.model.prepare_metadata(vocab_only=False)
    _write_file(converter.model.gguf_writer, Path(job["out"]), emit)
    open_gguf(Path(job["out"]))
    emit({"event": "done", "verified": 0})


def _feed(job: dict[str, Any], converter: Converter, learned: bool) -> None:
    """Give a converter the weights, unless nothing is learned and it alone can read them."""
    safetensors = any(Path(job["folder"]).glob("model*.safetensors"))
    if learned or (safetensors and not converter.reads_its_own()):
        converter.feed(SafetensorsCheckpoint(ModelSource(job["name"], Path(job["folder"]))))


def _keep_within_range(writer: Any) -> None:
    """Have a writer refuse numbers that their tensor's type cannot hold."""
    add_tensor = writer.add_tensor
    writer.add_tensor = lambda name, tensor, raw_shape=None, raw_dtype=None: add_tensor(
        name, _within_range(name, tensor, raw_dtype), raw_shape, raw_dtype
    )


def _within_range(name: str, tensor: Any, kind: Any) -> Any:
    """A tensor about to be written that raises where a type cannot hold its numbers."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if kind not in (kinds.F16, kinds.Q8_0):
        return tensor
    if isinstance(tensor, gguf.LazyNumpyTensor):
        return gguf.LazyNumpyTensor._wrap_fn(lambda data: _checked_range(name, data, kind), meta_noop=True)(tensor)
    return _checked_range(name, tensor, kind) if isinstance(tensor, np.ndarray) else tensor


def _checked_range(name: str, data: NDArray[Any], kind: Any) -> NDArray[Any]:
    """Packed weights of a tensor, once it is known that the type could hold them.

    Raises:
        ConversionError: it could not.
    """
    import gguf

    if kind == gguf.GGMLQuantizationType.Q8_0:  # the scale of a block stands first in it
        numbers = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])[:, :2].copy().view(np.float16)
    else:
        numbers = data
    if not np.isfinite(numbers).all():
        raise ConversionError(
            f"{name} has weights beyond the range of {kind.name.lower()}, or such as are no numbers: "
            "convert with a type of more range, such as bf16"
        )
    return data


def _from_gguf(
    job: dict[str, Any], learned: LearnedTensors, plan: Plan | None, probe: Converter | Original | None, emit: Emit
) -> Any:
    """Take metadata and tensors over from the file that a model came as, but for what was learned."""
    import gguf

    source = open_gguf(Path(job["gguf"]))
    orders, codebooks = orders_of(source), own_codebooks(source)
    writer = _raw_writer(source)
    vectors: dict[str, NDArray[Any]] = {}
    if plan is not None and probe is not None:
        for name in learned.vectors:
            vectors |= {target: v.float().numpy() for target, v in probe.modified(name, learned.vector(name))}
    fallbacks = []
    for tensor in source.tensors:
        if tensor.name.endswith(SUFFIX):  # written anew, or undone
            continue
        if plan is not None and tensor.name in plan.by_target:
            layers = plan.by_target[tensor.name]
            deferred, kind = _packed(learned, layers), learned.types[layers[0][0]]
        elif tensor.name in vectors:
            deferred, kind = _array(vectors.pop(tensor.name)), "f32"
        else:
            kind = _type_in_copy(tensor, job)
            deferred = _copied(source, tensor, kind, orders.get(tensor.name), codebooks)
            if plan is not None and kind != "f32":
                fallbacks.append((tensor.name, kind, tensor.shape[0]))
        shape = None if deferred.dtype == np.uint8 else tuple(reversed(tensor.shape))
        type_id = gguf.GGMLQuantizationType(tensor_type(kind).id if kind in TENSOR_TYPES else tensor.type_id)
        writer.add_tensor(tensor.name, deferred, raw_shape=shape, raw_dtype=type_id)
    if vectors:
        raise ConversionError(f"{', '.join(vectors)}: changed while learning, but not in {source.path.name}")
    if plan is not None:
        for name, order in plan.orders(learned).items():
            writer.add_tensor(name, _array(order), raw_dtype=gguf.GGMLQuantizationType.I32)
    _note_fallbacks(fallbacks, emit)
    main = learned.main_type() if learned.types else job["type"]
    writer.add_file_type(tensor_type(main).file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _array(values: NDArray[Any]) -> DeferredTensor:
    """A vector, float32 or int32."""
    return DeferredTensor(values.shape, values.dtype.newbyteorder("<"), lambda: [values])


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


def _copied(
    source: GgufFile,
    tensor: TensorInfo,
    kind: str,
    order: NDArray[np.int32] | None,
    codebooks: FileCodebooks,
) -> DeferredTensor:
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

    def weights(start: int, stop: int) -> NDArray[np.float32]:
        return natural(dequantized(tensor, data[start:stop], codebooks), order)

    sample = gguf.quants.quantize(weights(0, 1), want)

    def parts() -> Iterator[NDArray[Any]]:
        for start in range(0, tensor.rows, step):
            yield _checked_range(tensor.name, gguf.quants.quantize(weights(start, start + step), want), want)

    return DeferredTensor((*outer, sample.shape[1]), sample.dtype, parts)


def _note_fallbacks(written: list[tuple[str, str, int]], emit: Emit) -> None:
    """Say which matrices of the blocks were not learned: one line for each kind of matrix."""
    groups: Counter[tuple[str, str, int]] = Counter()
    for name, kind, columns in written:
        if name.startswith("blk."):
            groups[name.split(".", 2)[2].removesuffix(".weight"), kind, columns] += 1
    for (matrix, kind, columns), count in groups.items():
        blocks = "1 block" if count == 1 else f"{count} blocks"
        emit({"event": "note", "text": f"{matrix} of {blocks}, in rows of {columns} weights, is {kind}: not learned"})


def _add_metadata(writer: Any, job: dict[str, Any], learned: LearnedTensors) -> None:
    import gguf

    values: dict[str, Any] = {}
    if learned.types:
        custom = any(tensor_type(t).custom for t in learned.types.values())
        values["tesseraq.format_version"] = FORMAT_VERSION
        values["tesseraq.runtime"] = _RUNTIME_HINT if custom else _STOCK_HINT
    for key, codewords in learned.codebooks().items():
        writer.add_key_value(key, codewords, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT8)
    for key, value in (values | job["metadata"]).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


class _Counted:
    """A tensor of the writer that tells how far writing is."""

    def __init__(self, tensor: Any, told: Callable[[int], None]) -> None:
        self._tensor, self._told = tensor, told
        self.nbytes = tensor.nbytes

    def tofile(self, file: IO[bytes]) -> None:
        self._tensor.tofile(file)
        self._told(self.nbytes)


def _write_file(writer: Any, out: Path, emit: Emit) -> None:
    infos = writer.tensors[0]
    total = sum(info.nbytes for info in infos.values())
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise ConversionError(
            f"the file needs {total:,} bytes, and {free:,} are free in {out.parent}: make room, or write elsewhere"
        )
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        emit({"event": "progress", "done": done, "total": total})

    for info in infos.values():
        info.tensor = _Counted(info.tensor, told)
    try:
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
    finally:
        with contextlib.suppress(OSError):  # a full disk fails again here; the first failure is the one to tell
            writer.close()


_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it grows too large"}


def _explain(error: BaseException, job: dict[str, Any]) -> tuple[str, str] | None:
    """Return error class and one line for what a job raised, None if it is not understood."""
    if isinstance(error, TesseraqError):
        return type(error).__name__, str(error)
    if isinstance(error, FileNotFoundError) and error.errno is None:  # llama.cpp's own
        missing = str(error).strip().splitlines()[0].removeprefix("File not found: ")
        return "ModelError", f"{job['name']}: llama.cpp's converter needs a file that is not there: {missing}"
    if isinstance(error, OSError):
        # numpy drops the number of the error of a short write
        full = _FULL.get(error.errno or 0) or (_FULL[errno.ENOSPC] if "requested and" in str(error) else None)
        return "ConversionError", f"the file cannot be written: {full or error.strerror or error}"
    if isinstance(error, MemoryError):
        return "ConversionError", "not enough memory to write the file"
    read_folder = None if job["gguf"] else ModelSource(job["name"], Path(job["folder"]))
    if "tokenizer" in str(error) and read_folder and not read_folder.has_tokenizer():
        return "ModelError", f"{job['name']}: {NO_TOKENIZER}"
    if isinstance(error, AssertionError) and not str(error):
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        if "vocab_size" in line:
            return "ModelError", (
                f"{job['name']}: its tokenizer has more tokens than its embedding has rows: resize the embedding "
                "(resize_token_embeddings of transformers) and save the model again, or take the original tokenizer"
            )
    if "BPE pre-tokenizer was not recognized" in str(error):
        return (
            "ModelError",
            f"{job['name']}: llama.cpp does not know this model's tokenizer (get_vocab_base_pre refuses it)",
        )
    return None


def _refusal(error: BaseException, job: dict[str, Any]) -> tuple[str, str]:
    """Return error class and one line for what the library raised and nobody understands."""
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, AssertionError) and not reason:
        reason = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return (
        "ConversionError",
        f"{job['name']}: llama.cpp's converter refuses the model: {type(error).__name__}: {reason}",
    )


def _own_output() -> Emit:
    """Keep standard output for the answers; what the library prints there goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    return emit


def _end_with_parent() -> None:
    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: the interpreter cannot end while a thread has its lock
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Do one job; see the module's docstring."""
    emit = _own_output()
    _end_with_parent()
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    sys.path[:0] = [job["gguf_py"], job["llama_cpp"]]
    try:
        import gguf
        import torch

        register_with_gguf(gguf)
        with torch.inference_mode():
            {"write": write, "check": check, "project": project, "check_projector": check_projector}[job["task"]](
                job, emit
            )
    except Exception as error:
        explained = _explain(error, job)
        if explained is None:
            traceback.print_exc()
        kind, text = explained or _refusal(error, job)
        # users see the log where it says more than the line does
        emit({"event": "error", "kind": kind, "text": text, "log": explained is None})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
