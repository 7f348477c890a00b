"""The command line: one thin function per command. Whatever a user can cause ends in one line on stderr.

Nothing heavy is imported before a command needs it: `--help`, `inspect` and `runtime info` answer without torch.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from tesseraq_gguf.arguments import ON_COMMAND_LINE
from tesseraq_gguf.compute.schemes import KEY_VALUE_BITS, SCHEMES, scheme_of
from tesseraq_gguf.compute.torchrun import rank as process_rank
from tesseraq_gguf.errors import RuntimeMissingError, TesseraqError, UsageError
from tesseraq_gguf.methods.table import METHODS, PARTS
from tesseraq_gguf.printing import printable, to_json, tolerant_streams
from tesseraq_gguf.recipe.options import FINISHES, INITIALISATIONS
from tesseraq_gguf.recipe.recipe import CANDIDATES, PRESETS
from tesseraq_gguf.recipe.rules import read_rules
from tesseraq_gguf.runtime.target import CROSS
from tesseraq_gguf.types.facts import TensorType, names

if TYPE_CHECKING:
    from tesseraq_gguf.evaluation.tasks import LoadedTasks

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


def _listed(chosen: Callable[[TensorType], object]) -> str:
    """Names of tensor types, for help."""
    return ", ".join(names(chosen))


Backend = Annotated[str, typer.Option(help="Which devices it is for: cpu, or cuda for NVIDIA's GPUs as well.")]
Portable = Annotated[bool, typer.Option("--portable", help="The portable one, and no other.")]
OfTarget = Annotated[
    str | None, typer.Option("--target", metavar="TRIPLE", help="The one for another kind of machine.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else there.")]


class _Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """The user pressed Ctrl-C, and there is something to say about it."""


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    speaks = ON_COMMAND_LINE.set(True)
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()  # a disk that is full, or a reader that left, is noticed here and not after the end
    except TesseraqError as error:
        if process_rank() and isinstance(error, UsageError):
            sys.exit(error.exit_code)  # the first process says the same
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        _fail(f"the disk is full{where}. Free some room, or give another place", TesseraqError.exit_code)
    finally:
        ON_COMMAND_LINE.reset(speaks)
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
            help=f"Tensor type of the decoder blocks' matrices: {_listed(lambda t: t.custom)} for our runtime; "
            f"{_listed(lambda t: t.family and not t.custom)} for any llama.cpp. "
            f"With {_listed(lambda t: t.is_float)} nothing is learned.",
        ),
    ] = "tsq2",
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="Give matrices whose name in the checkpoint matches another type, a float type perhaps; may be given "
            "often, the last wins. One that matches nothing in the blocks is for embedding or output matrix.",
        ),
    ] = None,
    tensor_types: Annotated[
        Path | None, typer.Option("--tensor-types", metavar="FILE", help="The same from a file, one rule in a line.")
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            "--target-bpw",
            help="Choose each matrix's type so that the blocks take so many bits per weight; OUT.types tells which.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            metavar="SIZE",
            help="Choose types, the embedding's too unless it is given, so that the file is no larger (200M, 1.5G, …).",
        ),
    ] = None,
    candidates: Annotated[
        str, typer.Option("--candidates", metavar="TYPES", help="Types that a target chooses from.")
    ] = ",".join(CANDIDATES),
    method: Annotated[str, typer.Option("--method", help=f"How to learn: {', '.join(METHODS)}.")] = "tesseraq",
    init: Annotated[
        str, typer.Option("--init", help=f"What learned rounding begins at: {', '.join(INITIALISATIONS)}.")
    ] = INITIALISATIONS[0],
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="First mix channels by Hadamard matrices, where that folds into the weights: for activations of 4 "
            "bits or fewer.",
        ),
    ] = False,
    finish: Annotated[
        str,
        typer.Option(
            "--finish",
            help="A last pass: distill lets scales and norms of the whole model learn from its full-precision answers.",
        ),
    ] = FINISHES[0],
    finish_steps: Annotated[
        int | None, typer.Option("--finish-steps", help="Steps of that, in place of the preset's.")
    ] = None,
    granularity: Annotated[
        str,
        typer.Option(help="What shares a scale: group, the type's own; or channel, a whole row, as in some papers."),
    ] = "group",
    activations: Annotated[
        str,
        typer.Option(
            help=f"Learn for activations rounded so: {', '.join(SCHEMES)}. "
            "The runtime rounds them in its own way; eval --simulate measures the file with this one."
        ),
    ] = SCHEMES[0],
    kv_bits: Annotated[
        int | None,
        typer.Option(
            "--kv-bits",
            help=f"Learn for keys and values of so many bits: {', '.join(map(str, KEY_VALUE_BITS))}.",
            show_default="not rounded",
        ),
    ] = None,
    codebooks: Annotated[
        str,
        typer.Option(
            help=f"Codebooks of {_listed(lambda t: t.codebooks)}: universal, or model, designed from this model and "
            "put into the file."
        ),
    ] = "universal",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of lrq's scaling matrices.", show_default="a quarter of the model's width, as in the paper"
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            help="How much of ptq161 is done, for its ablation: "
            "mask, scales (mask and learned scales), or cosine, all of it."
        ),
    ] = PARTS[-1],
    preprocess: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|wikitext2|c4",
            help="Quantise once, let low-rank adapters learn this text, and quantise the result (needs peft).",
        ),
    ] = None,
    preprocess_steps: Annotated[
        int | None, typer.Option("--preprocess-steps", help="Steps of that, in place of the preset's.")
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
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="Memory of the device for activations kept from block to block (800M, 16G, …); if they need more, "
            "a GPU's go to main memory, and those there to disk.",
            show_default="a quarter of a GPU's free memory, half of the free main memory",
        ),
    ] = None,
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
      tesseraq-gguf convert demo mixed.gguf --target-bpw 2.75
      tesseraq-gguf convert demo down.gguf --type tsq2 --tensor-type mlp.down_proj=tsq3
      tesseraq-gguf convert demo reference.gguf --type f16
    """
    from tesseraq_gguf.cli.progress import ConvertProgress
    from tesseraq_gguf.recipe.options import FIELDS, refuse_conflicts
    from tesseraq_gguf.recipe.recipe import Recipe

    given = {name: context.params[name] for name in _given(context) if name in FIELDS}
    rules = _rules(tensor_types, tensor_type or [])
    recipe = Recipe(**given | ({"rules": rules} if rules else {}))
    refuse_conflicts(recipe, given.keys())  # also those that were given as they are by default
    try:
        if process_rank():
            from tesseraq_gguf.conversion.pipeline import convert as run

            _quieten_transformers()
            run(recipe)
            return  # the first process tells
        with ConvertProgress() as progress:
            progress.stage("Loading torch")
            from tesseraq_gguf.conversion.pipeline import convert as run

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
    if report.divergence is not None:
        print(
            f"Divergence from the original, on {report.held_out:,} tokens held out: "
            f"{report.divergence:.4f} nats per token"
        )
    if report.kept_start:
        print(
            f"Learning was undone in {report.kept_start} of {report.blocks} blocks: "
            "it ended worse than it began on the sequences held out. More --samples would help"
        )
    print(f"Runs on: {report.runs_on}")


@app.command("eval")
def evaluate(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The GGUF file to measure.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="A plain text file that the model was not learned on.")
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", help="Tokens of a chunk of the text.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", help="Measure so many chunks. By default all.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="A GGUF file to compare with on the text, usually the same model in 16 bits."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,…",
            help="Tasks of lm-evaluation-harness: names, patterns, .yaml files, or folders of these with a slash. "
            "A task file can run code of its own (!function): read those of strangers first.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many items of each task. By default all.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each item.", show_default="what the task says, mostly 0")
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Measure in torch, with activations rounded as the file's matrices were learned for."
        ),
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(help=f"With --simulate: round so instead: {', '.join(SCHEMES)}.", show_default="the file's own"),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="With --simulate and --activations: bits of keys and values.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a GGUF file: perplexity on a text, divergence from a reference file, and answers to tasks.

    For --text, llama.cpp's llama-perplexity does the work. With --reference it also gives the mean Kullback-Leibler
    divergence (0 is best) and how often both files agree on the most likely next token.

    For --tasks, lm-evaluation-harness asks the model in our runtime; pip install 'tesseraq-gguf\\[tasks]' brings it.
    Tasks with a name fetch their data from the Hugging Face hub.

    With --simulate torch does the work, slowly, and rounds activations in a scheme that llama.cpp does not have.

    \b
    Examples:
      tesseraq-gguf eval out.gguf --text valid.txt
      tesseraq-gguf eval out.gguf --text valid.txt --chunks 20 --reference f16.gguf --json
      tesseraq-gguf eval out.gguf --text valid.txt --simulate --activations a8 --kv-bits 8
      tesseraq-gguf eval out.gguf --tasks arc_easy,hellaswag --limit 200
      tesseraq-gguf eval out.gguf --tasks scripts/tasks/everyday.yaml --shots 3
    """
    given = _given(context)
    if text is None and tasks is None:
        raise UsageError("nothing to measure on: give --text, --tasks, or both")
    for needed, options in {"text": ("ctx", "chunks", "reference", "simulate"), "tasks": ("limit", "shots")}.items():
        if needed not in given and (useless := [name for name in options if name in given]):
            raise UsageError(f"--{useless[0]} has no meaning without --{needed}")
    if simulate and tasks is not None:
        raise UsageError("--simulate is for a text alone: tasks run in llama.cpp, so give --tasks a command of its own")
    for name, value in (("--activations", activations), ("--kv-bits", kv_bits)):
        if value is not None and not simulate:
            raise UsageError(f"{name} has a meaning with --simulate only: llama.cpp rounds activations in its own way")
    if kv_bits is not None and activations is None:
        raise UsageError(
            "--kv-bits belongs to a scheme: give --activations as well, none if it is keys and values alone"
        )

    def on_text(path: Path, watch: Callable[[str, int, int], None]) -> Any:
        if simulate:
            from tesseraq_gguf.evaluation.simulation import simulate as run_in_torch

            scheme = None if activations is None else scheme_of(activations, kv_bits)
            _quieten_transformers()
            return run_in_torch(file, path, ctx, chunks, reference, scheme, watch=watch)
        from tesseraq_gguf.evaluation.perplexity import evaluate as run

        return run(file, path, ctx, chunks, reference, watch)

    def measure() -> dict[str, Any]:
        from tesseraq_gguf.gguf_files.inspection import inspect

        found: dict[str, Any] = {}
        facts = inspect(file)
        with _bar() as watch:
            loaded = None if tasks is None else _load_tasks(tasks, shots, watch)
            if text is not None:
                found |= on_text(text, lambda what, done, all: watch(f"measuring the {what}", done, all)).to_json()
            if loaded is not None:
                from tesseraq_gguf.evaluation.tasks import evaluate_tasks

                found |= {"bytes": facts.bytes, "bpw": facts.bpw, "parts": facts.parts}
                found |= evaluate_tasks(file, loaded, limit, watch).to_json()
        return found

    found = measure() if simulate else _with_runtime(measure)
    if as_json:
        _print_json(found)
        return
    if text is not None:
        print(f"perplexity      {found['perplexity']:.4f} ± {found['perplexity_error']:.4f}")
    if found.get("kld") is not None:
        print(f"KL divergence   {found['kld']:.5f}")
        print(f"same top token  {100 * found['top1_agreement']:.2f} %")
    parts = f" in {found['parts']} parts" if found["parts"] > 1 else ""
    print(f"size            {_size(found['bytes'])}{parts}, {found['bpw']:.3f} bits per weight")
    if tasks is not None:
        _print_tasks(found["tasks"])
        if found["truncated"]:
            _print_line(
                f"{found['truncated']} requests were longer than the context and lost their beginning", "yellow"
            )


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="The GGUF file.")], as_json: Json = False) -> None:
    """Show what is in a GGUF file: type, shape and bits per weight of every tensor, totals per type, where it runs.

    Any GGUF file will do, and the runtime is not needed.

    \b
    Examples:
      tesseraq-gguf inspect out.gguf
      tesseraq-gguf inspect out.gguf --json
    """
    from tesseraq_gguf.gguf_files.inspection import inspect as run
    from tesseraq_gguf.gguf_files.inspection import render

    seen = run(file)
    if as_json:
        _print_json(seen.to_json())
    else:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 140)  # nobody wants names cut off in a file or a pipe
        console.print(render(seen))


@app.command("write-text")
def write_text(
    model: Annotated[str, typer.Argument(help="The model, as convert takes it.")],
    out: Annotated[Path, typer.Argument(help="The text file to write.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to sample.")] = 131072,
    seqlen: Annotated[int, typer.Option(help="Most tokens of a document.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    seed: Annotated[int, typer.Option(help="The same seed, options and machine give the same text.")] = 0,
) -> None:
    """Let a model write text of its own, to calibrate on.

    Learning at 2 bits wants more text than most people have at hand, and of many kinds. A model's own text is of all
    the kinds that it knows. Mix it with text like the one the model is for. The whole model is in memory meanwhile.

    \b
    Examples:
      tesseraq-gguf write-text demo own.txt
      cat mine.txt own.txt > both.txt
      tesseraq-gguf convert demo out.gguf --calibration both.txt --samples 1024
    """
    from tesseraq_gguf.learning.own_text import write_text as run

    _quieten_transformers()
    with _bar() as watch:
        documents = run(
            model,
            out,
            tokens,
            seqlen,
            device,
            seed,
            watch=lambda done, all: watch("writing", done, all),
            say=lambda text: watch(text, 0, 0),
        )
    print(f"{out}: {documents:,} documents, {_size(out.expanduser().stat().st_size)}")


@app.command()
def chat(
    file: Annotated[Path, typer.Argument(help="The GGUF file to talk to; any that llama.cpp runs.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and leave.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the most likely token.")] = 0.7,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed and questions give the same answers.", show_default="drawn, and said"),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chat template (Jinja) in place of the file's own.")
    ] = None,
) -> None:
    """Talk to a GGUF file.

    The file's own chat template is used. A file without one (a base model) goes on with your text instead.
    /exit leaves, /reset forgets what was said, // begins a text with /, Ctrl-C stops an answer.

    \b
    Examples:
      tesseraq-gguf chat out.gguf
      tesseraq-gguf chat out.gguf -p "Once upon a time" --max-tokens 60 --temperature 0
    """
    from tesseraq_gguf.serving.chat import chat as run

    _with_runtime(lambda: run(file, prompt, max_tokens, temperature, seed, template))


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(help="The GGUF file to serve; any that llama.cpp runs.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="More options, as llama-server has them.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8080,
    ctx: Annotated[
        int,
        typer.Option(
            "--ctx",
            help="Tokens of a conversation, and of all that are being answered at a time; 0 takes as many as the model "
            "was made for.",
        ),
    ] = 4096,
) -> None:
    """Answer programs that speak OpenAI's interface, over HTTP.

    It is llama.cpp's own server, from the runtime, for several clients at a time: /v1/chat/completions,
    /v1/completions, and what else llama-server has. Ctrl-C ends it.

    \b
    Examples:
      tesseraq-gguf serve out.gguf
      tesseraq-gguf serve out.gguf --port 9000 --ctx 16384 -- --parallel 8 --flash-attn on -ctk q8_0 -ctv q8_0
    """
    from tesseraq_gguf.serving.serve import serve as run

    _with_runtime(lambda: run(file, host, port, ctx, options or ()))


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
    from tesseraq_gguf.runtime import build

    runtime = build(
        backend,
        portable=portable,
        target=target,
        llama_cpp=llama_cpp,
        cuda_architectures=cuda_arch or (),
        force=force,
    )
    print(runtime.root)


@runtime_app.command("path")
def runtime_path(backend: Backend = "cpu", portable: Portable = False, target: OfTarget = None) -> None:
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


def _given(context: typer.Context) -> set[str]:
    """Names of the parameters that the user gave."""
    return {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]


def _load_tasks(tasks: str, shots: int | None, watch: Callable[[str, int, int], None]) -> LoadedTasks:
    """Load tasks before a text takes its minutes: what is wrong with them, or with the runtime, is said first."""
    from tesseraq_gguf.evaluation.tasks import load_tasks
    from tesseraq_gguf.runtime import find_runtime

    find_runtime()
    watch("loading the tasks", 0, 0)
    loaded = load_tasks(tasks.split(","), shots)
    watch("loading the tasks", 1, 1)
    return loaded


def _print_tasks(results: list[dict[str, Any]]) -> None:
    """Print a table of tasks and figures."""
    from rich.table import Table

    table = Table("task", "metric")
    for heading in ("value", "stderr", "items", "shots"):
        table.add_column(heading, justify="right")
    before = None
    for row in results:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        shots = "" if row["shots"] is None else str(row["shots"])
        name = "" if row["task"] == before else row["task"]
        table.add_row(
            Text(printable(name)), Text(printable(metric)), f"{row['value']:.4f}", error, f"{row['items']:,}", shots
        )
        before = row["task"]
    Console().print(table)


def _rules(file: Path | None, given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Rules REGEX=TYPE of a file, then those given; the last that matches wins."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"the rules {file} cannot be read: {reason}") from None
    return read_rules([*lines, *given])


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
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal, for each thing that is counted; a total of 0 is not known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)  # of now: what libraries print may be swallowed meanwhile
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield watch


def _quieten_transformers() -> None:
    """Keep the progress bars of transformers from mixing with ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / 1e6:.1f} MB)"


def _print_json(data: Any) -> None:
    print(to_json(data))


def _print_log(error: TesseraqError) -> None:
    """Show the end of what a program of llama.cpp said before it failed."""
    if log := getattr(error, "log", ""):
        lines = log.rstrip().splitlines()[-12:]
        Console(stderr=True, soft_wrap=True).print(Text(printable("\n".join(lines), "\n\t")), style="dim")


def _fail(message: str, code: int) -> NoReturn:
    _print_line(f"error: {' '.join(message.split())}", "red")
    sys.exit(code)


def _print_line(text: str, style: str = "") -> None:
    Console(stderr=True).print(Text(printable(text, "\n\t"), style=style), soft_wrap=True)
