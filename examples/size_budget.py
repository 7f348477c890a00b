"""Give a file a size, and let each matrix have the type that costs the model's answers least.

python examples/size_budget.py demo out.gguf 200M
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tesseraq_gguf import Recipe, convert, inspect


def main(model: str, out: str, size: str | int, preset: str = "fast", **fields: Any) -> None:
    """Convert within the size, and print how many matrices of the blocks have each type."""
    report = convert(Recipe(model, out, target_size=size, preset=preset, **fields))
    matrices = [tensor for tensor in inspect(out).tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    for type, count in sorted(Counter(tensor.type for tensor in matrices).items()):
        print(f"{count:5} × {type}")
    print(f"{report.bytes:,} bytes, {report.block_bits_per_weight:.2f} bits per weight of the blocks")
    # the choice as rules, one for each matrix: edit them, and give them to Recipe(rules=…)
    print(Path(f"{out}.types").read_text().splitlines()[0], "…")


if __name__ == "__main__":
    main(*sys.argv[1:])
