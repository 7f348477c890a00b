"""Experts of a mixture, one linear layer for each of their matrices, in place of stacks.

transformers keeps the experts of a block as a few parameters of three dimensions, [experts, out, in] or [experts, in,
out], gate and up in one or apart, one half after the other or row by row. Methods want a matrix for each, because every
expert sees its own tokens. `forms_of` finds such modules by their parameters and finds out what an expert computes:
down(act(into(x))), with the activation of the module itself. A module that does not compute the same as its stand-in
is refused. `unroll` puts the stand-in in its place.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.stand_ins import put
from tesseraq_gguf.models.streamed import StreamedLinear

_ALIASES = ((".mlp.", ".block_sparse_moe."),)
"""Names of modules that checkpoints call otherwise."""

_GATED, _PLAIN = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")
"""What an expert's matrices are called where no checkpoint has them one by one."""

_TOLERANCE = 1e-4
"""Relative error at which a stand-in computes what the module does, in float32."""

_ROUTES = (8, 2)
"""Tokens, and experts of each, that a stand-in is compared on."""

_EXPERTS = 3
"""Experts that it is compared on, at most."""

FEW = 16
"""Experts of a block that are in memory together and learned together, at most."""


@dataclass(frozen=True)
class Slot:
    """Where one matrix of an expert is within the expert's layer of a stack.

    Attributes:
        name: of the matrix.
        stack: the parameter.
        first: its first row in the layer.
        step: from one of its rows to the next.
        shape: its own, [out, in].
        transposed: whether rows of the matrix are columns of the layer.
    """

    name: str
    stack: str
    first: int
    step: int
    shape: tuple[int, int]
    transposed: bool

    def take(self, layer: Tensor) -> Tensor:
        """Return the matrix [out, in] out of a layer of the stack; memory is shared."""
        rows = layer.T if self.transposed else layer
        return rows[self.first :: self.step][: self.shape[0]]


Gate = Callable[[list[Tensor]], Tensor]
"""From what the first matrices give, [tokens, inner] each, to what the last is fed."""


@dataclass(frozen=True)
class Form:
    """What the experts of a module are.

    Attributes:
        count: how many.
        slots: where their matrices are, the last one's output being the expert's.
        biases: parameters that are added to what the first matrices give together, and to the last one's: names by
            place, 0 and 1.
        joined: how the first matrices' outputs stand in what their bias is added to: `beside` or `between` each other.
        gate: makes the module's own activation of the module.
        dense: whether the module is fed all tokens for every expert, zeros where it is not chosen.
    """

    count: int
    slots: tuple[Slot, ...]
    biases: Mapping[int, str]
    joined: str
    gate: Callable[[nn.Module], Gate]
    dense: bool

    @property
    def stacks(self) -> set[str]:
        """Names of the parameters that experts take the place of."""
        return {slot.stack for slot in self.slots} | set(self.biases.values())

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield name, within the module, and shape [out, in] of every expert's matrices."""
        for expert in range(self.count):
            for slot in self.slots:
                yield f"{expert}.{slot.name}", slot.shape

    def parameters(self) -> Iterator[str]:
        """Yield the names, within the module, of all parameters of the experts."""
        for expert in range(self.count):
            yield from (f"{expert}.{slot.name}.weight" for slot in self.slots)
            yield from (f"{expert}.{bias}" for bias in self.biases.values())


Watcher = Callable[[Tensor, Tensor, Tensor], None]
"""Is shown hidden states, which experts, and how much each counts."""

Tap = Callable[[Tensor, Tensor, Tensor], "Tensor | None"]
"""Takes the same, and may give what experts make of it."""


class Expert(nn.Module):
    """One expert, float32: down(act(into(x))).

    Args:
        form: of the module.
        gate: the module's activation.
        linear: makes a matrix of a slot.

    Attributes:
        form: of the module.
    """

    def __init__(self, form: Form, gate: Gate, linear: Callable[[Slot], nn.Linear]) -> None:
        super().__init__()
        self.form, self._gate = form, gate
        for slot in form.slots:
            setattr(self, slot.name, linear(slot))
        *into, down = form.slots
        for place, width in ((0, sum(slot.shape[0] for slot in into)), (1, down.shape[0])):
            if place in form.biases:
                self.register_parameter(form.biases[place], nn.Parameter(torch.empty(width, device="meta")))

    def __deepcopy__(self, memo: dict[int, Any]) -> Expert:
        """Copy all but the activation, which one module has for all experts."""
        memo[id(self._gate)], memo[id(self.form)] = self._gate, self.form
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return made

    def resident(self) -> Expert:
        """Return the same with weights in memory, read now."""
        made = Expert(self.form, self._gate, _empty)
        state = {f"{slot.name}.weight": getattr(self, slot.name).weight for slot in self.form.slots}
        made.load_state_dict(state | {n: getattr(self, n) for n in self.form.biases.values()}, assign=True)
        return made.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """What the expert makes of tokens [..., hidden]."""
        form = self.form
        given = [getattr(self, slot.name)(x) for slot in form.slots[:-1]]
        if 0 in form.biases:
            bias = getattr(self, form.biases[0])
            given = [g + b for g, b in zip(given, parted(bias, len(given), form.joined), strict=True)]
        out = getattr(self, form.slots[-1].name)(self._gate(given))
        return out + getattr(self, form.biases[1]) if 1 in form.biases else out  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """The experts of one block, in their order, in place of a module of transformers.

    Args:
        experts: as many as the module has.
        owner: the module, without its stacks.
        form: of the module.

    Attributes:
        tap: takes what `add_up` is called with, and may give what it returns.
    """

    def __init__(self, experts: Iterator[Expert], owner: nn.Module, form: Form) -> None:
        super().__init__(experts)
        self._owner, self.form = (owner,), form  # in a tuple: its parameters are none of the block's
        self.tap: Tap | None = None
        self._watchers: dict[int, Watcher] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        """Return what models look at besides calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_owner":
                raise
            return getattr(self._owner[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the module does of the same arguments."""
        given = bound(self._owner[0], args, kwargs)
        return self._all(given[0]) if self.form.dense else self._routed(*given)

    def watch(self, watcher: Watcher) -> RemovableHandle:
        """Show a function what `add_up` is called with, until the handle is removed."""
        handle = RemovableHandle(self._watchers)
        self._watchers[handle.id] = watcher
        return handle

    def _routed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum of what the chosen experts make of each token.

        Args:
            hidden: [tokens, hidden], or more dimensions in front.
            chosen: which experts, int64 [tokens, chosen].
            weights: how much each of them counts, [tokens, chosen].
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.add_up(rows, chosen, weights).view(*hidden.shape[:-1], -1)

    def _all(self, hidden: Tensor) -> Tensor:
        """What each expert makes of its tokens, [experts·tokens, hidden] in the order of experts."""
        fed = hidden.reshape(self.form.count, -1, hidden.shape[-1])
        expert, token = torch.where(fed.detach().any(-1))
        ones = torch.ones(len(expert), 1, dtype=hidden.dtype, device=hidden.device)
        out = self.add_up(fed[expert, token], expert[:, None], ones)
        whole = torch.zeros(*fed.shape[:2], out.shape[-1], dtype=out.dtype, device=out.device)
        return whole.index_put((expert, token), out).view(*hidden.shape[:-1], -1)

    def add_up(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Do what `_routed` does, on hidden states of two dimensions."""
        for watcher in self._watchers.values():
            watcher(hidden, chosen, weights)
        if self.tap and (told := self.tap(hidden, chosen, weights)) is not None:
            return told
        out = torch.zeros_like(hidden)
        for index in chosen.unique().tolist():
            token, place = torch.where(chosen == index)
            given = self[index](hidden[token]) * weights[token, place, None]
            out = out.index_add(0, token, given.to(out.dtype))
        return out


def bound(owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a module of experts is handed: hidden states, which experts, and how much each counts."""
    given = inspect.signature(type(owner).forward).bind(owner, *args, **kwargs).arguments
    hidden, *routes = [value for name, value in given.items() if isinstance(value, Tensor)]
    return [hidden, *sorted(routes, key=torch.is_floating_point)]


def parted(joined: Tensor, parts: int, how: str) -> list[Tensor]:
    """Part what stands `beside` or `between` each other in the last dimension."""
    if how == "between":
        return [joined[..., part::parts] for part in range(parts)]
    return list(joined.chunk(parts, -1))


def together(parts: list[Tensor], how: str) -> Tensor:
    """Join what `parted` parts."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, -1).flatten(-2) if how == "between" else torch.cat(parts, -1)


@dataclass
class Forms:
    """The modules of experts of a model, found once.

    Args:
        model: a transformers model whose parameters are on the meta device.

    Attributes:
        by_name: forms by the module's name in the model.

    Raises:
        ModelError: it has experts that are not understood.
    """

    model: nn.Module
    by_name: dict[str, Form] = field(init=False)

    def __post_init__(self) -> None:
        names = expert_names(self.model)
        known: dict[Any, Form] = {}
        self.by_name = {}
        for name, module in self.model.named_modules():
            stacks = stacks_of(module)
            if not stacks:
                continue
            called = names(f"{name}.")
            kind = (type(module), *((n, p.shape, *called.get(n, ())) for n, p in stacks.items()), *_settings(module))
            if kind not in known:
                known[kind] = form_of(module, called)
            self.by_name[name] = known[kind]

    def within(self, prefix: str) -> dict[str, Form]:
        """Return forms by the module's name within what a prefix, with its final dot, stands for."""
        return {name.removeprefix(prefix): form for name, form in self.by_name.items() if name.startswith(prefix)}


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Numbers that a module keeps: layers may be bounded differently."""
    return sorted((n, v) for n, v in vars(module).items() if isinstance(v, (int, float, str)))


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacks of a module of experts by name, in their order; none of other modules.

    Raises:
        ModelError: it has one that is no expert's.
    """
    if type(module).__module__.startswith("torch."):
        return {}
    found = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1}
    if found and (len(found) not in (2, 3) or len({len(p) for p in found.values()}) > 1):
        shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in found.items())
        raise ModelError(f"experts of this kind ({type(module).__name__}: {shapes}) cannot be learned yet")
    return found


def form_of(module: nn.Module, names: Mapping[str, list[str]] | None = None) -> Form:
    """Find out what the experts of a module compute.

    Args:
        module: its parameters may be on the meta device.
        names: what checkpoints call the matrices that make each of its stacks; those that are not named are called as
            is usual.

    Raises:
        ModelError: nothing that was tried computes the same.
    """
    for form in _candidates(module, names or {}):
        if agrees(module, form):
            return form
    raise ModelError(
        f"experts of this kind ({type(module).__name__}) cannot be learned yet: what they compute is not "
        "down(act(gate(x), up(x))) of matrices in stacks"
    )


def _candidates(module: nn.Module, names: Mapping[str, list[str]]) -> Iterator[Form]:
    """Forms that a module's parameters allow, likely ones first."""
    stacks = stacks_of(module)
    *into, down = stacks
    biases = {
        place: name
        for name, p in module.named_parameters(recurse=False)
        for place, stack in ((0, into[0]), (1, down))
        if p.dim() == 2 and name.startswith(stack) and len(p) == len(stacks[stack])
    }
    dense = len(inspect.signature(type(module).forward).parameters) == 2
    transposed = _told(module, "is_transposed", {False: False, True: True})
    joined = _told(module, "is_concatenated", {True: "beside", False: "between"})
    for turned, how, gate in product(transposed, joined, _gates(module)):
        slots = _slots(stacks, turned, how, names)
        if slots:
            yield Form(len(stacks[down]), slots, biases, how, gate, dense)


def _told(module: nn.Module, name: str, meaning: dict[bool, Any]) -> list[Any]:
    """What a module says of itself, or all that it could say."""
    said = getattr(module, name, None)
    return list(meaning.values()) if said is None else [meaning[bool(said)]]


def _slots(
    stacks: Mapping[str, Tensor], turned: bool, joined: str, names: Mapping[str, list[str]]
) -> tuple[Slot, ...] | None:
    """Where an expert's matrices are, or None if shapes do not allow it."""
    shapes = {name: tuple(p.shape[:0:-1] if turned else p.shape[1:]) for name, p in stacks.items()}
    *into, down = shapes
    inner = shapes[down][1]
    parts = [shapes[name][0] // inner for name in into]
    if any(shapes[name][0] != part * inner for name, part in zip(into, parts, strict=True)) or sum(parts) not in (1, 2):
        return None
    if len({shapes[name][1] for name in into}) > 1:
        return None
    usual = iter(_GATED if sum(parts) == 2 else _PLAIN)
    slots = []
    for name, part in (*zip(into, parts, strict=True), (down, 1)):
        rows = shapes[name][0] // part
        called = [next(usual) for _ in range(part)]
        called = names[name] if len(names.get(name, ())) == part else called
        for place, own in enumerate(called):
            first, step = (place, part) if joined == "between" else (place * rows, 1)
            slots.append(Slot(own, name, first, step, (rows, shapes[name][1]), turned))
    return tuple(slots) if len({slot.name for slot in slots}) == len(slots) else None


def _gates(module: nn.Module) -> list[Callable[[nn.Module], Gate]]:
    """What a module may apply to what its first matrices give: its own gating, or one of its activations."""
    found: list[Callable[[nn.Module], Gate]] = []
    how = "between" if getattr(module, "is_concatenated", True) is False else "beside"
    acts = [name for name, child in module.named_children() if not any(True for _ in child.parameters())]
    acts += [name for name, value in vars(module).items() if inspect.isfunction(value)]

    def activated(name: str) -> Callable[[nn.Module], Gate]:
        return lambda owner: lambda given: _gated(getattr(owner, name), given)

    if hasattr(module, "_apply_gate") and not _gates_as_usual(module):
        found.append(lambda owner: lambda given: owner._apply_gate(together(given, how)))  # type: ignore[operator]
    return found + [activated(name) for name in acts]


def _gates_as_usual(module: nn.Module) -> bool:
    from transformers.integrations import moe

    return getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", None)


def _gated(act: Callable[[Tensor], Tensor], given: list[Tensor]) -> Tensor:
    gate, *up = given
    return act(gate) * up[0] if up else act(gate)


@torch.no_grad()
def agrees(module: nn.Module, form: Form) -> bool:
    """Whether experts of a form compute what a module does, on random weights, tokens and routes."""
    random = torch.Generator().manual_seed(0)
    owner = copy.deepcopy(module).eval()
    some = min(form.count, _EXPERTS)
    for name, p in list(owner.named_parameters(recurse=False)):
        setattr(owner, name, nn.Parameter(_random_stack((some, *p.shape[1:]), random), requires_grad=False))
    whole = {name: p.detach() for name, p in owner.named_parameters(recurse=False)}
    given = _routes(form, some, random)
    try:
        expected = inspect.unwrap(type(owner).forward)(owner, *given)
        experts = _experts(owner, replace(form, count=some), lambda _: _empty)
        for index, expert in enumerate(experts):
            _give(expert, form, {name: stack[index] for name, stack in whole.items()})
        got = experts(*given)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    size = float(expected.norm())
    return got.shape == expected.shape and size > 0 and float((got - expected).norm()) <= _TOLERANCE * size


def _random_stack(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A stack of layers that all differ, in the memory of one and a bit: each begins one number after the one before.

    Weights are of a size at which sums of products are about as large as what is multiplied.
    """
    layer = math.prod(shape[1:])
    base = torch.randn(layer + shape[0], generator=random) * min(shape[1:]) ** -0.5
    return base.as_strided(shape, (1, *torch.empty(shape[1:], device="meta").stride()))


def _routes(form: Form, experts: int, random: torch.Generator) -> list[Tensor]:
    """Random arguments of a module: hidden states, experts, and what each counts."""
    tokens, each = _ROUTES[0], min(_ROUTES[1], experts)
    width = form.slots[0].shape[1]
    if form.dense:
        fed = torch.randn(experts, tokens, width, generator=random)
        fed[torch.rand(experts, tokens, generator=random) < 0.5] = 0
        return [fed.view(-1, width)]
    chosen = torch.rand(tokens, experts, generator=random).topk(each).indices
    return [torch.randn(tokens, width, generator=random), chosen, torch.rand(tokens, each, generator=random)]


def _give(expert: nn.Module, form: Form, layers: Mapping[str, Tensor]) -> None:
    """Give an expert its parameters out of its layers of the stacks, by name."""
    state = {f"{slot.name}.weight": slot.take(layers[slot.stack]) for slot in form.slots}
    expert.load_state_dict(state | {name: layers[name] for name in form.biases.values()}, assign=True)
    expert.requires_grad_(False)


def _experts(owner: nn.Module, form: Form, linear: Callable[[int], Callable[[Slot], nn.Linear]]) -> Experts:
    """Experts in place of a module, which loses its stacks; each gets what makes its matrices by its number."""
    for name in form.stacks:
        delattr(owner, name)
    gate = form.gate(owner)
    return Experts((Expert(form, gate, linear(index)) for index in range(form.count)), owner, form)


def _empty(slot: Slot) -> nn.Linear:
    return nn.Linear(*slot.shape[::-1], bias=False, device="meta")


def unroll(block: nn.Module, forms: Mapping[str, Form], read: Callable[[str], Tensor] | None = None) -> None:
    """Replace stacked experts in a module whose parameters are on the meta device.

    Args:
        block: the module.
        forms: of modules of experts, by their name within it.
        read: reads a parameter by its name in the module, float32 on the device: where experts are many, their
            matrices are streamed.
    """
    for name, form in forms.items():
        linear = partial(_streamed, read, name) if read is not None and form.count > FEW else lambda _: _empty
        put(block, name, _experts(block.get_submodule(name), form, linear))


def _streamed(read: Callable[[str], Tensor], module: str, expert: int) -> Callable[[Slot], nn.Linear]:
    return lambda slot: StreamedLinear(slot.shape, partial(read, f"{module}.{expert}.{slot.name}.weight"))


def expert_names(model: nn.Module) -> Callable[[str], dict[str, list[str]]]:
    """Return a function that says what checkpoints call the matrices that make stacks.

    It takes a module's name in the model, with its final dot, and gives names by stack, in the order in which
    transformers joins them. Stacks that no checkpoint has expert by expert are not among them.
    """
    found = [
        (re.compile(re.escape(target.replace("\\", "")) + "$"), [_leaf(s) for s in converter.source_patterns])
        for converter in converters_of(model)
        for target in converter.target_patterns
        if all("*" in source for source in converter.source_patterns)
    ]

    def names(prefix: str) -> dict[str, list[str]]:
        made: dict[str, list[str]] = {}
        for stack in stacks_of(model.get_submodule(prefix[:-1])):
            for target, leaves in found:
                if target.search(prefix + stack):
                    made.setdefault(stack, leaves)
        return made

    return names


def _leaf(pattern: str) -> str:
    """The name of an expert's matrix in a pattern such as `mlp.experts.*.w1.weight`."""
    return pattern.replace("\\", "").rpartition("*.")[2].removesuffix("$").removesuffix(".weight")


def converters_of(model: Any) -> list[Any]:
    """Return transformers' own rules by which stacks are made of what checkpoints keep."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]


def aliases(name: str) -> list[str]:
    """Return what a checkpoint may call a parameter."""
    return [name, *(name.replace(ours, theirs) for ours, theirs in _ALIASES if ours in name)]


def stack_of(name: str) -> str | None:
    """Return what the matrices of one stack are called together, a star in place of the expert's number; else None."""
    before, number, rest = _parts(name)
    return f"{before}.experts.*.{rest}" if number else None


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a matrix belongs to, None if it belongs to none."""
    number = _parts(name)[1]
    return int(number) if number else None


def _parts(name: str) -> tuple[str, str, str]:
    """What stands before an expert's number in a name, the number, and what stands after; no number, no expert."""
    before, _, after = name.partition(".experts.")
    number, _, rest = after.partition(".")
    return before, number if number.isdecimal() else "", rest
