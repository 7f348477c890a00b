# needs: extras=demo,build
"""Design the universal codebooks of a BCQ type from models' blocks, and measure them on the others.

Where activations are written in the same codebooks, they count as weights do: as many block arrays of both are drawn
from each matrix and from what it is fed.
The best of several starts is kept. On tensors of the other blocks the universal codebooks are compared with codebooks
designed for these blocks, and for each tensor alone.

They are written where Python and C read them, and change what every such file means: not after files are out.

    scripts/run design codebooks --calibration calib.txt
    scripts/run design codebooks --type bcq2 --measure
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from tesseraq_gguf.learning.calibration import load_calibration
from tesseraq_gguf.learning.codebooks import Drawn, best_design, draw
from tesseraq_gguf.methods import lobcq
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.types.bcq.grid import FEW
from tesseraq_gguf.types.bcq.packer import BLOCK, shape_of, write_universal
from tesseraq_gguf.types.facts import WITH_CODEBOOKS, Codebooks, names, tensor_type
from tesseraq_gguf.types.grids import grid_of

_ROWS = 256
"""Rows of each matrix that are rounded to measure a type."""


def _error(arrays: Tensor, codebooks: Tensor, shape: Codebooks) -> float:
    if shape.levels <= FEW:
        return lobcq.widened(arrays, codebooks, shape.group)[1]
    return lobcq.assign(lobcq.on_lattice(arrays).view(-1, shape.group), codebooks.float())[1]


def _drawn(name: str, shape: Codebooks, options: argparse.Namespace, generator: torch.Generator) -> Iterator[Drawn]:
    source = resolve_model(name, print)
    tokens = None
    if shape.activations:
        tokens = load_calibration(source, options.calibration, options.sequences, 256, 0).tokens
    yield from draw(Decoder(source, torch.device("cpu")), tokens, BLOCK, options.arrays, generator)


@torch.no_grad()
def measure(name: str, type: str) -> None:
    """Round the matrices of a model's odd blocks to the nearest in types of one size, and print what that moves."""
    decoder = Decoder(resolve_model(name, print), torch.device("cpu"))
    alike = names(lambda t: t.family and t.bits_per_weight == tensor_type(type).bits_per_weight)
    errors, energy = dict.fromkeys(alike, 0.0), 0.0
    for index in range(1, len(decoder), 2):
        for module in decoder.load_block(index).matrices().values():
            weight = module.weight[:: max(1, len(module.weight) // _ROWS)].float()
            energy += float(weight.square().sum())
            for other in alike:
                grid = grid_of(other)
                errors[other] += float((grid.dequantize(grid.quantize(weight)) - weight).square().sum())
    for other, error in errors.items():
        print(f"{name}, relative squared error of {other}: {error / energy:.4f}")


def main() -> None:
    """Design, write, compare."""
    parser = argparse.ArgumentParser(
        prog="scripts/run design codebooks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--type", default="bcq4", choices=WITH_CODEBOOKS, help="a type that has them")
    parser.add_argument("--model", default=["demo"], nargs="+", help="all count alike")
    parser.add_argument("--calibration", help="a text file; default: the text that convert takes by default")
    parser.add_argument("--sequences", type=int, default=8, help="of 256 tokens, that activations are taken from")
    parser.add_argument("--arrays", type=int, default=1000, help="block arrays drawn from each tensor")
    parser.add_argument("--starts", type=int, default=8, help="of each kind")
    parser.add_argument("--tensors", type=int, default=6, help="others to design own codebooks for, of each kind")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--measure", action="store_true", help="design nothing; round to types of this one's size")
    options = parser.parse_args()
    if options.measure:
        for name in options.model:
            measure(name, options.type)
        return

    shape = shape_of(options.type)
    generator = torch.Generator().manual_seed(0)
    drawn = [d for name in options.model for d in _drawn(name, shape, options, generator)]
    learned = torch.cat([d.arrays for d in drawn if d.block % 2 == 0])
    print(f"{len(learned)} block arrays of {BLOCK} to design from")
    universal = best_design(learned, shape, options.starts, generator, print).codebooks
    universal = universal[universal.float().mean(1).argsort()]
    print(universal.tolist())

    for kind in sorted({d.kind for d in drawn}, reverse=True):
        others = [d for d in drawn if d.block % 2 and d.kind == kind]
        together = torch.cat([d.arrays for d in others])
        own = best_design(together, shape, options.starts, generator).rounded_error
        error, energy = _error(together, universal, shape), float(together.square().mean())
        print(
            f"{kind}s of the other blocks, relative squared error: universal {error / energy:.6f}, "
            f"designed for them {own / energy:.6f} ({error / own - 1:+.1%})"
        )
        picked = torch.randperm(len(others), generator=generator)[: options.tensors].tolist()
        for d in (others[i] for i in sorted(picked)):
            alone = best_design(d.arrays, shape, options.starts, generator).rounded_error
            against = _error(d.arrays, universal, shape) / alone - 1
            print(f"  block {d.block}, {d.kind} of {d.name}: {against:+.1%} against codebooks of its own")
    if not options.dry:
        write_universal(universal.numpy(), shape)


if __name__ == "__main__":
    main()
