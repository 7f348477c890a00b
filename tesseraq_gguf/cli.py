"""The command line: one thin function per command. Whatever a user can cause ends in one line on stderr.

Nothing heavy is imported before a command needs it: `--help`, `inspect` and `runtime info` answer without torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from tesseraq_gguf.errors import RuntimeMissingError, TesseraqError, UsageError
from tesseraq_gguf.recipe import FINISHES, INITIALISATIONS, METHODS, PRESETS
from tesseraq_gguf.runtime.target import CROSS

INTERRUPTED = 130
TERMINATED = 143

_UsageProblem: type[Any] = typer.BadParameter.__mro__[2]  # ClickException, which typer brings along and does not export
_T = TypeVar("_T")

app = typer.Typer(
    name="tesseraq-gguf",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runtime_app = typer.Typer(
    no_args_is_help=True,
    help="Build and find the runtime: llama.cpp with the kernels of our tensor types.\n\n"
    "It is built once, from a pinned and verified source, into a cache folder that TESSERAQ_GGUF_CACHE can move.",
)
app.add_typer(runtime_app, name="runtime")

Backend = Annotated[str, typer.Option(help="Which devices it is for.")]
Portable = Annotated[bool, typer.Option("--portable", help="The portable one, and no other.")]
OfTarget = Annotated[
    str | None, typer.Option("--target", metavar="TRIPLE", help="The one for another kind of machine.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else there.")]


class _Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """The user pressed Ctrl-C, and there is something to say about it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit. Bugs, and nothing else, show a traceback."""
    # before torch is imported: OpenMP threads that spin while they wait stall when the machine does anything else
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # `kill` must not leave temporary files behind either
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except TesseraqError as error:
        _print_log(error)
        _fail(str(error), error.exit_code)
    except (_Stopped, KeyboardInterrupt, typer.Abort) as error:
        _print_line(str(error) or "stopped")
        sys.exit(INTERRUPTED)
    except _UsageProblem as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(error.exit_code)
        command = error.ctx.command_path if getattr(error, "ctx", None) else "tesseraq-gguf"
        _fail(f"{error.format_message().rstrip('.')}. See: {command} --help", error.exit_code)
    except BrokenPipeError:
        # the reader of our output left, as `head` does; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
        _print_line("stopped")
    sys.exit(code if isinstance(code, int) else 0)


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


@app.command()
def convert(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a hub id such as Qwen/Qwen3-0.6B, a .gguf file, or 'demo'.")
    ],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    type: Annotated[
        str,
        typer.Option(
            "--type",
            help="Tensor type of the decoder blocks' matrices: tsq2, tsq3, tsq4 for our runtime; "
            "q2_0, q4_0, q4_1, q5_0, q8_0, q2_k, q3_k, q4_k for any llama.cpp. "
            "With f16, bf16 or f32 nothing is learned.",
        ),
    ] = "tsq2",
    method: Annotated[str, typer.Option("--method", help=f"How to learn: {', '.join(METHODS)}.")] = METHODS[0],
    init: Annotated[
        str, typer.Option("--init", help=f"What tesseraq begins at: {', '.join(INITIALISATIONS)}.")
    ] = INITIALISATIONS[0],
    finish: Annotated[
        str,
        typer.Option(
            "--finish",
            help="A last pass: distill lets scales and norms of the whole model learn from its full-precision answers.",
        ),
    ] = FINISHES[0],
    granularity: Annotated[
        str,
        typer.Option(help="What shares a scale: group, the type's own; or channel, a whole row, as in some papers."),
    ] = "group",
    codebooks: Annotated[
        str,
        typer.Option(
            help="Codebooks of bcq types: universal, or model, designed from this model and put into the file."
        ),
    ] = "universal",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of lrq's scaling matrices.", show_default="a quarter of the model's width, as in the paper"
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help=f"How much to spend: {', '.join(PRESETS)} (the paper's setting).")
    ] = "balanced",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|wikitext2|c4",
            help="Text to learn on. By default the help topics that ship with Python, which need no network.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences, in place of the preset's.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a sequence, in place of the preset's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    embedding_type: Annotated[
        str | None,
        typer.Option(
            help="Tensor type of the embedding, any that --type takes.",
            show_default="q8_0; --type itself where nothing is learned",
        ),
    ] = None,
    output_type: Annotated[
        str | None, typer.Option(help="Tensor type of the output matrix.", show_default="that of the embedding")
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where finished blocks are kept until the file is whole. By default beside OUT.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw the blocks of an earlier run away.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed, options and machine give the same file.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn a model and write it as a GGUF file.

    Every finished block is on disk at once: after Ctrl-C, or worse, the same command goes on where it was.
    OUT appears only when it is whole and every learned tensor in it was compared with what was learned.

    \b
    Examples:
      tesseraq-gguf convert demo out.gguf
      tesseraq-gguf convert Qwen/Qwen3-0.6B qwen.gguf --calibration wikitext2
      tesseraq-gguf convert ./my-model my-model.gguf --preset best --device cuda
      tesseraq-gguf convert demo rounded.gguf --method rtn
      tesseraq-gguf convert demo reference.gguf --type f16
    """
    from tesseraq_gguf.converter.tensor_types import tensor_type
    from tesseraq_gguf.progress import ConvertProgress
    from tesseraq_gguf.recipe import Recipe

    _refuse_conflicts(context, type, method)
    embedding = tensor_type(embedding_type or ("q8_0" if _learns(type) else type))
    recipe = Recipe(
        model=model,
        out=out,
        type=type,
        method=method,
        init=init,
        finish=finish,
        rank=rank,
        granularity=granularity,
        codebooks=codebooks,
        preset=preset,
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        device=device,
        embedding_type=embedding.name,
        output_type=tensor_type(output_type).name if output_type else None,
        work_dir=work_dir,
        fresh=fresh,
        seed=seed,
    )
    try:
        with ConvertProgress() as progress:
            progress.stage("Loading torch")
            from tesseraq_gguf.pipeline import convert as run

            _quieten_transformers()
            report = run(recipe, progress)
    except KeyboardInterrupt:
        raise _Stopped("stopped; finished blocks are kept, run the same command again to go on") from None
    facts = {name: getattr(report, name) for name in report.__dataclass_fields__}
    if as_json:
        _print_json(facts)
        return
    learned = f", {report.block_bits_per_weight:.2f} in the learned matrices" if report.block_bits_per_weight else ""
    print(f"{report.out}: {_size(report.bytes)}, {report.bits_per_weight:.2f} bits per weight{learned}")
    print(f"Runs on: {report.runs_on}")


@app.command("eval")
def evaluate(
    file: Annotated[Path, typer.Argument(help="The GGUF file to measure.")],
    text: Annotated[Path, typer.Option("--text", help="A plain text file that the model was not learned on.")],
    ctx: Annotated[int, typer.Option("--ctx", help="Tokens of a chunk.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", help="Measure so many chunks. By default all.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="A GGUF file to compare answers with, usually the same model in 16 bits."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a GGUF file: perplexity on a text, and divergence from a reference file.

    llama.cpp's llama-perplexity does the work. With --reference it also gives the mean Kullback-Leibler divergence
    (0 is best) and how often both files agree on the most likely next token.

    \b
    Examples:
      tesseraq-gguf eval out.gguf --text valid.txt
      tesseraq-gguf eval out.gguf --text valid.txt --chunks 20 --reference f16.gguf --json
    """
    from tesseraq_gguf.evaluation import evaluate as run

    def measure() -> Any:
        with _chunk_bar() as watch:
            return run(file, text, ctx, chunks, reference, watch)

    result = _with_runtime(measure)
    if as_json:
        _print_json(result.to_json())
        return
    print(f"perplexity      {result.perplexity:.4f} ± {result.perplexity_error:.4f}")
    if result.kld is not None:
        print(f"KL divergence   {result.kld:.5f}")
        print(f"same top token  {100 * result.top1_agreement:.2f} %")
    print(f"size            {_size(result.bytes)}, {result.bpw:.3f} bits per weight")


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="The GGUF file.")], as_json: Json = False) -> None:
    """Show what is in a GGUF file: type, shape and bits per weight of every tensor, totals per type, where it runs.

    Any GGUF file will do, and the runtime is not needed.

    \b
    Examples:
      tesseraq-gguf inspect out.gguf
      tesseraq-gguf inspect out.gguf --json
    """
    from tesseraq_gguf.inspection import inspect as run
    from tesseraq_gguf.inspection import render

    seen = run(file)
    if as_json:
        _print_json(seen.to_json())
    else:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 140)  # nobody wants names cut off in a file or a pipe
        console.print(render(seen))


@app.command()
def chat(
    file: Annotated[Path, typer.Argument(help="The GGUF file to talk to; any that llama.cpp runs.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and leave.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the most likely token.")] = 0.7,
) -> None:
    """Talk to a GGUF file.

    The file's own chat template is used. A file without one (a base model) goes on with your text instead.
    /exit leaves, /reset forgets what was said, Ctrl-C stops an answer.

    \b
    Examples:
      tesseraq-gguf chat out.gguf
      tesseraq-gguf chat out.gguf -p "Once upon a time" --max-tokens 60 --temperature 0
    """
    from tesseraq_gguf.chat import chat as run

    _with_runtime(lambda: run(file, prompt, max_tokens, temperature))


@runtime_app.command("build")
def runtime_build(
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
    force: Annotated[bool, typer.Option("--force", help="Build even if it is there.")] = False,
) -> None:
    """Fetch, verify, patch, build and prove the runtime; nothing to do if it is there. Prints its folder.

    It needs a C++ compiler, CMake and Ninja; pip install 'tesseraq-gguf\\[build]' brings the latter two.

    Without options the runtime is as fast as this processor allows, and for this processor. With --portable it holds
    the CPU backend in several variants, of which every start loads the best. It may be copied: its programs and its
    Python bindings find each other wherever the folder is. On the other machine they run as they are, or set
    TESSERAQ_GGUF_RUNTIME to the copy for eval and chat.

    \b
    Examples:
      tesseraq-gguf runtime build
      tesseraq-gguf runtime build --portable
      tesseraq-gguf runtime build --target aarch64-linux-gnu
      tesseraq-gguf runtime build --llama-cpp ~/src/llama.cpp
    """
    from tesseraq_gguf.runtime import build

    runtime = build(backend, portable=portable, target=target, llama_cpp=llama_cpp, force=force)
    print(runtime.root)


@runtime_app.command("path")
def runtime_path(backend: Backend = "cpu", portable: Portable = False, target: OfTarget = None) -> None:
    """Print the folder of the runtime that eval and chat use; llama.cpp's programs are in its bin/.

    It is the first of these that is there: the one in the folder that TESSERAQ_GGUF_RUNTIME names, the one for this
    processor, the portable one.

    \b
    Examples:
      $(tesseraq-gguf runtime path)/bin/llama-bench -m out.gguf
      cp -a "$(tesseraq-gguf runtime path --portable)" /mnt/stick/runtime
    """
    from tesseraq_gguf.runtime import find_runtime

    print(find_runtime(backend, portable=portable, target=target).root)


@runtime_app.command("info")
def runtime_info(
    backend: Backend = "cpu", portable: Portable = False, target: OfTarget = None, as_json: Json = False
) -> None:
    """Tell which runtime is needed and which is there: what a bug report should contain.

    \b
    Example:
      tesseraq-gguf runtime info --json
    """
    from tesseraq_gguf.runtime import info

    data = info(backend, portable=portable, target=target)
    if as_json:
        _print_json(data)
        return
    manifest = data.pop("manifest") or {}
    for name, value in (data | {f"manifest.{key}": value for key, value in manifest.items()}).items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:<26}{'-' if shown in (None, '') else shown}")


def _learns(type: str) -> bool:
    """Whether something is learned in a type: only floats hold a model as it is."""
    from tesseraq_gguf.converter.tensor_types import tensor_type

    return tensor_type(type).name not in ("f32", "f16", "bf16")


def _refuse_conflicts(context: typer.Context, type: str, method: str) -> None:
    """Refuse options that the chosen type or method would ignore."""
    given = {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]
    learning = ["init", "finish", "rank", "preset", "calibration", "samples", "seqlen"]
    if not _learns(type):
        ignored = [
            "method",
            *learning,
            "granularity",
            "codebooks",
            "output_type",
            "work_dir",
            "fresh",
            "seed",
            "device",
        ]
        reason = f"--type {type} learns nothing"
    elif method == "rtn":
        ignored, reason = learning, "--method rtn uses no calibration"
    elif method != "tesseraq":
        ignored = ["init", *(["rank"] if method != "lrq" else [])]
        reason = f"--method {method} knows one way"
    else:
        ignored, reason = ["rank"], "--rank is lrq's alone"
    if "codebooks" in given and _learns(type) and not type.lower().startswith("bcq"):
        raise UsageError(f"--codebooks would be ignored: {type.lower()} has none")
    for name in ignored:
        if name in given:
            raise UsageError(f"{reason}: --{name.replace('_', '-')} has no meaning there")


def _with_runtime(action: Callable[[], _T]) -> _T:
    """Do something that needs the runtime; on a terminal, offer to build it if it is missing."""
    try:
        return action()
    except RuntimeMissingError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        typer.echo(f"{error}", err=True)
        if not typer.confirm("Build it now? It takes some minutes, once.", err=True):
            raise
    from tesseraq_gguf.runtime import build

    build()
    return action()


@contextmanager
def _chunk_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the chunks on stderr, if that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"measuring the {what}", total=total)
            bar.update(tasks[what], completed=done)

        yield watch


def _quieten_transformers() -> None:
    """Keep the progress bars of transformers from mixing with ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / 1e6:.1f} MB)"


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=str))


def _print_log(error: TesseraqError) -> None:
    """Show the end of what a program of llama.cpp said before it failed."""
    if log := getattr(error, "log", ""):
        lines = log.rstrip().splitlines()[-12:]
        Console(stderr=True, soft_wrap=True).print(Text("\n".join(lines)), style="dim")


def _fail(message: str, code: int) -> NoReturn:
    _print_line(f"error: {' '.join(message.split())}", "red")
    sys.exit(code)


def _print_line(text: str, style: str = "") -> None:
    Console(stderr=True).print(Text(text, style=style), soft_wrap=True)
