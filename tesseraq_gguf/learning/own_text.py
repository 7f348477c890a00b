"""Text that a model writes itself, to calibrate on where other text is scarce.

Sampled from nothing but the token that begins a document, it has every kind of text the model was trained on, in the
model's own proportions; there is no end to it, and no file is needed (LLM-QAT, arXiv 2305.17888, §3.1, draws its data
so). It goes into a plain text file, to be read, mixed with other text, and given to `--calibration`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tesseraq_gguf import arguments
from tesseraq_gguf.compute.devices import learning_dtype, resolve_device
from tesseraq_gguf.errors import ModelError, UsageError
from tesseraq_gguf.learning.calibration import tokens_of
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.whole import whole_model
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.runtime.progress import Reporter, SilentReporter

LENGTH = 256
"""Tokens of a document, unless the model ends it before."""

_TOGETHER = 64
"""Documents written at a time: each token reads all weights, for all of them at once."""

_CANDIDATES = 400
"""Most likely tokens that one is drawn from; what small models give to the thousands behind them is noise."""


@dataclass(frozen=True)
class OwnText:
    """How much a model writes.

    Attributes:
        tokens: to sample, in whole documents.
        length: most tokens of a document.
        seed: of the draw.
    """

    tokens: int = 512 * LENGTH
    length: int = LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UsageError: naming the first that is found.
        """
        arguments.integer("seqlen" if arguments.ON_COMMAND_LINE.get() else "length", self.length, 2)
        arguments.integer("seed", self.seed)
        if arguments.integer("tokens", self.tokens) < self.length:
            raise UsageError(
                f"--tokens must be at least {self.length}, one document of --seqlen tokens, got {self.tokens}"
            )

    def write(self, model: str, out: str | Path, device: str = "auto", progress: Reporter | None = None) -> int:
        """Let a model write documents into a text file, at temperature 1.

        The whole model is in memory meanwhile.

        Args:
            model: as `convert` takes it.
            out: the file; it appears when all is written.
            device: as `convert` takes it.
            progress: told what begins, and of steps done.

        Returns:
            How many documents there are.

        Raises:
            UsageError: a file that cannot be written there.
            ModelError: the model cannot be loaded, or has no token to begin with, or the device's memory is too small.
        """
        model, out = arguments.text("model", model), arguments.path("out", out).expanduser()
        if out.is_dir():
            raise UsageError(f"{out} is a folder. Give the name of the text file to write")
        if not out.parent.is_dir():
            raise UsageError(f"there is no folder {out.parent} to write into")
        documents = self._documents(model, resolve_device(arguments.device("device", device)), progress)
        try:
            with temporary_sibling(out) as partial:
                partial.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        except PermissionError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror}") from error
        return len(documents)

    def _documents(self, model: str, device: torch.device, progress: Reporter | None) -> list[str]:
        progress = progress or SilentReporter()
        source = resolve_model(model, progress.stage)
        Decoder(source, device)  # takes no memory, and refuses the models that `convert` refuses
        progress.stage("Loading the whole model")
        from transformers import AutoTokenizer

        tokens_of(source, "a")  # a tokenizer that cannot be used says so here
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ModelError(
                f"{source.name}: its tokenizer has neither a token that begins a text nor one that ends it"
            )
        try:
            network = whole_model(source, learning_dtype(device)).to(device).eval()
            count = -(-self.tokens // self.length)
            rows = sample(network, first, count, self.length, self.seed, progress.advance)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{source.name}: the whole model does not fit into the memory of {device}. Try --device cpu"
            ) from error
        return tokenizer.batch_decode(rows, skip_special_tokens=True)


def sample(
    network: Any, first: int, count: int, length: int, seed: int, watch: Callable[[int, int], None] = lambda *_: None
) -> list[Tensor]:
    """Sample documents from a causal language model of transformers, at temperature 1.

    Args:
        network: the model.
        first: the token that each begins with.
        count: documents wanted.
        length: most tokens of each, `first` among them; from the model's end of text on there is padding.
        seed: of the draw.
        watch: told of steps done and of all.

    Returns:
        Tokens of each document, int64 [up to length].
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    steps = -(-count // _TOGETHER) * (length - 1)
    generator = torch.Generator(network.device).manual_seed(seed)
    documents: list[Tensor] = []

    class Draw(LogitsProcessor):  # type: ignore[misc]
        """Leaves no choice but the token that was drawn: sampling a vocabulary whole takes longer than the model."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            watch(len(documents) // _TOGETHER * (length - 1) + input_ids.shape[1], steps)
            likely, tokens = scores.topk(min(_CANDIDATES, scores.shape[1]))
            chosen = torch.multinomial(likely.float().softmax(-1), 1, generator=generator)
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, chosen), 0.0)

    ends = network.generation_config.eos_token_id
    ends = ends[0] if isinstance(ends, list) else ends
    while len(documents) < count:
        begin = torch.full((min(_TOGETHER, count - len(documents)), 1), first, device=network.device)
        documents += network.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            max_new_tokens=length - 1,
            pad_token_id=first if ends is None else ends,
            logits_processor=LogitsProcessorList([Draw()]),
        ).cpu()
    return documents
