"""Files against one reference: divergence, perplexity, size, memory and speed, in one run.

Divergence and perplexity are those of llama-perplexity's `--kl-divergence`: the second half of every chunk counts, and
of the divergence those words that the reference gives more than e^-16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf import arguments
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.evaluation.generation import Generated, check_count, generate
from tesseraq_gguf.evaluation.perplexity import check_request
from tesseraq_gguf.evaluation.side_by_side import Findings, Positions, Text, run, tokenised
from tesseraq_gguf.evaluation.speed import Speed, speeds
from tesseraq_gguf.evaluation.tasks import LoadedTasks, TaskResult, check_limit, evaluate_tasks, load_tasks
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.inspection import Inspection, inspect
from tesseraq_gguf.paths import sha256
from tesseraq_gguf.runtime.load import memory_of
from tesseraq_gguf.runtime.locate import find_runtime

Watch = Callable[[str, int, int], None]
"""Told what is counted, how much of it is done, and of how much."""


_BEGINNING = 48
"""Tokens of a chunk that a file without a chat template goes on with."""


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        reference: a GGUF file, usually the model in 16 bits.
        files: GGUF files of the same model, anybody's.
        text: a plain text file that nothing was learned on.
        ctx: tokens of a chunk.
        chunks: how many chunks are run; None takes the whole text.
        memory_at: tokens of the context whose memory is told.
        timed: whether speed is measured.
        answers: questions that every file answers, or beginnings that it goes on with; None asks none.
        tasks: tasks of lm-evaluation-harness, as `load_tasks` takes them.
        limit: items of each task that are asked; None asks all.
        shots: examples before each item; None leaves it to the task.
        fresh: whether what earlier runs found is left aside.
    """

    reference: Path
    files: tuple[Path, ...]
    text: Path
    ctx: int = 512
    chunks: int | None = None
    memory_at: int = 4096
    timed: bool = True
    answers: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Answers:
    """What a file's answers amount to; an error is one standard error.

    Attributes:
        perplexity: exp of the mean minus log-likelihood.
        perplexity_error: its error.
        log_ratio: logarithm of the perplexity's ratio to the reference's.
        log_ratio_error: its error, over pairs of positions.
        kld: mean divergence in nats per token.
        kld_error: its error.
        kld_median: half of the positions have no more.
        kld_90: nine of ten have no more.
        kld_99: 99 of 100 have no more.
        kld_999: 999 of 1000 have no more.
        kld_maximum: the largest.
        rms_dp: root of the mean squared difference of the next token's probability.
        rms_dp_error: its error.
        same_top: share of positions, 0 to 1, with the same most likely token.
        same_top_error: its error.
        tokens: positions that count.
    """

    perplexity: float
    perplexity_error: float
    log_ratio: float
    log_ratio_error: float
    kld: float
    kld_error: float
    kld_median: float
    kld_90: float
    kld_99: float
    kld_999: float
    kld_maximum: float
    rms_dp: float
    rms_dp_error: float
    same_top: float
    same_top_error: float
    tokens: int


@dataclass(frozen=True)
class Compared:
    """A file and what was found of it.

    Attributes:
        file: its path.
        facts: what is in it.
        memory: bytes of weights, cache and computing, at the context asked for.
        positions: what its answers are, position by position.
        answers: what that amounts to.
        speed: how fast it runs; None where that was not measured.
        generated: what it writes; None where it was not asked.
        tasks: what tasks found; empty where none were asked.
    """

    file: Path
    facts: Inspection
    memory: dict[str, int]
    positions: Positions = field(repr=False)
    answers: Answers
    speed: Speed | None = None
    generated: Generated | None = None
    tasks: tuple[TaskResult, ...] = ()

    def row(self) -> dict[str, Any]:
        """Return its figures by name, JSON-ready."""
        return {
            "file": str(self.file),
            "bytes": self.facts.bytes,
            "sha256": sha256(*open_gguf(self.file).parts),
            "bpw": self.facts.bpw,
            "block_bpw": self.facts.block_bpw,
            "types": {t.type: t.tensors for t in self.facts.types},
            **asdict(self.answers),
            **{f"memory_{what}": size for what, size in self.memory.items()},
            "prompt_speed": self.speed and self.speed.prompt,
            "answer_speed": self.speed and self.speed.answer,
            **{
                f"generated_{name}": value for name, value in (asdict(self.generated) if self.generated else {}).items()
            },
            **{f"task_{result.name}": result.value for result in self.tasks},
            **{f"task_{result.name}_error": result.stderr for result in self.tasks},
        }


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        request: what was compared.
        reference: the reference compared with itself: its size, memory, perplexity and speed.
        files: the others, in the order given.
        text: what they were run on.
    """

    request: Request
    reference: Compared
    files: tuple[Compared, ...]
    text: Text = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything but single positions, JSON-ready."""
        asked = {name: getattr(self.request, name) for name in ("text", "ctx", "chunks", "memory_at")}
        return {**asked, "reference": self.reference.row(), "files": [file.row() for file in self.files]}


def compare(request: Request, watch: Watch = lambda *_: None) -> Comparison:
    """Compare files with a reference.

    Args:
        request: what to compare.
        watch: told how far it is.

    Raises:
        FileFormatError: a GGUF file is missing or damaged, or llama.cpp refuses it.
        UsageError: the text is missing or too short, files have other vocabularies, one is named twice, or there is no
            such task.
        RuntimeMissingError: the runtime is not built.
        EvaluationError: a file cannot be run, its answers are not finite, or a task failed.
    """
    facts = _checked(request)
    find_runtime()
    text = _text(request)
    asked = _Tasks(request)
    findings = {file: Findings(request.reference, file, text) for file in request.files}
    for found in findings.values() if request.fresh else ():
        found.forget()
    memory = {file: memory_of(file, request.memory_at) for file in facts}
    run(request.reference, findings, text, watch)
    timed = speeds([*facts], watch=watch) if request.timed else {}
    count, begun = request.answers, _beginnings(text)
    wrote = {file: generate(file, begun, count, watch) for file in facts} if count else {}

    did = {file: asked.of(file, watch) for file in facts}

    def compared(file: Path, positions: Positions) -> Compared:
        what = answers_of(positions), timed.get(file), wrote.get(file), did[file]
        return Compared(file, facts[file], memory[file], positions, *what)

    files = tuple(compared(file, found.positions) for file, found in findings.items())
    return Comparison(request, compared(request.reference, _with_itself(files[0].positions)), files, text)


class _Tasks:
    """Tasks that every file is asked, loaded before anything else is done: most that is wrong with them shows there."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._loaded = self._load() if request.tasks else None

    def of(self, file: Path, watch: Watch) -> tuple[TaskResult, ...]:
        """Ask a file."""
        if not self._request.tasks:
            return ()
        loaded, self._loaded = self._loaded or self._load(), None  # what is loaded serves once
        found = evaluate_tasks(
            file, loaded, self._request.limit, lambda what, *done: watch(f"{file.name}: {what}", *done)
        )
        return found.results

    def _load(self) -> LoadedTasks:
        return load_tasks(self._request.tasks, self._request.shots)


def answers_of(positions: Positions) -> Answers:
    """Sum up what was found position by position."""
    kld = positions.kld.astype(np.float64).ravel()
    nll, nll_error = _mean(positions.nll)
    ratio, ratio_error = _mean(positions.nll.astype(np.float64) - positions.base_nll)
    divergence, divergence_error = _mean(kld)
    median, most, nearly_all, all_but_few = (float(q) for q in np.quantile(kld, (0.5, 0.9, 0.99, 0.999)))
    square, square_error = _mean(positions.dp.astype(np.float64) ** 2)
    rms = math.sqrt(square)
    same, same_error = _mean(positions.same)
    return Answers(
        perplexity=math.exp(nll),
        perplexity_error=math.exp(nll) * nll_error,
        log_ratio=ratio,
        log_ratio_error=ratio_error,
        kld=divergence,
        kld_error=divergence_error,
        kld_median=median,
        kld_90=most,
        kld_99=nearly_all,
        kld_999=all_but_few,
        kld_maximum=float(kld.max()),
        rms_dp=rms,
        rms_dp_error=square_error / (2 * rms) if rms else 0.0,
        same_top=same,
        same_top_error=same_error,
        tokens=kld.size,
    )


def _mean(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and its standard error."""
    values = values.astype(np.float64).ravel()
    return float(values.mean()), float(values.std() / math.sqrt(max(1, values.size - 1)))


def _with_itself(positions: Positions) -> Positions:
    """What is found of a reference, from what was found of a file beside it."""
    nothing = np.zeros_like(positions.kld)
    return replace(positions, nll=positions.base_nll, kld=nothing, dp=nothing, same=np.ones_like(nothing))


def _beginnings(text: Text) -> list[str]:
    """Beginnings of the chunks of a text, for files that go on with it."""
    chunks = text.chunks[:, 1 : 1 + _BEGINNING]
    return ["".join(text.pieces.get(int(token), "") for token in chunk) for chunk in chunks]


def _checked(request: Request) -> dict[Path, Inspection]:
    """Refuse what cannot be compared, and return what is in the files, the reference's first."""
    arguments.integer("memory_at", request.memory_at, 1, "token")
    if request.answers is not None:
        check_count(arguments.spelled("generate"), request.answers)
    check_limit(request.limit)
    if not request.files:
        raise UsageError("nothing to compare: give a reference and at least one more file")
    every = [file.absolute() for file in (request.reference, *request.files)]
    if twice := next((file for file in every if every.count(file) > 1), None):
        raise UsageError(f"{twice.name} is given twice")
    for file in request.files:
        check_request(file, request.text, request.ctx, request.chunks, request.reference)
    return {file: inspect(file) for file in (request.reference, *request.files)}


def _text(request: Request) -> Text:
    """The chunks of the text that are run.

    Raises:
        UsageError: it is too short, or no text: llama.cpp would end the process.
    """
    read = request.text.read_bytes()
    try:
        read.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{request.text} is not UTF-8 text: byte {error.start:,} is none of a character") from None
    text = tokenised(request.reference, read, request.ctx)
    if text.length < 2 * request.ctx:
        raise UsageError(
            f"the text {request.text} is too short: {text.length} tokens; chunks of {request.ctx} need at least "
            f"{2 * request.ctx}. Take a longer text or a smaller {arguments.spelled('ctx')}"
        )
    return replace(text, chunks=text.chunks[: request.chunks])
