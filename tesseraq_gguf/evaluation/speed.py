"""How fast GGUF files run, measured in turns, so that what else the machine does is felt by all of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tesseraq_gguf.errors import EvaluationError
from tesseraq_gguf.runtime.locate import find_runtime
from tesseraq_gguf.runtime.log import errors_in, first_reason
from tesseraq_gguf.runtime.threads import usable_cores

TOOL = "llama-bench"
PROMPT, ANSWER = 512, 64
"""Tokens of a prompt that is read, and of an answer that is given."""

ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """The best of several rounds.

    Attributes:
        prompt: tokens of a prompt read in a second.
        answer: tokens of an answer given in a second.
    """

    prompt: float
    answer: float


def speeds(
    files: Sequence[Path], rounds: int = ROUNDS, watch: Callable[[str, int, int], None] = lambda *_: None
) -> dict[Path, Speed]:
    """Run every file once in every round.

    Raises:
        RuntimeMissingError: the runtime is not built.
        EvaluationError: llama-bench fails.
    """
    tool = find_runtime().tool(TOOL)
    best = dict.fromkeys(files, Speed(0.0, 0.0))
    done = 0
    for _ in range(rounds):
        for file in files:
            watch("timing", done, rounds * len(files))
            found, before = _timed(tool, file), best[file]
            best[file] = Speed(max(found.prompt, before.prompt), max(found.answer, before.answer))
            done += 1
    watch("timing", done, done)
    return best


def _timed(tool: Path, file: Path) -> Speed:
    command = [str(tool), "-m", str(file), "-p", str(PROMPT), "-n", str(ANSWER), "-r", "1", "-t", str(usable_cores())]
    run = subprocess.run([*command, "-o", "jsonl"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    said = run.stderr.decode("utf-8", "replace")
    rows = [json.loads(line) for line in run.stdout.decode("utf-8", "replace").splitlines() if line.startswith("{")]
    found = {bool(row["n_gen"]): float(row["avg_ts"]) for row in rows}
    if run.returncode or len(found) != 2:
        reason = first_reason(errors_in(said)) or f"exit code {run.returncode}"
        raise EvaluationError(f"{TOOL} failed on {file}: {reason}", said)
    return Speed(prompt=found[False], answer=found[True])
