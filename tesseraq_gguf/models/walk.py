"""Where a model's blocks are, and what becomes of hidden states between them: asked of its own `forward`.

No architecture is known by name. `find` runs a model on a few tokens, with numbers that take no memory for weights and
with stand-ins for whatever may be blocks, and sees which of them hand hidden states on to each other, under which name,
what else they are handed, what of it depends on the tokens, and what runs behind the last one. `Walk.check` then runs
one block of every kind, in the model and by itself, and compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.handed import BlockInputs, Given, Layout, State, Trait, is_left, mapped
from tesseraq_gguf.models.stand_ins import placeholders, replaced, stand_in, varied, watching

_FEW, _MORE = (1, 6), (2, 9)
"""Samples and tokens of the two runs by whose shapes dimensions are told apart."""

_RETURNS = (None, 1, 2, 3, 4)
"""What models expect of a block: hidden states, or a tuple of so many that begins with them."""

_TOLERANCE = 1e-3
"""Relative error that float32 arithmetic may make of what a few blocks compute."""


@dataclass(frozen=True)
class Walk:
    """A model's blocks.

    Attributes:
        names: of the blocks within the model, in the order they run.
        hidden: keyword of what they are handed as hidden states.
        first: whether their `forward` takes these first.
        returns: size of the tuple that they return; None where it is hidden states alone.
        traits: what else each is handed, by keyword.
        state: how what travels from block to block lies.
        before: names, within the base model, of the innermost modules that run before the first block.
        behind: those that run after the last one.
        alone: whether the one behind is a norm and all there is.
        tables: names, within the base model, of embeddings of which rows are taken by the tokens' own numbers.
    """

    names: tuple[str, ...]
    hidden: str
    first: bool
    returns: int | None
    traits: tuple[Given, ...]
    state: State
    before: tuple[str, ...]
    behind: tuple[str, ...]
    alone: bool
    tables: tuple[str, ...]

    def inputs(self) -> BlockInputs:
        """Return a record, still empty, of what blocks are handed."""
        return BlockInputs(self.state, None if self.first else self.hidden, self.traits)

    def outside(self, model: Any) -> dict[str, nn.Module]:
        """Return the modules of the base model that are in no block, by their names within it."""
        base = model.base_model
        inside = {id(module) for name in self.names for module in model.get_submodule(name).modules()}
        return {name: module for name, module in base.named_modules() if id(module) not in inside}

    @contextmanager
    def passed(
        self, model: Any, gives: Tensor | None = None, but: Sequence[int] = ()
    ) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
        """Put stand-ins in the places of the blocks, which pass hidden states on and record what they are handed.

        Args:
            model: the model.
            gives: hidden states to return instead, of any shape; what the blocks return last counts.
            but: numbers of blocks that stay.

        Yields:
            Hidden states and other arguments of each block that ran, in order.
        """
        calls: list[tuple[Tensor, dict[str, Any]]] = []

        def see(_: int, given: dict[str, Any]) -> Tensor:
            hidden = given.pop(self.hidden)
            calls.append((hidden, given))
            return hidden if gives is None else gives

        blocks = {name: model.get_submodule(name) for i, name in enumerate(self.names) if i not in but}
        with replaced(model, _stand_ins(blocks, self.returns, see)):
            yield calls

    @torch.no_grad()
    def check(self, model: Any, device: torch.device) -> None:
        """Run one block of every kind in the model and by itself, on two samples at once; compare what comes of them.

        Args:
            model: the transformers model; its parameters are on the meta device.
            device: where to run.

        Raises:
            ModelError: it is not the same.
        """
        blocks = [model.get_submodule(name) for name in self.names]
        some = self._kinds(blocks)
        outside = list(self.outside(model).values())
        with placeholders([*outside, *(m for i in some for m in blocks[i].modules())], device, varied):
            tokens = _tokens(model, 2, 24).to(device)
            with self.passed(model, but=some):
                expected = _final(_forward(model, tokens))
            got, inputs = self.stem(model, tokens.split(1))
            for index in some:
                got = inputs.arguments[index].run(blocks[index], got)
            norm = self.tail(model, {name: model.base_model.get_submodule(name) for name in self.behind})
            got = norm(self.fed(got))
        if not _same(got, expected):
            raise ModelError(
                f"{type(model).__name__}: its blocks, run one by one, do not make what they make in the model"
            )

    def stem(
        self,
        model: Any,
        samples: Sequence[Tensor],
        empty: Callable[[torch.Size], Tensor] = torch.empty,
        inputs: BlockInputs | None = None,
    ) -> tuple[Tensor, BlockInputs]:
        """Run what comes before the first block, sample by sample.

        Args:
            model: the model; what runs before the blocks has weights.
            samples: tokens, each int64 [1, length] on the device.
            empty: makes the tensor that what travels goes to.
            inputs: what blocks are handed, to which these samples are added; by default there are no others.

        Returns:
            What travels, float32 [samples, length, width], and what blocks are handed.
        """
        inputs, states, first = inputs or self.inputs(), torch.empty(0), 0
        with self.passed(model) as calls:
            for index, sample in enumerate(samples):
                calls.clear()
                _forward(model, sample)
                given = [call for _, call in calls]
                if index == 0:
                    first = inputs.begin(given, len(samples), empty)
                inputs.add(first + index, given)
                state = self.state.first(calls[0][0], first + index)
                if index == 0:
                    states = empty(torch.Size((len(samples), *state.shape[1:])))
                states[index].copy_(state[0])
        return states, inputs

    def tail(self, model: Any, modules: Mapping[str, nn.Module]) -> nn.Module:
        """Return what runs behind the last block: from what `fed` gives to [..., length, hidden].

        Args:
            model: the transformers model.
            modules: those named in `behind`, with weights, by name.
        """
        return modules[self.behind[0]] if self.alone else _Tail(self, model, modules)

    def fed(self, state: Tensor) -> Tensor:
        """What the norm behind the last block is fed, of what travels, [..., length, width]."""
        return state[..., : self.state.stream.channels] if self.alone else state

    def _kinds(self, blocks: Sequence[nn.Module]) -> list[int]:
        """Numbers of blocks, one of each kind, and all that leave something to others."""
        kinds: dict[Any, int] = {}
        for index, block in enumerate(blocks):
            inside = tuple((name, p.shape) for name, p in block.named_parameters())
            kinds.setdefault((inside, str(self.traits[index])), index)
        return sorted({*kinds.values(), *(i for makers in self.state.makers.values() for i in makers)})


def find(model: Any, device: torch.device) -> Walk:
    """Find the blocks of a model.

    Args:
        model: the transformers model; parameters are on the meta device, buffers on `device`.
        device: where to run.

    Raises:
        ModelError: no modules hand hidden states on to each other.
    """
    found = _candidates(model)
    inside = {id(module) for block in found.values() for module in block.modules()}
    outside = [module for module in model.base_model.modules() if id(module) not in inside]
    reason = ""
    with torch.no_grad(), placeholders(outside, device, varied):
        for returns in _RETURNS if found else ():
            try:
                few = _Passed(model, found, returns, _tokens(model, *_FEW).to(device))
                more = _Passed(model, found, returns, _tokens(model, *_MORE).to(device))
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = reason or str(error).strip().split("\n")[0]
                continue
            if few.whole and more.whole:
                return _walk(model, few, more, returns, device)
    raise ModelError(
        f"{type(model).__name__}: no decoder blocks that hand hidden states on to each other were found in this "
        f"architecture{reason and f' ({reason})'}"
    )


class _Passed:
    """One run of a model in which stand-ins for blocks pass hidden states on.

    Args:
        model: the model.
        candidates: modules that may be blocks, by name within the model.
        returns: what they are to return.
        tokens: int64 [samples, length].

    Attributes:
        names: of the blocks that ran, in order.
        hidden: keyword of the hidden states.
        states: hidden states that each was handed.
        given: what each was handed besides, by keyword.
        before: names, within the base model, of the innermost modules that ran before the first block.
        behind: those that ran after the last one.
        tables: embeddings that were asked for the tokens themselves.
        final: what the base model gives, float32 [samples, length, hidden].
        whole: whether each ran once, and was handed what the one before had returned.
    """

    def __init__(self, model: Any, candidates: Mapping[str, nn.Module], returns: int | None, tokens: Tensor) -> None:
        names, calls = list(candidates), []
        events: list[str | int] = []
        inside = {id(module) for block in candidates.values() for module in block.modules()}
        leaves = {n: m for n, m in model.base_model.named_modules() if id(m) not in inside and not [*m.children()]}

        def see(number: int, given: dict[str, Any]) -> Tensor:
            events.append(number)
            calls.append(given)
            return given[self._key(calls)]

        tables: list[str] = []

        def ran_leaf(name: str, args: tuple[Any, ...]) -> None:
            events.append(name)
            if isinstance(leaves[name], nn.Embedding) and args and torch.equal(args[0], tokens):
                tables.append(name)

        with watching(leaves, ran_leaf), replaced(model, _stand_ins(candidates, returns, see)):
            self.final = _final(_forward(model, tokens))
        places = [place for place, event in enumerate(events) if isinstance(event, int)]
        ran = [event for event in events if isinstance(event, int)]
        self.names = tuple(names[number] for number in ran)
        self.hidden = self._key(calls) if calls else ""
        self.states = [call[self.hidden] for call in calls]
        self.given: list[dict[str, Any]] = [{k: v for k, v in call.items() if k != self.hidden} for call in calls]
        self.before = tuple(dict.fromkeys(map(str, events[: places[0]] if ran else events)))
        self.tables = tuple(tables)
        self.behind = tuple(dict.fromkeys(map(str, events[places[-1] + 1 :] if ran else [])))
        self.whole = (
            bool(ran)
            and len(set(ran)) == len(ran)
            and all(state.shape == self.states[0].shape for state in self.states)
            and self.final.shape[:2] == tokens.shape
        )

    def _key(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Keyword of the hidden states: the first tensor."""
        return next(name for name, value in calls[0].items() if isinstance(value, Tensor))


def _candidates(model: Any) -> dict[str, nn.Module]:
    """Modules of the base model that may be its blocks, by name: those in outermost lists that have matrices inside."""
    found: dict[str, nn.Module] = {}
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, several in lists.items():
        if not any(name.startswith(f"{outer}.") for outer in found):
            found |= {
                f"{name}.{place}": module
                for place, module in several.named_children()
                if [*module.children()] and any(p.dim() > 1 for p in module.parameters())
            }
    return found


def _walk(model: Any, few: _Passed, more: _Passed, returns: int | None, device: torch.device) -> Walk:
    traits = tuple(mapped(_trait, a, b) for a, b in zip(few.given, more.given, strict=True))
    left = any(_leaves(call, is_left) for call in few.given)
    numbered = any(_leaves(call, lambda trait: isinstance(trait, Trait) and trait.varies) for call in traits)
    stream = _layout(few.states[0], more.states[0])
    carried, makers = _carried(model, few.names, device) if left else ({}, {})
    state = State(stream, carried, makers, numbered)
    alone = len(more.behind) == 1 and stream.plain
    if alone:
        norm = model.base_model.get_submodule(more.behind[0])
        alone = _same(norm(more.states[-1]), more.final)
    first = all(_parameters(model.get_submodule(name))[0] == few.hidden for name in few.names)
    return Walk(few.names, few.hidden, first, returns, traits, state, more.before, more.behind, alone, more.tables)


class _Tail(nn.Module):
    """Runs what is behind a model's last block, where that is more than a norm, by the model's own `forward`.

    Args:
        walk: the model's.
        model: the model.
        modules: those behind the last block, with weights, by name within the base model, which they keep here.
    """

    def __init__(self, walk: Walk, model: Any, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._walk, self._model, self._names = walk, (model,), tuple(modules)
        for name, module in modules.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for step in path:
                if not hasattr(parent, step):
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            parent.add_module(leaf, module)

    def forward(self, states: Tensor) -> Tensor:
        """From what travels, [..., length, width], to [..., length, hidden]."""
        (model,), walk = self._model, self._walk
        packed = states.reshape(-1, *states.shape[-2:])
        tokens = torch.zeros(packed.shape[:2], dtype=torch.int64, device=states.device)
        modules = {name: self.get_submodule(name) for name in self._names}
        with (
            replaced(model.base_model, modules),
            placeholders(walk.outside(model).values(), states.device),
            walk.passed(model, walk.state.hidden(packed)),
        ):
            final = _final(_forward(model, tokens))
        return final.view(*states.shape[:-1], -1)


def _trait(few: Any, more: Any) -> Trait | None:
    """How a leaf depends on the samples, by the two runs."""
    if not isinstance(few, Tensor):
        return None
    axis = next((d for d, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if b == 2 * a), None)
    return Trait(axis, axis is not None and not torch.equal(*more.chunk(2, axis)))


def _layout(few: Tensor, more: Tensor) -> Layout:
    """Where batch and length stand, by the two runs.

    Raises:
        ModelError: one of them is not there.
    """
    sizes = list(zip(few.shape, more.shape, strict=True))
    batch, length = ([d for d, pair in enumerate(sizes) if pair == wanted] for wanted in zip(_FEW, _MORE, strict=True))
    if not batch or not length:
        raise ModelError("what goes from block to block in this architecture is not of one shape for all tokens")
    return Layout(batch[0], length[0], tuple(a for a, b in sizes if a == b))


def _carried(
    model: Any, names: Sequence[str], device: torch.device
) -> tuple[dict[Any, tuple[Layout, ...]], dict[Any, frozenset[int]]]:
    """What blocks leave to later ones, by key, and which of them leave it."""
    makers: dict[Any, set[int]] = {}
    last: list[dict[Any, Any]] = []
    blocks = {name: model.get_submodule(name) for name in names}

    def watched(number: int, block: nn.Module) -> nn.Module:
        def forward(*args: Any, **kwargs: Any) -> Any:
            holder = next(v for v in _named(block, args, kwargs).values() if isinstance(v, MutableMapping))
            before = dict(holder)
            out = type(block).forward(block, *args, **kwargs)
            for key, value in holder.items():
                if value is not before.get(key):
                    makers.setdefault(key, set()).add(number)
            last[-1] = dict(holder)
            return out

        return stand_in(block, forward)  # type: ignore[no-any-return]

    watchers = {name: watched(number, block) for number, (name, block) in enumerate(blocks.items())}
    modules = [module for block in blocks.values() for module in block.modules()]
    with replaced(model, watchers), placeholders(modules, device, varied):
        for sizes in (_FEW, _MORE):
            last.append({})
            _forward(model, _tokens(model, *sizes).to(device))
    few, more = last
    carried = {key: tuple(_layout(a, b) for a, b in zip(few[key], more[key], strict=True)) for key in few}
    return carried, {key: frozenset(numbers) for key, numbers in makers.items()}


def _stand_ins(
    blocks: Mapping[str, nn.Module], returns: int | None, see: Callable[[int, dict[str, Any]], Tensor]
) -> dict[str, nn.Module]:
    """Stand-ins for blocks, which return what `see` makes of their number and of what they are handed, by keyword."""

    def forward(number: int, block: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = see(number, _named(block, args, kwargs))
            return hidden if returns is None else (hidden, *(None,) * (returns - 1))

        return run

    return {name: stand_in(block, forward(number, block)) for number, (name, block) in enumerate(blocks.items())}


def _named(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a block's `forward` by keyword.

    Raises:
        ModelError: some have no name.
    """
    names = _parameters(block)
    if len(args) > len(names):
        raise ModelError("this architecture hands arguments without names to its decoder blocks")
    return dict(zip(names, args, strict=False)) | kwargs


def _parameters(block: nn.Module) -> list[str]:
    """Names that arguments of a block's `forward` have by their position."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _leaves(tree: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    found: list[Any] = []
    mapped(lambda leaf: found.append(leaf) if wanted(leaf) else None, tree)
    return found


def _tokens(model: Any, samples: int, length: int) -> Tensor:
    """Tokens that differ as far as the vocabulary allows, int64 [samples, length]."""
    return torch.arange(samples * length).view(samples, length) % model.config.get_text_config().vocab_size


def _forward(model: Any, tokens: Tensor) -> Any:
    return model.base_model(input_ids=tokens, use_cache=False)


def _final(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _same(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    return bool((got - expected).norm() <= _TOLERANCE * expected.norm())
