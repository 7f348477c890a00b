"""The command `serve` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Server:
    """A server that answers.

    Args:
        log: the file that its words go to.
        port: where it is to listen.
        arguments: of the command, port left out.
    """

    def __init__(self, log: Path, port: int, *arguments: object) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self._log = log
        words = list(map(str, arguments))
        at = words.index("--") if "--" in words else len(words)
        words[at:] = ["--port", str(port), "--", "--threads", "1", *words[at + 1 :]]
        with log.open("wb") as out:
            command = [sys.executable, "-m", "tesseraq_gguf", "serve", *words]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self.until(self._answers)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something happened."""
        end = time.monotonic() + 60
        while not happened():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()

    def _answers(self) -> bool:
        try:
            return bool(self.ask("health"))
        except (urllib.error.URLError, ConnectionError):
            return False
