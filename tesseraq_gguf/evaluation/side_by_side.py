"""Models side by side over one text: what each answers, position by position, beside what a reference answers.

No logits are kept. What was found of a file is in the cache after every chunk, so a run goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from tesseraq_gguf.evaluation.logits import PrefixDecoder, Tokens
from tesseraq_gguf.evaluation.perplexity import check_finite
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.paths import cache_folder, temporary_sibling
from tesseraq_gguf.runtime import load_llama_cpp
from tesseraq_gguf.runtime.locate import find_runtime
from tesseraq_gguf.serving.chat import load

Row = NDArray[np.float32]
"""Of one position, a number for each word of the vocabulary."""

_LEAST = -16.0
"""Logarithm of the reference's probability from which on llama-perplexity counts a word's part of the divergence."""

_SHARE_OF_MEMORY = 0.6
"""Of what is free, that files which run at the same time may take together."""


@dataclass(frozen=True)
class Positions:
    """What was found of a file. Everything is float32 [chunks, positions].

    Attributes:
        nll: minus log-likelihood of the next token in nats.
        base_nll: the reference's.
        kld: divergence of the answer from the reference's in nats.
        dp: the next token's probability in the file, less that in the reference.
        same: 1 where both hold the same token most likely.
    """

    nll: NDArray[np.float32]
    base_nll: NDArray[np.float32]
    kld: NDArray[np.float32]
    dp: NDArray[np.float32]
    same: NDArray[np.float32]


_KINDS = len(Positions.__dataclass_fields__)


@dataclass(frozen=True)
class Text:
    """A text in the tokens of a model, as llama-perplexity cuts it.

    Attributes:
        chunks: int32 [chunks, ctx]; each begins with BOS where the model's texts do.
        pieces: what its tokens stand for.
        length: tokens of the whole text.
    """

    chunks: NDArray[np.int32]
    pieces: Mapping[int, str]
    length: int

    @property
    def first(self) -> int:
        """The first position of a chunk that counts: those before it only give a context."""
        return self.chunks.shape[1] // 2


def tokenised(model: Path, text: bytes, ctx: int) -> Text:
    """Cut a text into whole chunks of a model's tokens.

    Raises:
        FileFormatError: llama.cpp refuses the model.
        RuntimeMissingError: the runtime is not built.
    """
    with _opened(model, ctx) as llama:
        api = load_llama_cpp()
        tokens = llama.tokenize(text.removesuffix(b"\n"), add_bos=True, special=False)
        pieces = {token: llama.detokenize([token], special=True).decode("utf-8", "replace") for token in set(tokens)}
        begins = api.llama_vocab_get_add_bos(api.llama_model_get_vocab(llama.model))
        bos = int(llama.token_bos())
    count = len(tokens) // ctx
    chunks = np.array(tokens[: count * ctx], np.int32).reshape(count, ctx)
    if begins:
        chunks[:, 0] = bos
    return Text(chunks, pieces, len(tokens))


class Findings:
    """What was found of a file so far. It is kept in the cache, under what the file, the reference and the text are.

    Args:
        reference: the file that answers are compared with.
        file: whose answers they are.
        text: that both are run on.
    """

    def __init__(self, reference: Path, file: Path, text: Text) -> None:
        self._file = file
        said = [*map(_identity, (reference, file)), find_runtime().manifest.get("kernels_hash"), text.chunks.shape]
        digest = hashlib.sha256(repr(said).encode())
        digest.update(text.chunks.tobytes())
        self._place = cache_folder("comparisons") / f"{digest.hexdigest()[:24]}.npy"
        self._chunks = list(self._read((_KINDS, text.chunks.shape[1] - 1 - text.first)))

    @property
    def done(self) -> int:
        """Chunks that are done."""
        return len(self._chunks)

    @property
    def positions(self) -> Positions:
        """What was found, position by position."""
        return Positions(*np.stack(self._chunks, 1))

    def add(self, found: NDArray[np.float32]) -> None:
        """Keep what was found in the next chunk, float32 [kinds, positions].

        Raises:
            EvaluationError: it is not finite.
        """
        if not np.isfinite(found).all():
            check_finite(self._file, float("nan"))
        self._chunks.append(found)
        self._place.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(self._place) as partial, partial.open("wb") as stream:
            np.save(stream, np.stack(self._chunks))

    def forget(self) -> None:
        """Begin anew."""
        self._chunks = []

    def _read(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        nothing = np.empty((0, *shape), np.float32)
        try:
            found: NDArray[np.float32] = np.load(self._place, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return nothing
        return found if found.shape[1:] == shape else nothing


def run(reference: Path, findings: Mapping[Path, Findings], text: Text, watch: Callable[[str, int, int], None]) -> None:
    """Run a reference and files over the chunks that are missing, as many files at a time as memory takes.

    Raises:
        FileFormatError: llama.cpp refuses a file.
        EvaluationError: a file cannot be run, or its answers are not finite.
    """
    missing = [file for file, found in findings.items() if found.done < len(text.chunks)]
    groups = list(_groups(missing, _free_memory() - _bytes(reference)))
    for number, group in enumerate(groups, 1):
        said = "comparing" if len(groups) == 1 else f"comparing, part {number} of {len(groups)}"
        _run(reference, {file: findings[file] for file in group}, text, lambda *n, said=said: watch(said, *n))


def _run(reference: Path, findings: dict[Path, Findings], text: Text, watch: Callable[[int, int], None]) -> None:
    ctx, api = text.chunks.shape[1], load_llama_cpp()
    done = min(found.done for found in findings.values())
    watch(done, len(text.chunks))
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(file, ctx)) for file in (reference, *findings)]
        base, *others = (PrefixDecoder(api, llama) for llama in opened)
        for number in range(done, len(text.chunks)):
            due = [(o, f) for o, f in zip(others, findings.values(), strict=True) if f.done == number]
            chunk = tuple(map(int, text.chunks[number]))
            for found, (_, of_file) in zip(
                _compared([base, *(o for o, _ in due)], chunk, text.first), due, strict=True
            ):
                of_file.add(found)
            watch(number + 1, len(text.chunks))


def _compared(sides: Sequence[PrefixDecoder], tokens: Tokens, first: int) -> list[NDArray[np.float32]]:
    """What is found of each side but the first in a chunk, float32 [kinds, positions] each."""
    found = np.empty((len(sides) - 1, _KINDS, len(tokens) - 1 - first), np.float32)
    for side in sides:
        side.forget()
    # what is said after the last token of a chunk is not known
    rows = zip(*(side.rows(tokens[:-1], first) for side in sides), strict=True)
    for place, ((position, base), *others) in enumerate(rows):
        target = tokens[position + 1]
        p = _log_probabilities(base)
        counted = np.flatnonzero(p > _LEAST)
        chance = np.exp(p[counted])
        likeliest, expected = int(base.argmax()), float(np.exp(p[target]))
        for index, (_, row) in enumerate(others):
            q = _log_probabilities(row)
            kld = float(np.sum(chance * (p[counted] - q[counted]), dtype=np.float64))
            dp = float(np.exp(q[target])) - expected
            found[index, :, place] = -q[target], -p[target], kld, dp, int(row.argmax()) == likeliest
    return list(found)


def _log_probabilities(row: Row) -> Row:
    """Logarithms of the probabilities that logits give, float32 [vocabulary]."""
    most = row.max()
    total = np.exp(row - most).sum(dtype=np.float64)
    return row - (most + np.float32(np.log(total)))


def _opened(file: Path, ctx: int) -> closing[Any]:
    """A loaded model, closed at the end of a `with`."""
    return closing(load(file, context=ctx))


def _identity(file: Path) -> tuple[str, int, int]:
    """What tells a file, with all its parts, from what it was before."""
    found = open_gguf(file)
    return str(file.resolve()), found.bytes, max(part.stat().st_mtime_ns for part in found.parts)


def _bytes(file: Path) -> int:
    """Bytes of a GGUF file, all parts together."""
    return open_gguf(file).bytes


def _groups(files: Sequence[Path], room: int) -> Iterator[list[Path]]:
    """Files that are in memory together; one at least."""
    group: list[Path] = []
    for file in files:
        if group and sum(map(_bytes, (*group, file))) > room:
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _free_memory() -> int:
    """Bytes that models may take together."""
    return int(_SHARE_OF_MEMORY * psutil.virtual_memory().available)
