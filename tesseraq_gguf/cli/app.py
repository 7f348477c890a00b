"""The command line: one thin function per command. Whatever a user can cause ends in one line on stderr.

Nothing heavy is imported before a command needs it: `--help`, `inspect` and `runtime info` answer without torch.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from tesseraq_gguf.arguments import ON_COMMAND_LINE
from tesseraq_gguf.cli import runtime
from tesseraq_gguf.cli.compare import compare
from tesseraq_gguf.cli.convert import convert
from tesseraq_gguf.cli.doctor import doctor
from tesseraq_gguf.cli.eval import evaluate
from tesseraq_gguf.cli.inspect import inspect
from tesseraq_gguf.cli.output import INTERRUPTED, Stopped, Terminated, print_line
from tesseraq_gguf.cli.publish import publish
from tesseraq_gguf.cli.recipe import recipe
from tesseraq_gguf.cli.serve import chat, serve
from tesseraq_gguf.cli.text import write_text
from tesseraq_gguf.compute.torchrun import rank as process_rank
from tesseraq_gguf.errors import TesseraqError, UsageError
from tesseraq_gguf.printing import printable, tolerant_streams

_UsageProblem: type[Any] = typer.BadParameter.__mro__[2]  # ClickException, which typer brings along and does not export

app = typer.Typer(
    name="tesseraq-gguf",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, name in (
    (convert, "convert"),
    (evaluate, "eval"),
    (compare, "compare"),
    (inspect, "inspect"),
    (recipe, "recipe"),
    (publish, "publish"),
    (write_text, "write-text"),
    (chat, "chat"),
    (serve, "serve"),
    (doctor, "doctor"),
):
    app.command(name)(command)
app.add_typer(runtime.app, name="runtime")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit. Bugs, and nothing else, show a traceback."""
    tolerant_streams()
    # before torch is imported: OpenMP threads that spin while they wait stall when the machine does anything else
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # no pool of processes for the few functions that torch.compile is given
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # `kill` must not leave temporary files behind either
    signal.signal(signal.SIGTERM, _terminate)
    speaks = ON_COMMAND_LINE.set(True)
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()  # a disk that is full, or a reader that left, is noticed here and not after the end
    except TesseraqError as error:
        if process_rank() and isinstance(error, UsageError):
            sys.exit(error.exit_code)  # the first process says the same
        _print_log(error)
        _fail(str(error), error.exit_code)
    except Terminated as error:
        print_line("stopped")
        sys.exit(error.code)
    except (Stopped, KeyboardInterrupt, typer.Abort) as error:
        print_line(str(error) or "stopped")
        sys.exit(getattr(error, "code", INTERRUPTED))
    except _UsageProblem as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(error.exit_code)
        command = error.ctx.command_path if getattr(error, "ctx", None) else "tesseraq-gguf"
        _fail(f"{error.format_message().rstrip('.')}. See: {command} --help", error.exit_code)
    except BrokenPipeError:
        # the reader of our output left, as `head` does; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        _fail(f"the disk is full{where}. Free some room, or give another place", TesseraqError.exit_code)
    finally:
        ON_COMMAND_LINE.reset(speaks)
    if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
        print_line("stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _version(wanted: bool) -> None:
    if wanted:
        from tesseraq_gguf import __version__

        typer.echo(f"tesseraq-gguf {__version__}")
        raise typer.Exit


@app.callback()
def tesseraq_gguf(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Learn ultra-low-bit GGUF files block by block, and run them in llama.cpp.

    \b
    A first round, with a small model that pip brings:
      tesseraq-gguf runtime build
      tesseraq-gguf convert demo out.gguf --preset fast
      tesseraq-gguf inspect out.gguf
      tesseraq-gguf chat out.gguf -p "The capital of France is"
    """


def _print_log(error: TesseraqError) -> None:
    """Show the end of what a program of llama.cpp said before it failed."""
    if log := getattr(error, "log", ""):
        lines = log.rstrip().splitlines()[-12:]
        Console(stderr=True, soft_wrap=True).print(Text(printable("\n".join(lines), "\n\t")), style="dim")


def _fail(message: str, code: int) -> NoReturn:
    print_line(f"error: {' '.join(message.split())}", "red")
    sys.exit(code)
