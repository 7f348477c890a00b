"""The commands that run a file: chat with it, or serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tesseraq_gguf.cli.runtime import with_runtime


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

    with_runtime(lambda: run(file, prompt, max_tokens, temperature, seed, template))


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

    with_runtime(lambda: run(file, host, port, ctx, options or ()))
