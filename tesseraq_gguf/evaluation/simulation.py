"""How good a GGUF file would be with activations rounded in a scheme: the whole model in torch, block by block.

The same figures as `evaluation.py`, on the same tokens: chunks of a text, of which the second half counts. The weights
are the file's, dequantised to 16 bits; what its matrices are fed, and keys and values, are rounded by `activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf import arguments
from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.schemes import ACTIVATIONS_KEY, ActivationScheme, Range, from_metadata
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.evaluation.perplexity import Evaluation, Watch, check_finite, check_request
from tesseraq_gguf.gguf_files.dequantize import own_codebooks
from tesseraq_gguf.gguf_files.inspection import open_gguf
from tesseraq_gguf.learning.calibration import tokens_of
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.models.source import gguf_source

_POSITIONS = 128
"""Answers, of two models, that are in memory at a time."""


@dataclass(frozen=True)
class Simulation:
    """How a file is measured in torch.

    Attributes:
        scheme: how activations are rounded; None takes what a file was learned for.
        device: where to compute.
    """

    scheme: ActivationScheme | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def evaluate(
        self,
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
            text: a plain text file.
            ctx: tokens of a chunk.
            chunks: how many chunks to measure; None takes the whole text.
            reference: a GGUF file to compare with, whose activations are not rounded.
            watch: told how far it is: blocks done, and blocks in all.

        Raises:
            FileFormatError: a GGUF file is missing or damaged.
            ModelError: transformers cannot read it.
            UsageError: the text is missing or too short, a number or a reference cannot be meant, or the scheme needs
                ranges that the file has not.
            EvaluationError: a figure is not finite.
        """
        file, text = arguments.path("file", file), arguments.path("text", text)
        facts = check_request(file, text, ctx, chunks, reference)
        scheme, ranges = _scheme(file, self.scheme)
        source = gguf_source(file, file.stem)
        ids = tokens_of(source, text.read_text(encoding="utf-8", errors="replace"), special=False)[1]
        tokens = chunks_of(ids, opening(file), ctx, chunks)
        student = Decoder(source, self.device)
        codebooks = {layout: torch.from_numpy(own) for layout, own in own_codebooks(open_gguf(file)).items()}

        def rounding(block: LoadedBlock) -> ActivationRounding | None:
            return ActivationRounding(scheme, block.by_module(ranges), codebooks) if scheme.rounds else None

        hidden = final_states(student, tokens, lambda *done: watch("model", *done), rounding)
        if reference is None:
            figures = measure(hidden, tokens, student.answers())
        else:
            teacher = Decoder(resolve_model(str(reference)), self.device)
            wanted = final_states(teacher, tokens, lambda *done: watch("reference", *done))
            figures = measure(hidden, tokens, student.answers(), wanted, teacher.answers())
        check_finite(file, *figures)
        return Evaluation(*figures, facts.bytes, facts.bpw, facts.parts)


def _scheme(file: Path, scheme: ActivationScheme | None) -> tuple[ActivationScheme, dict[str, Range]]:
    entry = open_gguf(file).get(ACTIVATIONS_KEY)
    own, ranges = from_metadata(entry) if entry else (ActivationScheme(), {})
    scheme = scheme or own
    if scheme.static and not ranges:
        raise UsageError(f"{file} has no ranges for {scheme}: these are measured by convert --activations a8-static")
    return scheme, ranges


def opening(file: Path) -> int | None:
    """Return the token that llama.cpp opens a chunk with when it runs the file, or None."""
    header = open_gguf(file)
    opens = header.get("tokenizer.ggml.add_bos_token", header.get("tokenizer.ggml.model") == "llama")
    return header.get("tokenizer.ggml.bos_token_id", 1) if opens else None


def chunks_of(ids: Sequence[int], begin: int | None, ctx: int, chunks: int | None) -> Tensor:
    """Cut tokens into chunks as llama-perplexity does, int64 [chunks, ctx].

    Args:
        ids: the tokens of a text.
        begin: opens the text and takes the first place of every chunk; None opens nothing.
        ctx: tokens of a chunk.
        chunks: how many chunks; None takes all.

    Raises:
        UsageError: the text is shorter than one chunk.
    """
    ids = [*([] if begin is None else [begin]), *ids]
    count = min(len(ids) // ctx, chunks or len(ids))
    if count < 1:
        raise UsageError(f"the text is too short: {len(ids)} tokens, fewer than one chunk of {ctx}")
    found = torch.tensor(ids[: count * ctx], dtype=torch.int64).view(count, ctx)
    if begin is not None:
        found[:, 0] = begin
    return found


def measure(
    hidden: Tensor,
    tokens: Tensor,
    answers: Callable[[Tensor], Tensor],
    wanted: Tensor | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float, float | None, float | None]:
    """Return perplexity, its standard error, mean divergence in nats, and agreement of the most likely token.

    Args:
        hidden: final hidden states, float32 [chunks, ctx, hidden].
        tokens: int64 [chunks, ctx]; answers to the second half count.
        answers: from hidden states to log-probabilities.
        wanted: final hidden states of a reference, if there is one; without it the last two figures are None.
        teacher: its `answers`.
    """
    losses, divergences, same = [], [], []
    for chunk, positions in _scored(tokens):
        got = answers(hidden[chunk, positions])
        losses.append(-got.gather(1, tokens[chunk, positions + 1, None].to(got.device))[:, 0].double())
        if wanted is not None and teacher is not None:
            true = teacher(wanted[chunk, positions])
            differences = true.exp() * (true - got)
            divergences.append(differences.where(true != -torch.inf, 0.0).sum(-1).double())
            same.append((true.argmax(-1) == got.argmax(-1)).double())
    loss = torch.cat(losses)
    mean = float(loss.mean())
    perplexity = math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean
    error = perplexity * float(loss.std(correction=0)) / math.sqrt(max(1, len(loss) - 1))
    if not divergences:
        return perplexity, error, None, None
    divergence = float(torch.cat(divergences).mean())
    if divergence < 0:
        divergence = 0.0  # by rounding
    return perplexity, error, divergence, float(torch.cat(same).mean())


def _scored(tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the positions whose answers count, some at a time."""
    ctx = tokens.shape[1]
    for chunk in range(len(tokens)):
        for positions in torch.arange(ctx // 2, ctx - 1).split(_POSITIONS):
            yield chunk, positions
