"""Codebooks for a whole model: what they are designed from, and how many starts a design is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.methods.lobcq import Design, Sought, block_arrays, clipped, design
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite
from tesseraq_gguf.types.bcq.grid import FEW
from tesseraq_gguf.types.bcq.packer import BLOCK
from tesseraq_gguf.types.facts import Codebooks

_STARTS = 2
"""Designs of each kind of start that a model's own codebooks are the best of."""

_ARRAYS = 200
"""Block arrays drawn from each matrix, and from what it is fed."""


@dataclass(frozen=True)
class Drawn:
    """Block arrays of one tensor.

    Attributes:
        block: index of the decoder block that it belongs to.
        name: the matrix, or the first matrix that is fed with it, within the block.
        kind: `weight` or `input`.
        arrays: float32 [arrays, length], scaled as `block_arrays` does.
    """

    block: int
    name: str
    kind: str
    arrays: Tensor


@torch.no_grad()
def draw(
    decoder: Decoder, tokens: Tensor | None, length: int, count: int, generator: torch.Generator
) -> Iterator[Drawn]:
    """Draw block arrays of every matrix of the blocks, and of what they are fed.

    Args:
        decoder: the full-precision model.
        tokens: what it is run on, int64 [samples, length]; None draws from weights alone.
        length: L_A, scalars of a block array.
        count: block arrays of each tensor, at most.
        generator: of the draw.
    """
    hidden, recorded = (None, None) if tokens is None else decoder.stem(tokens)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        fed: dict[int, tuple[str, Tensor]] = {}

        def see(name: str, x: Tensor, fed: dict[int, tuple[str, Tensor]] = fed) -> None:
            fed.setdefault(id(x), (name, x))  # what several matrices are fed counts once

        for name, module in block.matrices().items():
            if module.in_features % length == 0:
                yield Drawn(index, name, "weight", block_arrays(module.weight, length, count, generator))
                module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        if hidden is not None and recorded is not None:
            hidden = block.run(hidden.to(decoder.device), recorded.arguments[index])
            for name, x in fed.values():
                yield Drawn(index, name, "input", block_arrays(x.flatten(0, -2), length, count, generator))


def best_design(
    arrays: Tensor,
    shape: Codebooks,
    starts: int,
    generator: torch.Generator,
    say: Callable[[str], None] = lambda _: None,
) -> Design:
    """Design codebooks from several starts of each kind; return what errs least with INT6 codewords."""
    found = []
    for start in ("k-means++", "random"):
        for _ in range(starts):
            new = design(arrays, Sought(shape.group, shape.count, shape.levels), generator, start)
            said = f"{start}: {new.errors[0]:.4f} -> {new.errors[-1]:.4f} in {len(new.errors)} steps, "
            if shape.levels <= FEW:
                said += f"with INT6 codewords {new.rounded_error:.4f}, with outliers clipped "
                new = clipped(arrays, new, shape.group)
            else:
                said += "with INT6 codewords "
            say(f"{said}{new.rounded_error:.4f}")
            found.append(new)
    return min(found, key=lambda d: d.rounded_error)


def model_codebooks(decoder: Decoder, tokens: Tensor | None, seed: int, shape: Codebooks) -> Tensor:
    """Design a model's own codebooks, int8 [codebooks, levels].

    Args:
        decoder: the full-precision model.
        tokens: what it is run on, int64 [samples, length]. Without any, or where no activations are written in these
            codebooks, they are designed from weights alone.
        seed: of draws and starts.
        shape: of the codebooks.

    Raises:
        NotFiniteError: a matrix, or what it is fed, is not finite.
        ModelError: there is nothing but zeros to design from.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for d in draw(decoder, tokens if shape.activations else None, BLOCK, _ARRAYS, generator):
        what = "its numbers" if d.kind == "weight" else "what it is fed"
        check_finite({f"{decoder.block_prefix(d.block)}{d.name}.weight": d.arrays}, f"{what}, scaled,", TAKE_ANOTHER)
        drawn.append(d.arrays)
    arrays = torch.cat(drawn)
    if not len(arrays):
        raise ModelError(f"{decoder.source.name}: its matrices are all zeros: use --codebooks universal")
    return best_design(arrays, shape, _STARTS, generator).codebooks
