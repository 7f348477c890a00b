"""A chat in a terminal, for real: what stands on the screen after keys were pressed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest

from tesseraq_gguf.runtime import find_runtime

pytestmark = [pytest.mark.runtime, pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")]

THINKS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<think>\n"
ALT_ENTER, UP, CTRL_C, CTRL_D = "\x1b\r", "\x1b[A", "\x03", "\x04"


class Terminal:
    """A command in a terminal of 100 by 50 characters."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.screen = pyte.Screen(100, 50)
        self._stream = pyte.ByteStream(self.screen)
        self.process = pexpect.spawn(sys.executable, arguments, env=environment, dimensions=(50, 100), timeout=60)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def press(self, keys: str) -> None:
        self.process.send(keys)

    def until(self, pattern: str) -> str:
        """Wait until the screen shows something; return all that it shows."""
        end = time.monotonic() + 60
        while not re.search(pattern, self.text, re.MULTILINE):
            assert time.monotonic() < end, f"no {pattern!r} on the screen:\n{self.text}"
            self._read()
        return self.text

    def end(self) -> int:
        """Wait until the command left; return its exit code."""
        while self._read():
            pass
        self.process.close()
        return int(self.process.exitstatus)

    def _read(self) -> bool:
        try:
            self._stream.feed(self.process.read_nonblocking(4096, timeout=1))
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        return True


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Begin a chat in a terminal, with a cache of its own, whose history lasts as long as the test."""
    environment = {
        **os.environ,
        "TESSERAQ_GGUF_CACHE": str(tmp_path / "cache"),
        "TESSERAQ_GGUF_RUNTIME": str(find_runtime().root),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    begun: list[Terminal] = []

    def begin(*arguments: Any) -> Terminal:
        begun.append(Terminal(["-m", "tesseraq_gguf", "chat", *map(str, arguments), "--seed", "1"], environment))
        return begun[-1]

    yield begin
    for each in begun:
        each.process.close(force=True)


def test_a_chat_from_its_start_to_ctrl_d(terminal, tiny_gguf, tmp_path):
    chat = terminal(tiny_gguf, "--max-tokens", 8)
    start = chat.until("^>$")
    assert re.search(r"^model +.*, llama, [\d,]+ weights$", start, re.MULTILINE)
    assert re.search(r"^type +mostly f16, \d+\.\d\d bits per weight, \d+\.\d MB$", start, re.MULTILINE)
    assert re.search(r"^context +512 tokens$", start, re.MULTILINE)
    assert re.search(r"^runtime +\S+, cpu, \d+ threads$", start, re.MULTILINE)

    chat.press("the quick\\\rbrown" + ALT_ENTER + "fox\r")
    screen = chat.until(r"ended at --max-tokens 8\)\n>$")
    assert "> the quick\n  brown\n  fox\n" in screen
    chat.press(f"/save {tmp_path}/said.json\r/stats\r")
    screen = chat.until(r"context +\d+ of 512 tokens\n>$")
    assert "1 question with answers saved" in screen
    assert re.search(r"^last answer +\d+ tokens of prompt at [\d,.]+ a second, \d+ of answer", screen, re.MULTILINE)
    assert '"the quick\\nbrown\\nfox"' in (tmp_path / "said.json").read_text()

    chat.press(CTRL_C)
    chat.until("^/exit leaves")
    chat.press(CTRL_D)
    assert chat.end() == 0

    history = tmp_path / "cache/chat/history"
    assert history.stat().st_mode & 0o077 == 0
    again = terminal(tiny_gguf)
    again.until("^>$")
    again.press(UP * 3)
    again.until("^> the quick\n  brown\n  fox$")


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(terminal, tiny_gguf):
    chat = terminal(tiny_gguf, "--max-tokens", 480, "--temperature", 0)  # by which it finds no end
    chat.until("^>$")
    chat.press("the quick brown fox\r")
    chat.until(r"fox\n.+")
    chat.press(CTRL_C)
    chat.until(r"\(stopped\)\n>$")
    chat.press("/nothing\r")
    chat.until("unknown command /nothing; /help lists those there are")
    chat.press("/exit\r")
    assert chat.end() == 0


def test_thoughts_are_folded_unless_they_are_to_be_shown(terminal, tiny_gguf, tmp_path):
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    folded = terminal(tiny_gguf, "--max-tokens", 8, "--template", template)
    folded.until("^>$")
    folded.press("the quick brown fox\r")
    screen = folded.until(r"ended at --max-tokens 8\)\n>$")
    assert re.search(r"> the quick brown fox\nthought for \d+ s, and gave no answer\n\(ended", screen)
    folded.press("/thought\r")
    screen = folded.until(r"/thought\n[^>]+\n>$")
    thought = screen.rpartition("/thought\n")[2].removesuffix("\n>").strip()

    shown = terminal(tiny_gguf, "--max-tokens", 8, "--template", template, "--show-reasoning")
    shown.until("^>$")
    shown.press("the quick brown fox\r")
    screen = shown.until(r"ended at --max-tokens 8\)\n>$")
    assert thought and thought.splitlines()[0] in screen


def test_a_base_model_says_what_it_is(terminal, base_gguf):
    chat = terminal(base_gguf)
    assert "no chat template: it goes on with your text" in chat.until("^>$")
    chat.press("/system Be brief.\r")
    chat.until("no place for a system's text")


def test_piped_lines_are_answered_without_a_word_about_the_model(tiny_gguf):
    command = [sys.executable, "-m", "tesseraq_gguf", "chat", str(tiny_gguf), "--max-tokens", "4", "--seed", "1"]
    done = subprocess.run(command, input=b"the quick\n/exit\n", capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.count(b"\n") >= 1
    assert done.stderr == b"(ended at --max-tokens 4)\n"
