"""Serving: what a client gets over HTTP is what the file answers, and an address that cannot be is said at once."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_pairs import take_for_gpt2
from served import Server
from tiny_drafters import drafter  # noqa: F401  (a fixture)
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.runtime import Runtime
from tesseraq_gguf.serving import serve as serving
from tesseraq_gguf.serving.model_folder import check_folder
from tesseraq_gguf.serving.serve import Extras, _drafting, _page

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], ModelSource], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A tiny Llama in a type of ours."""
    out = tmp_path_factory.mktemp("serving") / "tiny.gguf"
    convert(Recipe(str(make_model("llama-256").folder), out, type="tsq4", method="rtn"))
    return out


@pytest.mark.runtime
def test_a_client_gets_what_the_file_answers(serve: Callable[..., Server], model: Path) -> None:
    from tesseraq_gguf.runtime import Llama  # loads the runtime's libraries

    server = serve(model, "--ctx", 256, "--", "--parallel", "3")
    served = server.ask("v1/completions", prompt=PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    llama = Llama(str(model), n_ctx=256, n_threads=1, verbose=False)
    assert served and served == llama(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]

    messages = [{"role": "user", "content": PROMPT}]
    said = server.ask("v1/chat/completions", messages=messages, max_tokens=4, temperature=0)
    assert said["choices"][0]["message"]["role"] == "assistant"
    assert said["usage"]["completion_tokens"] == 4
    assert server.ask("props")["default_generation_settings"]["n_ctx"] == 256

    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) == 0


@pytest.mark.runtime
def test_a_folder_is_served_with_types_of_ours(
    serve: Callable[..., Server], model: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    """Each model is loaded when it is asked for, and answers as it does alone."""
    folder = tmp_path / "models"
    (folder / "plain").mkdir(parents=True)
    (folder / "ours.gguf").symlink_to(model)
    (folder / "plain/tiny.gguf").symlink_to(tiny_gguf)
    asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    alone = serve(model, "--ctx", 256).ask("v1/completions", **asked)["choices"][0]["text"]

    server = serve("--models", folder, "--ctx", 256)
    listed = {each["id"]: each["status"]["value"] for each in server.ask("v1/models")["data"]}
    assert listed == {"ours": "unloaded", "plain": "unloaded"}
    found = {name: server.ask("v1/completions", model=name, **asked)["choices"][0]["text"] for name in listed}
    assert found["ours"] and found["ours"] == alone
    assert found["plain"] and found["plain"] != alone
    said = server.ask(
        "v1/chat/completions", model="plain", messages=[{"role": "user", "content": PROMPT}], max_tokens=3
    )
    assert said["usage"]["completion_tokens"] <= 3
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) == 0


def test_what_of_a_folder_cannot_be_served(tiny_gguf: Path, tmp_path: Path, seen_kinds: dict[str, Path]) -> None:
    (tmp_path / "good.gguf").symlink_to(tiny_gguf)
    (tmp_path / "mmproj-good.gguf").write_bytes(b"not listed")
    (tmp_path / "notes.txt").write_text("not listed")
    assert check_folder(tmp_path) == []
    (tmp_path / "split-00001-of-00002.gguf").symlink_to(tiny_gguf)
    (tmp_path / "split-00002-of-00002.gguf").symlink_to(tiny_gguf)
    (tmp_path / "imatrix.gguf").symlink_to(seen_kinds["imatrix"])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/torn.gguf").write_bytes(b"GGUF")
    complaints = check_folder(tmp_path)
    assert [line.partition(" ")[0] for line in complaints] == ["imatrix.gguf", "split-00002-of-00002.gguf", "torn.gguf"]
    assert "of the kind 'imatrix'" in complaints[0]
    assert "parts are hidden in a folder of their own" in complaints[1]


@pytest.fixture
def seen_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of an importance matrix."""
    from gguf import GGUFWriter

    out = tmp_path_factory.mktemp("kinds") / "imatrix.gguf"
    writer = GGUFWriter(out, "imatrix")
    writer.add_type("imatrix")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"imatrix": out}


def test_a_folder_without_a_model(run: Callable[..., Any], tiny_gguf: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--models", tmp_path), "has no GGUF files"),
        (("--models", tmp_path / "none"), "--models wants a folder"),
        (("--models", tmp_path, tiny_gguf), "not both"),
        ((tmp_path,), "is a folder: serve it with --models"),
        ((), "give a GGUF file to serve"),
        (("--models", tiny_gguf.parent, "--draft", tiny_gguf), "--draft is of one model"),
    ):
        answer = run("serve", *options)
        assert answer.code == 2
        assert said in answer.error
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    assert "has no model to serve: of torn.gguf," in run("serve", "--models", tmp_path).error


@pytest.mark.runtime
def test_a_draft_model_drafts_and_changes_no_answer(serve: Callable[..., Server], tiny_gguf: Path) -> None:
    asked = {"prompt": PROMPT, "n_predict": 24, "temperature": 0}
    alone = serve(tiny_gguf, "--ctx", 256).ask("completion", **asked)
    server = serve(tiny_gguf, "--draft", tiny_gguf, "--ctx", 256)
    drafted = server.ask("completion", **asked)
    assert drafted["content"] and drafted["content"] == alone["content"]
    assert drafted["timings"]["draft_n"] > 0 and drafted["timings"]["draft_n_accepted"] > 0
    assert "draft_n" not in alone["timings"]
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) == 0


@pytest.mark.runtime
def test_a_draft_model_of_another_vocabulary(
    run: Callable[..., Any], tiny_gguf: Path, drafting: Path, port: int
) -> None:
    """llama-server would go on without it."""
    options = ("--port", port, "--ctx", 256, "--", "--threads", "1", "--spec-type", "draft-simple")
    answer = run("serve", tiny_gguf, "--draft", drafting, *options)
    assert answer.code == 2
    assert f"llama.cpp cannot draft with {drafting}: draft model vocab type must match" in answer.error


def test_what_cannot_draft(run: Callable[..., Any], tiny_gguf: Path, tmp_path: Path) -> None:
    assert "none.gguf" in run("serve", tiny_gguf, "--draft", tmp_path / "none.gguf").error
    assert "only one can draft" in run("serve", tiny_gguf, "--draft", tiny_gguf, "--mtp").error
    assert _drafting(tiny_gguf, Extras(draft=tiny_gguf)) == ["-md", str(tiny_gguf), "--spec-type", "draft-simple"]
    chosen = Extras(draft=tiny_gguf, options=["--spec-type", "draft-eagle3"])
    assert _drafting(tiny_gguf, chosen) == ["-md", str(tiny_gguf)]


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


@pytest.mark.runtime
def test_a_head_drafts_and_changes_no_answer(serve: Callable[..., Server], drafting: Path) -> None:
    found = {}
    for option in ("--mtp", "--no-mtp"):
        server = serve(drafting, "--ctx", 256, option)
        found[option] = server.ask("completion", prompt=PROMPT, temperature=0, n_predict=24)
    assert found["--mtp"]["content"] and found["--mtp"]["content"] == found["--no-mtp"]["content"]
    assert found["--mtp"]["timings"]["draft_n"] > 0
    assert "draft_n" not in found["--no-mtp"]["timings"]


def test_what_drafts_by_itself(drafting: Path, tiny_gguf: Path) -> None:
    assert _drafting(drafting, Extras()) == ["--spec-type", "draft-mtp"]
    assert _drafting(drafting, Extras(mtp=False)) == []
    assert _drafting(drafting, Extras(options=["--spec-type=ngram-simple"])) == []
    assert _drafting(tiny_gguf, Extras()) == []
    assert _drafting(drafting, Extras(draft=drafting)) == ["-md", str(drafting)]  # llama-server sees the head itself


def test_nothing_to_draft_with(run: Callable[..., Any], tiny_gguf: Path) -> None:
    answer = run("serve", tiny_gguf, "--mtp")
    assert answer.code == 2
    assert "has no head for speculation to draft with" in answer.error


def test_a_page_that_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_runtime", lambda: Runtime(tmp_path, {}))
    assert _page(Extras()) == []
    with pytest.raises(UsageError, match="the runtime has no web page; run: tesseraq-gguf runtime page"):
        _page(Extras(opens=True))
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.html").write_text("a page")
    assert _page(Extras(opens=True)) == ["--path", str(tmp_path / "page")]
    assert _page(Extras(options=["--path=mine"])) == []
    monkeypatch.setenv("LLAMA_API_KEY", "SECRET")
    assert _page(Extras()) == []
