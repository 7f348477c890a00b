"""Where the project keeps files between runs, and how a file or folder appears only when it is whole."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

_CHUNK = 1 << 24

_ALIVE = ".alive"
"""Lock that a process holds while it builds in a folder."""


def cache_folder(kind: str) -> Path:
    """Return (and make) the cache folder for `kind`, under TESSERAQ_GGUF_CACHE or the user's cache folder."""
    base = os.environ.get("TESSERAQ_GGUF_CACHE") or platformdirs.user_cache_dir("tesseraq-gguf")
    folder = Path(base).expanduser() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of files, one behind the other, as `sha256sum` has that of one."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to build in; rename it to `target` if the body ends well, remove it if not.

    The path does not exist yet: the body makes a file or a folder there. An existing file at `target` is replaced in
    one step. What a killed process left of the same target is removed.
    """
    with temporary_home(target) as home:
        partial = home / target.name
        yield partial
        partial.replace(target)


@contextmanager
def temporary_home(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` to build in, and remove it afterwards: the body moves out what is to stay.

    What a killed process left of the same target is removed.
    """
    prefix, suffix = f".{target.name}.", ".partial"
    _remove_abandoned(target.parent, prefix, suffix)
    home = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=target.parent))
    alive = FileLock(home / _ALIVE)
    try:
        with alive:
            yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _remove_abandoned(folder: Path, prefix: str, suffix: str) -> None:
    """Remove folders whose makers are gone: a lock that can be taken has no owner any more."""
    for home in folder.glob(f"{glob.escape(prefix)}*{suffix}"):
        lock = home / _ALIVE
        if lock.is_file():  # without it, its maker may be about to lock it
            with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
                shutil.rmtree(home, ignore_errors=True)
