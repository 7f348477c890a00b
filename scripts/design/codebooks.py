# needs: extras=demo,build
"""Design BCQ4's universal codebooks from a model's blocks, and measure them on the others.

Weights and activations count alike: as many block arrays of both are drawn from each matrix and from what it is fed.
The best of several starts is kept. On tensors of the other blocks the universal codebooks are compared with codebooks
designed for these blocks, and for each tensor alone.

They are written where Python and C read them, and change what every such file means: not after files are out.

    scripts/run design codebooks --calibration calib.txt
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tesseraq_gguf.learning.calibration import load_calibration
from tesseraq_gguf.learning.codebooks import best_design, draw
from tesseraq_gguf.methods import lobcq
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.types.bcq import packer as bcq


def _error(arrays: Tensor, codebooks: Tensor) -> float:
    return lobcq.assign(lobcq.on_lattice(arrays).view(-1, bcq.GROUP), codebooks.float())[1]


def main() -> None:
    """Design, write, compare."""
    parser = argparse.ArgumentParser(
        prog="scripts/run design codebooks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="a text file; default: the text that convert takes by default")
    parser.add_argument("--sequences", type=int, default=8, help="of 256 tokens, that activations are taken from")
    parser.add_argument("--arrays", type=int, default=1000, help="block arrays drawn from each tensor")
    parser.add_argument("--starts", type=int, default=8, help="of each kind")
    parser.add_argument("--tensors", type=int, default=6, help="others to design own codebooks for, of each kind")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()

    source = resolve_model(options.model, print)
    decoder = Decoder(source, torch.device("cpu"))
    tokens = load_calibration(source, options.calibration, options.sequences, 256, 0).tokens
    generator = torch.Generator().manual_seed(0)
    drawn = list(draw(decoder, tokens, bcq.BLOCK, options.arrays, generator))
    learned = torch.cat([d.arrays for d in drawn if d.block % 2 == 0])
    print(f"{len(learned)} block arrays of {bcq.BLOCK} to design from")
    universal = best_design(learned, bcq.CODEBOOKS, options.starts, generator, print).codebooks
    universal = universal[universal.float().mean(1).argsort()]
    print(universal.tolist())

    for kind in ("weight", "input"):
        others = [d for d in drawn if d.block % 2 and d.kind == kind]
        together = torch.cat([d.arrays for d in others])
        own = best_design(together, bcq.CODEBOOKS, options.starts, generator).rounded_error
        error, energy = _error(together, universal), float(together.square().mean())
        print(
            f"{kind}s of the other blocks, relative squared error: universal {error / energy:.6f}, "
            f"designed for them {own / energy:.6f} ({error / own - 1:+.1%})"
        )
        picked = torch.randperm(len(others), generator=generator)[: options.tensors].tolist()
        for d in (others[i] for i in sorted(picked)):
            alone = best_design(d.arrays, bcq.CODEBOOKS, options.starts, generator).rounded_error
            against = _error(d.arrays, universal) / alone - 1
            print(f"  block {d.block}, {d.kind} of {d.name}: {against:+.1%} against codebooks of its own")
    if not options.dry:
        bcq.write_universal(universal.numpy())


if __name__ == "__main__":
    main()
