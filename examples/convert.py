"""Convert a model from Python, and print how far it is.

python examples/convert.py demo out.gguf
"""

from __future__ import annotations

import sys
from typing import Any

from tesseraq_gguf import Recipe, convert


class Lines:
    """What `convert` tells: stages, notes, steps within a block, and finished blocks."""

    def stage(self, text: str) -> None:
        """A new stage begins."""
        print(text)

    def advance(self, done: int, total: int) -> None:
        """The stage has done so many steps."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        print(" ", text)

    def step(self, block: int, blocks: int, done: int, total: int, doing: str) -> None:
        """The running block has done so many steps; there are 0 in all where they are not counted."""
        share = f"{done / total:4.0%}" if total else doing
        print(f"\r\033[K  block {block + 1} of {blocks}: {share}", end="", flush=True)

    def block(self, result: Any, blocks: int) -> None:
        """A block is finished and on disk: stopped now, the same call goes on after it."""
        print(f"\r  block {result.index + 1} of {blocks}: {result.seconds:.0f} s")
        if result.verdict:
            print(f"    loss on sequences held out: {result.verdict.start:.4g}, learned: {result.verdict.end:.4g}")


def main(model: str, out: str, preset: str = "fast", **fields: Any) -> None:
    """Convert, and say what came of it. `fields` are any others of a recipe."""
    report = convert(Recipe(model, out, preset=preset, **fields), Lines())
    print(
        f"{report.out}: {report.bytes / 1e6:.1f} MB, {report.block_bits_per_weight:.2f} bits per weight of the blocks"
    )
    print(f"divergence from the original's answers: {report.divergence:.4f} nats per token")
    print(f"runs on {report.runs_on}")


if __name__ == "__main__":
    main(*sys.argv[1:])
