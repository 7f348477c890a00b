"""Where numbers stop being finite: damaged weights, activations that overflow, learning that ran away.

None of it may reach a file: rounding turns NaN into codes that look like any others. So what is measured and what is
learned is checked, and the error names the block and the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import NotFiniteError

if TYPE_CHECKING:
    from tesseraq_gguf.models.decoder import LoadedBlock

TAKE_ANOTHER = "The checkpoint is damaged, or its numbers are too large for float32: take another one"
"""What to do about a model that is not finite before anything is quantised."""

_LARGEST = 1e18
"""Magnitudes beyond it overflow when they are squared."""


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return bool(torch.isfinite(tensor).all())


def check_finite(tensors: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Look at numbers that belong to matrices.

    Args:
        tensors: by checkpoint name of the matrix.
        what: they are, such as `the second moments of what it is fed`.
        advice: what a user can do, a sentence without its stop.

    Raises:
        NotFiniteError: names the first matrix of which some are not finite.
    """
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise NotFiniteError(f"{name}: {what} are not finite. {advice}")


def origin(block: LoadedBlock, run: Callable[[], object]) -> str:
    """Say where numbers get out of hand when a block is run: `from model.layers.0.mlp.up_proj.weight on`."""
    with _watched(block) as found:
        run()
    if not found:
        return f"in {block.prefix.rstrip('.')}"
    name, fed = found[0]
    return f"{'in front of' if fed else 'from'} {block.prefix}{name}.weight{'' if fed else ' on'}"


@contextmanager
def _watched(block: LoadedBlock) -> Iterator[list[tuple[str, bool]]]:
    """Collect matrices whose input (True) or output is not finite, or too large to be squared, in order."""
    found: list[tuple[str, bool]] = []

    def wild(x: Tensor) -> bool:
        return bool(x.numel()) and not float(x.abs().amax()) <= _LARGEST

    def hook(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if wild(args[0]):
                found.append((name, True))
            elif wild(out):
                found.append((name, False))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in block.matrices().items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
