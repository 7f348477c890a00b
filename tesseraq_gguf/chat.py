"""Talk to a GGUF file in the terminal: streaming, with the file's chat template, or plain completion without one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

from tesseraq_gguf.errors import FileFormatError, TesseraqError, UsageError
from tesseraq_gguf.inspection import open_gguf

CONTEXT = 4096
"""Tokens of a conversation, unless the model was made for fewer."""

EXIT, RESET = "/exit", "/reset"

_TEMPLATE = "tokenizer.chat_template"
_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h

_kept_alive: list[Any] = []  # C calls these as long as the process lives


class Model(Protocol):
    """What a conversation needs of llama-cpp-python's `Llama`."""

    n_tokens: int

    def n_ctx(self) -> int:
        """Tokens that fit."""

    def create_chat_completion(self, messages: list[dict[str, str]], **options: Any) -> Any:
        """Answer messages."""

    def create_completion(self, prompt: str, **options: Any) -> Any:
        """Go on with a text."""


class ContextFullError(TesseraqError):
    """What was said so far leaves no room for an answer."""


class Conversation:
    """A model and what was said so far.

    Args:
        model: a loaded model.
        templated: whether the file has a chat template; without one every line is appended to one growing text.
        max_tokens: most tokens of an answer; None goes on until the model stops or the context is full.
        temperature: 0 always takes the most likely token.
    """

    def __init__(self, model: Model, templated: bool, max_tokens: int | None, temperature: float) -> None:
        self.model = model
        self.templated = templated
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = []
        self.text = ""
        self.cut = ""

    def answer(self, line: str) -> Generator[str, None, None]:
        """Say something and yield the answer as it comes. Stopping early keeps what has come.

        Afterwards `cut` says why the answer ended before the model stopped: `length`, `context` or nothing.

        Raises:
            ContextFullError: the prompt alone fills the context; what was said stays as it was.
        """
        self.cut = ""
        came = ""
        heard = False
        stream = self._stream(line)
        try:
            for piece, reason in stream:
                heard = True
                if reason == "length":
                    self.cut = "context" if self.model.n_tokens >= self.model.n_ctx() - 1 else "length"
                if piece:
                    came += piece
                    yield piece
        except ValueError as error:
            if "exceed context window" not in str(error):
                raise
            raise ContextFullError(
                f"the context of {self.model.n_ctx():,} tokens is full; {RESET} starts a new conversation"
            ) from None
        finally:
            stream.close()
            if heard:
                self._remember(line, came)

    def _stream(self, line: str) -> Generator[tuple[str, str | None], None, None]:
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True}
        if self.templated:
            messages = [*self.messages, {"role": "user", "content": line}]
            for chunk in self.model.create_chat_completion(messages, **options):
                choice = chunk["choices"][0]
                yield choice["delta"].get("content") or "", choice["finish_reason"]
        else:
            for chunk in self.model.create_completion(self.text + line, **options):
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"]

    def _remember(self, line: str, came: str) -> None:
        if self.templated:
            # templates want user and assistant by turns, so an answer that never came takes its question with it
            if came:
                self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": came}]
        else:
            self.text += f"{line}{came}\n"


def chat(file: Path | str, prompt: str | None = None, max_tokens: int | None = 512, temperature: float = 0.7) -> None:
    """Talk to a GGUF file: answers go to stdout, all else to stderr.

    Args:
        file: the GGUF file.
        prompt: answer this and return; None reads lines from stdin until `/exit` or its end.
        max_tokens: most tokens of an answer.
        temperature: 0 always takes the most likely token.

    Raises:
        FileFormatError: the file is missing, damaged, or no language model.
        UsageError: a number cannot be meant.
        RuntimeMissingError: the runtime is not built.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1, not {max_tokens}")
    if temperature < 0:
        raise UsageError(f"--temperature must not be negative, not {temperature}")
    header = open_gguf(file)
    templated = _TEMPLATE in header.entries
    conversation = Conversation(load(Path(file)), templated, max_tokens, temperature)
    if prompt is not None:
        _print_answer(conversation, prompt)
        return
    if not templated:
        _tell("This file has no chat template: it goes on with your text instead of answering it.")
    if sys.stdin.isatty():
        _tell(f"{EXIT} leaves, {RESET} forgets what was said, Ctrl-C stops an answer.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() editing and history)
    talk(conversation, input)


def load(file: Path) -> Model:
    """Load a file that `open_gguf` accepted.

    Raises:
        FileFormatError: llama.cpp refuses it.
        RuntimeMissingError: the runtime is not built.
    """
    from tesseraq_gguf.runtime import load_llama_cpp

    llama_cpp = load_llama_cpp()
    _silence(llama_cpp)
    header = open_gguf(file)
    trained = header.get(f"{header.get('general.architecture')}.context_length", CONTEXT)
    try:
        model: Model = llama_cpp.Llama(
            model_path=str(file), n_ctx=min(int(trained), CONTEXT), n_gpu_layers=-1, verbose=False
        )
    except (ValueError, AssertionError) as error:
        raise FileFormatError(f"llama.cpp cannot load {file}: {error or 'it gives no reason'}") from error
    return model


def _silence(llama_cpp: Any) -> None:
    """Let llama.cpp's log through only where it is an error: the bindings' own filter takes warnings for errors."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def errors_only(level: int, text: bytes, _data: Any) -> None:
        if level == _LOG_LEVEL_ERROR:
            sys.stderr.write(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(errors_only, None)
    _kept_alive.append(errors_only)


def talk(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Read lines and print answers until `/exit` or the end of the input.

    Args:
        conversation: whom to talk to.
        read: like `input`: takes the prompt sign, returns a line, raises EOFError at the end.
    """
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = read(sign).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _tell(f"\n{EXIT} leaves.")
            continue
        if line == EXIT:
            return
        if line == RESET:
            conversation.reset()
            _tell("Forgotten.")
        elif line.startswith("/"):
            _tell(f"unknown command {line.split()[0]}; there are {EXIT} and {RESET}")
        elif line:
            try:
                _print_answer(conversation, line)
            except ContextFullError as error:
                _tell(str(error))


def _print_answer(conversation: Conversation, line: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it there."""
    pieces = conversation.answer(line)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        _tell("(stopped)")
    finally:
        pieces.close()
        sys.stdout.flush()
    if conversation.cut == "context":
        _tell(f"(the context of {conversation.model.n_ctx():,} tokens is full; {RESET} starts a new conversation)")
    elif conversation.cut == "length":
        _tell(f"(ended at --max-tokens {conversation.max_tokens})")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
