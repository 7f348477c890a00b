"""Logits of a GGUF file at the positions of token sequences, as our runtime computes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import EvaluationError

Tokens = tuple[int, ...]

_ROWS = 128
"""Most rows of logits that one call computes: with a vocabulary of 262,144 tokens a row is a megabyte."""


class PrefixDecoder:
    """Logits of one sequence of tokens after another; what a sequence has in common with the one before is kept.

    Args:
        llama_cpp: the bindings' module.
        llama: a loaded model; its first sequence is ours.
    """

    def __init__(self, llama_cpp: Any, llama: Any) -> None:
        self._api = llama_cpp
        self._context = llama.ctx
        self._vocabulary = int(llama.n_vocab())
        self._size = int(llama.n_batch)
        self._held: Tokens = ()
        self.computed = 0
        """Tokens that went through the model so far."""

    def forget(self) -> None:
        """Begin anew: somebody else has used the model."""
        self._held = ()

    def rows(self, tokens: Tokens, first: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield position and logits `[vocabulary]` of every position of a sequence from `first` on.

        The logits at a position are about the token after it. An array is valid until the next one is asked for.

        Args:
            tokens: the sequence, no longer than the context.
            first: the first position whose logits are wanted.

        Raises:
            EvaluationError: llama.cpp cannot decode it.
        """
        keep = min(_common(self._held, tokens), first)
        memory = self._api.llama_get_memory(self._context)
        if not self._api.llama_memory_seq_rm(memory, 0, keep, -1):  # a recurrent model has one state, not one per token
            self._api.llama_memory_clear(memory, True)
            keep = 0
        self._held = tokens[:keep]
        at = keep
        while at < len(tokens):
            end = min(at + self._size, max(at, first) + _ROWS, len(tokens))
            self._decode(tokens[at:end], at, first)
            self._held = tokens[:end]
            for position in range(max(at, first), end):
                row = self._api.llama_get_logits_ith(self._context, position - at)
                yield position, np.ctypeslib.as_array(row, (self._vocabulary,))
            at = end

    def _decode(self, tokens: Tokens, at: int, first: int) -> None:
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = at + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = at + i >= first
            code = self._api.llama_decode(self._context, batch)
        finally:
            self._api.llama_batch_free(batch)
        if code:
            self._held = ()
            raise EvaluationError(f"llama.cpp failed to decode {len(tokens)} tokens at position {at}: code {code}")
        self.computed += len(tokens)


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
