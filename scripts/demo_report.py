"""Print what `scripts/demo` measured and what its files say: `demo_report.py FOLDER NAME=TITLE …`.

FOLDER holds NAME.eval.json, NAME.inspect.json and NAME.txt, its answer to question.txt, for each name.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path


def table(folder: Path, titles: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each file: its size, bits per weight of all and of the blocks' matrices, perplexity."""
    yield f"{'':<26}{'file':>10}{'bits per weight':>18}{'of the blocks':>16}{'perplexity':>13}"
    for name, title in titles.items():
        measured = json.loads((folder / f"{name}.eval.json").read_text())
        blocks = json.loads((folder / f"{name}.inspect.json").read_text())["block_bpw"]
        yield (
            f"{title:<26}{measured['bytes'] / 1e6:>7.1f} MB{measured['bpw']:>18.2f}{blocks:>16.2f}"
            f"{measured['perplexity']:>13.2f}"
        )


def answers(folder: Path, titles: Mapping[str, str]) -> Iterator[str]:
    """Yield the question, and what each file answers."""
    yield (folder / "question.txt").read_text().strip()
    for name, title in titles.items():
        said = " ".join((folder / f"{name}.txt").read_text().split())
        yield ""
        yield f"{title}:"
        yield textwrap.fill(said, 96, initial_indent="    ", subsequent_indent="    ")


def main() -> None:
    """Print the table, then the answers."""
    folder = Path(sys.argv[1])
    titles = dict(word.split("=", 1) for word in sys.argv[2:])
    print("\n".join(table(folder, titles)), end="\n\n")
    print("\n".join(answers(folder, {name: t for name, t in titles.items() if (folder / f"{name}.txt").exists()})))


if __name__ == "__main__":
    main()
