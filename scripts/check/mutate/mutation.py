"""A mutation: a small change of one file that makes the program wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """What changes.

    Attributes:
        name: says what is wrong then.
        file: path from the root of the tree.
        before: text of the file as it is.
        after: its text with the mutation.
        tests: files or tests that should notice, most likely ones first.
        drawn: whether it is one of those that were drawn, not of the list.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    drawn: bool = False

    @property
    def line(self) -> int:
        """First line that changes, counted from 1."""
        return self._same_lines()[0] + 1

    def diff(self) -> str:
        """Return the lines that change, as a diff without context or headers."""
        head, tail = self._same_lines()
        old, new = (text.splitlines()[head:] for text in (self.before, self.after))
        gone = [f"-{line}" for line in old[: len(old) - tail]]
        return "\n".join([*gone, *(f"+{line}" for line in new[: len(new) - tail])])

    def _same_lines(self) -> tuple[int, int]:
        """How many lines are the same at the beginning, and then at the end."""
        old, new = self.before.splitlines(), self.after.splitlines()
        head = _same(old, new)
        return head, _same(old[head:][::-1], new[head:][::-1])


def _same(one: list[str], other: list[str]) -> int:
    """How many lines are the same at the beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class StaleError(ValueError):
    """A mutation of the list does not fit the code any more."""


def replaced(root: Path, name: str, file: str, search: str, replacement: str, tests: tuple[str, ...]) -> Mutation:
    """Return the mutation that puts one text for another.

    Raises:
        StaleError: the text is not there exactly once.
    """
    before = (root / file).read_text(encoding="utf-8")
    if (count := before.count(search)) != 1:
        raise StaleError(f"'{name}': {file} has its text {count} times, not once; mend scripts/check/mutate/named.py")
    return Mutation(name, file, before, before.replace(search, replacement), tests)
