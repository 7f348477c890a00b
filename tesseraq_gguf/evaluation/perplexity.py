"""How good a GGUF file is: perplexity on a text, and how far its answers are from those of a reference file.

llama.cpp's own llama-perplexity does the work, so figures compare with those that others publish. With a reference, its
log-probabilities are written to a temporary file first: 2 bytes × vocabulary for every second token of the text.
"""

from __future__ import annotations

import math
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tesseraq_gguf import arguments
from tesseraq_gguf.errors import EvaluationError, FileFormatError, UsageError
from tesseraq_gguf.gguf_files.inspection import Inspection, inspect, open_gguf
from tesseraq_gguf.runtime.locate import BUILD_COMMAND, find_runtime
from tesseraq_gguf.runtime.log import errors_in, first_reason
from tesseraq_gguf.runtime.threads import usable_cores

Watch = Callable[[str, int, int], None]
"""Receives what runs (`reference`, `model`), chunks done, and chunks in all."""

TOOL = "llama-perplexity"
_SMALLEST_CONTEXT = 16
_TAIL_LINES = 8

_NUMBER = r"(-?(?:\d[\d.e+-]*|nan|inf))"
_CHUNKS = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks")
_NOT_FINITE = re.compile(r"\[\d+\](-?(?:nan|inf))")
_TOO_SHORT = re.compile(r"the data file you provided tokenizes to only (\d+) tokens")
_PERPLEXITY = re.compile(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}")
_ROW = re.compile(rf"^ *(\d+) +{_NUMBER} ± +{_NUMBER} +{_NUMBER} ± +{_NUMBER} +{_NUMBER} ± ", re.MULTILINE)
_ROW_TOP = re.compile(rf"{_NUMBER} ± +{_NUMBER} %\s*$", re.MULTILINE)
_SUMMARY_PERPLEXITY = re.compile(rf"Mean PPL\(Q\) *: *{_NUMBER} ± *{_NUMBER}")
_SUMMARY_DIVERGENCE = re.compile(rf"Mean +KLD: *{_NUMBER} ±")
_SUMMARY_TOP = re.compile(rf"Same top p: *{_NUMBER} ±")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; `to_json` has the same keys.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the second half of every chunk.
        perplexity_error: its standard error.
        kld: mean Kullback-Leibler divergence from the reference's next-token distribution, in nats; None without one.
        top1_agreement: share of tokens, 0 to 1, whose most likely successor is the reference's; None without one.
        bytes: size of the file, all parts together.
        bpw: bits of the file per weight of the model, everything counted.
        parts: how many files it consists of.
    """

    perplexity: float
    perplexity_error: float
    kld: float | None
    top1_agreement: float | None
    bytes: int
    bpw: float
    parts: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def evaluate(
    file: Path | str,
    text: Path | str,
    ctx: int = 512,
    chunks: int | None = None,
    reference: Path | str | None = None,
    watch: Watch = lambda *_: None,
) -> Evaluation:
    """Measure a GGUF file on a text.

    Args:
        file: the GGUF file.
        text: a plain text file of at least 2 × `ctx` tokens.
        ctx: tokens of a chunk.
        chunks: how many chunks to measure; None takes the whole text.
        reference: a GGUF file to compare with, usually the same model in 16 bits.
        watch: told how far it is.

    Raises:
        FileFormatError: a GGUF file is missing or damaged.
        UsageError: the text is missing or too short, or a number or a reference cannot be meant.
        RuntimeMissingError: the runtime is not built.
        EvaluationError: llama-perplexity failed, a figure is not finite, or the disk has no room.
    """
    file, text = arguments.path("file", file), arguments.path("text", text)
    facts = check_request(file, text, ctx, chunks, reference)
    vocabulary = vocabulary_size(file)
    run = PerplexityRun(find_runtime().tool(TOOL), text, ctx, chunks, vocabulary, watch)
    if reference is None:
        perplexity, error = run.perplexity(file)
        divergence, agreement = None, None
    else:
        with tempfile.TemporaryDirectory(prefix="tesseraq-eval-") as folder:
            logits = Path(folder) / "reference.logits"
            run.save_logits(Path(reference), logits)
            perplexity, error, divergence, agreement = run.compare(file, logits)
    return Evaluation(perplexity, error, divergence, agreement, facts.bytes, facts.bpw, facts.parts)


def check_request(file: Path, text: Path, ctx: int, chunks: int | None, reference: Path | str | None) -> Inspection:
    """Refuse what cannot be measured, and return what is in the file. Arguments are those of `evaluate`.

    Raises:
        FileFormatError: a GGUF file is missing or damaged.
        UsageError: the text cannot be read, or a number or a reference cannot be meant.
    """
    arguments.integer("ctx", ctx, _SMALLEST_CONTEXT, "tokens")
    if chunks is not None:
        arguments.integer("chunks", chunks, 1)
    facts = inspect(file)
    vocabulary = vocabulary_size(file)
    if reference is not None and (other := vocabulary_size(arguments.path("reference", reference))) != vocabulary:
        raise UsageError(
            f"{reference} cannot be the reference of {file}: its vocabulary has {other:,} tokens, not {vocabulary:,}"
        )
    _check_text(text)
    return facts


def vocabulary_size(file: Path) -> int:
    """Return how many tokens a GGUF file's vocabulary has.

    Raises:
        FileFormatError: missing or damaged, or it has none.
    """
    tokens = open_gguf(file).get("tokenizer.ggml.tokens")
    count = getattr(tokens, "count", 0)
    if not count:
        raise FileFormatError(f"{file} has no vocabulary: it is not a language model")
    return int(count)


def _check_text(text: Path) -> None:
    if text.is_dir():
        raise UsageError(f"the text {text} is a folder, not a text file")
    try:
        with text.open("rb") as stream:
            empty = not stream.read(1)
    except FileNotFoundError:
        raise UsageError(f"no text at {text}") from None
    except OSError as error:
        raise UsageError(f"the text {text} cannot be read: {error.strerror}") from error
    if empty:
        raise UsageError(f"the text {text} is empty")


@dataclass(frozen=True)
class PerplexityRun:
    """Runs of llama-perplexity on one text with the same options; `evaluate` is the usual way to it.

    Attributes:
        tool: the program.
        text: what it reads.
        ctx: tokens of a chunk.
        chunks: how many chunks; None takes the whole text.
        vocabulary: tokens of the model's vocabulary.
        watch: told how far it is.
    """

    tool: Path
    text: Path
    ctx: int
    chunks: int | None
    vocabulary: int
    watch: Watch

    def perplexity(self, file: Path) -> tuple[float, float]:
        """Return perplexity and standard error."""
        said = self._execute("model", file, ["-f", str(self.text)])
        return self._final_estimate(file, said, "gave no perplexity")

    def save_logits(self, reference: Path, logits: Path) -> None:
        """Write the reference's log-probabilities."""
        arguments = ["-f", str(self.text), "--kl-divergence-base", str(logits)]
        said = self._execute("reference", reference, arguments, logits)
        self._final_estimate(reference, said, "gave no perplexity for the reference")

    def _final_estimate(self, file: Path, said: str, failure: str) -> tuple[float, float]:
        found = _PERPLEXITY.search(said)
        if not found:
            for value in _NOT_FINITE.findall(said)[-1:]:  # it keeps the final estimate to itself then
                check_finite(file, float(value))
            raise self._failure(failure, said)
        perplexity, error = float(found[1]), float(found[2])
        check_finite(file, perplexity, error)
        return perplexity, error

    def compare(self, file: Path, logits: Path) -> tuple[float, float, float, float]:
        """Return perplexity, standard error, mean divergence, and agreement of the most likely token."""
        said = self._execute("model", file, ["--kl-divergence-base", str(logits), "--kl-divergence"])
        perplexity, divergence, top = (
            _SUMMARY_PERPLEXITY.search(said), _SUMMARY_DIVERGENCE.search(said), _SUMMARY_TOP.search(said),
        )  # fmt: skip
        if perplexity and divergence and top:
            figures = [float(perplexity[1]), float(perplexity[2]), float(divergence[1]), float(top[1]) / 100]
        else:
            # with few tokens it prints no summary; the last row of its table says the same, a digit shorter
            rows, tops = _ROW.findall(said), _ROW_TOP.findall(said)
            if not rows or not tops:
                raise self._failure("gave no Kullback-Leibler divergence", said)
            figures = [float(rows[-1][1]), float(rows[-1][2]), float(rows[-1][5]), float(tops[-1][0]) / 100]
        check_finite(file, *figures)
        return figures[0], figures[1], max(0.0, figures[2]), figures[3]

    def _execute(self, what: str, file: Path, arguments: Sequence[str], logits: Path | None = None) -> str:
        """Run the tool to its end and return all it said. It never outlives this call."""
        # one chunk at a time: logits of four, the tool's default, take gigabytes with a large vocabulary
        command = [str(self.tool), "-m", str(file), "-c", str(self.ctx), "-b", str(self.ctx), "-t", str(usable_cores())]
        command += [*arguments, *(["--chunks", str(self.chunks)] if self.chunks else [])]
        said = bytearray()
        total = 0
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        assert process.stdout is not None
        try:
            # progress comes without line ends
            while piece := process.stdout.read(1 << 14):
                said += piece
                if not total and (found := _CHUNKS.search(said.decode("utf-8", "replace"))):
                    total = int(found[1])
                    if logits is not None:
                        self._check_room(logits.parent, total)
                if total:
                    self.watch(what, min(_chunks_done(said), total), total)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()
        text = said.decode("utf-8", "replace")
        if short := _TOO_SHORT.search(text):
            raise UsageError(
                f"the text {self.text} is too short: {short[1]} tokens; chunks of {self.ctx} need at least "
                f"{2 * self.ctx}. Take a longer text or a smaller --ctx"
            )
        if code in (-signal.SIGILL, 128 + signal.SIGILL):
            raise EvaluationError(
                f"{TOOL} was killed by an illegal instruction: the runtime was built for the instruction set of "
                f"another processor. Build it again on this one: {BUILD_COMMAND} --force"
            )
        if code < 0:
            raise self._failure(f"was killed by {signal.Signals(-code).name}", text)
        if code:
            raise self._failure(f"failed with exit code {code}", text)
        return text

    def _check_room(self, folder: Path, chunks: int) -> None:
        """Compare the logits file to come with the free disk."""
        row = 2 * ((self.vocabulary + 1) // 2) + 4
        need = chunks * ((self.ctx - 1 - self.ctx // 2) * row * 2 + self.ctx * 4)
        free = shutil.disk_usage(folder).free
        if need > free:
            raise EvaluationError(
                f"comparing {chunks} chunks with the reference needs {need / 1e9:.1f} GB in {tempfile.gettempdir()}, "
                f"which has {free / 1e9:.1f} GB free. Give fewer --chunks, or set TMPDIR to a folder with more room"
            )

    def _failure(self, what: str, said: str) -> EvaluationError:
        if reason := first_reason(errors_in(said)):
            return EvaluationError(f"{TOOL} {what}: {reason}")
        lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
        return EvaluationError(f"{TOOL} {what}: {lines[-1]}", "\n".join(lines[-_TAIL_LINES:]))


def check_finite(
    file: Path, perplexity: float, error: float = 0.0, kld: float | None = None, top1: float | None = None
) -> None:
    """Refuse figures that are no numbers: they measure nothing.

    Raises:
        EvaluationError: one is NaN or infinite.
    """
    figures = {"perplexity": perplexity, "perplexity's standard error": error, "divergence": kld, "agreement": top1}
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise EvaluationError(
                f"the {name} of {file} is {value}, not a number: weights in it, or what it computes with them, are not "
                "finite"
            )


def _chunks_done(said: bytearray) -> int:
    """The last chunk that was counted: `[7]12.34,` while measuring, the first number of a row while comparing."""
    tail = said[-400:].decode("utf-8", "replace")
    counted = [*re.findall(r"\[(\d+)\]-?[\dni]", tail), *re.findall(r"^ *(\d+) +\d[\d.]* ±", tail, re.MULTILINE)]
    return int(counted[-1]) if counted else 0
