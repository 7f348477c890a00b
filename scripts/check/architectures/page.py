"""The table of architectures, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from check.architectures.columns import COLUMNS, FILES, MADE, WALK, Outcome
from check.architectures.models import ARCHITECTURES, Architecture

_HEADINGS = {WALK: "walk", "q8_0": "Q8_0, rounded", "tesseraq": "TSQ3, `tesseraq`", "gptq": "TSQ3, `gptq`"}


@dataclass(frozen=True)
class Entry:
    """What is known of an architecture.

    Attributes:
        outcomes: by column.
        date: on which it was measured, as in ISO 8601.
        seconds: that it took.
    """

    outcomes: Mapping[str, Outcome]
    date: str
    seconds: float

    def beside(self, earlier: Entry | None) -> Entry:
        """Return the entry with what an earlier one has of columns that were not measured now."""
        return self if earlier is None else replace(self, outcomes={**earlier.outcomes, **self.outcomes})

    @property
    def good(self) -> bool:
        """Whether all its columns are ✔."""
        return len(self.outcomes) == len(COLUMNS) and all(o.good for o in self.outcomes.values())


def table(entries: Mapping[str, Entry]) -> str:
    """Return the part of the page that is made of the outcomes."""
    known = [(a, entries[a.name]) for a in ARCHITECTURES if a.name in entries]
    lines = [_summary([entry for _, entry in known]), ""]
    headings = ("architecture", "blocks", *_HEADINGS.values(), "not learned")
    lines += [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += [_row(architecture, entry) for architecture, entry in known]
    return "\n".join(lines)


def _summary(entries: list[Entry]) -> str:
    dates = sorted({entry.date for entry in entries})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    good = sum(entry.good for entry in entries)
    left = len(ARCHITECTURES) - len(entries)
    more = f"\n{left} more are tried and have not been measured yet." if left else ""
    return f"{good} of {len(entries)} have every ✔. Measured {when} by `scripts/run check architectures`.{more}"


def _row(architecture: Architecture, entry: Entry) -> str:
    if architecture.obstacle and entry.good:
        raise ValueError(f"{architecture.name} has every ✔: take its obstacle out")
    cells = [*_cells(entry, architecture.obstacle), _not_learned(entry)]
    return f"| `{architecture.name}` | {architecture.kind} | {' | '.join(cells)} |"


def _not_learned(entry: Entry) -> str:
    """Matrices of blocks that have 8 bits or more in a learned file, as the program notes them."""
    notes = [note for outcome in entry.outcomes.values() for note in outcome.notes]
    found = [match[1] for note in notes if (match := re.fullmatch(r"(\S+) of .* blocks?, .*: not learned", note))]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(found))


def _cells(entry: Entry, obstacle: str) -> Iterator[str]:
    """A cell for each column; a reason stands once, where it is met first, and what is in the way beside the first."""
    said: set[str] = set()
    made = entry.outcomes.get(MADE, Outcome())
    for column in _HEADINGS:
        outcome = made if made.reason else entry.outcomes.get(column)
        if outcome is None:
            yield "not reached"
        elif outcome.good:
            yield "✔"
        elif outcome.reason in said:
            yield "as before"
        else:
            known = "" if said or column not in FILES else obstacle
            yield _explained(outcome, known).replace("|", "\\|")
            said.add(outcome.reason)


def _explained(outcome: Outcome, obstacle: str) -> str:
    """A reason with its cause; a figure is kept, and a message of others is not."""
    if outcome.error is None:
        return obstacle or outcome.reason
    return f"{outcome.reason}: {obstacle}" if obstacle else outcome.reason
