"""Measure GGUF files of one model against its 16-bit file. Needs the runtime.

tesseraq-gguf convert demo f16.gguf --type f16
python examples/compare.py f16.gguf valid.txt learned.gguf rounded.gguf
"""

from __future__ import annotations

import sys

from tesseraq_gguf import evaluate


def main(reference: str, text: str, *files: str, ctx: int = 512, chunks: int | None = 20) -> None:
    """Print a line for each file: the better one has less divergence."""
    print(f"{'file':24} {'MB':>8} {'bits':>6} {'perplexity':>18} {'divergence':>11} {'same token':>11}")
    for file in files:
        found = evaluate(file, text, ctx=ctx, chunks=chunks, reference=reference)
        perplexity = f"{found.perplexity:.2f} ± {found.perplexity_error:.2f}"
        size = f"{found.bytes / 1e6:8.1f} {found.bpw:6.2f}"
        print(f"{file:24} {size} {perplexity:>18} {found.kld:11.4f} {found.top1_agreement:11.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
