"""A browser without a window, driven by Chrome's own protocol over pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium with one page.

    Args:
        profile: the folder that it keeps files in.
        url: of the page.
    """

    def __init__(self, profile: Path, url: str) -> None:
        theirs, self._write = os.pipe()
        self._read, back = os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --user-data-dir={profile} --remote-debugging-pipe"
        # Chromium reads from 3 and writes to 4
        command = ["bash", "-c", f"exec {CHROMIUM} {options} 3<&{theirs} 4>&{back}"]
        self._process = subprocess.Popen(command, pass_fds=(theirs, back), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(back)
        self._asked = 0
        self._came = b""
        self._session: dict[str, str] = {}
        target = self._ask("Target.createTarget", url=url)["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def evaluate(self, script: str) -> Any:
        """Return what a line of JavaScript is, as far as JSON can say it."""
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until a line of JavaScript is true of the page; return what it is."""
        end = time.monotonic() + 60
        while not (found := self.evaluate(script)):
            assert time.monotonic() < end, f"never {script}: {self.evaluate('document.body.innerText')}"
            time.sleep(0.2)
        return found

    def write(self, text: str) -> None:
        """Type a text where the cursor is, and press Enter."""
        self._ask("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self._ask("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **key)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        asked = {"id": self._asked, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._asked:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _next(self) -> bytes:
        while b"\0" not in self._came:
            came = os.read(self._read, 65536)
            assert came, "Chromium left"
            self._came += came
        message, _, self._came = self._came.partition(b"\0")
        return message
