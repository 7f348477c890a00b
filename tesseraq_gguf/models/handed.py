"""What a model hands to its blocks, and what these hand on, in one tensor for each sample.

From block to block travels a tensor [batch, length, width]. In most models it is the hidden states and nothing else.
It is wider where hidden states have further dimensions (streams side by side), where a block leaves something to later
ones (keys and values that these share), and where blocks are handed what depends on the tokens: its last channel is
then the number of the sample, by which that is found again. So whatever carries hidden states carries all of it: the
chains of reconstruction, gradients on the way down, files on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tesseraq_gguf.errors import ModelError

Empty = Callable[[torch.Size], Tensor]
"""Makes a float32 tensor of a shape, its numbers not set."""

Given = dict[str, Any]
"""What a block is handed besides hidden states, by keyword: tensors, or tuples, lists and dicts of them, or others."""


@dataclass(frozen=True)
class Layout:
    """Where batch and length stand in a tensor.

    Attributes:
        batch: dimension of the samples.
        length: dimension of the tokens.
        others: sizes of the dimensions that remain, in their order.
    """

    batch: int
    length: int
    others: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether the tensor is [batch, length, channels] as it is."""
        return (self.batch, self.length, len(self.others)) == (0, 1, 1)

    @property
    def channels(self) -> int:
        """How many numbers there are for each token."""
        return math.prod(self.others)

    def pack(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to [batch, length, channels]."""
        return tensor if self.plain else tensor.movedim((self.batch, self.length), (0, 1)).flatten(2)

    def unpack(self, packed: Tensor) -> Tensor:
        """Bring [batch, length, channels] back."""
        if self.plain:
            return packed
        return packed.unflatten(-1, self.others).movedim((0, 1), (self.batch, self.length))


@dataclass(frozen=True)
class State:
    """What lies where in the tensor that travels from block to block.

    Attributes:
        stream: of hidden states as blocks take them.
        carried: of what blocks leave to later ones, by its key, in tuples.
        makers: numbers of the blocks that leave it, by key.
        numbered: whether the last channel is the sample's number.
    """

    stream: Layout
    carried: Mapping[Any, tuple[Layout, ...]] = field(default_factory=dict)
    makers: Mapping[Any, frozenset[int]] = field(default_factory=dict)
    numbered: bool = False

    @property
    def plain(self) -> bool:
        """Whether hidden states are all there is."""
        return self.stream.plain and not self.carried and not self.numbered

    @property
    def width(self) -> int:
        """How many channels travel."""
        return self.stream.channels + sum(map(_channels, self.carried.values())) + self.numbered

    def first(self, hidden: Tensor, number: int) -> Tensor:
        """What enters the first block, of the hidden states of one sample, which has a number."""
        packed = self.stream.pack(hidden)
        if self.plain:
            return packed
        rest = packed.new_zeros(*packed.shape[:2], self.width - packed.shape[2])
        if self.numbered:
            rest[..., -1] = number
        return torch.cat([packed, rest], -1)

    def hidden(self, state: Tensor) -> Tensor:
        """The hidden states, as blocks take them, of what travels."""
        return state if self.plain else self.stream.unpack(state[..., : self.stream.channels])

    def numbers(self, state: Tensor) -> list[int]:
        """The numbers of the samples, where they have any."""
        return [round(number) for number in state.detach()[:, 0, -1].tolist()] if self.numbered else []

    def left(self, state: Tensor, index: int) -> dict[Any, tuple[Tensor, ...]]:
        """What earlier blocks left to block `index`, by key."""
        found, first = {}, self.stream.channels
        for key, layouts in self.carried.items():
            parts = state[..., first : first + _channels(layouts)].split([one.channels for one in layouts], -1)
            if min(self.makers[key]) < index:
                found[key] = tuple(one.unpack(part) for one, part in zip(layouts, parts, strict=True))
            first += _channels(layouts)
        return found

    def next(self, state: Tensor, hidden: Tensor, left: Mapping[Any, tuple[Tensor, ...]]) -> Tensor:
        """What a block hands on, of what it was handed, its hidden states, and all that was left by now."""
        packed = self.stream.pack(hidden)
        if self.plain:
            return packed
        parts, first = [packed], self.stream.channels
        for key, layouts in self.carried.items():
            last = first + _channels(layouts)
            here = (one.pack(tensor) for one, tensor in zip(layouts, left[key], strict=True)) if key in left else ()
            parts += here or [state[..., first:last]]
            first = last
        return torch.cat([*(part.to(state.dtype) for part in parts), state[..., first:]], -1)

    def made(self, index: int) -> Tensor | None:
        """Which channels block `index` makes anew, 1 or 0, float32 [width]; None if it is all of them."""
        if self.plain:
            return None
        made = [torch.ones(self.stream.channels)]
        made += [torch.full((_channels(of),), float(index in self.makers[key])) for key, of in self.carried.items()]
        return torch.cat([*made, torch.zeros(int(self.numbered))])


def _channels(layouts: Iterable[Layout]) -> int:
    return sum(layout.channels for layout in layouts)


@dataclass(frozen=True)
class Trait:
    """How a tensor that blocks are handed depends on the samples.

    Attributes:
        batch: the dimension that grows with their number; None if none does.
        varies: whether it depends on their tokens.
    """

    batch: int | None
    varies: bool


class Recorded:
    """A tensor that blocks are handed.

    Args:
        first: what it is for one sample.
        trait: how it depends on the samples.
    """

    def __init__(self, first: Tensor, trait: Trait) -> None:
        self._first, self._trait = first, trait
        self._rows: dict[int, Tensor] = {}

    def room(self, start: int, samples: int, empty: Empty) -> None:
        """Make room for samples from number `start` on."""
        if self._trait.varies:
            shape = torch.Size((samples, *self._first.shape))
            floats = self._first.dtype == torch.float32
            self._rows[start] = empty(shape) if floats else torch.empty(shape, dtype=self._first.dtype)

    def add(self, number: int, value: Tensor) -> None:
        """Take what it is for the sample of a number.

        Raises:
            ModelError: it depends on the sample unexpectedly.
        """
        if self._trait.varies:
            self._row(number).copy_(value)
        elif value is not self._first and not torch.equal(value, self._first):
            raise ModelError("what this architecture hands to its blocks differs between samples of one length")

    def of(self, numbers: Sequence[int], batch: int, device: torch.device) -> Tensor:
        """What it is for a batch of samples, by their numbers, on a device."""
        if self._trait.varies:
            assert self._trait.batch is not None
            return torch.cat([self._row(number).to(device) for number in numbers], self._trait.batch)
        axis = self._trait.batch
        if axis is None or batch == 1 or self._first.shape[axis] == 1:  # one serves all
            return self._first
        return torch.cat([self._first] * batch, axis)

    def _row(self, number: int) -> Tensor:
        start = max(first for first in self._rows if first <= number)
        return self._rows[start][number - start]


class Left:
    """Stands where a block is handed what earlier blocks left, and leaves its own.

    Args:
        kind: of the mapping that has it.
    """

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def holding(self, left: Mapping[Any, tuple[Tensor, ...]]) -> MutableMapping[Any, Any]:
        """Return a mapping that blocks can read and write."""
        made = self._kind()
        made.update(left)
        return made  # type: ignore[no-any-return]


def is_left(value: Any) -> bool:
    """Whether what blocks are handed is a mapping, still empty, that they leave things in."""
    return isinstance(value, MutableMapping) and not value


@dataclass(frozen=True)
class BlockArguments:
    """What one block is handed besides what travels.

    Attributes:
        given: by keyword; tensors are `Recorded`.
        state: how what travels lies.
        index: the block's number.
        hidden: keyword of the hidden states; None where they come first, by position.
    """

    given: Given
    state: State
    index: int
    hidden: str | None

    def __contains__(self, name: object) -> bool:
        """Whether there is an argument of a name."""
        return name in self.given

    def __or__(self, others: Given) -> BlockArguments:
        """Return the same with some arguments replaced."""
        return BlockArguments(self.given | others, self.state, self.index, self.hidden)

    def run(self, block: Callable[..., Any], state: Tensor) -> Tensor:
        """Run a block on what travels, [batch, length, width]."""
        numbers, left = self.state.numbers(state), self.state.left(state, self.index)
        holders: list[MutableMapping[Any, Any]] = []

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Recorded):
                return leaf.of(numbers, len(state), state.device)
            if isinstance(leaf, Left):
                holders.append(leaf.holding(left))
                return holders[-1]
            return leaf

        hidden = self.state.hidden(state)
        given = {name: mapped(value, tree) for name, tree in self.given.items()}
        out = block(hidden, **given) if self.hidden is None else block(**{self.hidden: hidden}, **given)
        return self.state.next(state, hidden_of(out, hidden), holders[0] if holders else {})


Arguments = BlockArguments | Given
"""Of a block; where nothing but hidden states travels, and all samples have the same, tensors by keyword will do."""


def run(block: Callable[..., Any], state: Tensor, arguments: Arguments) -> Tensor:
    """Run a block on what travels, [batch, length, width]."""
    if isinstance(arguments, BlockArguments):
        return arguments.run(block, state)
    return hidden_of(block(state, **arguments), state)


def hidden_of(out: Any, hidden: Tensor) -> Tensor:
    """Return the hidden states in what a block returned: the first tensor that has the shape of those it was handed.

    Raises:
        ModelError: there is none.
    """
    for part in (out,) if isinstance(out, Tensor) else out:
        if isinstance(part, Tensor) and part.shape == hidden.shape:
            return part
    raise ModelError("a block of this architecture returns no hidden states like those it was handed")


class BlockInputs:
    """What the model hands to its blocks besides what travels, recorded for one sequence length.

    Args:
        state: how what travels lies.
        hidden: keyword of the hidden states; None where they come first, by position.
        traits: of the tensors, for each block, by keyword.

    Attributes:
        arguments: of each block.
    """

    def __init__(self, state: State, hidden: str | None, traits: Sequence[Given]) -> None:
        self._state, self._hidden, self._traits = state, hidden, traits
        self._samples = 0
        self._tensors: dict[int, Recorded] = {}
        self._kept: list[Tensor] = []
        self.arguments: list[BlockArguments] = []

    def begin(self, calls: Sequence[Given], samples: int, empty: Empty) -> int:
        """Make room for samples, of which the first is handed `calls`; return its number."""
        if not self.arguments:
            self.arguments = [
                BlockArguments(mapped(self._recorded, traits, call), self._state, index, self._hidden)
                for index, (traits, call) in enumerate(zip(self._traits, calls, strict=True))
            ]
        for tensor in self._tensors.values():
            tensor.room(self._samples, samples, empty)
        first, self._samples = self._samples, self._samples + samples
        return first

    def add(self, number: int, calls: Sequence[Given]) -> None:
        """Take what the sample of a number is handed."""
        seen: set[tuple[int, int]] = set()

        def add(recorded: Any, value: Any) -> None:
            if isinstance(recorded, Recorded) and (pair := (id(recorded), id(value))) not in seen:
                seen.add(pair)
                recorded.add(number, value)

        for arguments, call in zip(self.arguments, calls, strict=True):
            mapped(add, arguments.given, call)

    def _recorded(self, trait: Any, value: Any) -> Any:
        if isinstance(trait, Trait):
            self._kept.append(value)  # so that no other can have its identity
            return self._tensors.setdefault(id(value), Recorded(value, trait))
        return Left(type(value)) if is_left(value) else value


def mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """Return a tree of tuples, lists and dicts with a function's value for each leaf.

    Args:
        function: called with the leaves at the same place of all trees.
        trees: of the same shape.

    Raises:
        ModelError: they have different shapes.
    """
    first = trees[0]
    if not isinstance(first, (tuple, list, dict)) or (isinstance(first, dict) and not first):
        return function(*trees)
    if any(type(tree) is not type(first) or len(tree) != len(first) for tree in trees):
        raise ModelError("what this architecture hands to its blocks has another shape for every sample")
    if isinstance(first, dict):
        return {key: mapped(function, *(tree[key] for tree in trees)) for key in first}
    made = [mapped(function, *parts) for parts in zip(*trees, strict=True)]
    return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
