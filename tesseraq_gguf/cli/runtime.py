"""The commands that build and find the runtime, and what the others do where it is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tesseraq_gguf.cli.output import print_json
from tesseraq_gguf.cli.parameters import Json
from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime.target import CROSS, Target

_T = TypeVar("_T")

app = typer.Typer(
    no_args_is_help=True,
    help="Build and find the runtime: llama.cpp with the kernels of our tensor types.\n\n"
    "It is built once, from a pinned and verified source, into a cache folder that TESSERAQ_GGUF_CACHE can move.",
)

Backend = Annotated[str, typer.Option(help="Which devices it is for: cpu, or cuda for NVIDIA's GPUs as well.")]
Portable = Annotated[bool, typer.Option("--portable", help="The portable one, and no other.")]
OfTarget = Annotated[
    str | None, typer.Option("--target", metavar="TRIPLE", help="The one for another kind of machine.")
]


@app.command("build")
def build(
    backend: Backend = "cpu",
    portable: Annotated[
        bool,
        typer.Option(
            "--portable", help="For every processor of this machine's kind, not for this one's instruction sets."
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TRIPLE", help=f"Build for another kind of machine, portable as well: {', '.join(CROSS)}."
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", help="Patch and build a copy of this llama.cpp checkout, not the pinned one."),
    ] = None,
    cuda_arch: Annotated[
        list[str] | None,
        typer.Option(
            "--cuda-arch",
            metavar="ARCH",
            help="With --backend cuda: compile for this architecture (89, 90-virtual); may be repeated. "
            "By default for this machine's GPUs, or for all since Turing.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even if it is there.")] = False,
) -> None:
    """Fetch, verify, patch, build and prove the runtime; nothing to do if it is there. Prints its folder.

    It needs a C++ compiler, CMake and Ninja; pip install 'tesseraq-gguf\\[build]' brings the latter two.

    Without options the runtime is as fast as this processor allows, and for this processor. With --portable it holds
    the CPU backend in several variants, of which every start loads the best. It may be copied: its programs and its
    Python bindings find each other wherever the folder is. On the other machine they run as they are, or set
    TESSERAQ_GGUF_RUNTIME to the copy for eval, chat and serve.

    With --backend cuda it runs on NVIDIA's GPUs as well. That takes nvcc and cuBLAS, of a CUDA toolkit or of NVIDIA's
    wheels (pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cublas). eval, chat and serve use it if
    TESSERAQ_GGUF_RUNTIME names its folder.

    \b
    Examples:
      tesseraq-gguf runtime build
      tesseraq-gguf runtime build --portable
      tesseraq-gguf runtime build --target aarch64-linux-gnu
      tesseraq-gguf runtime build --backend cuda
      tesseraq-gguf runtime build --backend cuda --cuda-arch 86 --cuda-arch 89
      tesseraq-gguf runtime build --llama-cpp ~/src/llama.cpp
    """
    from tesseraq_gguf.runtime import build as run

    wanted = Target(backend, portable, target)
    runtime = run(wanted, llama_cpp=llama_cpp, cuda_architectures=cuda_arch or (), force=force)
    print(runtime.root)


@app.command("page")
def page(
    force: Annotated[bool, typer.Option("--force", help="Build even if it is there.")] = False,
) -> None:
    """Build llama.cpp's web page into the runtime that serve uses; nothing to do if it is there. Prints its folder.

    npm builds it from the source of the runtime, with the packages that llama.cpp pins. It takes Node.js 20.19 or
    newer, a network, and a gigabyte of disk while it is built.

    \b
    Example:
      tesseraq-gguf runtime page
    """
    from tesseraq_gguf.runtime import find_runtime
    from tesseraq_gguf.runtime.page import add_page
    from tesseraq_gguf.runtime.progress import RichReporter

    with RichReporter() as reporter:
        print(add_page(find_runtime(), reporter, force))


@app.command("path")
def path(backend: Backend = "cpu", portable: Portable = False, target: OfTarget = None) -> None:
    """Print the folder of the runtime that eval, chat and serve use; llama.cpp's programs are in its bin/.

    It is the first of these that is there: the one in the folder that TESSERAQ_GGUF_RUNTIME names, the one for this
    processor, the portable one.

    \b
    Examples:
      $(tesseraq-gguf runtime path)/bin/llama-bench -m out.gguf
      cp -a "$(tesseraq-gguf runtime path --portable)" /mnt/stick/runtime
    """
    from tesseraq_gguf.runtime import find_runtime

    print(find_runtime(backend, portable=portable, target=target).root)


@app.command("info")
def info(backend: Backend = "cpu", portable: Portable = False, target: OfTarget = None, as_json: Json = False) -> None:
    """Tell which runtime is needed and which is there: what a bug report should contain.

    \b
    Example:
      tesseraq-gguf runtime info --json
    """
    from tesseraq_gguf.runtime import info as run

    data = run(backend, portable=portable, target=target)
    if as_json:
        print_json(data)
        return
    manifest = data.pop("manifest") or {}
    for name, value in (data | {f"manifest.{key}": value for key, value in manifest.items()}).items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:<26}{'-' if shown in (None, '') else shown}")


def with_runtime(action: Callable[[], _T]) -> _T:
    """Do something that needs the runtime; on a terminal, offer to build it if it is missing."""
    try:
        return action()
    except RuntimeMissingError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        typer.echo(f"{error}", err=True)
        if not typer.confirm("Build it now? It takes some minutes, once.", err=True):
            raise
    from tesseraq_gguf.runtime import build as run

    run()
    return action()
