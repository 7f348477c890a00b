"""What a line that begins with `/` does in a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.printing import printable
from tesseraq_gguf.serving import saved
from tesseraq_gguf.serving.conversation import Conversation
from tesseraq_gguf.serving.counting import Counter
from tesseraq_gguf.serving.display import Display, Plain
from tesseraq_gguf.serving.images import read_image

EXIT, RESET = "/exit", "/reset"


class Leave(Exception):  # noqa: N818  (nothing went wrong)
    """The chat is to end."""


@dataclass
class Talk:
    """A conversation, and what is around it.

    Attributes:
        conversation: whom to talk to.
        display: shows answers.
        counter: counts tokens; None where nobody does.
        asked: told to answer the last question again.
    """

    conversation: Conversation
    display: Display = field(default_factory=Plain)
    counter: Counter | None = None
    asked: bool = False


@dataclass(frozen=True)
class Command:
    """What a word does.

    Attributes:
        name: the word.
        does: in a few words.
        run: does it, given what stands after the word; returns what is to be said, if anything.
        takes: how help names what stands after the word; empty where nothing may.
        may_be_bare: whether the word may stand alone all the same.
    """

    name: str
    does: str
    run: Callable[[Talk, str], str]
    takes: str = ""
    may_be_bare: bool = False


def obey(talk: Talk, line: str) -> str:
    """Do what a line says. Returns what is to be said of it, if anything.

    Raises:
        UsageError: there is no such command, or it cannot be meant.
        Leave: the chat is to end.
    """
    word, *more = line.split(maxsplit=1)
    rest = "".join(more)
    command = COMMANDS.get(word)
    if command is None:
        raise UsageError(
            f"unknown command {printable(word)}; /help lists those there are. "
            "A text that begins with / is said with two of them: //"
        )
    if rest and not command.takes:
        raise UsageError(f"{word} takes nothing after it")
    if command.takes and not rest and not command.may_be_bare:
        raise UsageError(f"{word} wants {command.takes} after it")
    return command.run(talk, rest)


def _help(talk: Talk, _: str) -> str:
    able = [command for command in COMMANDS.values() if command.run is not _image or talk.conversation.sees]
    rows = [(f"{command.name} {command.takes}".strip(), command.does) for command in able]
    rows += [("//…", "says a text that begins with /"), ("Ctrl-C", "stops an answer"), ("Ctrl-D", "leaves")]
    return "\n".join(f"  {name:<14}{does}" for name, does in rows)


def _system(talk: Talk, text: str) -> str:
    if not talk.conversation.templated:
        raise UsageError("this file has no chat template, so the model has no place for a system's text")
    talk.conversation.system = text
    return "It holds from the next answer on." if text else "The system says nothing."


def _regenerate(talk: Talk, _: str) -> str:
    if not talk.conversation.turns:
        raise UsageError("nothing was asked yet")
    talk.asked = True
    return ""


def _image(talk: Talk, file: str) -> str:
    if not talk.conversation.sees:
        raise UsageError("this chat sees no images: begin it with --mmproj FILE, which convert wrote")
    talk.conversation.images.append(read_image(Path(file)))
    return "Seen; ask about it."


def _save(talk: Talk, file: str) -> str:
    path = Path(file).expanduser()
    saved.save(talk.conversation, path)
    return f"{_turns(talk)} saved in {printable(str(path))}."


def _load(talk: Talk, file: str) -> str:
    saved.load(talk.conversation, Path(file).expanduser())
    return f"{_turns(talk)} taken up; what was said before is forgotten."


def _turns(talk: Talk) -> str:
    count = len(talk.conversation.turns)
    return f"{count} question{'s' if count != 1 else ''} with answers"


def _stats(talk: Talk, _: str) -> str:
    counter, model = talk.counter, talk.conversation.model
    if counter is None or not counter.answers:
        raise UsageError("nothing was answered yet")
    return "\n".join(
        (
            f"last answer  {counter.last}",
            f"all {counter.answers:<8,} {counter.all}",
            f"context      {model.n_tokens:,} of {model.n_ctx():,} tokens",
        )
    )


def _thought(talk: Talk, _: str) -> str:
    thought = talk.display.thought.strip()
    if not thought:
        raise UsageError("nothing was thought before the last answer, as far as its template marks it")
    return printable(thought, "\n\t")


def _reset(talk: Talk, _: str) -> str:
    talk.conversation.reset()
    return "Forgotten."


def _exit(_: Talk, __: str) -> str:
    raise Leave


COMMANDS = {
    command.name: command
    for command in (
        Command("/help", "lists this", _help),
        Command("/system", "tells the model what it is; without a text, nothing", _system, "TEXT", may_be_bare=True),
        Command("/regenerate", "answers the last question again", _regenerate),
        Command("/image", "shows an image with the next question", _image, "FILE"),
        Command("/save", "writes what was said into a file", _save, "FILE"),
        Command("/load", "takes up what was saved", _load, "FILE"),
        Command("/stats", "tells tokens and speed", _stats),
        Command("/thought", "shows what was thought before the last answer", _thought),
        Command(RESET, "forgets what was said", _reset),
        Command(EXIT, "leaves", _exit),
    )
}
"""All of them by their words, as `/help` lists them."""
