"""Opens the page of a server in a browser as soon as the server answers. Runs beside it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser

_PAUSE = 0.2
"""Seconds between two questions whether the server answers."""


def open_when_it_answers(url: str) -> None:
    """Begin to wait for the server that this process is about to become, or to start."""
    command = [sys.executable, "-m", "tesseraq_gguf.serving.browser", url, str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL)


def wait_and_open(url: str, server: int) -> None:
    """Wait until a server answers, say where its page is, and show it where there is a screen.

    Args:
        url: of the page.
        server: its process, our parent; when it is gone nobody waits any longer.
    """
    while not _answers(f"{url}health"):
        if os.getppid() != server:
            return
        time.sleep(_PAUSE)
    shown = has_screen() and webbrowser.open(url)
    print(f"the page is at {url}{'' if shown else ' (no browser was found to open it)'}", file=sys.stderr, flush=True)


def has_screen() -> bool:
    """Whether a browser would have a window: those of text would take the server's terminal."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def page_url(host: str, port: int, prefix: str = "") -> str:
    """The address at which this machine sees the page of a server that listens at an address."""
    seen = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{seen}]' if ':' in seen else seen}:{port}{prefix.rstrip('/')}/"


if __name__ == "__main__":
    try:
        wait_and_open(sys.argv[1], int(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
