"""Tokens of a conversation and their speed, as llama.cpp counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tesseraq_gguf.runtime import load_llama_cpp


@dataclass(frozen=True)
class Count:
    """What was computed.

    Attributes:
        prompt: tokens of prompts, without those that are still known from before.
        prompt_seconds: time they took.
        answer: tokens of answers.
        answer_seconds: time they took.
    """

    prompt: int = 0
    prompt_seconds: float = 0.0
    answer: int = 0
    answer_seconds: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.prompt + other.prompt,
            self.prompt_seconds + other.prompt_seconds,
            self.answer + other.answer,
            self.answer_seconds + other.answer_seconds,
        )

    def __str__(self) -> str:
        return (
            f"{self.prompt:,} tokens of prompt{_speed(self.prompt, self.prompt_seconds)}, "
            f"{self.answer:,} of answer{_speed(self.answer, self.answer_seconds)}"
        )


def _speed(tokens: int, seconds: float) -> str:
    return f" at {tokens / seconds:,.1f} a second" if tokens and seconds else ""


class Counter:
    """Counts what a model computes.

    Args:
        model: llama-cpp-python's `Llama`.

    Attributes:
        last: what the last answer took.
        all: what all answers took.
        answers: how many there were.
    """

    def __init__(self, model: Any) -> None:
        self._context = model._ctx
        self.last = self.all = Count()
        self.answers = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the body computes."""
        llama_cpp = load_llama_cpp()
        llama_cpp.llama_perf_context_reset(self._context.ctx)
        try:
            yield
        finally:
            seen = llama_cpp.llama_perf_context(self._context.ctx)
            # llama.cpp says at least one token of each, even where it took no time
            self.last = Count(
                seen.n_p_eval * (seen.t_p_eval_ms > 0),
                seen.t_p_eval_ms / 1e3,
                seen.n_eval * (seen.t_eval_ms > 0),
                seen.t_eval_ms / 1e3,
            )
            self.all += self.last
            self.answers += 1
