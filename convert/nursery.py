"""Where the child processes that write come from: a process that has imported what they all need, and forks them.

To import torch and transformers takes seconds, and a conversion has several children. What a child does to its modules
goes with it, as in an interpreter of its own; which it has where processes cannot be forked safely.

    python -m tesseraq_gguf.converter.nursery DESCRIPTOR

serves on a socket. A request has the arguments of a worker, its environment and its folder, and brings its standard
streams along; the answer is the child's number. It ends when its parent is gone, or has asked for nothing for a while.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NoReturn

_IDLE = 20.0
"""Seconds without a request after which it ends: learning takes hours, and needs the memory."""

_LARGEST = 1 << 20
"""Bytes of a request, at most."""

_IMPORTED = ("HF_", "TRANSFORMERS_", "TORCH", "PYTHON", "OMP_", "TOKENIZERS_", "XDG_", "HOME", "TMPDIR", "LD_")
"""What variables begin with that are looked at while modules are imported: a child's must be the nursery's."""


@dataclass(frozen=True)
class _Nursery:
    """A nursery that runs.

    Attributes:
        parent: number of the process that it is of: a fork of that needs one of its own.
        inherited: what a child has from its parent and cannot be given later.
        socket: to ask it by; it ends when this is closed.
        process: itself.
    """

    parent: int
    inherited: Mapping[str, Any]
    socket: socket.socket
    process: subprocess.Popen[bytes]


_kept: list[_Nursery] = []


@contextmanager
def child(job: Path, environment: Mapping[str, str], log: IO[str]) -> Iterator[IO[str]]:
    """Start a worker on a job and give what it says on its standard output. It never outlives the context.

    Args:
        job: the file that says what to do.
        environment: of the child.
        log: for its standard error.
    """
    if _can_fork():
        with ExitStack() as stack:
            began = _forked(job, environment, log, stack)
            if began is not None:
                yield began
                return
    with _interpreter(job, environment, log) as said:
        yield said


@cache
def _can_fork() -> bool:
    """Whether this is a Linux that tells one process from a later one of its number; elsewhere forks are not safe."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # another system, or a sandbox
        return False
    return True


@contextmanager
def _interpreter(job: Path, environment: Mapping[str, str], log: IO[str]) -> Iterator[IO[str]]:
    """A child with an interpreter of its own."""
    command = [sys.executable, "-m", "tesseraq_gguf.converter.worker", str(job)]
    pipe = subprocess.PIPE
    running = subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True, encoding="utf-8"
    )
    assert running.stdout is not None
    try:
        yield running.stdout
        running.wait()
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()
        for end in (running.stdin, running.stdout):
            if end is not None:
                with suppress(OSError):
                    end.close()


def _forked(job: Path, environment: Mapping[str, str], log: IO[str], stack: ExitStack) -> IO[str] | None:
    """Start a forked child, whose end the stack sees to; None if there is no nursery to be had."""
    request = json.dumps({"job": str(job), "environment": dict(environment), "folder": str(Path.cwd())}).encode()
    if len(request) > _LARGEST:
        return None
    their_input, our_input = os.pipe()  # the child ends when ours is closed
    stack.callback(os.close, our_input)
    our_output, their_output = os.pipe()
    said = stack.enter_context(os.fdopen(our_output, encoding="utf-8"))
    try:
        number = _ask(request, [their_input, their_output, log.fileno()], environment)
    finally:
        os.close(their_input)
        os.close(their_output)
    if number is None:
        return None
    with suppress(ProcessLookupError):  # it has ended
        process = os.pidfd_open(number)
        stack.callback(os.close, process)
        stack.push(partial(_see_off, process))
    return said


def _see_off(process: int, kind: type[BaseException] | None, *_: object) -> None:
    """Wait for a child that has said all, and end one that was not let finish.

    Args:
        process: its descriptor, which no other process can come to have.
        kind: of the exception that the context is left with.
    """
    if kind is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [])


def _ask(request: bytes, descriptors: list[int], environment: Mapping[str, str]) -> int | None:
    """Hand a request to the nursery, a new one if that of before has ended; return the child's number."""
    for _ in range(2):
        nursery = _nursery(environment)
        with suppress(OSError):
            socket.send_fds(nursery.socket, [request], descriptors)
            if answer := nursery.socket.recv(64):
                return int(answer)
        _close()
    return None


def _inherited(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a child of this process has from it: variables that imports look at, limits, and processors."""
    import resource

    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    variables = {name: value for name, value in environment.items() if name.startswith(_IMPORTED)}
    bounds = {name: resource.getrlimit(getattr(resource, name)) for name in limits}
    return variables | bounds | {"processors": os.sched_getaffinity(0)}


def _nursery(environment: Mapping[str, str]) -> _Nursery:
    """The nursery of this process, begun where there is none that inherited the same."""
    inherited = _inherited(environment)
    if _kept and (_kept[0].parent, _kept[0].inherited) == (os.getpid(), inherited):
        return _kept[0]
    _close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tesseraq_gguf.converter.nursery", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    _kept.append(_Nursery(os.getpid(), inherited, ours, process))
    return _kept[0]


@atexit.register
def _close() -> None:
    while _kept:
        nursery = _kept.pop()
        nursery.socket.close()
        if nursery.parent == os.getpid():  # a fork has no say in it
            nursery.process.kill()
            nursery.process.wait()


def _grow_up(request: Mapping[str, Any], descriptors: list[int], work: Callable[[list[str]], int]) -> NoReturn:
    """Be a worker, as if an interpreter of its own had begun with these streams, and end."""
    for stream, descriptor in enumerate(descriptors):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        code = work([request["job"]])
    except BaseException:
        traceback.print_exc()
    finally:
        for written in (sys.stdout, sys.stderr):
            with suppress(OSError):
                written.flush()
        os._exit(code)


def main(arguments: list[str]) -> int:
    """Serve; see the module's docstring."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the children, and for the parent
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    from tesseraq_gguf.converter import worker

    served = socket.socket(fileno=int(arguments[0]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while select.select([served], [], [], _IDLE)[0]:
        request, descriptors, *_ = socket.recv_fds(served, _LARGEST, 3)
        if not request:
            break
        number = os.fork()
        if number == 0:
            served.close()
            _grow_up(json.loads(request), descriptors, worker.main)
        served.send(str(number).encode())
        for descriptor in descriptors:
            os.close(descriptor)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
