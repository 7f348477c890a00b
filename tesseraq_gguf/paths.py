"""Where the project keeps files between runs, and how a file or folder appears only when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_folder(kind: str) -> Path:
    """Return (and make) the cache folder for `kind`, under TESSERAQ_GGUF_CACHE or the user's cache folder."""
    base = os.environ.get("TESSERAQ_GGUF_CACHE") or platformdirs.user_cache_dir("tesseraq-gguf")
    folder = Path(base).expanduser() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to build in; rename it to `target` if the body ends well, remove it if not.

    The path does not exist yet: the body makes a file or a folder there. An existing file at `target` is replaced in
    one step.
    """
    home = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    partial = home / target.name
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(home, ignore_errors=True)
