"""Design BCQ4's universal codebooks from every second decoder block of a model; measure them on the others.

Weights and activations count alike: as many block arrays of both are drawn from each matrix and from what it is fed.
The best of several starts is kept. On tensors of the other blocks the universal codebooks are compared with codebooks
designed for these blocks, and for each tensor alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.calibration import load_calibration
from tesseraq_gguf.converter.packers import bcq
from tesseraq_gguf.methods import lobcq
from tesseraq_gguf.models import Decoder, resolve_model

BLOCK, ARRAY, COUNT = 8, 64, 8
"""L_b, L_A and N_c of BCQ4."""


@torch.no_grad()
def tensors(decoder: Decoder, tokens: Tensor) -> Iterator[tuple[int, str, Tensor]]:
    """Yield block, name and values, [rows, columns], of every matrix and of every input of matrices."""
    hidden, recorded = decoder.stem(tokens)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        fed: dict[int, tuple[str, Tensor]] = {}
        for name, module in block.matrices().items():
            yield index, f"{index}.{name} weight", module.weight

            def see(_: object, args: tuple[Tensor, ...], name: str = name) -> None:
                fed.setdefault(id(args[0]), (name, args[0]))  # what several matrices are fed counts once

            module.register_forward_pre_hook(see)
        hidden = block.run(hidden, recorded.arguments[index])
        yield from ((index, f"{index}.{name} input", x.flatten(0, -2)) for name, x in fed.values())


def best(
    arrays: Tensor, starts: int, generator: torch.Generator, say: Callable[[str], None] = lambda _: None
) -> lobcq.Design:
    """Design from several starts of each kind; return what errs least with INT6 codewords."""
    found = []
    for start in ("k-means++", "random"):
        for _ in range(starts):
            found.append(lobcq.design(arrays, BLOCK, COUNT, start=start, generator=generator))
            first, last = found[-1].errors[0], found[-1].errors[-1]
            say(f"{start}: {first:.4f} -> {last:.4f} in {len(found[-1].errors)} steps, INT6 {found[-1].rounded_error:.4f}")
    return min(found, key=lambda d: d.rounded_error)


def main() -> None:
    """Design, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    drawn = [(i, n, lobcq.block_arrays(t, ARRAY, options.arrays, generator)) for i, n, t in tensors(decoder, tokens)]
    learned = torch.cat([arrays for index, _, arrays in drawn if index % 2 == 0])
    print(f"{len(learned)} block arrays of {ARRAY} to design from")
    universal = best(learned, options.starts, generator, print).codebooks
    universal = universal[universal.float().mean(1).argsort()]
    print(json.dumps(universal.tolist()))

    for kind in ("weight", "input"):
        others = [(name, arrays) for index, name, arrays in drawn if index % 2 and name.endswith(kind)]
        together = torch.cat([arrays for _, arrays in others])
        own = best(together, options.starts, generator).rounded_error
        blocks = lobcq.on_lattice(together).view(-1, BLOCK)
        mean = lobcq.assign(blocks, universal.float())[1]
        energy = float(together.square().mean())
        print(f"{kind}s of the other blocks, relative squared error: universal {mean / energy:.6f}, "
              f"designed for them {own / energy:.6f} ({mean / own - 1:+.1%})")  # fmt: skip
        picked = torch.randperm(len(others), generator=generator)[: options.tensors].tolist()
        for name, arrays in (others[i] for i in sorted(picked)):
            alone = best(arrays, options.starts, generator).rounded_error
            ours = lobcq.assign(lobcq.on_lattice(arrays).view(-1, BLOCK), universal.float())[1]
            print(f"  {name}: {ours / alone - 1:+.1%} against codebooks of its own")
    if not options.dry:
        bcq.write_universal(universal.numpy())


if __name__ == "__main__":
    main()
