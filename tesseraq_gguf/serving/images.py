"""Images in a conversation: llama.cpp's libmtmd, through llama-cpp-python, with a projector that `convert` wrote."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import ChatTemplateError, FileFormatError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf

ADDRESS = "data:image"
"""How the address of an image that is in a message itself begins."""

_PROBE = "tesseraq"


def check_projector(file: Path) -> None:
    """Refuse a file that is no projector, before a model is loaded.

    Raises:
        FileFormatError: it is missing, damaged, or another kind of GGUF file.
    """
    header = open_gguf(file)
    if header.get("general.type") != "mmproj" and header.get("general.architecture") != "clip":
        raise FileFormatError(f"{file} is no projector of images: give a file that convert --mmproj wrote")


def read_image(file: Path) -> str:
    """Return an image file as the address that a message names it by.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        data = file.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"the image {file} cannot be read: {error.strerror or error}") from None
    return f"{ADDRESS};base64,{base64.b64encode(data).decode('ascii')}"


def message(line: str, images: Iterable[str]) -> dict[str, Any]:
    """What a user says, after images that are named by their addresses."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": line}] if parts else line}


def text_of(said: dict[str, Any]) -> str:
    """The text of a message, without its images."""
    content = said["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def see(llama_cpp: Any, model: Any, file: Path, projector: Path, template: str) -> Any:
    """Load a projector beside a model; return the handler of chats that may have images.

    Args:
        llama_cpp: the module of llama-cpp-python.
        model: its model.
        file: of the model.
        projector: the other file.
        template: the chat template.

    Raises:
        FileFormatError: llama.cpp refuses the projector, with this model at least.
    """
    try:
        handler = _handler(llama_cpp, template)(str(projector), verbose=False)
        for log_set in (handler._mtmd_cpp.mtmd_log_set, handler._mtmd_cpp.mtmd_helper_log_set):
            log_set(llama_cpp._logger.llama_log_callback, None)  # which tells errors alone
        handler._init_mtmd_context(model)
    except ValueError as error:
        raise FileFormatError(
            f"llama.cpp cannot use {projector} with {file}: it is damaged, of another model, or for no images"
        ) from error
    return handler


def _handler(llama_cpp: Any, template: str) -> Any:
    """The class of a handler with a template of its own."""

    class Sight(llama_cpp.llama_chat_format.MTMDChatHandler):  # type: ignore[misc,name-defined]
        """Hands the parts of a message to templates that loop over them, and one text to all others."""

        def _get_chat_template(self, _: Any) -> str:
            return template

        def _get_template_messages(self, messages: Any, media_marker: str) -> Any:
            found = super()._get_template_messages(messages, media_marker)
            return [_typed(m) for m in found] if loops_over_parts(template) else [_plain(m) for m in found]

        def _create_bitmap_from_bytes(self, image_bytes: bytes) -> Any:
            try:
                return super()._create_bitmap_from_bytes(image_bytes)
            except ValueError as error:
                raise UsageError("llama.cpp cannot read the image: give a JPEG, PNG, BMP or GIF file") from error

    return Sight


def loops_over_parts(template: str) -> bool:
    """Whether a template makes text only of messages that are lists of parts.

    Raises:
        ChatTemplateError: it cannot be read, or makes nothing of any message.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = repr
    said = {"role": "user", "content": _PROBE}
    for form in (_plain, _typed):
        try:
            made = environment.from_string(template).render(messages=[form(said)], bos_token="", eos_token="")
        except (TemplateError, TypeError, ValueError):
            continue
        if _PROBE in made and "{'" not in made:
            return form is _typed
    raise ChatTemplateError("the chat template makes no text of what a user says")


def _typed(said: dict[str, Any]) -> dict[str, Any]:
    content = said["content"]
    return said if isinstance(content, list) else said | {"content": [{"type": "text", "text": content}]}


def _plain(said: dict[str, Any]) -> dict[str, Any]:
    content = said["content"]
    return said if isinstance(content, str) else said | {"content": "\n".join(part["text"] for part in content)}
