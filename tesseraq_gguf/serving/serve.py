"""Serve a GGUF file over HTTP, with the interface of OpenAI: llama.cpp's own server, which has our types in it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.inspection import open_gguf
from tesseraq_gguf.models.speculation import drafts
from tesseraq_gguf.printing import printable
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.runtime.load import check_loads
from tesseraq_gguf.runtime.page import BUILD_COMMAND
from tesseraq_gguf.runtime.threads import usable_cores, usable_processors
from tesseraq_gguf.serving.browser import open_when_it_answers, page_url
from tesseraq_gguf.serving.chat import CONTEXT
from tesseraq_gguf.serving.images import check_projector
from tesseraq_gguf.serving.model_folder import check_folder

TOOL = "llama-server"

_SPECULATION = {"--spec-type", "-md", "--model-draft", "--spec-draft-model", "--mtp"}
"""Options that say what drafts."""

_CHANGE_WHAT_IS_READ = {"--override-kv", "--model", "-m", "--override-tensor", "-ot"}
"""Options that say what llama-server makes of a file, or that it takes another."""

_KEYS = {"--api-key", "--api-key-file"}
_NO_PAGE = {"--no-ui", "--no-webui", "--path"}
"""Options by which there is no page, or another."""

_KEY_VARIABLES = ("LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE")

_NO_DRAFT = re.compile(r"failed to initialize speculative decoding context: (.*)")
"""What llama-server says, and goes on without a draft model."""


@dataclass(frozen=True)
class Extras:
    """What a server has beside a model.

    Attributes:
        projector: what images go through, as `convert` wrote it.
        mtp: whether the file's head for speculation drafts; None lets it where there is one.
        draft: a smaller model that drafts.
        opens: whether the server's page is opened in a browser.
        options: more options of llama-server.
    """

    projector: Path | None = None
    mtp: bool | None = None
    draft: Path | None = None
    opens: bool = False
    options: Sequence[str] = ()

    def says(self, names: Iterable[str]) -> bool:
        """Whether one of these options is among those of llama-server."""
        return not {option.partition("=")[0] for option in self.options}.isdisjoint(names)


def serve(
    file: Path | str,
    host: str = "127.0.0.1",
    port: int = 8080,
    ctx: int = CONTEXT,
    extras: Extras | None = None,
) -> NoReturn:
    """Become a server of a GGUF file, until it is stopped.

    Args:
        file: the GGUF file; or a folder of them, of which each is loaded when it is asked for.
        host: the address to listen at.
        port: of that address.
        ctx: tokens of a conversation, and of all that are being answered at a time; 0 has as many as the model was
            made for.
        extras: what it has beside the model.

    Raises:
        FileFormatError: the file is missing, damaged, or refused by llama.cpp.
        UsageError: a number cannot be meant, nothing can listen there, or llama.cpp cannot draft with the draft model.
        RuntimeMissingError: the runtime is not built, or has no server.
    """
    if ctx < 0:
        raise UsageError(f"--ctx must not be negative, not {ctx}")
    extras = extras or Extras()
    folder = Path(file).is_dir()
    what = _folder(Path(file), extras) if folder else _file(file, extras)
    _try_to_listen(host, port)
    command = [str(find_runtime().tool(TOOL)), *what, "--host", host, "--port", str(port)]
    page = _page(extras)
    if not folder and not extras.says(_CHANGE_WHAT_IS_READ):
        check_loads(file)  # the server says in many lines what this says in one
    # one cache for all clients: each may fill it, where llama-server would give each its share
    command += ["-c", str(ctx), "--kv-unified"]
    if len(usable_processors()) < (os.cpu_count() or 1):
        command += ["-t", str(usable_cores())]  # it would take as many threads as the machine has cores
    command += [*page, *extras.options]
    if extras.opens:
        open_when_it_answers(page_url(host, port, _value(extras.options, "--api-prefix")))
    if extras.draft is not None:
        sys.exit(_run_with_draft(command, extras.draft))
    if sys.platform == "win32":  # where a program that becomes another one leaves its terminal
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def _folder(folder: Path, extras: Extras) -> list[str]:
    """Options by which llama-server serves a folder."""
    for option, given in (("--mmproj", extras.projector), ("--draft", extras.draft), ("--mtp", extras.mtp)):
        if given:
            raise UsageError(f"{option} is of one model: leave it out with --models")
    for complaint in check_folder(folder):
        print(printable(complaint), file=sys.stderr)
    return ["--models-dir", str(folder)]


def _file(file: Path | str, extras: Extras) -> list[str]:
    """Options by which llama-server serves a file, and what is beside it."""
    drafting = _drafting(file, extras)
    if extras.projector is not None:
        check_projector(extras.projector)
        drafting += ["--mmproj", str(extras.projector)]
    return ["-m", str(file), *drafting]


def _drafting(file: Path | str, extras: Extras) -> list[str]:
    """Options by which llama-server drafts: with a model, or with the file's own head.

    Raises:
        FileFormatError: a file is missing or damaged.
        UsageError: it is to draft, and has no head; or two are to.
    """
    able = drafts(open_gguf(file))
    said = extras.says(_SPECULATION)
    if extras.draft is not None:
        if extras.mtp or extras.says(_SPECULATION - {"--spec-type"}):
            raise UsageError("only one can draft: leave --draft out, or what else is to draft")
        return ["-md", str(extras.draft), *([] if said else _way_of(extras.draft))]
    if extras.mtp and not able:
        raise UsageError(f"{file} has no head for speculation to draft with: leave --mtp out")
    return ["--spec-type", "draft-mtp"] if able and extras.mtp is not False and not said else []


def _way_of(draft: Path) -> list[str]:
    """How a draft model drafts, where llama-server does not see it by itself."""
    header = open_gguf(draft)
    architecture = header.get("general.architecture")
    if drafts(header) or architecture == "dflash":
        return []
    return ["--spec-type", "draft-eagle3" if architecture == "eagle3" else "draft-simple"]


def _run_with_draft(command: Sequence[str], draft: Path) -> int:
    """Run a server, and end it if it cannot draft: it would go on without. Returns its exit code.

    Raises:
        UsageError: it cannot.
    """
    # in a session of its own, so that Ctrl-C comes to it once, from here
    with (
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        ) as process,
        _hands_signals_on(process),
    ):
        try:
            for line in process.stderr or ():
                print(line, end="", file=sys.stderr, flush=True)
                if reason := _NO_DRAFT.search(line):
                    raise UsageError(f"llama.cpp cannot draft with {draft}: {printable(reason[1].strip())}")
            code = process.wait()
        finally:
            process.terminate()
    if code < 0:
        raise UsageError(f"llama-server fell over with the draft model {draft} (signal {-code}): is it of this model?")
    return code


@contextlib.contextmanager
def _hands_signals_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """Send a process the signals that end this one."""
    if sys.platform == "win32":  # where they reach all processes of a terminal
        yield
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, lambda number, _: process.send_signal(number)) for each in ends}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _page(extras: Extras) -> list[str]:
    """Options by which llama-server has its page, if it can have it.

    Raises:
        UsageError: it is to be opened, and the runtime has none, or other options leave it out.
    """
    keyed = extras.says(_KEYS) or any(os.environ.get(name) for name in _KEY_VARIABLES)
    if extras.opens and keyed:
        raise UsageError("llama-server keeps its page from browsers that have no key: leave --open or the key out")
    if extras.says(_NO_PAGE):
        if extras.opens and not extras.says({"--path"}):
            raise UsageError("--open and --no-ui contradict each other: leave one of them out")
        return []
    page = find_runtime().page
    if extras.opens and page is None:
        raise UsageError(f"the runtime has no web page; run: {BUILD_COMMAND}")
    return ["--path", str(page)] if page and not keyed else []


def _value(options: Sequence[str], name: str) -> str:
    """What llama-server's options say of a name; empty if nothing."""
    for option, following in zip(options, [*options[1:], ""], strict=True):
        if option == name:
            return following
        if option.startswith(f"{name}="):
            return option.partition("=")[2]
    return ""


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
