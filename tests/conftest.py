"""A tiny Llama, as a Hugging Face folder and as a GGUF file, and the command line in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_llama import TEMPLATE, WORDS, make_tiny_model

pytest_plugins = ["skips", "workers", "pytester"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama", TEMPLATE)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in f16, with a chat template."""
    from tesseraq_gguf.converter.writer import write_plain
    from tesseraq_gguf.models import ModelSource

    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_plain(ModelSource("tiny", tiny_model), out, "f16")
    return out


@pytest.fixture(scope="session")
def base_gguf(tiny_gguf: Path) -> Path:
    """The same file without a chat template: its key has another name of the same length."""
    data = tiny_gguf.read_bytes()
    key = b"tokenizer.chat_template"
    assert data.count(key) == 1
    out = tiny_gguf.with_name("base.gguf")
    out.write_bytes(data.replace(key, b"tokenizer.that_template"))
    return out


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens of the tiny Llama."""
    out = tmp_path_factory.mktemp("text") / "long.txt"
    out.write_text(WORDS * 100)
    return out


@dataclass
class Answer:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error that a user sees last."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Run a command in this process."""
    from tesseraq_gguf.cli.app import main

    monkeypatch.setenv("COLUMNS", "200")
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Answer:
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(a) for a in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        code = ended.value.code
        return Answer(code if isinstance(code, int) else 0, out, err)

    return call
