"""Stand-ins for modules of a transformers model: for a while, so that its own `forward` can be run in part."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Fill = Callable[[int, torch.Size, torch.device], Tensor]
"""Makes numbers of a shape for a parameter; it is told its own number, and the device."""


def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """Return what is to its surroundings the module itself, attributes and class included, but runs `forward`."""
    made = copy.copy(module)
    made.__dict__["forward"] = forward
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        made.__dict__[hooks] = OrderedDict()
    return made


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its name within the root, for good."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


@contextmanager
def replaced(root: nn.Module, replacements: dict[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of others, by their names within the root, for a while."""
    originals = {name: root.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            put(root, name, module)
        yield
    finally:
        for name, module in originals.items():
            put(root, name, module)


def _zeros(_: int, shape: torch.Size, device: torch.device) -> Tensor:
    return torch.zeros(1, device=device).expand(shape)


def varied(number: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Random numbers by which rows and columns can be told apart, float32, in as little memory as a row and a column.

    Matrices keep the size of what they multiply; vectors, such as weights of norms, are close to 1.
    """
    random = torch.Generator().manual_seed(number)
    numbers = torch.randn(max(1, sum(shape) - len(shape) + 1), generator=random).to(device)
    if len(shape) < 2:
        return numbers.mul_(0.1).add_(1).view(shape)
    # element (i, j) is number i + j: every row is the one above, moved by one
    return numbers.div_(math.sqrt(shape[-1])).as_strided(shape, (1,) * len(shape))


@contextmanager
def placeholders(modules: Iterable[nn.Module], device: torch.device, fill: Fill = _zeros) -> Iterator[None]:
    """Give parameters that are on the meta device numbers that take no memory, float32.

    Args:
        modules: whose own parameters.
        device: of the numbers.
        fill: makes them; by default they are zeros.
    """
    empty = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for number, (module, name, parameter) in enumerate(empty):
        setattr(module, name, nn.Parameter(fill(number, parameter.shape, device), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in empty:
            setattr(module, name, parameter)


@contextmanager
def watching(modules: dict[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `see` with the name of each of some modules that begins to run inside, and its arguments by position."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: see(name, args))  # type: ignore[misc]
            hooks.callback(handle.remove)
        yield
