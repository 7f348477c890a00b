"""Stand-ins for modules of a transformers model: for a while, so that its own `forward` can be run in part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import ModelError


class BlockStandIn(nn.Module):
    """Stands in for a block: remembers what it is handed, returns the hidden states unchanged or gives others.

    Args:
        block: read for what models look at while they loop over their blocks.
        gives: to return in place of the hidden states.

    Attributes:
        hidden: what came in, [batch, length, hidden].
        arguments: keyword arguments.
    """

    def __init__(self, block: nn.Module, gives: Tensor | None = None) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}
        self._gives = gives
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for the block's own.

        Raises:
            ModelError: the model hands over more than hidden states by position.
        """
        if args:
            raise ModelError(
                "this architecture hands positional arguments to its decoder blocks, which is not supported"
            )
        self.hidden, self.arguments = hidden_states, kwargs
        return hidden_states if self._gives is None else self._gives


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its name within the root, for good."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


@contextmanager
def replaced(root: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    """Put a module in the place of another, by its name within the root, for a while."""
    original = root.get_submodule(name)
    put(root, name, replacement)
    try:
        yield
    finally:
        put(root, name, original)


@contextmanager
def placeholders(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Give parameters that are on the meta device zeros that take no memory, float32."""
    empty = [
        (module, name, parameter)
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in empty:
        zero = torch.zeros(1, device=device).expand(parameter.shape)
        setattr(module, name, nn.Parameter(zero, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in empty:
            setattr(module, name, parameter)
