# needs: extras=demo,build
"""Measure codebooks in torch: perplexity in W4A4 and W4A8, and what it depends on.

Perplexity with 4-bit weights and activations against other 4-bit activations, against llama.cpp on the same file, and
over the number of codebooks and the length of block arrays, as Markdown tables.

    scripts/run bench codebooks --text valid.txt --calibration calib.txt
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.kernel_arithmetic import BLOCK, codebook_blocks, fp4_blocks
from tesseraq_gguf.compute.schemes import scheme_of
from tesseraq_gguf.evaluation.perplexity import TOOL, PerplexityRun, vocabulary_size
from tesseraq_gguf.evaluation.simulation import chunks_of, measure
from tesseraq_gguf.learning.calibration import load_calibration, tokens_of
from tesseraq_gguf.learning.codebooks import best_design, draw
from tesseraq_gguf.models import Decoder, ModelSource, resolve_model
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.types.bcq.packer import shape_of
from tesseraq_gguf.types.grids import grid_of

CTX = 512

EMBEDDING = "q8_0"

SHAPE = shape_of("bcq4_a4")

FP4 = "nvfp4-like"
"""What weights in NVFP4's format are called: 16 to an E4M3 scale; llama.cpp makes no such files from others."""

ACTIVATIONS = {
    "float": "none",
    "int8, 64 to a scale": "a8-blocks",
    "codebooks, 4.5 bits": "a4-codebooks",
    "NVFP4-like: E2M1, 16 to a scale, 4.5 bits": "a4-fp4",
    "int4, 64 to a scale, 4.25 bits and more": "a4-blocks",
}
"""Activations to compare, and their schemes."""


def chunks(source: ModelSource, text: Path, count: int) -> Tensor:
    """Tokens as llama-perplexity cuts them: int64 [count, 512]."""
    begin, ids = tokens_of(source, text.read_text(encoding="utf-8"), special=False)
    return chunks_of(ids, begin[0] if begin else None, CTX, count)


class Bench:
    """Perplexities of one model on one text."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.source = resolve_model(options.model, lambda *_: None)
        self.decoder = Decoder(self.source, torch.device("cpu"))
        self.tokens = chunks(self.source, options.text, options.chunks)
        name = self.decoder.embedding_name()
        blocks = self.decoder.matrix(name).unflatten(1, (-1, 32))
        scale = blocks.abs().amax(2, keepdim=True) / 127  # q8_0 as llama.cpp rounds to it
        rounded = (blocks / scale.clamp_min(1e-30)).round_() * scale.half().float()
        self.embeddings = {name: rounded.flatten(1)}
        head = self.embeddings.get(self.decoder.output_name(), self.decoder.output_weight())
        self._answers = torch.no_grad()(lambda hidden: self.decoder.head.logits(hidden, head).log_softmax(-1))
        self._reference = final_states(self.decoder, self.tokens, embeddings=self.embeddings)

    def measure(self, weights: Mapping[str, Tensor], rounding: ActivationRounding | None) -> Figures:
        """Measure with matrices by checkpoint name in place of the model's, and activations rounded."""

        def of_block(block: LoadedBlock) -> dict[str, Tensor]:
            return {n: weights[f"{block.prefix}{n}.weight"] for n in block.matrices()} if weights else {}

        hidden = final_states(
            self.decoder, self.tokens, rounding=lambda _: rounding, weights=of_block, embeddings=self.embeddings
        )
        perplexity, error, kld, top1 = measure(hidden, self.tokens, self._answers, self._reference, self._answers)
        assert kld is not None and top1 is not None  # there is a reference
        return Figures(perplexity, error, kld, top1)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every matrix of the blocks by checkpoint name."""
        return ((name, self.decoder.matrix(name)) for name in self.decoder.matrix_shapes())


class Figures(NamedTuple):
    """Perplexity, its error, divergence from the model with 16-bit blocks, and agreement with it."""

    perplexity: float
    error: float
    kld: float
    top1: float

    def cells(self) -> str:
        """The figures as cells of a table."""
        return f"{self.perplexity:.3f} ± {self.error:.3f} | {self.kld:.4f} | {100 * self.top1:.1f} %"


@dataclass(frozen=True)
class OtherCodebooks(ActivationRounding):
    """Rounds with any number of codebooks, and any number of neighbours to a scale.

    Attributes:
        block: L_A, neighbours that share a scale.
    """

    block: int = BLOCK

    @override
    def feed(self, name: str, x: Tensor) -> Tensor:
        return codebook_blocks(x, self.codebooks[SHAPE.layout], self.block)


def show(name: str, measured: Figures) -> None:
    """Print a row of a table."""
    print(f"| {name} | {measured.cells()} |", flush=True)


def nearest_in(type: str) -> Callable[[Tensor], Tensor]:
    """Return what rounds matrices to a type, with parameters of least squared error."""
    grid = grid_of(type)
    return lambda weight: grid.dequantize(grid.quantize(weight))


def compare(bench: Bench, options: argparse.Namespace) -> None:
    """W4 with several activations, and BCQ4_A4 through llama.cpp."""
    print("| weights, activations | perplexity | KL divergence | same top token |\n| --- | --- | --- | --- |")
    for type in options.weights.split(","):
        rounded = fp4_blocks if type == FP4 else nearest_in(type)
        weights = {name: rounded(w) for name, w in bench.matrices()}
        for said, name in ACTIVATIONS.items():
            if name not in options.activations.split(","):
                continue
            scheme = scheme_of(name, None)
            rounding = ActivationRounding(scheme) if scheme.rounds else None
            show(f"{type.upper()}, {said}", bench.measure(weights, rounding))
    if options.llama:
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "reference.gguf"
            convert(Recipe(options.model, reference, type="f16", embedding_type=EMBEDDING))
            run = PerplexityRun(
                find_runtime().tool(TOOL),
                options.text,
                CTX,
                options.chunks,
                vocabulary_size(reference),
                lambda *_: None,
            )
            logits = Path(folder) / "reference.logits"
            run.save_logits(reference, logits)
            for type in ("bcq4", "bcq4_a4"):
                out = Path(folder) / f"{type}.gguf"
                convert(Recipe(options.model, out, type=type, method="rtn", embedding_type=EMBEDDING))
                show(f"{type.upper()} through llama.cpp", Figures(*run.compare(out, logits)))


def curve(bench: Bench, options: argparse.Namespace) -> None:
    """Weights and activations encoded as the paper does it, over N_c and L_A."""
    calibration = load_calibration(bench.source, options.calibration, 8, 256, 0).tokens
    print("\n| N_c | L_A | bits | squared error of the design | perplexity, W4A4 | KL divergence | same top token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    settings = [(count, 64) for count in (2, 4, 8, 16)] + [(8, length) for length in (16, 32, 128)]
    for count, length in settings:
        generator = torch.Generator().manual_seed(0)
        found = draw(bench.decoder, calibration, length, options.arrays * 64 // length, generator)
        drawn = torch.cat([d.arrays for d in found if d.block % 2 == 0])
        best = best_design(drawn, replace(SHAPE, count=count), options.starts, generator)
        encode = partial(codebook_blocks, codebooks=best.codebooks, block=length)
        weights = {name: torch.cat([encode(part) for part in w.split(512)]) for name, w in bench.matrices()}
        figures = bench.measure(
            weights,
            OtherCodebooks(scheme_of("a4-codebooks", None), codebooks={SHAPE.layout: best.codebooks}, block=length),
        )
        bits = 4 + math.log2(count) / 8 + 8 / length
        relative = best.rounded_error / float(drawn.square().mean())
        print(f"| {count} | {length} | {bits:.3f} | {relative:.5f} | {figures.cells()} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="scripts/run bench codebooks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", help="a text file that codebooks are designed from")
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens")
    parser.add_argument("--arrays", type=int, default=200, help="block arrays of 64 drawn from each tensor")
    parser.add_argument("--starts", type=int, default=2, help="of each kind, for a design")
    parser.add_argument("--no-llama", dest="llama", action="store_false", help="in torch alone; needs no runtime")
    parser.add_argument("--weights", default=f"bcq4_a4,q4_0,{FP4}", help="types of the weights")
    parser.add_argument("--activations", default=",".join(ACTIVATIONS.values()), help="their schemes")
    parser.add_argument("--only", choices=("compare", "curve"))
    options = parser.parse_args()
    bench = Bench(options)
    if options.only != "curve":
        compare(bench, options)
    if options.only != "compare":
        curve(bench, options)


if __name__ == "__main__":
    main()
