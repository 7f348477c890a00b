"""Results on disk: one JSON file, from which a later run takes what it need not measure again."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock

from bench.quality.rows import Row
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.recipe.presets import PRESETS


@dataclass(frozen=True)
class Result:
    """What was measured on the file of a row.

    Attributes:
        key: of `result_key`; a result with another key is no longer true.
        bits: bits per weight of the block matrices.
        types: how many block matrices there are of each type.
        embedding: type of the embedding.
        perplexity: on the evaluation text.
        perplexity_error: its standard error; None if it was lost.
        kld: mean Kullback-Leibler divergence from the 16-bit model, in nats.
        top1: share of places where both find the same token most likely.
        seconds: wall time that making the file took.
        cpu_seconds: processor time that it took, of all threads; says more on a machine that does other things too.
            None if it was made in several runs that were not timed alike.
        peak_bytes: the most memory that making it took; None if that was not measured.
        variables: how many numbers were learned at once, in the largest block; None where nothing is learned.
        kept: perplexity, its error, divergence and agreement on the kept part of the calibration text, for rows of the
            study of rounding.
        gpu: name of the GPU that the file was learned on; None if there was none. The measurement is the processor's.
        commit: of the program that made and measured the file, as `git describe` has it; None if that is not known.
        recorded: the commit that brought the result, where `commit` is not known: the program is no later one.
        date: on which it was measured, or recorded, as in ISO 8601.
        bytes: size of the file; None if it was not noted.
        figures: of the presets that made it, by their names: samples, steps, rates. None if they are not known.
    """

    key: str
    bits: float
    types: dict[str, int]
    embedding: str
    perplexity: float
    perplexity_error: float | None
    kld: float
    top1: float
    seconds: float
    cpu_seconds: float | None
    peak_bytes: int | None = None
    variables: int | None = None
    kept: tuple[float, float, float, float] | None = None
    gpu: str | None = None
    commit: str | None = None
    recorded: str | None = None
    date: str | None = None
    figures: dict[str, dict[str, float]] | None = None
    bytes: int | None = None


def program(root: Path) -> str | None:
    """Return what `git describe` calls the tree, with `-dirty` if the program was changed; None outside a repository.

    Documents are not the program: rows that are measured one after the other change them.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    described = git("describe", "--always")
    changed = described and git("diff", "--name-only", "HEAD", "--", ".", ":(exclude)docs")
    return f"{described}-dirty" if changed else described or None


def figures_of(row: Row, filled: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return what the presets that a row's commands name stand for today; of a last pass only where there is one.

    Args:
        row: the row.
        filled: what stands for the names in its commands.
    """
    words = [word for command in row.commands for word in command]
    named = [after for word, after in pairwise(words) if word == "--preset"]
    figures = {preset: asdict(PRESETS[preset]) for preset in (word.format_map(filled) for word in named)}
    if "--finish" not in words:
        for each in figures.values():
            del each["finish_steps"]
    return figures


def result_key(row: Row, setting: Mapping[str, Any]) -> str:
    """Hash what decides a result: the row's commands, and how they are filled and measured."""
    decides = json.dumps([row.commands, row.padded, dict(sorted(setting.items()))])
    return hashlib.sha256(decides.encode()).hexdigest()[:16]


class Results:
    """Results by the name of their row. Several processes may measure rows for one file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, row: Row, key: str) -> Result | None:
        """Return the result of a row, None if there is none with this key."""
        result = self._read().get(row.name)
        return result if result and result.key == key else None

    def put(self, row: Row, result: Result) -> None:
        """Keep a result."""
        with FileLock(f"{self.file}.lock"):
            rows = self._read() | {row.name: result}
            text = json.dumps({name: asdict(r) for name, r in sorted(rows.items())}, indent=1)
            with temporary_sibling(self.file) as partial:
                partial.write_text(text + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Result]:
        if not self.file.is_file():
            return {}
        stored = json.loads(self.file.read_text(encoding="utf-8"))
        return {name: Result(**values) for name, values in stored.items()}
