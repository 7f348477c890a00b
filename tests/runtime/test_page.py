"""The web page of a runtime: whole or not there, and what npm says where it fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeBuildError
from tesseraq_gguf.runtime.locate import Runtime
from tesseraq_gguf.runtime.page import add_page
from tesseraq_gguf.runtime.progress import SilentReporter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell script is npm")

BUILDS = """
case $1 in
ci) test -f package-lock.json && echo "$@" > installed ;;
run)
    test -f installed && mkdir -p "$LLAMA_UI_OUT_DIR" || exit 1
    echo "<title>page $(cat package-lock.json)</title>" > "$LLAMA_UI_OUT_DIR/index.html" ;;
esac
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    ui = tmp_path / "key/source/llama.cpp/tools/ui"
    ui.mkdir(parents=True)
    (ui / "package-lock.json").write_text("1\n")
    (tmp_path / "key/cpu").mkdir()
    return Runtime(tmp_path / "key/cpu", {})


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that does what a test writes into it."""
    program = tmp_path / "bin/npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{BUILDS}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def names(runtime: Runtime) -> list[str]:
    return sorted(path.name for path in runtime.root.parent.iterdir())


def test_it_is_built_once_from_the_runtimes_own_source(runtime: Runtime, npm: Path) -> None:
    assert runtime.page is None
    page = add_page(runtime, SilentReporter())
    assert page == runtime.page == runtime.root / "page"
    assert (page / "index.html").read_text() == "<title>page 1</title>\n"
    assert names(runtime) == ["build-page.log", "cpu", "source"]
    source = runtime.root.parent / "source/llama.cpp/tools/ui"
    assert [path.name for path in source.iterdir()] == ["package-lock.json"]

    (source / "package-lock.json").write_text("2\n")
    assert add_page(runtime, SilentReporter()) == page
    assert "page 1" in (page / "index.html").read_text()
    add_page(runtime, SilentReporter(), force=True)
    assert "page 2" in (page / "index.html").read_text()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'npm error code EBADENGINE'; echo 'npm error engine Unsupported engine'; exit 3", "engine Unsupported"),
        ("echo 'npm error network is down'; exit 3", r"exit code 3\): network is down; the full log is .*page\.log"),
        ("exit 3", r"exit code 3\); the full log"),
        ("exit 0", "npm built no web page"),
    ],
)
def test_what_fails_leaves_nothing(runtime: Runtime, npm: Path, script: str, said: str) -> None:
    npm.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(RuntimeBuildError, match=said):
        add_page(runtime, SilentReporter())
    assert runtime.page is None
    assert names(runtime) == ["build-page.log", "cpu", "source"]


def test_without_npm(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeBuildError, match=r"npm, .*, is missing: install Node\.js"):
        add_page(runtime, SilentReporter())
