"""Lines in, answers out: a chat from its first line to its end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator

from tesseraq_gguf.errors import ChatTemplateError, UsageError
from tesseraq_gguf.serving.commands import EXIT, RESET, Leave, Talk, obey
from tesseraq_gguf.serving.conversation import ContextFullError


def talk(chat: Talk, read: Callable[[str], str]) -> None:
    """Read lines and show answers until `/exit` or the end of the input.

    Args:
        chat: whom to talk to, and how.
        read: like `input`: takes the prompt sign, returns a line, raises EOFError at the end.

    Raises:
        UsageError: a line that is no text came from something else than a terminal.
        ChatTemplateError: the template makes nothing of the first question either.
    """
    while True:
        try:
            _take_turn(chat, read)
        except (EOFError, Leave):
            return
        except KeyboardInterrupt:
            tell(f"\n{EXIT} leaves.")


def _take_turn(chat: Talk, read: Callable[[str], str]) -> None:
    """Read a line and do what it says."""
    terminal = sys.stdin.isatty()
    try:
        line = as_text(read("> " if terminal else ""), "the input").strip()
    except UsageError as error:
        if not terminal:
            raise
        tell(str(error))
        return
    try:
        _do(chat, line)
    except (ContextFullError, UsageError) as error:
        tell(str(error))
    except ChatTemplateError as error:
        if not chat.conversation.messages:
            raise  # it works with nothing
        tell(f"{error}{'; /system alone takes its text away' if chat.conversation.system else ''}")


def _do(chat: Talk, line: str) -> None:
    if line.startswith("/") and not line.startswith("//"):
        if said := obey(chat, line):
            tell(said)
        if chat.asked:
            chat.asked = False
            show_answer(chat, chat.conversation.again())
    elif line:
        show_answer(chat, chat.conversation.answer(line.removeprefix("/") if line.startswith("//") else line))


def show_answer(chat: Talk, pieces: Generator[str, None, None]) -> bool:
    """Show an answer as it comes; Ctrl-C ends it there. Returns whether it came to its end."""
    conversation = chat.conversation
    whole = False
    try:
        with chat.counter.counting() if chat.counter else contextlib.nullcontext():
            chat.display.show(pieces)
        whole = True
    except KeyboardInterrupt:
        tell("(stopped)")
    finally:
        pieces.close()
    if conversation.cut == "context":
        tell(f"(the context of {conversation.model.n_ctx():,} tokens is full; {RESET} starts a new conversation)")
    elif conversation.cut == "length":
        tell(f"(ended at --max-tokens {conversation.max_tokens})")
    return whole


def as_text(said: str, what: str) -> str:
    """Return what was typed as text. Bytes that are none have come as lone surrogates.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return said.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UsageError(f"{what} is not UTF-8 text") from None


def tell(text: str) -> None:
    """Say something that is no answer, on stderr."""
    print(text, file=sys.stderr, flush=True)
