"""The command that lets a model write text to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tesseraq_gguf.cli.output import bar, quieten_transformers, size
from tesseraq_gguf.runtime.progress import SilentReporter


def write_text(
    model: Annotated[str, typer.Argument(help="The model, as convert takes it.")],
    out: Annotated[Path, typer.Argument(help="The text file to write.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to sample.")] = 131072,
    seqlen: Annotated[int, typer.Option(help="Most tokens of a document.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    seed: Annotated[int, typer.Option(help="The same seed, options and machine give the same text.")] = 0,
) -> None:
    """Let a model write text of its own, to calibrate on.

    Learning at 2 bits wants more text than most people have at hand, and of many kinds. A model's own text is of all
    the kinds that it knows. Mix it with text like the one the model is for. The whole model is in memory meanwhile.

    \b
    Examples:
      tesseraq-gguf write-text demo own.txt
      cat mine.txt own.txt > both.txt
      tesseraq-gguf convert demo out.gguf --calibration both.txt --samples 1024
    """
    from tesseraq_gguf.learning.own_text import OwnText

    class Bar(SilentReporter):
        """Shows stages, and the steps of the writing."""

        def stage(self, text: str) -> None:
            watch(text, 0, 0)

        def advance(self, done: int, total: int) -> None:
            watch("writing", done, total)

    text = OwnText(tokens, seqlen, seed)
    quieten_transformers()
    with bar() as watch:
        documents = text.write(model, out, device, Bar())
    print(f"{out}: {documents:,} documents, {size(out.expanduser().stat().st_size)}")
