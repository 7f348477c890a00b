"""Talk to a GGUF file in the terminal: streaming, with the file's chat template, or plain completion without one."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tesseraq_gguf.errors import ChatTemplateError, FileFormatError, TesseraqError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, open_gguf
from tesseraq_gguf.printing import printable
from tesseraq_gguf.runtime.threads import usable_cores
from tesseraq_gguf.serving.images import check_projector, message, read_image, see

CONTEXT = 4096
"""Tokens of a conversation, unless the model was made for fewer."""

EXIT, RESET, IMAGE = "/exit", "/reset", "/image"

_TEMPLATE = "tokenizer.chat_template"
_SEEDS = 2**32 - 1  # the last number that llama.cpp takes for a seed means none


class Model(Protocol):
    """What a conversation needs of llama-cpp-python's `Llama`."""

    n_tokens: int

    def n_ctx(self) -> int:
        """Tokens that fit."""

    def create_chat_completion(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Answer messages."""

    def create_completion(self, prompt: str, **options: Any) -> Any:
        """Go on with a text."""


class ContextFullError(TesseraqError):
    """What was said so far leaves no room for an answer."""


class Conversation:
    """A model and what was said so far.

    Args:
        model: a loaded model.
        templated: whether the file has a chat template; without one every line is appended to one growing text.
        max_tokens: most tokens of an answer; None goes on until the model stops or the context is full.
        temperature: 0 always takes the most likely token.
        seed: of the first answer; each after it has the next one, so that no question has the same answer twice.

    Attributes:
        images: what goes with the next line, as `images.read_image` gives it.
        sees: whether the model was loaded with a projector.
    """

    def __init__(
        self, model: Model, templated: bool, max_tokens: int | None, temperature: float, seed: int = 0
    ) -> None:
        self.model = model
        self.templated = templated
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.seed = seed
        self.sees = False
        self.reset()

    def reset(self) -> None:
        """Forget what was said; seeds go on."""
        self.messages: list[dict[str, Any]] = []
        self.images: list[str] = []
        self.text = ""
        self.cut = ""

    def answer(self, line: str) -> Generator[str, None, None]:
        """Say something and yield the answer as it comes. Stopping early keeps what has come.

        Afterwards `cut` says why the answer ended before the model stopped: `length`, `context` or nothing.

        Raises:
            ContextFullError: the prompt alone fills the context; what was said stays as it was.
            ChatTemplateError: the template makes no text of what was said.
        """
        self.cut = ""
        came = ""
        heard = False
        stream = self._stream(line)
        try:
            for piece, reason in stream:
                heard = True
                if reason == "length":
                    self.cut = "context" if self.model.n_tokens >= self.model.n_ctx() - 1 else "length"
                if piece:
                    came += piece
                    yield piece
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{error}. Another one can be given: --template FILE") from error
        except ValueError as error:
            if "exceed context window" not in str(error):
                raise
            raise ContextFullError(
                f"the context of {self.model.n_ctx():,} tokens is full; {RESET} starts a new conversation"
            ) from None
        finally:
            stream.close()
            if heard:
                self._remember(line, came)

    def _stream(self, line: str) -> Generator[tuple[str, str | None], None, None]:
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True, "seed": self.seed}
        self.seed = (self.seed + 1) % _SEEDS
        if self.templated:
            messages = [*self.messages, message(line, self.images)]
            for chunk in self.model.create_chat_completion(messages, **options):
                choice = chunk["choices"][0]
                yield choice["delta"].get("content") or "", choice["finish_reason"]
        else:
            for chunk in self.model.create_completion(self.text + line, **options):
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"]

    def _remember(self, line: str, came: str) -> None:
        if self.templated:
            # templates want user and assistant by turns, so an answer that never came takes its question with it
            if came:
                self.messages += [message(line, self.images), {"role": "assistant", "content": came}]
                self.images = []
        else:
            self.text += f"{line}{came}\n"


@dataclass(frozen=True)
class Beside:
    """Files that a conversation takes beside the model's.

    Attributes:
        template: a chat template in place of the GGUF file's own.
        projector: what images go through, as `convert` wrote it.
        images: what the first question is about.
    """

    template: Path | None = None
    projector: Path | None = None
    images: Sequence[Path] = ()


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
        beside: other files that it takes.

    Raises:
        FileFormatError: the file is missing, damaged, or no language model; or its projector is none of this model.
        UsageError: a number, the prompt, the template or an image cannot be meant.
        ChatTemplateError: the template makes no text of what was said.
        RuntimeMissingError: the runtime is not built.
        KeyboardInterrupt: Ctrl-C while `prompt` was being answered.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1, not {max_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature must be a number that is not negative, not {temperature}")
    if seed is not None and not 0 <= seed < _SEEDS:
        raise UsageError(f"--seed must be a number from 0 to {_SEEDS - 1}, not {seed}")
    beside = beside or Beside()
    given = None if beside.template is None else _read_template(beside.template)
    if prompt is not None:
        prompt = _text(prompt, "the prompt")
    templated = given is not None or has_template(open_gguf(file))
    images = _images(beside, templated)
    model = load(Path(file), given, projector=beside.projector) if beside.projector else load(Path(file), given)
    if seed is None:
        seed = random.SystemRandom().randrange(_SEEDS)
        if temperature:
            _tell(f"seed {seed}")
    conversation = Conversation(model, templated, max_tokens, temperature, seed)
    conversation.images, conversation.sees = images, beside.projector is not None
    if prompt is not None:
        if not _print_answer(conversation, prompt):
            raise KeyboardInterrupt
        return
    if not templated:
        _tell("This file has no chat template: it goes on with your text instead of answering it.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused when it is its turn
    if sys.stdin.isatty():
        _tell(f"{EXIT} leaves, {RESET} forgets what was said, // begins a text with /, Ctrl-C stops an answer.")
        if conversation.sees:
            _tell(f"{IMAGE} FILE shows an image with the next question.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() editing and history)
    talk(conversation, input)


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
        ends, begins = model.token_eos(), model.token_bos()
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            template,
            eos_token=model._model.token_get_text(ends) if ends >= 0 else "",
            bos_token=model._model.token_get_text(begins) if begins >= 0 else "",
            stop_token_ids=[ends],
        )
        model.chat_handler = formatter.to_chat_handler()
    loaded: Model = model
    return loaded


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


def _text(said: str, what: str) -> str:
    """Return what was typed as text. Bytes that are none have come as lone surrogates.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return said.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UsageError(f"{what} is not UTF-8 text") from None


def talk(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Read lines and print answers until `/exit` or the end of the input.

    Args:
        conversation: whom to talk to.
        read: like `input`: takes the prompt sign, returns a line, raises EOFError at the end.
    """
    while True:
        try:
            if not _take_turn(conversation, read):
                return
        except KeyboardInterrupt:
            _tell(f"\n{EXIT} leaves.")


def _take_turn(conversation: Conversation, read: Callable[[str], str]) -> bool:
    """Read a line and do what it says. Returns whether there is to be another."""
    terminal = sys.stdin.isatty()
    try:
        line = _text(read("> " if terminal else ""), "the input").strip()
    except EOFError:
        return False
    except UsageError as error:
        if not terminal:
            raise
        _tell(str(error))
        return True
    if line == EXIT:
        return False
    if line == RESET:
        conversation.reset()
        _tell("Forgotten.")
    elif line.split(maxsplit=1)[:1] == [IMAGE]:
        _tell(_show(conversation, line))
    elif line.startswith("/") and not line.startswith("//"):
        _tell(
            f"unknown command {printable(line.split()[0])}; there are {EXIT}, {RESET} and {IMAGE}. "
            "A text that begins with / is said with two of them: //"
        )
    elif line:
        try:
            _print_answer(conversation, line[1:] if line.startswith("//") else line)
        except ContextFullError as error:
            _tell(str(error))
        except ChatTemplateError as error:
            if not conversation.messages:
                raise  # it works with nothing
            _tell(str(error))
    return True


def _show(conversation: Conversation, line: str) -> str:
    """Put an image beside the next question. Returns what is said of it."""
    file = line.removeprefix(IMAGE).strip()
    if not conversation.sees:
        return "This chat sees no images: begin it with --mmproj FILE, which convert wrote."
    if not file:
        return f"{IMAGE} wants the name of a file."
    try:
        conversation.images.append(read_image(Path(file)))
    except UsageError as error:
        return str(error)
    return "Seen; ask about it."


def _print_answer(conversation: Conversation, line: str) -> bool:
    """Print an answer as it comes; Ctrl-C ends it there. Returns whether it came to its end."""
    terminal = sys.stdout.isatty()
    pieces = conversation.answer(line)
    whole = False
    try:
        for piece in pieces:
            sys.stdout.write(printable(piece, "\n\t") if terminal else piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        whole = True
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        _tell("(stopped)")
    finally:
        pieces.close()
        sys.stdout.flush()
    if conversation.cut == "context":
        _tell(f"(the context of {conversation.model.n_ctx():,} tokens is full; {RESET} starts a new conversation)")
    elif conversation.cut == "length":
        _tell(f"(ended at --max-tokens {conversation.max_tokens})")
    return whole


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
