# needs: extras=test runtime=cpu
"""Say which architectures can be learned, and write the table into the docs.

A tiny model of each, with random weights, is walked block by block, and written as Q8_0 and as learned TSQ3; logits are
held against transformers' own. Outcomes are kept in docs/guides/architectures.json: only what is asked for is measured
anew, or what is not there yet.

    scripts/run check architectures                       what is missing; all takes half an hour on two cores
    scripts/run check architectures --only 'qwen3|glm'    measure some of them anew
    scripts/run check architectures --report              only write the page
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.markers import write_part

from check.architectures.columns import COLUMNS, MADE, Outcome
from check.architectures.forks import Ended, in_forks
from check.architectures.measure import outcomes
from check.architectures.models import ARCHITECTURES, Architecture
from check.architectures.page import Entry, table
from tesseraq_gguf.compute.devices import learning_dtype

ROOT = Path(__file__).resolve().parents[3]
_JSON, _PAGE = "guides/architectures.json", "guides/architectures.md"


def main() -> None:
    """Measure, keep the outcomes, write the page."""
    options = _parser().parse_args()
    kept = options.docs / _JSON
    entries = _read(kept)
    if not options.report:
        wanted = [a.name for a in ARCHITECTURES if _is_wanted(a, options.only, entries)]
        options.logs.mkdir(parents=True, exist_ok=True)
        learning_dtype(torch.device("cpu"))  # measured once, for all forks
        for ended in in_forks(wanted, partial(_measure, options.columns), options.jobs, options.limit, options.logs):
            entry = entry_of(ended, options.columns)
            entries[ended.name] = entry.beside(entries.get(ended.name))
            _keep(kept, entries)
            print(f"{ended.name:<18} {_line(entry)} ({ended.seconds:.0f} s)", flush=True)
    write_part(options.docs / _PAGE, table(entries))


def _measure(columns: Sequence[str], name: str) -> Iterator[tuple[str, Outcome]]:
    with tempfile.TemporaryDirectory(prefix="architectures-") as folder:
        yield from outcomes(name, Path(folder), columns)


def entry_of(ended: Ended, columns: Sequence[str]) -> Entry:
    """Return what a process told of an architecture; where it ended early, the column that it was at has the reason."""
    found: dict[str, Outcome] = dict(ended.told)
    left = [column for column in (MADE, *columns) if column not in found]
    if left and found.get(MADE, Outcome()).good:
        found[left[0]] = Outcome(ended.reason)
    return Entry(found, date.today().isoformat(), ended.seconds)


def _is_wanted(architecture: Architecture, only: str | None, entries: dict[str, Entry]) -> bool:
    if only:
        return bool(re.search(only, architecture.name))
    return architecture.name not in entries


def _line(entry: Entry) -> str:
    return ", ".join(f"{column} {outcome.reason or '✔'}" for column, outcome in entry.outcomes.items())


def _read(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        return {}
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: Entry({c: Outcome(**o) for c, o in e["outcomes"].items()}, e["date"], e["seconds"])
        for name, e in stored.items()
    }


def _keep(file: Path, entries: dict[str, Entry]) -> None:
    known = {a.name: entries[a.name] for a in ARCHITECTURES if a.name in entries}
    text = json.dumps({name: asdict(entry) for name, entry in known.items()}, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/run check architectures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", metavar="REGEX", help="measure these anew; by default what was never measured")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS[1:], default=COLUMNS[1:], help="measure these alone")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one of them")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where page and outcomes are")
    parser.add_argument("--logs", type=Path, default=ROOT / "build/architectures", help="what is said meanwhile")
    parser.add_argument("--report", action="store_true", help="only write the page")
    return parser


if __name__ == "__main__":
    main()
