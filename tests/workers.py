"""How many processes share the tests when `scripts/test` runs them: `-n auto`, which pytest-xdist asks about here.

Files are dealt out whole (`--dist loadfile`), so more processes than files would idle. One file needs none, nor does
who wants to look on: `-n 0`, `--pdb`, `--trace` and `-s` run the tests in pytest's own process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tesseraq_gguf.runtime.threads import usable_processors

MEMORY = 2 << 30
"""Bytes that must be free for each process; with the compilers and programs that its tests start, one takes 0.9 GB."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Answer for `-n auto`, unless the environment does (`PYTEST_XDIST_AUTO_NUM_WORKERS`)."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if config.option.trace or config.option.capture == "no":
        return 0
    return workers(files(config.args), len(usable_processors()), psutil.virtual_memory().available)


def files(arguments: Iterable[str]) -> int:
    """Return how many test files lie in the files, folders and node ids that pytest is to run."""
    found: set[Path] = set()
    for argument in arguments:
        path = Path(argument.partition("::")[0])
        found.update(file.resolve() for file in (path.rglob("test_*.py") if path.is_dir() else [path]))
    return len(found)


def workers(files: int, cores: int, memory: int) -> int:
    """Return the number of processes beside pytest's own; none where it would be one, which shares nothing."""
    number = min(files, cores, memory // MEMORY)
    return number if number > 1 else 0
