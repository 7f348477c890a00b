"""What a model thinks before it answers: how its chat template marks it, and how a stream is told apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tesseraq_gguf.errors import ChatTemplateError

SWITCH = "enable_thinking"
"""The variable by which templates turn thinking off, llama.cpp's and transformers' name for it."""

_QUESTION = {"role": "user", "content": "question"}
_CALL = {"id": "1", "type": "function", "function": {"name": "tool", "arguments": {}}}
_THOUGHT = "tesseraqthought"
_BEFORE = re.compile(r"([<\[][^\s<>\[\]]*[>\]]\w*)\s*$")
_AFTER = re.compile(r"\s*([<\[][^\s<>\[\]]*[>\]])")
_NAMED = re.compile(r"[<\[]/((?:\w+:)?(?:think|thinking|thought|reasoning))[>\]]", re.IGNORECASE)


@dataclass(frozen=True)
class Marks:
    """Where thoughts begin and end.

    Attributes:
        begin: what stands before them.
        end: what stands after them.
        begun: whether the prompt ends with `begin`, so that an answer begins within a thought.
    """

    begin: str
    end: str
    begun: bool = False


def marks(template: str, render: Callable[[list[dict[str, Any]]], str]) -> Marks | None:
    """Ask a chat template how it marks thoughts; None where it knows of none.

    Args:
        template: its text.
        render: makes the prompt of messages with it.
    """
    try:
        prompt = render([_QUESTION])
    except ChatTemplateError:
        return None
    found = _around_a_thought(render) or _named(template)
    if found is None:
        return None
    begin, end = found
    return Marks(begin, end, begun=prompt.rstrip().endswith(begin))


def _around_a_thought(render: Callable[[list[dict[str, Any]]], str]) -> tuple[str, str] | None:
    """What the template puts around a thought that an answer had; some keep one only before a call of a tool."""
    answer = {"role": "assistant", "content": "answer", "reasoning_content": _THOUGHT}
    for said in (answer, answer | {"tool_calls": [_CALL]}):
        try:
            before, thought, after = render([_QUESTION, said]).partition(_THOUGHT)
        except ChatTemplateError:
            continue
        begin, end = _BEFORE.search(before), _AFTER.match(after)
        if thought and begin and end:
            return begin[1], end[1]
    return None


def _named(template: str) -> tuple[str, str] | None:
    """The marks that the template's text names: many of them only cut thoughts off."""
    end = _NAMED.search(template)
    return (end[0].replace("/", "", 1), end[0]) if end else None


def set_thinking(template: str, wanted: bool) -> str:
    """Return a template that turns thinking on or off.

    Raises:
        ChatTemplateError: it has no switch for it.
    """
    if SWITCH not in template:
        raise ChatTemplateError(
            f"the chat template cannot turn thinking on or off, it has no {SWITCH}: leave --reasoning out"
        )
    return f"{{%- set {SWITCH} = {'true' if wanted else 'false'} -%}}{template}"


class Splitter:
    """Tells a thought from the answer after it in a stream, whatever pieces the marks come in.

    Args:
        marks: where thoughts begin and end; None has none.
    """

    def __init__(self, marks: Marks | None) -> None:
        self._marks = marks or Marks("", "")
        self._waits = marks is not None and not marks.begun
        self._thinks = marks is not None and marks.begun
        self._held = ""

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield what is certain so far: whether it is thought, and the text without marks."""
        self._held += piece
        begin, end = self._marks.begin, self._marks.end
        if self._waits:
            text = self._held.lstrip()
            if begin != text and begin.startswith(text):
                return
            self._waits, self._thinks = False, text.startswith(begin)
            self._held = text.removeprefix(begin) if self._thinks else self._held
        if self._thinks:
            thought, found, after = self._held.partition(end)
            kept = "" if found else _beginning_of(end, thought)
            self._held = after or kept
            yield True, thought.removesuffix(kept)
            if not found:
                return
            self._thinks = False
        yield from self.finish()

    def finish(self) -> Iterator[tuple[bool, str]]:
        """Yield what was held back, because a mark might have begun there."""
        if self._held:
            yield self._thinks, self._held
        self._held = ""


def _beginning_of(mark: str, text: str) -> str:
    """The longest end of a text that a mark may begin with."""
    return next((text[-n:] for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), "")
