"""The server's web page, in a real browser: a question that is typed there is answered there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from served import Server

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.serving.browser import page_url

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module", autouse=True)
def page() -> None:
    try:
        built = find_runtime().page
    except RuntimeMissingError:
        return  # the tests fail for it
    if built is None:
        pytest.skip("needs the web page: tesseraq-gguf runtime page")


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[[str], Browser]]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    opened: list[Browser] = []

    def browse(url: str) -> Browser:
        opened.append(Browser(tmp_path / "profile", url))
        return opened[-1]

    yield browse
    for browser in opened:
        browser.close()


ANSWER = "document.querySelector('[aria-label^=\"Assistant message\"]')?.innerText"
IDLE = "!document.querySelector('[aria-label=\"Stop\"]')"


def test_a_question_on_the_page_is_answered_on_it(serve: Callable[..., Server], browse, tiny_gguf: Path) -> None:
    server = serve(tiny_gguf, "--ctx", 512)
    browser = browse(server.url)
    browser.until("document.querySelector('textarea')?.offsetParent != null")
    browser.evaluate("document.querySelector('textarea').focus()")
    browser.write("the quick brown fox")
    assert "the quick brown fox" in browser.until("document.querySelector('[aria-label^=\"User message\"]')?.innerText")
    browser.until(r"/\d+ tokens/.test(" + ANSWER + ")")
    assert browser.evaluate(IDLE)
    assert "error" not in browser.evaluate("document.body.innerText").lower()


def test_the_page_lists_the_models_of_a_folder(
    serve: Callable[..., Server], browse, tiny_gguf: Path, tmp_path: Path
) -> None:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.gguf").symlink_to(tiny_gguf)
    browser = browse(serve("--models", tmp_path).url)
    browser.until("document.querySelector('textarea')?.offsetParent != null")
    models = browser.evaluate(
        "fetch('./v1/models').then(a => a.json()).then(m => window.found = m.data.map(d => d.id))"
    )
    assert models is not None
    assert sorted(browser.until("window.found")) == ["blue", "red"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script is the browser")
def test_a_browser_is_sent_to_the_page(serve: Callable[..., Server], tiny_gguf: Path, tmp_path, monkeypatch) -> None:
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/url\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(script))
    server = serve(tiny_gguf, "--open")
    server.until(lambda: (tmp_path / "url").exists() and (tmp_path / "url").read_text() == f"{server.url}\n")
    server.until(lambda: f"the page is at {server.url}\n" in server.log)


def test_without_a_screen_the_address_is_said(serve: Callable[..., Server], tiny_gguf: Path, monkeypatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    server = serve(tiny_gguf, "--open")
    server.until(lambda: f"the page is at {server.url} (no browser was found to open it)" in server.log)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--", "--api-key", "SECRET"), "leave --open or the key out"),
        (("--", "--no-webui"), "--open and --no-ui contradict each other"),
    ],
)
def test_a_page_that_cannot_be_opened(run, tiny_gguf, port, options, said):
    answer = run("serve", tiny_gguf, "--port", port, "--open", *options)
    assert answer.code == 2
    assert said in answer.error


def test_addresses():
    assert page_url("0.0.0.0", 80) == "http://127.0.0.1:80/"
    assert page_url("::", 80, "/llm/") == "http://[::1]:80/llm/"
    assert page_url("example.org", 8080) == "http://example.org:8080/"
