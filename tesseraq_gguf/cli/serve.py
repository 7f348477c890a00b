"""The commands that run a file: chat with it, or serve it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tesseraq_gguf.cli.parameters import of_fields, takes
from tesseraq_gguf.cli.runtime import with_runtime
from tesseraq_gguf.errors import UsageError


class Reasoning(str, Enum):
    """What may be said of thinking, as llama-cli has it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class Talk:
    """Whom to talk to, and how, as the command line takes it."""

    file: Annotated[Path, typer.Argument(help="The GGUF file to talk to; any that llama.cpp runs.")]
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and leave.")] = None
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.")] = 512
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the most likely token.")] = 0.7
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed and questions give the same answers.", show_default="drawn, and said"),
    ] = None
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chat template (Jinja) in place of the file's own.")
    ] = None
    mmproj: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What images go through, as convert --mmproj wrote it.")
    ] = None
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image that the first question is about; may be given often."),
    ] = None
    reasoning: Annotated[
        Reasoning,
        typer.Option(help="Whether the model thinks before it answers; auto leaves it to the template."),
    ] = Reasoning.AUTO
    show_reasoning: Annotated[
        bool, typer.Option("--show-reasoning", help="Show thoughts in full, where a terminal has one line of them.")
    ] = False


@takes(of_fields(Talk))
def chat(_: typer.Context, **options: Any) -> None:
    """Talk to a GGUF file.

    The file's own chat template is used. A file without one (a base model) goes on with your text instead.
    In a terminal it says which model it has, keeps the lines of earlier chats, and folds what the model thinks before
    it answers, where the template marks that. Alt-Enter, or \\ before Enter, begins another line. /help lists
    commands, // begins a text with /, Ctrl-C stops an answer, Ctrl-D leaves.

    \b
    Examples:
      tesseraq-gguf chat out.gguf
      tesseraq-gguf chat out.gguf -p "Once upon a time" --max-tokens 60 --temperature 0
      tesseraq-gguf chat out.gguf --reasoning off
      tesseraq-gguf chat out.gguf --mmproj mmproj.gguf --image photo.jpg -p "What is this?"
    """
    from tesseraq_gguf.serving.chat import Beside
    from tesseraq_gguf.serving.chat import chat as run

    talk = Talk(**options)
    thinking = None if talk.reasoning is Reasoning.AUTO else talk.reasoning is Reasoning.ON
    beside = Beside(talk.template, talk.mmproj, talk.image or (), thinking, talk.show_reasoning)
    with_runtime(lambda: run(talk.file, talk.prompt, talk.max_tokens, talk.temperature, talk.seed, beside))


@dataclass(frozen=True)
class Serving:
    """What to serve, and where, as the command line takes it."""

    file: Annotated[
        Path | None,
        typer.Argument(help="The GGUF file to serve, any that llama.cpp runs; or --models.", show_default=False),
    ] = None
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="More options, as llama-server has them.")
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8080
    ctx: Annotated[
        int,
        typer.Option(
            "--ctx",
            help="Tokens of a conversation, and of all that are being answered at a time; 0 takes as many as the model "
            "was made for.",
        ),
    ] = 4096
    mmproj: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What images go through, as convert --mmproj wrote it.")
    ] = None
    mtp: Annotated[
        bool | None,
        typer.Option(
            "--mtp/--no-mtp",
            help="Draft with the file's head for speculation, so that several tokens come at a time.",
            show_default="where there is one",
        ),
    ] = None
    draft: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A smaller model with the same vocabulary, which drafts several tokens."),
    ] = None
    models: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Serve every model of a folder, each loaded when it is asked for."),
    ] = None
    opens: Annotated[
        bool, typer.Option("--open", help="Open the server's web page in a browser; runtime page builds it.")
    ] = False


@takes(of_fields(Serving))
def serve(_: typer.Context, **given: Any) -> None:
    """Answer programs that speak OpenAI's interface, over HTTP.

    It is llama.cpp's own server, from the runtime, for several clients at a time: /v1/chat/completions,
    /v1/completions, and what else llama-server has; and its web page at /, once runtime page has
    built it. Ctrl-C ends it.

    \b
    Examples:
      tesseraq-gguf serve out.gguf --open
      tesseraq-gguf serve out.gguf --mmproj mmproj.gguf
      tesseraq-gguf serve big.gguf --draft small.gguf
      tesseraq-gguf serve --models ./models -- --models-max 2
      tesseraq-gguf serve out.gguf --port 9000 --ctx 16384 -- --parallel 8 --flash-attn on -ctk q8_0 -ctv q8_0
    """
    from tesseraq_gguf.serving.serve import Extras
    from tesseraq_gguf.serving.serve import serve as run

    serving = Serving(**given)
    options = list(serving.options or ())
    file = serving.file
    if serving.models is not None:
        if file is not None and not str(file).startswith("-"):
            raise UsageError("give a GGUF file to serve, or a folder with --models, not both")
        options = [*([] if file is None else [str(file)]), *options]  # `--models DIR -- OPTIONS` has no file
        if not serving.models.is_dir():
            raise UsageError(f"--models wants a folder, and {serving.models} is none")
        file = serving.models
    elif file is None:
        raise UsageError("give a GGUF file to serve, or a folder of them with --models")
    elif file.is_dir():
        raise UsageError(f"{file} is a folder: serve it with --models")
    extras = Extras(serving.mmproj, serving.mtp, serving.draft, serving.opens, options)
    with_runtime(lambda: run(file, serving.host, serving.port, serving.ctx, extras))
