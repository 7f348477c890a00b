"""Images: they reach the model through the projector, in a chat as over HTTP, and what is no image is one line."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model  # noqa: F401  (a fixture)
from tiny_vision import make_vision_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.errors import ChatTemplateError, FileFormatError
from tesseraq_gguf.serving.chat import load
from tesseraq_gguf.serving.commands import Talk
from tesseraq_gguf.serving.conversation import Conversation
from tesseraq_gguf.serving.images import loops_over_parts, message, read_image
from tesseraq_gguf.serving.talk import talk


def picture(path: Path, colour: tuple[int, int, int], side: int = 56) -> Path:
    """Write a PNG of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(colour) * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


@pytest.fixture(scope="module")
def seeing(make_vision_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:  # noqa: F811
    """A tiny model that sees, and its projector."""
    folder = tmp_path_factory.mktemp("seeing")
    out, projector = folder / "out.gguf", folder / "mmproj.gguf"
    convert(Recipe(str(make_vision_model("gemma3-vision").folder), out, type="f16", mmproj=projector))
    return out, projector


def test_templates_are_asked_for_the_form_of_messages():
    assert not loops_over_parts("{% for m in messages %}{{ m.content }}{% endfor %}")
    typed = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    )
    assert loops_over_parts(typed + "{% endfor %}")
    with pytest.raises(ChatTemplateError):
        loops_over_parts("nothing of it")


def test_a_message_holds_images_before_its_text(tmp_path):
    url = read_image(picture(tmp_path / "red.png", (255, 0, 0)))
    assert base64.b64decode(url.split(",")[1]) == (tmp_path / "red.png").read_bytes()
    assert message("hi", []) == {"role": "user", "content": "hi"}
    assert [part["type"] for part in message("hi", [url])["content"]] == ["image_url", "text"]


@pytest.mark.runtime
def test_an_image_reaches_the_model(seeing, tmp_path):
    out, projector = seeing
    model: Any = load(out, "{% for m in messages %}{{ m.content }}{% endfor %}", projector=projector)
    prompts = []
    for colour in ((255, 0, 0), (0, 0, 255), (255, 0, 0)):
        said = message("the quick brown fox", [read_image(picture(tmp_path / "image.png", colour))])
        list(model.create_chat_completion([said], max_tokens=1, temperature=0, stream=True))
        prompts.append(model._ctx.get_logits()[: model.n_vocab()])
    model.close()
    red, blue, again = prompts
    assert red == again
    assert max(abs(a - b) for a, b in zip(red, blue, strict=True)) > 1e-3


@pytest.mark.runtime
def test_a_chat_with_an_image(seeing, run, tmp_path):
    out, projector = seeing
    image = picture(tmp_path / "red.png", (255, 0, 0))
    answer = run("chat", out, "--mmproj", projector, "--image", image, "-p", "fox", "--temperature", 0)
    assert answer.code == 0
    assert "encod" not in answer.err  # llama.cpp's own chatter
    (tmp_path / "text.txt").write_text("no image")
    answer = run("chat", out, "--mmproj", projector, "--image", tmp_path / "text.txt", "-p", "fox")
    assert answer.code == 2
    assert "cannot read the image" in answer.error


def test_what_cannot_be_meant(run, seeing, tmp_path):
    out, projector = seeing
    for options, said in (
        (("--image", "red.png"), "add --mmproj FILE"),
        (("--mmproj", out), "is no projector of images"),
        (("--mmproj", projector, "--image", "none.png"), "the image none.png cannot be read: No such file"),
    ):
        answer = run("chat", out, "-p", "hi", *options)
        assert answer.code != 0
        assert said in answer.error
    assert "is no projector of images" in run("serve", out, "--mmproj", out).error


class Blind:
    """A model that hears messages."""

    n_tokens = 1

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def n_ctx(self) -> int:
        return 10

    def create_chat_completion(self, messages: Any, **_: Any) -> Any:
        self.heard.append(messages)
        yield {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}


def test_a_command_shows_an_image_with_the_next_question(tmp_path, capsys):
    image = picture(tmp_path / "red.png", (255, 0, 0))
    model: Any = Blind()
    conversation = Conversation(model, True, 7, 0)
    lines = iter([f"/image {image}", "what?"])
    talk(Talk(conversation), lambda _: next(lines, None) or _end())
    assert "begin it with --mmproj" in capsys.readouterr().err
    conversation.sees = True
    lines = iter([f"/image {image}", "/image none.png", "what?", "and?"])
    talk(Talk(conversation), lambda _: next(lines, None) or _end())
    assert model.heard[0][-1]["content"] == "what?"
    assert [part["type"] for part in model.heard[1][-1]["content"]] == ["image_url", "text"]
    assert model.heard[2][-1]["content"] == "and?"
    assert "none.png cannot be read" in capsys.readouterr().err


def _end() -> str:
    raise EOFError


@pytest.mark.runtime
def test_a_projector_of_another_model(seeing, make_model, tmp_path):  # noqa: F811
    _, projector = seeing
    wide = tmp_path / "wide.gguf"
    convert(Recipe(str(make_model("llama").folder), wide, type="f16"))
    with pytest.raises(FileFormatError, match=r"llama\.cpp cannot use .*mmproj\.gguf with .*wide\.gguf"):
        load(wide, "{{ messages[0].content }}", projector=projector)
