"""Serving: what a client gets over HTTP is what the file answers, and an address that cannot be is said at once."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_pairs import take_for_gpt2
from tiny_drafters import drafter  # noqa: F401  (a fixture)
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.runtime import Runtime
from tesseraq_gguf.serving.serve import Extras, _drafting

PROMPT = "the quick brown fox"


@pytest.fixture
def port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], ModelSource], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A tiny Llama in a type of ours."""
    out = tmp_path_factory.mktemp("serving") / "tiny.gguf"
    convert(Recipe(str(make_model("llama-256").folder), out, type="tsq4", method="rtn"))
    return out


@pytest.fixture
def server(model: Path, port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, with a client's connection accepted."""
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "tesseraq_gguf", "serve", str(model), "--port", str(port), "--ctx", "256"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--", "--threads", "1", "--parallel", "3"], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def ask(port: int, path: str, **body: Any) -> dict[str, Any]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.mark.runtime
def test_a_client_gets_what_the_file_answers(server: subprocess.Popen[bytes], model: Path, port: int) -> None:
    from tesseraq_gguf.runtime import Llama  # loads the runtime's libraries

    served = ask(port, "/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    llama = Llama(str(model), n_ctx=256, n_threads=1, verbose=False)
    assert served and served == llama(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]

    messages = [{"role": "user", "content": PROMPT}]
    said = ask(port, "/v1/chat/completions", messages=messages, max_tokens=4, temperature=0)
    assert said["choices"][0]["message"]["role"] == "assistant"
    assert said["usage"]["completion_tokens"] == 4
    assert ask(port, "/props")["default_generation_settings"]["n_ctx"] == 256

    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 0


def test_a_port_that_is_taken(run: Callable[..., Any], tiny_gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        answer = run("serve", tiny_gguf, "--port", taken)
    assert answer.code == 2
    assert f"nothing can listen at 127.0.0.1, port {taken} (Address already in use)" in answer.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--port", 70000), "--port must be a number from 1 to 65535, not 70000"),
        (("--ctx", -1), "--ctx must not be negative, not -1"),
        (("--host", "203.0.113.1"), "nothing can listen at 203.0.113.1, port 8080 (Cannot assign requested address)"),
    ],
)
def test_what_cannot_be_meant(run: Callable[..., Any], tiny_gguf: Path, options: tuple[object, ...], said: str) -> None:
    answer = run("serve", tiny_gguf, *options)
    assert answer.code == 2
    assert said in answer.error


def test_a_missing_file(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("serve", tmp_path / "none.gguf").code == 1


def test_a_runtime_without_a_server(
    run: Callable[..., Any], tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    """One that an earlier version built."""
    from tesseraq_gguf.serving import serve as serving

    monkeypatch.setattr(serving, "find_runtime", lambda: Runtime(tmp_path, {"backend": "cpu", "portable": True}))
    answer = run("serve", tiny_gguf, "--port", port)
    assert answer.code == 1
    assert answer.error.endswith("has no program 'llama-server'; run: tesseraq-gguf runtime build --portable")


@pytest.fixture(scope="module")
def drafting(drafter: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:  # noqa: F811
    """A tiny model with a head for speculation, rounded."""
    folder = tmp_path_factory.mktemp("drafting")
    with pytest.MonkeyPatch.context() as patched:
        take_for_gpt2(folder, patched)
        convert(Recipe(str(drafter.folder), folder / "out.gguf", type="q4_0", method="rtn"))
    yield folder / "out.gguf"


def start(file: Path, port: int, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start the command, and wait until it answers."""
    command = [sys.executable, "-m", "tesseraq_gguf", "serve", str(file), "--port", str(port), "--ctx", "256", *options]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--", "--threads", "1"], stdout=out, stderr=subprocess.STDOUT)
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            ask(port, "/health")
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    return process


@pytest.mark.runtime
def test_a_head_drafts_and_changes_no_answer(drafting: Path, port: int, tmp_path: Path) -> None:
    found = {}
    for option in ("--mtp", "--no-mtp"):
        process = start(drafting, port, tmp_path / "server.log", option)
        try:
            found[option] = ask(port, "/completion", prompt=PROMPT, temperature=0, n_predict=24)
        finally:
            process.kill()
            process.wait()
    assert found["--mtp"]["content"] and found["--mtp"]["content"] == found["--no-mtp"]["content"]
    assert found["--mtp"]["timings"]["draft_n"] > 0
    assert "draft_n" not in found["--no-mtp"]["timings"]


def test_what_drafts_by_itself(drafting: Path, tiny_gguf: Path) -> None:
    assert _drafting(drafting, Extras()) == ["--spec-type", "draft-mtp"]
    assert _drafting(drafting, Extras(mtp=False)) == []
    assert _drafting(drafting, Extras(options=["--spec-type=ngram-simple"])) == []
    assert _drafting(tiny_gguf, Extras()) == []


def test_nothing_to_draft_with(run: Callable[..., Any], tiny_gguf: Path) -> None:
    answer = run("serve", tiny_gguf, "--mtp")
    assert answer.code == 2
    assert "has no head for speculation to draft with" in answer.error
