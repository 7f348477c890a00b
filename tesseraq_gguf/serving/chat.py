"""Talk to a GGUF file in the terminal: streaming, with the file's chat template, or plain completion without one."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import FileFormatError, TesseraqError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, open_gguf
from tesseraq_gguf.runtime.threads import usable_cores
from tesseraq_gguf.serving.commands import Talk
from tesseraq_gguf.serving.conversation import SEEDS, Conversation, Model
from tesseraq_gguf.serving.counting import Counter
from tesseraq_gguf.serving.display import Folding
from tesseraq_gguf.serving.images import check_projector, read_image, see
from tesseraq_gguf.serving.talk import as_text, show_answer, talk, tell
from tesseraq_gguf.serving.thinking import Marks, marks, set_thinking

CONTEXT = 4096
"""Tokens of a conversation, unless the model was made for fewer."""

_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Beside:
    """What a conversation has beside the model's file.

    Attributes:
        template: a chat template in place of the GGUF file's own.
        projector: what images go through, as `convert` wrote it.
        images: what the first question is about.
        thinking: whether the model thinks before it answers; None leaves it to the template.
        shows_thoughts: whether a terminal shows thoughts in full.
    """

    template: Path | None = None
    projector: Path | None = None
    images: Sequence[Path] = ()
    thinking: bool | None = None
    shows_thoughts: bool = False


def chat(
    file: Path | str,
    prompt: str | None = None,
    max_tokens: int | None = 512,
    temperature: float = 0.7,
    seed: int | None = None,
    beside: Beside | None = None,
) -> None:
    """Talk to a GGUF file: answers go to stdout, all else to stderr.

    Args:
        file: the GGUF file.
        prompt: answer this and return; None reads lines from stdin until `/exit` or its end.
        max_tokens: most tokens of an answer.
        temperature: 0 always takes the most likely token.
        seed: what chance begins at; None draws one, and says which.
        beside: what it has beside the file.

    Raises:
        FileFormatError: the file is missing, damaged, or no language model; or its projector is none of this model.
        UsageError: a number, the prompt, the template or an image cannot be meant.
        ChatTemplateError: the template makes no text of what was said, or does not let thinking be chosen.
        RuntimeMissingError: the runtime is not built.
        KeyboardInterrupt: Ctrl-C while `prompt` was being answered.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1, not {max_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature must be a number that is not negative, not {temperature}")
    if seed is not None and not 0 <= seed < SEEDS:
        raise UsageError(f"--seed must be a number from 0 to {SEEDS - 1}, not {seed}")
    beside = beside or Beside()
    given = _given_template(open_gguf(file), beside)
    if prompt is not None:
        prompt = as_text(prompt, "the prompt")
    templated = given is not None or has_template(open_gguf(file))
    images = _images(beside, templated)
    model = load(Path(file), given, projector=beside.projector) if beside.projector else load(Path(file), given)
    if seed is None:
        seed = random.SystemRandom().randrange(SEEDS)
        if temperature:
            tell(f"seed {seed}")
    conversation = Conversation(model, templated, max_tokens, temperature, seed)
    conversation.images, conversation.sees = images, beside.projector is not None
    if prompt is not None:
        if not show_answer(Talk(conversation), conversation.answer(prompt)):
            raise KeyboardInterrupt
        return
    chat, read = _with_its_terminal(conversation, Path(file), given, beside)
    if not templated:
        tell("This file has no chat template: it goes on with your text instead of answering it.")
    talk(chat, read)


def _with_its_terminal(
    conversation: Conversation, file: Path, given: str | None, beside: Beside
) -> tuple[Talk, Callable[[str], str]]:
    """A chat, and what reads its lines."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused when it is its turn
    if not sys.stdin.isatty():
        return Talk(conversation), input
    if not sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() editing and history)
        return Talk(conversation), input
    from tesseraq_gguf.serving.terminal import about, reader

    model: Any = conversation.model
    tell(about(file, model.n_ctx()))
    template = given if given is not None else _own_template(open_gguf(file))
    found = _marks(model, template) if template is not None else None
    return Talk(conversation, Folding(found, beside.shows_thoughts), Counter(model)), reader()


def _marks(model: Any, template: str) -> Marks | None:
    """Marks of thoughts that are seen in answers: tokens of control are left out of them."""
    formatter = _formatter(model, template)
    found = marks(template, lambda said: formatter(messages=said).prompt)
    both = () if found is None else (found.begin.encode(), found.end.encode())
    seen = (mark in model.detokenize(model.tokenize(mark, add_bos=False, special=True)) for mark in both)
    return found if all(seen) else None


def _given_template(header: GgufFile, beside: Beside) -> str | None:
    """The template that takes the place of the file's own, if one does."""
    given = None if beside.template is None else _read_template(beside.template)
    if beside.thinking is None:
        return given
    template = given if given is not None else _own_template(header)
    if template is None:
        raise UsageError("this file has no chat template that thinking could be turned on or off in")
    return set_thinking(template, beside.thinking)


def _images(beside: Beside, templated: bool) -> list[str]:
    """Read images, and look at what they go through."""
    if beside.projector is None:
        if beside.images:
            raise UsageError("an image goes through the model's projector: add --mmproj FILE, which convert wrote")
        return []
    if not templated:
        raise UsageError("this file has no chat template, which images need a place in: give one with --template")
    check_projector(beside.projector)
    return [read_image(image) for image in beside.images]


def load(
    file: Path,
    template: str | None = None,
    flash_attention: bool | None = None,
    projector: Path | None = None,
    context: int | None = None,
) -> Model:
    """Load a file that `open_gguf` accepted, with attention, threads and context as llama.cpp's programs choose them.

    Args:
        file: the GGUF file.
        template: a chat template in place of its own.
        flash_attention: whether attention is computed so; None leaves it to llama.cpp, as its programs do.
        projector: what images go through; it wants a template.
        context: tokens of it; None takes those of a conversation.

    Raises:
        FileFormatError: llama.cpp refuses it, or the projector.
        RuntimeMissingError: the runtime is not built.
    """
    from tesseraq_gguf.runtime import load_llama_cpp

    llama_cpp = load_llama_cpp()
    header = open_gguf(file)
    threads = usable_cores()
    try:
        model = llama_cpp.Llama(
            model_path=str(file),
            n_ctx=context or _context(header),
            n_gpu_layers=-1,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash_attention,
            verbose=False,
        )
    except TesseraqError:
        raise
    except (ValueError, AssertionError, MemoryError) as error:
        raise FileFormatError(f"llama.cpp cannot load {file}: {error or 'it gives no reason'}") from error
    template = template if template is not None else _own_template(header)
    if projector is not None and template is not None:
        model.chat_handler = see(llama_cpp, model, file, projector, template)
    elif template is not None:
        model.chat_handler = _formatter(model, template).to_chat_handler()
    loaded: Model = model
    return loaded


def _formatter(model: Any, template: str) -> Any:
    """What makes prompts of messages."""
    from tesseraq_gguf.runtime import load_llama_cpp

    ends, begins = model.token_eos(), model.token_bos()
    return load_llama_cpp().llama_chat_format.Jinja2ChatFormatter(
        template,
        eos_token=model._model.token_get_text(ends) if ends >= 0 else "",
        bos_token=model._model.token_get_text(begins) if begins >= 0 else "",
        stop_token_ids=[ends],
    )


def has_template(header: GgufFile) -> bool:
    """Return whether a file says how a conversation is written."""
    return _own_template(header) is not None


def _own_template(header: GgufFile) -> str | None:
    template = header.get(_TEMPLATE)
    return template if isinstance(template, str) else None


def _context(header: GgufFile) -> int:
    """Tokens of a conversation; whatever is no number of tokens is llama.cpp's to refuse."""
    trained = header.get(f"{header.get('general.architecture')}.context_length")
    return min(trained, CONTEXT) if isinstance(trained, int) and trained > 0 else CONTEXT


def _read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"the template {path} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"the template {path} cannot be read: {error.strerror or error}") from None
