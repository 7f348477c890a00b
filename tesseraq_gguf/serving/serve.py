"""Serve a GGUF file over HTTP, with the interface of OpenAI: llama.cpp's own server, which has our types in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.inspection import open_gguf
from tesseraq_gguf.models.speculation import drafts
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.runtime.load import check_loads
from tesseraq_gguf.runtime.threads import usable_cores, usable_processors
from tesseraq_gguf.serving.chat import CONTEXT
from tesseraq_gguf.serving.images import check_projector

TOOL = "llama-server"

_SPECULATION = {"--spec-type", "-md", "--model-draft", "--spec-draft-model", "--mtp"}
"""Options that say what drafts."""

_CHANGE_WHAT_IS_READ = {"--override-kv", "--model", "-m", "--override-tensor", "-ot"}
"""Options that say what llama-server makes of a file, or that it takes another."""


@dataclass(frozen=True)
class Extras:
    """What a server has beside a model.

    Attributes:
        projector: what images go through, as `convert` wrote it.
        mtp: whether the file's head for speculation drafts; None lets it where there is one.
        options: more options of llama-server.
    """

    projector: Path | None = None
    mtp: bool | None = None
    options: Sequence[str] = ()


def serve(
    file: Path | str,
    host: str = "127.0.0.1",
    port: int = 8080,
    ctx: int = CONTEXT,
    extras: Extras | None = None,
) -> NoReturn:
    """Become a server of a GGUF file, until it is stopped.

    Args:
        file: the GGUF file.
        host: the address to listen at.
        port: of that address.
        ctx: tokens of a conversation, and of all that are being answered at a time; 0 has as many as the model was
            made for.
        extras: what it has beside the model.

    Raises:
        FileFormatError: the file is missing, damaged, or refused by llama.cpp.
        UsageError: a number cannot be meant, or nothing can listen there.
        RuntimeMissingError: the runtime is not built, or has no server.
    """
    if ctx < 0:
        raise UsageError(f"--ctx must not be negative, not {ctx}")
    extras = extras or Extras()
    options, projector = extras.options, extras.projector
    drafting = _drafting(file, extras)
    if projector is not None:
        check_projector(projector)
    _try_to_listen(host, port)
    command = [str(find_runtime().tool(TOOL)), "-m", str(file), "--host", host, "--port", str(port)]
    if _CHANGE_WHAT_IS_READ.isdisjoint(option.partition("=")[0] for option in options):
        check_loads(file)  # the server says in many lines what this says in one
    # one cache for all clients: each may fill it, where llama-server would give each its share
    command += ["-c", str(ctx), "--kv-unified"]
    if len(usable_processors()) < (os.cpu_count() or 1):
        command += ["-t", str(usable_cores())]  # it would take as many threads as the machine has cores
    if projector is not None:
        command += ["--mmproj", str(projector)]
    command += [*drafting, *options]
    if sys.platform == "win32":  # where a program that becomes another one leaves its terminal
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def _drafting(file: Path | str, extras: Extras) -> list[str]:
    """Options by which llama-server drafts with the file's own head.

    Raises:
        FileFormatError: the file is missing or damaged.
        UsageError: it is to draft, and has no head.
    """
    able = drafts(open_gguf(file))
    if extras.mtp and not able:
        raise UsageError(f"{file} has no head for speculation to draft with: leave --mtp out")
    said = any(option.partition("=")[0] in _SPECULATION for option in extras.options)
    return ["--spec-type", "draft-mtp"] if able and extras.mtp is not False and not said else []


def _try_to_listen(host: str, port: int) -> None:
    """Say what is wrong with an address before a model is loaded: the server says it after that, in many lines.

    Raises:
        UsageError: another program has it, or it is not of this machine.
    """
    if not 0 < port < 65536:
        raise UsageError(f"--port must be a number from 1 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":  # there it means that others may listen at the same address
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"nothing can listen at {host}, port {port} ({reason}). Give another --port, or another --host"
        ) from None
