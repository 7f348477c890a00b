"""A chat's terminal: what it says on start, and how lines are typed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.paths import cache_folder
from tesseraq_gguf.printing import printable
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.runtime.threads import usable_cores
from tesseraq_gguf.serving.commands import COMMANDS

CONTINUED = "\\"
"""What at the end of a line lets Enter begin another one."""


def about(file: Path, context: int) -> str:
    """Say in a few lines which model this is, and what runs it.

    Args:
        file: the GGUF file.
        context: tokens that fit.

    Raises:
        FileFormatError: the file is damaged.
    """
    seen = inspect(file)
    name = printable(str(seen.metadata.get("general.name") or file.name))
    size = f"{seen.weights:,} weights" if seen.weights else "no weights"
    trained = seen.metadata.get(f"{seen.architecture}.context_length")
    of = f" of the {trained:,} it was made for" if isinstance(trained, int) and trained > context else ""
    runtime = find_runtime()
    rows = (
        ("model", f"{name}, {printable(seen.architecture)}, {size}"),
        ("type", f"{seen.file_type or seen.types[0].type}, {seen.bpw:.2f} bits per weight, {seen.bytes / 1e6:,.1f} MB"),
        ("context", f"{context:,} tokens{of}"),
        ("runtime", f"{runtime.manifest.get('key')}, {runtime.root.name}, {usable_cores()} threads"),
    )
    hint = "/help lists commands; Alt-Enter or \\ before Enter begins another line; Ctrl-D leaves."
    return "\n".join(f"{what:<9}{value}" for what, value in rows) + f"\n{hint}"


def reader() -> Callable[[str], str]:
    """What reads lines of a terminal, like `input`: several at a time, with editing and the history of earlier runs."""
    session = PromptSession(
        history=_history(),
        multiline=True,
        key_bindings=_keys(),
        completer=_completer(),
        complete_while_typing=False,
        prompt_continuation="  ",
    )
    return session.prompt  # type: ignore[no-any-return]


def _completer() -> Completer:
    files = {command.name for command in COMMANDS.values() if command.takes == "FILE"}
    return NestedCompleter({name: PathCompleter(expanduser=True) if name in files else None for name in COMMANDS})


def _keys() -> KeyBindings:
    keys = KeyBindings()
    keys.add("enter")(_enter)
    keys.add("escape", "enter")(_new_line)
    return keys


def _enter(event: KeyPressEvent) -> None:
    buffer = event.current_buffer
    if buffer.document.text_before_cursor.endswith(CONTINUED):
        buffer.delete_before_cursor()
        _new_line(event)
    else:
        buffer.validate_and_handle()


def _new_line(event: KeyPressEvent) -> None:
    event.current_buffer.newline(copy_margin=False)


def _history() -> History:
    """The history of all chats, which only their user may read; of this one where there is no place for it."""
    try:
        file = cache_folder("chat") / "history"
        file.touch(mode=0o600)
        return _Kept(file)
    except OSError:
        return InMemoryHistory()


class _Kept(FileHistory):  # type: ignore[misc]
    """A history in a file that no line, and no full disk, ends a chat for."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return ()

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            super().store_string(string)
