"""Calibration: text to token sequences of one length."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.errors import CalibrationError, ModelError
from tesseraq_gguf.models.source import NO_TOKENIZER, ModelSource

DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
"""Text sets by name, through `datasets`: path and configuration on the hub."""

BUILT_IN = "python-topics"
"""Name of the default text: the topics of Python's own help, English prose with code. It ships with every Python."""

_CHARACTERS_PER_TOKEN = 8
"""Enough text per token wanted from a streamed set: more than any tokenizer needs on average."""

_FEWEST = 4
"""Fewer sequences than this are no calibration."""

_HELD_OUT = 1 / 16
_FEWEST_HELD_OUT = 4
"""Sequences that are held out: a share of those that are learned on, and no fewer than so many."""


@dataclass(frozen=True)
class Calibration:
    """Token sequences to learn on.

    Attributes:
        name: where the text came from.
        tokens: int64 [samples, length].
        held_out: sequences that nothing is learned on, of the same length, if any were held out.
    """

    name: str
    tokens: Tensor
    held_out: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def first(self, tokens: int) -> Tensor:
        """Return the first sequences that hold so many tokens together, one at least, int64 [samples, length]."""
        return self.tokens[: max(1, tokens // self.tokens.shape[1])]

    def fingerprint(self) -> str:
        """Return a hash of the tokens: of those held out as well, which decide what is kept."""
        everything = self.tokens.numpy().tobytes() + self.held_out.numpy().tobytes()
        return hashlib.sha256(everything).hexdigest()[:16]


def held_out_for(samples: int) -> int:
    """Return how many sequences are held out beside so many that are learned on."""
    return max(_FEWEST_HELD_OUT, math.ceil(samples * _HELD_OUT))


def load_calibration(
    source: ModelSource, text: str | None, samples: int, length: int, seed: int, held_out: int = 0
) -> Calibration:
    """Cut a text into sequences and draw `samples` of them, and others to hold out.

    The text is tokenised whole, cut into pieces without overlap, each opened by the beginning-of-sequence token if the
    model has the habit; which pieces are taken depends on the seed alone. A text with fewer pieces gives all it has,
    in the same proportion: at least one to learn on and, if any are wanted, one to hold out.

    Args:
        source: the model, for its tokenizer.
        text: a file, a name in `DATASETS`, or None for the built-in text.
        samples: sequences wanted to learn on.
        length: tokens of a sequence.
        seed: of the draw.
        held_out: sequences wanted beside them.

    Raises:
        CalibrationError: missing, unreadable, empty, or too short a text.
    """
    name = text or BUILT_IN
    wanted = samples + held_out
    pieces = _pieces(source, _read(text, wanted * length * _CHARACTERS_PER_TOKEN), length)
    fewest = max(min(samples, _FEWEST), 2 if held_out else 1)
    if len(pieces) < fewest:
        raise CalibrationError(
            f"the calibration text {name} is too short: it fills {len(pieces)} sequences of {length} tokens, "
            f"and at least {fewest} are needed. Give a longer text or a smaller --seqlen"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    drawn = pieces[order[:wanted]]
    apart = min(max(1, round(len(drawn) * held_out / wanted)), len(drawn) - 1) if held_out else 0
    learned_on = len(drawn) - apart
    return Calibration(Path(name).name, drawn[:learned_on], drawn[learned_on:])


def _read(text: str | None, enough: int) -> str:
    if text is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    if text in DATASETS:
        return _stream(text, enough)
    path = Path(text).expanduser()
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        known = " or ".join(DATASETS)
        raise CalibrationError(f"no calibration text at {text}. Give a text file, or {known}") from None
    except OSError as error:
        raise CalibrationError(f"the calibration text {text} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise CalibrationError(f"the calibration text {text} is empty")
    return content


def _stream(name: str, enough: int) -> str:
    from datasets import load_dataset

    path, configuration = DATASETS[name]
    parts, size = [], 0
    try:
        for row in load_dataset(path, configuration, split="train", streaming=True):
            parts.append(row["text"])
            size += len(row["text"])
            if size >= enough:
                break
    except Exception as error:  # datasets and the hub raise many unrelated kinds
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise CalibrationError(
            f"the text set {name} could not be fetched ({reason}). Give a text file instead"
        ) from error
    return "\n\n".join(parts) if name == "c4" else "".join(parts)


def _pieces(source: ModelSource, text: str, length: int) -> Tensor:
    begin, ids = tokens_of(source, text)
    body = length - len(begin)
    count = len(ids) // body
    pieces = torch.tensor(ids[: count * body], dtype=torch.int64).view(count, body)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, len(begin)), pieces], dim=1)


def tokens_of(source: ModelSource, text: str, special: bool = True) -> tuple[list[int], list[int]]:
    """Return what the model's tokenizer opens a sequence with, at most one token, and the tokens of a text.

    Args:
        source: the model.
        text: any text.
        special: whether the names of special tokens in it mean these; llama.cpp's tools read them as plain text.

    Raises:
        ModelError: the model has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    if not source.has_tokenizer():  # transformers may make one that knows no word
        raise ModelError(f"{source.name}: {NO_TOKENIZER}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        with_specials = tokenizer("a").input_ids
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False).input_ids
    except Exception as error:  # tokenizers raise many unrelated kinds
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ModelError(f"{source.name}: the tokenizer cannot be loaded: {reason}") from error
    begin = [tokenizer.bos_token_id] if with_specials[:1] == [tokenizer.bos_token_id] else []
    return begin, ids
