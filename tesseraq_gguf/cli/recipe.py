"""The command that tells how a file was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tesseraq_gguf.cli.output import print_json, print_line
from tesseraq_gguf.cli.parameters import Json
from tesseraq_gguf.errors import UsageError

_SAID = {"version": "tesseraq-gguf", "calibration": "calibration text", "runtime": "runtime"}


def recipe(file: Annotated[Path, typer.Argument(help="A GGUF file that convert made.")], as_json: Json = False) -> None:
    """Print the command that makes a file again.

    Paths are not in the file, only names: of the model, if it was a folder, and of texts. The same command, version and
    machine give the same bytes. What else is known of how it was made comes after it, on stderr.

    \b
    Examples:
      tesseraq-gguf recipe out.gguf
      tesseraq-gguf recipe out.gguf --json
    """
    from tesseraq_gguf.gguf_files.inspection import inspect

    said = inspect(file).tesseraq
    if "command" not in said:
        raise UsageError(f"{file} does not say how it was made: it was not learned here, or by an earlier version")
    if as_json:
        print_json(said)
        return
    print(said["command"])
    for key, name in _SAID.items():
        if key in said:
            print_line(f"{name}: {said[key]}", "dim")
