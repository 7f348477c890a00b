"""The command that looks at the machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tesseraq_gguf.cli.output import bar, print_json
from tesseraq_gguf.cli.parameters import Json
from tesseraq_gguf.printing import printable

_MARKS = {"good": ("✓", "green"), "poor": ("!", "yellow"), "bad": ("✗", "red")}


def doctor(
    speed: Annotated[bool, typer.Option(help="Try speed, for ten seconds.")] = True, as_json: Json = False
) -> None:
    """Tell what this machine has for learning and running, what is amiss, and what to do about it.

    Versions, the runtime, the processor and the kernels it gets, GPUs, memory, disks, and speed against what is usual.
    It ends with exit code 1 where something does not work.

    \b
    Examples:
      tesseraq-gguf doctor
      tesseraq-gguf doctor --no-speed --json
    """
    from tesseraq_gguf.evaluation.doctor import Finding, examine

    found: list[Finding] = []
    with bar() as watch:
        for finding in examine(speed, watch):
            found.append(finding)
            if not as_json:
                _print(finding.topic, finding.state, finding.said, finding.advice)
    if as_json:
        print_json([asdict(finding) for finding in found])
    if any(finding.state == "bad" for finding in found):
        raise typer.Exit(1)


def _print(topic: str, state: str, said: str, advice: str) -> None:
    mark, style = _MARKS[state]
    line = Text.assemble((f"{mark} ", style), (f"{topic:<12}", "bold"), printable(said))
    Console().print(line, soft_wrap=True)
    if advice:
        Console().print(Text(f"  {'':<12}→ {printable(advice)}", style=style), soft_wrap=True)
