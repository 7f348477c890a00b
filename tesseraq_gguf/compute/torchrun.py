"""What torchrun says of the processes that it started; nothing here needs torch."""

from __future__ import annotations

import os


def rank() -> int:
    """Return this process' place among all; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process' place among those of its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many processes this machine has; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
