"""A model and what was said so far: with the file's chat template, or one growing text without it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from tesseraq_gguf.errors import ChatTemplateError, TesseraqError, UsageError
from tesseraq_gguf.serving.images import message, text_of

SEEDS = 2**32 - 1  # the last number that llama.cpp takes for a seed means none


class Model(Protocol):
    """What a conversation needs of llama-cpp-python's `Llama`."""

    n_tokens: int

    def n_ctx(self) -> int:
        """Tokens that fit."""

    def create_chat_completion(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Answer messages."""

    def create_completion(self, prompt: str, **options: Any) -> Any:
        """Go on with a text."""


class ContextFullError(TesseraqError):
    """What was said so far leaves no room for an answer."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: a user's message, as OpenAI's interface has it.
        answer: what came.
    """

    question: dict[str, Any]
    answer: str


class Conversation:
    """A model and what was said so far.

    Args:
        model: a loaded model.
        templated: whether the file has a chat template; without one every line is appended to one growing text.
        max_tokens: most tokens of an answer; None goes on until the model stops or the context is full.
        temperature: 0 always takes the most likely token.
        seed: of the first answer; each after it has the next one, so that no question has the same answer twice.

    Attributes:
        turns: what was said.
        system: what the model is told before all of it; empty says nothing.
        images: what goes with the next line, as `images.read_image` gives it.
        sees: whether the model was loaded with a projector.
        cut: why the last answer ended before the model stopped: `length`, `context` or nothing.
    """

    def __init__(
        self, model: Model, templated: bool, max_tokens: int | None, temperature: float, seed: int = 0
    ) -> None:
        self.model = model
        self.templated = templated
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.seed = seed
        self.sees = False
        self.system = ""
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system's text stays, and seeds go on."""
        self.turns: list[Turn] = []
        self.images: list[str] = []
        self.cut = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said, as OpenAI's interface has it."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        answers = ([turn.question, {"role": "assistant", "content": turn.answer}] for turn in self.turns)
        return [*before, *(each for pair in answers for each in pair)]

    def answer(self, line: str) -> Generator[str, None, None]:
        """Say something and yield the answer as it comes. Stopping early keeps what has come.

        Raises:
            ContextFullError: the prompt alone fills the context; what was said stays as it was.
            ChatTemplateError: the template makes no text of what was said.
        """
        return self._ask(message(line, self.images if self.templated else ()))

    def again(self) -> Generator[str, None, None]:
        """Yield another answer to the last question, in place of the last one if anything of it comes.

        Raises:
            UsageError: nothing was asked.
            ContextFullError, ChatTemplateError: as `answer` does.
        """
        if not self.turns:
            raise UsageError("nothing was asked yet")
        *before, last = self.turns
        images, self.images = self.images, []
        self.turns = [*before]
        try:
            yield from self._ask(last.question)
        finally:
            self.images = images
            if len(self.turns) == len(before):
                self.turns = [*before, last]

    def _ask(self, question: dict[str, Any]) -> Generator[str, None, None]:
        self.cut = ""
        came = ""
        heard = False
        stream = self._stream(question)
        try:
            for piece, reason in stream:
                heard = True
                if reason == "length":
                    self.cut = "context" if self.model.n_tokens >= self.model.n_ctx() - 1 else "length"
                if piece:
                    came += piece
                    yield piece
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{error}. Another one can be given: --template FILE") from error
        except UsageError:  # of an image that is none; the next question shall not have it again
            self.images = []
            raise
        except ValueError as error:
            if "exceed context window" not in str(error):
                raise
            raise ContextFullError(
                f"the context of {self.model.n_ctx():,} tokens is full; /reset starts a new conversation"
            ) from None
        finally:
            stream.close()
            # templates want user and assistant by turns, so an answer that never came takes its question with it
            if heard and (came or not self.templated):
                self.turns.append(Turn(question, came))
                self.images = []

    def _stream(self, question: dict[str, Any]) -> Generator[tuple[str, str | None], None, None]:
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True, "seed": self.seed}
        self.seed = (self.seed + 1) % SEEDS
        if self.templated:
            for chunk in self.model.create_chat_completion([*self.messages, question], **options):
                choice = chunk["choices"][0]
                yield choice["delta"].get("content") or "", choice["finish_reason"]
        else:
            text = "".join(f"{text_of(turn.question)}{turn.answer}\n" for turn in self.turns)
            for chunk in self.model.create_completion(text + text_of(question), **options):
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"]
