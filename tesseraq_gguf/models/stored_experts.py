"""Where a checkpoint keeps the matrices of experts: each on its own, or as part of a layer of a stack.

transformers says how it makes the stacks of a module of what is stored, as a list of operations (merge a list,
concatenate, transpose, interleave). They are run here on numbers that tell where they come from, as large as it takes
to see, for one expert: so for each row of an expert's matrix it is known which row or column of which tensor it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.checkpoint import Checkpoint
from tesseraq_gguf.models.experts import Form, Slot, converters_of

_SMALLEST = 4
"""Rows and columns that a probe has at least."""


@dataclass(frozen=True)
class Place:
    """Where a matrix, or a vector, of an expert is stored.

    Attributes:
        name: of the tensor in the files.
        layer: which layer of it, if it is a stack; None if the tensor is the expert's own.
        first: the matrix's first row in the layer.
        step: from one of its rows to the next.
        shape: its own.
        transposed: whether rows of the matrix are columns of the layer.
    """

    name: str
    layer: int | None
    first: int
    step: int
    shape: tuple[int, ...]
    transposed: bool

    def read(self, weights: Checkpoint) -> Tensor:
        """Read it, float32 on the CPU, and of a stack no more than a layer."""
        if self.layer is None:
            layer = weights.read(self.name).float()
        else:
            layer = weights.rows(self.name, torch.tensor([self.layer]))[0]
        rows = layer.T if self.transposed else layer
        return rows[self.first :: self.step][: self.shape[0]].contiguous()


class StoredExperts:
    """The experts of a model in a checkpoint.

    Args:
        model: the transformers model, its experts in stacks, parameters on the meta device.
        forms: of its modules of experts, by their names in the model.
        weights: the checkpoint.
    """

    def __init__(self, model: Any, forms: Mapping[str, Form], weights: Checkpoint) -> None:
        self._model, self._forms, self._weights = model, forms, weights
        self._probed: dict[Any, list[tuple[int, int, int, bool]]] = {}
        self._places: dict[str, dict[str, Place]] = {}

    def place(self, name: str) -> Place | None:
        """Return where a parameter of an expert is; None of any other parameter, and where nothing is stored for it."""
        module = next((m for m in _parents(name) if m in self._forms), None)
        if module is None:
            return None
        if module not in self._places:
            self._places = {module: dict(self._within(module))}  # of one block at a time: there may be many thousands
        return self._places[module].get(name.removeprefix(f"{module}."))

    def renamed(self, name: str) -> str | None:
        """Return what the files call a parameter that transformers renames when it loads it."""
        return self._names[0].get(name)

    @cached_property
    def _names(self) -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
        """Stored names by parameter, and by parameter and the pattern that a converter collects them by."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

        renamings = [r for r in get_model_conversion_mapping(self._model) if isinstance(r, WeightRenaming)]
        converters, known = converters_of(self._model), self._model.state_dict()
        base = self._model.base_model_prefix
        plain: dict[str, str] = {}
        collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for stored in sorted(self._weights, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, base, known)
            if name not in known and stored in known:
                name, pattern = stored, None
            if pattern is None:
                plain[name] = stored
            else:
                collected[name][pattern].append(stored)
        return plain, collected

    def _within(self, module: str) -> Iterator[tuple[str, Place]]:
        """Yield the places of a module's experts by parameter name within it."""
        form = self._forms[module]
        owner = self._model.get_submodule(module)
        for slot in form.slots:
            for expert, place in enumerate(self._of_stack(f"{module}.{slot.stack}", slot, form.count)):
                yield f"{expert}.{slot.name}.weight", place
        for bias in form.biases.values():
            stored, width = self._names[0].get(f"{module}.{bias}"), owner.get_parameter(bias).shape[1]
            if stored:
                for expert in range(form.count):
                    yield f"{expert}.{bias}", Place(stored, expert, 0, 1, (width,), False)

    def _of_stack(self, stack: str, slot: Slot, experts: int) -> Iterator[Place]:
        plain, collected = self._names
        if stack in plain:
            for expert in range(experts):
                yield Place(plain[stack], expert, slot.first, slot.step, slot.shape, slot.transposed)
        elif stack in collected:
            sources = collected[stack]
            converter = next(c for c in converters_of(self._model) if sources.keys() <= set(c.source_patterns))
            names = [sources[p] for p in converter.source_patterns if p in sources]
            apart = all(len(n) == experts and len(self._weights.shape(n[0])) == 2 for n in names)
            if not apart and any(len(n) != 1 or len(self._weights.shape(n[0])) != 3 for n in names):
                shapes = {n: list(self._weights.shape(n)) for found in names for n in found[:1]}
                raise ModelError(f"{self._weights.name}: {stack} is made of {shapes} in a way that is not understood")
            source, first, step, transposed = self._probe(converter, names, stack, slot)
            for expert in range(experts):
                name = names[source][expert if apart else 0]
                yield Place(name, None if apart else expert, first, step, slot.shape, transposed)

    def _probe(self, converter: Any, names: list[list[str]], stack: str, slot: Slot) -> tuple[int, int, int, bool]:
        """Find which source a slot is in, its first row or column there, the step, and whether these are columns."""
        shapes = [self._weights.shape(n[0])[-2:] for n in names]
        whole = tuple(self._model.get_parameter(stack).shape[1:])
        key = (str(converter), tuple(shapes), whole, slot)
        if key not in self._probed:
            found = _trace(self._model, converter, shapes, stack, whole, slot)
            if found is None:
                raise ModelError(
                    f"{self._weights.name}: transformers makes {stack} of {names[0][0]} in a way that is not understood"
                )
            self._probed[key] = [found]
        return self._probed[key][0]


def _trace(
    model: nn.Module, converter: Any, shapes: list[tuple[int, ...]], stack: str, whole: tuple[int, ...], slot: Slot
) -> tuple[int, int, int, bool] | None:
    scale = _scale([*whole, *(n for shape in shapes for n in shape)])
    small = [(rows // scale, columns // scale) for rows, columns in shapes]
    source, row, column = (
        _converted(model, converter, probes, stack, [n // scale for n in whole])
        for probes in (
            [torch.full(shape, float(index)) for index, shape in enumerate(small)],
            [torch.arange(float(r))[:, None].expand(r, c).contiguous() for r, c in small],
            [torch.arange(float(c)).expand(r, c).contiguous() for r, c in small],
        )
    )
    part = Slot(
        slot.name, slot.stack, slot.first if slot.step > 1 else slot.first // scale, slot.step,
        (slot.shape[0] // scale, slot.shape[1] // scale), slot.transposed,
    )  # fmt: skip
    source, row, column = (part.take(x) for x in (source, row, column))
    transposed = not bool((row[:, :1] == row).all())
    along, across = (column[:, 0], row[0]) if transposed else (row[:, 0], column[0])
    step, first = int(along[1] - along[0]), int(along[0])
    exact = (
        bool((source == source[0, 0]).all())
        and torch.equal(across, torch.arange(float(len(across))))
        and torch.equal(along, torch.arange(len(along)) * float(step) + first)
        and torch.equal(column if transposed else row, along[:, None].expand(row.shape))
        and step > 0
    )
    return (int(source[0, 0]), first * scale if step == 1 else first, step, transposed) if exact else None


def _scale(sizes: list[int]) -> int:
    """By how much sizes can be divided so that what is joined still fits, and something is left to see."""
    common = math.gcd(*sizes)
    parts = next((n for n in range(_SMALLEST, common + 1) if common % n == 0), common)
    return common // parts if common > parts else 1


def _converted(model: nn.Module, converter: Any, layers: list[Tensor], stack: str, whole: list[int]) -> Tensor:
    """What a converter makes of one expert's tensors, or of one layer of stacks: a layer [rows, columns]."""
    from transformers.core_model_loading import MergeModulelist, Transpose

    merges = any(isinstance(op, MergeModulelist) for op in converter.operations)
    given: Any = {
        pattern: [layer] if merges else [layer[None]]
        for pattern, layer in zip(converter.source_patterns, layers, strict=True)
    }
    for op in converter.operations:
        if isinstance(op, Transpose) and op.check_dims:  # by shapes, which are smaller here
            (held,) = given.values()
            tensor = held[0] if isinstance(held, list) else held
            if list(tensor.shape[1:]) == whole:
                continue
            op = Transpose(op.dim0, op.dim1)
        given = op.convert(
            given, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns,
            full_layer_name=stack, model=model, config=getattr(model, "config", None), missing_keys=None,
        )  # fmt: skip
    plain = {key.replace("\\", ""): value for key, value in given.items()}
    made = next((value for key, value in plain.items() if stack.endswith(key)), next(iter(plain.values())))
    return made[0][0] if isinstance(made, list) else made[0]


def _parents(name: str) -> Iterator[str]:
    """Yield the names of the modules that a parameter is in, from the innermost out."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
