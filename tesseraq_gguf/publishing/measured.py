"""What was measured of files, as `tesseraq-gguf compare --json` prints it: the only figures that a card has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile
from tesseraq_gguf.paths import sha256

_NEEDED = (
    "file",
    "bytes",
    "sha256",
    "bpw",
    "perplexity",
    "perplexity_error",
    "kld",
    "kld_error",
    "kld_99",
    "same_top",
    "tokens",
)


@dataclass(frozen=True)
class Measured:
    """A comparison.

    Attributes:
        text: name of the text.
        ctx: tokens of a chunk.
        memory_at: tokens of the context that memory is told at.
        reference: figures of what the files were compared with.
        rows: figures of each file, by name.
    """

    text: str
    ctx: int
    memory_at: int
    reference: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def all(self) -> tuple[Mapping[str, Any], ...]:
        """Every file's figures, the reference's first."""
        return (self.reference, *self.rows)

    @property
    def plotted(self) -> bool:
        """Whether there is something to draw, and something to draw it with."""
        return bool(self.rows) and find_spec("matplotlib") is not None

    def row_of(self, file: GgufFile) -> Mapping[str, Any] | None:
        """Return the figures of a file; None if there are none.

        Raises:
            UsageError: they are of a file of that name, but of another one.
        """
        every = [row for row in self.all if Path(row["file"]).name == file.path.name]
        if not every:
            return None
        same = [row for row in every if row["bytes"] == file.bytes]
        digest = sha256(*file.parts) if same else ""
        found = next((row for row in same if row["sha256"] == digest), None)
        if found is None:
            raise UsageError(f"what was measured of {file.path.name} is not of {file.path} as it is: compare it again")
        return found


def read_comparison(path: Path) -> Measured:
    """Read a comparison.

    Raises:
        UsageError: it is missing, or something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [data["reference"], *data["files"]]
        text, ctx, memory_at = Path(data["text"]).name, int(data["ctx"]), int(data["memory_at"])
        complete = all(isinstance(row, dict) and all(key in row for key in _NEEDED) for row in rows)
    except OSError as error:
        raise UsageError(f"the comparison {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UsageError(f"{path} is no comparison: make one with tesseraq-gguf compare REFERENCE FILE… --json > FILE")
    return Measured(text, ctx, memory_at, rows[0], rows[1:])
