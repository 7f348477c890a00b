"""A conversation in a file: JSON with its messages, as OpenAI's interface has them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.serving.conversation import Conversation, Turn
from tesseraq_gguf.serving.images import ADDRESS

LARGEST = 256 * 2**20
"""Bytes of a saved conversation, images included."""


def save(conversation: Conversation, file: Path) -> None:
    """Write what was said; an earlier conversation in the file is replaced when the new one is whole.

    Raises:
        UsageError: nothing was said, the file cannot be written, or it holds something else.
    """
    if not conversation.turns:
        raise UsageError("nothing was said yet that could be saved")
    if file.exists():
        try:
            _read(file)
        except UsageError:
            raise UsageError(f"{file} is there and is no conversation: it stays as it is") from None
    text = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=2) + "\n"
    try:
        with temporary_sibling(file) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror or error}") from None


def load(conversation: Conversation, file: Path) -> None:
    """Take a conversation up where it was saved, in place of what was said.

    Raises:
        UsageError: the file cannot be read, is no conversation, or one that this chat cannot go on with.
    """
    system, turns = _read(file)
    if system and not conversation.templated:
        raise UsageError(f"{file} has a system's text, which has no place without a chat template")
    if not conversation.sees and any(isinstance(turn.question["content"], list) for turn in turns):
        raise UsageError(f"{file} has images, which this chat does not see: begin it with --mmproj FILE")
    conversation.reset()
    conversation.system, conversation.turns = system, turns


def _read(file: Path) -> tuple[str, list[Turn]]:
    """The system's text and the turns of a file."""
    try:
        if file.stat().st_size > LARGEST:
            raise UsageError(f"{file} is no conversation: it is too large")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{file} is no conversation: it is not JSON") from None
    messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list) or not all(isinstance(said, dict) for said in messages):
        raise UsageError(f'{file} is no conversation: it has no list of "messages"')
    system = ""
    if messages and messages[0].get("role") == "system":
        system = _text(messages.pop(0).get("content"), file)
    roles = [said.get("role") for said in messages]
    if len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UsageError(f"{file} is no conversation: user and assistant do not speak by turns")
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return system, [
        Turn(_question(asked.get("content"), file), _text(said.get("content"), file)) for asked, said in pairs
    ]


def _question(content: Any, file: Path) -> dict[str, Any]:
    """A user's message, with nothing in it but text and images that are in the file."""
    if not isinstance(content, list):
        return {"role": "user", "content": _text(content, file)}
    return {"role": "user", "content": [_part(part, file) for part in content]}


def _part(part: Any, file: Path) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), file)}
    image = part.get("image_url") if kind == "image_url" else None
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str) or not _holds_an_image(url):  # others would be fetched
        raise UsageError(f"{file} is no conversation: a message has parts that are neither text nor images in it")
    return {"type": "image_url", "image_url": {"url": url}}


def _holds_an_image(url: str) -> bool:
    kind, _, data = url.partition(";base64,")
    try:
        return kind.startswith(ADDRESS) and bool(base64.b64decode(data, validate=True))
    except ValueError:
        return False


def _text(content: Any, file: Path) -> str:
    if not isinstance(content, str):
        raise UsageError(f"{file} is no conversation: a message has no text")
    try:
        content.encode("utf-8")
    except UnicodeError:
        raise UsageError(f"{file} is no conversation: a message is not UTF-8 text") from None
    return content
