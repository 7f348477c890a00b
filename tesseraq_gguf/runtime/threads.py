"""How many threads llama.cpp gets: one for each core that this process may use, as its own programs take them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable_cores(topology: str = _TOPOLOGY) -> int:
    """Return the number of cores that this process may run on; those that are one core's two threads count once.

    Args:
        topology: path of the file that names the threads of a core, with `{}` in the place of a thread's number.
    """
    allowed = usable_processors()
    cores = {_siblings(topology, number) or str(number) for number in allowed}
    return max(1, len(cores))


def usable_processors() -> Collection[int]:
    """Return the numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _siblings(topology: str, number: int) -> str:
    try:
        return Path(topology.format(number)).read_text().strip()
    except OSError:
        return ""
