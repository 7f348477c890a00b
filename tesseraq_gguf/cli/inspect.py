"""The command that shows what is in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tesseraq_gguf.cli.output import print_json
from tesseraq_gguf.cli.parameters import Json


def inspect(file: Annotated[Path, typer.Argument(help="The GGUF file.")], as_json: Json = False) -> None:
    """Show what is in a GGUF file: type, shape and bits per weight of every tensor, totals per type, where it runs.

    Any GGUF file will do, and the runtime is not needed.

    \b
    Examples:
      tesseraq-gguf inspect out.gguf
      tesseraq-gguf inspect out.gguf --json
    """
    from tesseraq_gguf.gguf_files.inspection import inspect as run
    from tesseraq_gguf.gguf_files.inspection import render

    seen = run(file)
    if as_json:
        print_json(seen.to_json())
    else:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 140)  # nobody wants names cut off in a file or a pipe
        console.print(render(seen))
