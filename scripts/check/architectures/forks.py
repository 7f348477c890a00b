"""Processes that begin where their parent is: what takes seconds to import is imported once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from byte_pairs import take_from_now_on

from tesseraq_gguf.runtime.progress import Reporter

_FORK = multiprocessing.get_context("fork")


@dataclass
class Ended:
    """What a process left.

    Attributes:
        name: of its task.
        told: what it told, in order.
        reason: why it ended before it was done; empty if it was done.
        seconds: that it took.
    """

    name: str
    told: list[Any] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0


@dataclass
class _Running:
    process: Any
    ended: Ended
    begun: float


def in_forks(
    names: Sequence[str], task: Callable[[str], Iterable[Any]], jobs: int, limit: float, logs: Path
) -> Iterator[Ended]:
    """Run a task for each name in a process of its own, some at a time, and yield what became of it.

    Args:
        names: of the tasks.
        task: yields what it tells.
        jobs: how many at a time.
        limit: seconds that one may take.
        logs: folder for what they say on standard output and standard error.
    """
    left, running = list(names), dict[Connection, _Running]()
    try:
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                listen, tell = _FORK.Pipe(duplex=False)
                process = _FORK.Process(target=_do, args=(name, task, tell, logs / name))
                process.start()
                tell.close()
                running[listen] = _Running(process, Ended(name), time.monotonic())
            for connection in wait(list(running), timeout=1):
                assert isinstance(connection, Connection)
                if not _hear(connection, running[connection]):
                    yield running.pop(connection).ended
            for one in running.values():
                if time.monotonic() - one.begun > limit:
                    one.ended.reason = f"took more than {limit:.0f} s"
                    _kill(one)
    finally:
        for one in running.values():
            _kill(one)


def _kill(one: _Running) -> None:
    """End a process with the forks that it made: while one of them holds the pipe, it seems to have more to tell."""
    with suppress(ProcessLookupError):  # it has ended, or has no group yet
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.kill()


def _hear(connection: Connection, one: _Running) -> bool:
    """Whether a process has more to tell; it is asked once."""
    try:
        one.ended.told.append(connection.recv())
        return True
    except EOFError:
        one.process.join()
    code = one.process.exitcode
    if code:
        one.ended.reason = one.ended.reason or (f"ended by signal {-code}" if code < 0 else "ended in an error")
    one.ended.seconds = round(time.monotonic() - one.begun, 1)
    return False


def _do(name: str, task: Callable[[str], Iterable[Any]], tell: Connection, log: Path) -> None:
    os.setpgid(0, 0)
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    for told in task(name):
        tell.send(told)


def talk_to_fork(job: Path, log: IO[str], progress: Reporter) -> dict[str, Any]:
    """Do what the package does to write a file, in a fork of this process in place of a new one.

    A fork has imported torch and transformers, which takes longer than to write a tiny model. It takes any tokenizer of
    byte pairs for GPT-2's.
    """
    (asks, asked), (told, tells) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _be_worker(job, asks, tells, log)
    for end in (asks, tells):
        os.close(end)
    answer: dict[str, Any] = {}
    with os.fdopen(told, encoding="utf-8") as answers:
        for line in answers:
            answer = json.loads(line)
            if answer["event"] == "note":
                progress.note(answer["text"])
    os.close(asked)
    os.waitpid(child, 0)
    return answer


def _be_worker(job: Path, asks: int, tells: int, log: IO[str]) -> None:
    code = 1
    try:
        for mine, its in ((asks, 0), (tells, 1), (log.fileno(), 2)):
            os.dup2(mine, its)
        sys.stdout = sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
            del sys.modules[name]  # transformers' own
        take_from_now_on()
        from tesseraq_gguf.converter import worker

        code = worker.main([str(job)])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
