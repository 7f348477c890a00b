"""llama.cpp's web page, beside the programs of a runtime: npm builds it from the same source, once.

The runtime's own build leaves it out, because npm fetches hundreds of packages for it; the lock file that llama.cpp
has of them names the checksum of each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tesseraq_gguf.errors import RuntimeBuildError
from tesseraq_gguf.runtime.locate import Runtime
from tesseraq_gguf.runtime.progress import Reporter
from tesseraq_gguf.runtime.source import ensure_source

BUILD_COMMAND = "tesseraq-gguf runtime page"
"""What a user runs to get the page."""


def add_page(runtime: Runtime, progress: Reporter, force: bool = False) -> Path:
    """Return the folder of a runtime's page, building it if it is not there.

    Args:
        runtime: what it is to stand in.
        progress: told what happens.
        force: build even if it is there.

    Raises:
        RuntimeBuildError: npm is missing or fails, or the source cannot be had; the message is one line, and names the
            log if there is one.
    """
    if runtime.page is not None and not force:
        return runtime.page
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeBuildError("npm, which builds the web page, is missing: install Node.js 20.19 or newer")
    beside = runtime.root.parent / "source" / "llama.cpp"  # none, where the runtime was copied here
    source = beside if beside.is_dir() else ensure_source(progress).llama_cpp
    log = runtime.root.parent / "build-page.log"
    with tempfile.TemporaryDirectory(dir=runtime.root.parent, prefix="page-") as temporary:
        work, out = Path(temporary) / "ui", Path(temporary) / "page"
        shutil.copytree(source / "tools" / "ui", work)
        log.write_text("")
        progress.stage("fetching what the web page is built with")
        _npm([npm, "ci", "--no-audit", "--no-fund"], work, out, log)
        progress.stage("building the web page")
        _npm([npm, "run", "build"], work, out, log)
        if not (out / "index.html").is_file():
            raise RuntimeBuildError(f"npm built no web page; the full log is {log}")
        final = runtime.root / "page"
        if final.exists():
            final.rename(Path(temporary) / "old")
        out.rename(final)
    return final


def _npm(command: list[str], work: Path, out: Path, log: Path) -> None:
    environment = os.environ | {"LLAMA_UI_OUT_DIR": str(out), "LLAMA_BUILD_NUMBER": "0"}
    with log.open("a") as sink:
        print("$", *command, file=sink, flush=True)
        code = subprocess.run(command, cwd=work, env=environment, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code:
        said = re.findall(r"npm (?:error|ERR!) +(.*)", log.read_text(errors="replace"))
        reason = f": {said[1] if said[1:] and said[0].startswith('code ') else said[0]}" if said else ""
        raise RuntimeBuildError(f"npm could not build the web page (exit code {code}){reason}; the full log is {log}")
