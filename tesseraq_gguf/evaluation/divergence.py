"""What quantising did to a model's answers, on sequences that nothing was learned on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.quantised import Quantised

_LOGITS = 1 << 23
"""Logits of one model that are in memory at a time: words of the vocabulary, of all positions."""


class Yardstick:
    """Tells how far answers of quantised models are from the original's, whose states are computed once.

    Args:
        original: the model.
        tokens: int64 [sequences, length].
        report: called with (blocks done, blocks in all).
    """

    def __init__(self, original: Decoder, tokens: Tensor, report: Callable[[int, int], None] = lambda *_: None) -> None:
        self._tokens = tokens
        self._original = Quantised(original, lambda _: {})
        with torch.no_grad():
            self._wanted = self._original.states(tokens, report)

    @torch.no_grad()
    def divergence(self, model: Quantised, report: Callable[[int, int], None] = lambda *_: None) -> float:
        """Mean Kullback-Leibler divergence KL(p || p̂) of answers in nats per token, over all positions.

        Args:
            model: whose answers are p̂; products with both models' output matrices are in its autocast.
            report: called with (blocks done, blocks in all).

        Raises:
            NotFiniteError: it is not finite.
        """
        got = model.states(self._tokens, report)
        positions = self._tokens.numel()
        rows = max(1, _LOGITS // positions)
        teacher = replace(self._original, autocast=model.autocast)
        gathered = _Gathered(positions, model.decoder.device)
        for p, q in zip(_logits(teacher, self._wanted, rows), _logits(model, got, rows), strict=True):
            gathered.add(p, q)
        found = gathered.divergence()
        if not math.isfinite(found):
            raise NotFiniteError(
                f"the answers of the quantised model are not finite: their divergence from the original's is {found}. "
                "Give more bits to its matrices (--type, --tensor-type)"
            )
        return max(0.0, found)


def divergence(
    original: Decoder,
    model: Quantised,
    tokens: Tensor,
    report: Callable[[int, int], None] = lambda *_: None,
) -> float:
    """Measure one model as a `Yardstick` does.

    Args:
        original: whose answers are p.
        model: whose answers are p̂; products with both models' output matrices are in its autocast.
        tokens: int64 [sequences, length].
        report: called with (blocks done, blocks in all), those of both models.

    Raises:
        NotFiniteError: it is not finite.
    """
    steps = 2 * len(original)
    yardstick = Yardstick(original, tokens, lambda done, _: report(done, steps))
    return yardstick.divergence(model, lambda done, _: report(len(original) + done, steps))


def _logits(model: Quantised, states: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield logits float32 [positions, words] of final hidden states, with what was learned in place.

    The output matrix of a large vocabulary is larger than a block, and is never in memory as a whole unless it was
    rounded with care.

    Args:
        model: whose.
        states: final hidden states, float32 [sequences, length, width].
        rows: words at a time.
    """
    decoder, head = model.decoder, model.decoder.head
    given = model.embeddings.get(decoder.output_name())
    parts = decoder.output_rows(rows) if given is None else iter(given.split(rows))
    vectors = {n.removeprefix(head.prefix): t.arrays["values"].to(decoder.device) for n, t in model.final.items()}
    hidden, first = states.flatten(0, 1).to(decoder.device), 0
    for part in parts:
        yield head.logits(hidden, part.to(decoder.device, model.autocast), vectors, first)
        first += len(part)


class _Gathered:
    """Sums over a vocabulary that is seen in parts, for the divergence of answers.

    With logits a and b of two models and w = exp(a - max a), KL = Σ w·(a - b) / Σ w - (log Σ exp a - log Σ exp b).

    Args:
        positions: how many answers of each model.
        device: where they are.
    """

    def __init__(self, positions: int, device: torch.device) -> None:
        self._most = torch.full((positions,), -torch.inf, device=device)
        self._weights, self._apart = torch.zeros(2, positions, dtype=torch.float64, device=device)
        self._all = torch.full((2, positions), -torch.inf, dtype=torch.float64, device=device)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in logits of further words, float32 [positions, words] each."""
        most = torch.maximum(self._most, a.amax(-1))
        shrink = (self._most - most).double().exp()
        w = (a - most[:, None]).exp()
        self._weights = self._weights * shrink + w.sum(-1, dtype=torch.float64)
        self._apart = self._apart * shrink + (w * (a - b)).sum(-1, dtype=torch.float64)
        self._all = torch.logaddexp(self._all, torch.stack([a.logsumexp(-1), b.logsumexp(-1)]).double())
        self._most = most

    def divergence(self) -> float:
        """Mean over positions in nats."""
        first, second = self._all
        return float((self._apart / self._weights - (first - second)).mean())
