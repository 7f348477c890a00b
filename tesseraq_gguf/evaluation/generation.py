"""What a file writes when it is let go on: how long, whether it comes to an end, how much it repeats itself.

These break first at few bits, and perplexity does not show it. A file with a chat template answers questions, any other
goes on with beginnings of the text. The most likely token is always taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.serving.chat import has_template, load
from tesseraq_gguf.serving.conversation import Conversation

LONGEST = 256
"""Tokens of an answer at most."""

_WORDS = 4
"""Words in a row that count as repeated where an answer has them again."""

QUESTIONS = (
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write three sentences about a lighthouse.",
    "What is the difference between weather and climate?",
    "Explain to a child how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "Name five animals that live in the sea, with a word about each.",
    "What should I pack for a week in the mountains?",
    "Summarise the story of Cinderella in four sentences.",
    "How does a refrigerator keep food cold?",
    "Give me a simple recipe for tomato soup.",
    "What is a prime number? Give some examples.",
    "Write a polite e-mail that asks for a day off.",
    "Which planets have rings, and what are rings made of?",
    "What happens to water when it freezes?",
    "How can I remember names better?",
    "Describe a morning at a harbour.",
    "What does a bank do with the money that people bring?",
    "Compare trains and planes for a journey of 500 km.",
    "Write a short poem about autumn.",
    "How do vaccines work?",
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain what a loop is in programming.",
    "How do I water house plants when I am away?",
)
"""What a file with a chat template is asked."""


@dataclass(frozen=True)
class Generated:
    """What became of a file's answers.

    Attributes:
        answers: how many there are.
        mean_words: words of an answer.
        unended: share of them, 0 to 1, that did not end within `LONGEST` tokens.
        repeated: share, 0 to 1, of four words in a row that an answer had before; the mean of answers.
    """

    answers: int
    mean_words: float
    unended: float
    repeated: float


def check_count(name: str, count: int) -> None:
    """Refuse a number of answers that there are no questions for.

    Raises:
        UsageError: it is below 1, or too many.
    """
    if not 1 <= count <= len(QUESTIONS):
        raise UsageError(f"{name} must be between 1 and {len(QUESTIONS)}, not {count}")


def generate(
    file: Path, beginnings: Sequence[str], count: int, watch: Callable[[str, int, int], None] = lambda *_: None
) -> Generated:
    """Let a file answer, or go on.

    Args:
        file: the GGUF file.
        beginnings: of a text, for a file without a chat template.
        count: how many of the questions, or of the beginnings.
        watch: told how far it is.

    Raises:
        FileFormatError: llama.cpp refuses the file.
        RuntimeMissingError: the runtime is not built.
    """
    templated = has_template(open_gguf(file))
    prompts = (QUESTIONS if templated else beginnings)[:count]
    said: list[str] = []
    unended = 0
    with closing(cast(Any, load(file))) as model:
        for done, prompt in enumerate(prompts):
            watch(f"{file.name} answers", done, len(prompts))
            conversation = Conversation(model, templated, LONGEST, temperature=0.0)
            said.append("".join(conversation.answer(prompt)))
            unended += bool(conversation.cut)
        watch(f"{file.name} answers", len(prompts), len(prompts))
    return Generated(
        answers=len(said),
        mean_words=sum(len(answer.split()) for answer in said) / len(said),
        unended=unended / len(said),
        repeated=sum(map(repeated, said)) / len(said),
    )


def repeated(answer: str) -> float:
    """Return the share, 0 to 1, of four words in a row that an answer had before."""
    words = answer.split()
    rows = [tuple(words[at : at + _WORDS]) for at in range(len(words) - _WORDS + 1)]
    return 1 - len(set(rows)) / len(rows) if rows else 0.0
