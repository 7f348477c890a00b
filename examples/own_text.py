"""Calibrate on a text of your own, and on text that the model writes itself.

python examples/own_text.py demo mine.txt out.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.learning.own_text import OwnText


def main(model: str, mine: str, out: str, tokens: int = 131072, preset: str = "balanced", **fields: Any) -> None:
    """Let the model write, put both texts together, and learn on them."""
    written, both = Path(f"{out}.own.txt"), Path(f"{out}.both.txt")
    documents = OwnText(tokens).write(model, written)
    both.write_text(Path(mine).read_text(encoding="utf-8") + "\n\n" + written.read_text(encoding="utf-8"))
    print(f"{documents} documents of the model's own, {both.stat().st_size / 1e6:.1f} MB of text together")
    report = convert(Recipe(model, out, preset=preset, calibration=both, **({"samples": 1024} | fields)))
    print(f"{report.out}: divergence {report.divergence:.4f} on {report.held_out} tokens held out")


if __name__ == "__main__":
    main(*sys.argv[1:])
