"""Perplexity in torch of W4A4 and W4A8 with codebooks, and what it depends on; the same file through llama.cpp."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.calibration import load_calibration, tokens_of
from tesseraq_gguf.codebooks import best_design, draw
from tesseraq_gguf.evaluation import TOOL, PerplexityRun, vocabulary_size
from tesseraq_gguf.grids import grid_of
from tesseraq_gguf.kernel_arithmetic import Fake, codebook_blocks, fp4_blocks, int4_blocks, int8_blocks, mean_loss
from tesseraq_gguf.models import Decoder, ModelSource, resolve_model
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.simulation import chunks_of

CTX = 512
SCORED = CTX - 1 - CTX // 2
"""Tokens of a chunk that llama-perplexity counts."""

EMBEDDING = "q8_0"


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

    def perplexity(self, weights: Mapping[str, Tensor], activations: Fake | None) -> tuple[float, float]:
        """Perplexity and its error with matrices by checkpoint name in place of the model's."""

        def of_block(index: int) -> dict[str, Tensor]:
            prefix = self.decoder.block_prefix(index)
            given = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            return {n.removesuffix(".weight"): w for n, w in given.items()}

        loss, error = mean_loss(self.decoder, self.tokens, of_block, activations, SCORED, self.embeddings)
        return math.exp(loss), math.exp(loss) * error

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every matrix of the blocks by checkpoint name."""
        return ((name, self.decoder.matrix(name)) for name in self.decoder.matrix_shapes())


def show(name: str, measured: tuple[float, float]) -> None:
    """Print a row of a table."""
    print(f"| {name} | {measured[0]:.3f} ± {measured[1]:.3f} |", flush=True)


def compare(bench: Bench, options: argparse.Namespace) -> None:
    """W4 with several activations, and BCQ4_A4 through llama.cpp."""
    grid = grid_of("bcq4_a4")
    weights = {name: grid.dequantize(grid.quantize(w)) for name, w in bench.matrices()}
    print("| weights, activations | perplexity |\n| --- | --- |")
    show("16 bits, 16 bits", bench.perplexity({}, None))
    rows: dict[str, Fake | None] = {
        "float": None,
        "int8, 64 to a scale (BCQ4)": int8_blocks,
        "codebooks, 4.5 bits (BCQ4_A4)": codebook_blocks,
        "NVFP4-like: E2M1, 16 to a scale, 4.5 bits": fp4_blocks,
        "int4, 64 to a scale": int4_blocks,
    }
    for name, fake in rows.items():
        show(f"BCQ4, {name}", bench.perplexity(weights, fake))
    if options.llama:
        with tempfile.TemporaryDirectory() as folder:
            for type in ("bcq4", "bcq4_a4"):
                out = Path(folder) / f"{type}.gguf"
                convert(Recipe(options.model, out, type=type, method="rtn", embedding_type=EMBEDDING))
                tool = find_runtime().tool(TOOL)
                run = PerplexityRun(tool, options.text, CTX, options.chunks, vocabulary_size(out), lambda *_: None)
                show(f"{type} through llama.cpp", run.perplexity(out))


def curve(bench: Bench, options: argparse.Namespace) -> None:
    """Weights and activations encoded as the paper does it, over N_c and L_A."""
    calibration = load_calibration(bench.source, options.calibration, 8, 256, 0).tokens
    print("\n| N_c | L_A | bits | squared error of the design | perplexity, W4A4 |\n| --- | --- | --- | --- | --- |")
    settings = [(count, 64) for count in (2, 4, 8, 16)] + [(8, length) for length in (16, 32, 128)]
    for count, length in settings:
        generator = torch.Generator().manual_seed(0)
        found = draw(bench.decoder, calibration, length, options.arrays * 64 // length, generator)
        drawn = torch.cat([d.arrays for d in found if d.block % 2 == 0])
        best = best_design(drawn, count, options.starts, generator)
        encode = partial(codebook_blocks, codebooks=best.codebooks, block=length)
        weights = {name: torch.cat([encode(part) for part in w.split(512)]) for name, w in bench.matrices()}
        perplexity, error = bench.perplexity(weights, encode)
        bits = 4 + math.log2(count) / 8 + 8 / length
        relative = best.rounded_error / float(drawn.square().mean())
        print(f"| {count} | {length} | {bits:.3f} | {relative:.5f} | {perplexity:.3f} ± {error:.3f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", help="a text file that codebooks are designed from")
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens")
    parser.add_argument("--arrays", type=int, default=200, help="block arrays of 64 drawn from each tensor")
    parser.add_argument("--starts", type=int, default=2, help="of each kind, for a design")
    parser.add_argument("--no-llama", dest="llama", action="store_false", help="in torch alone; needs no runtime")
    parser.add_argument("--only", choices=("compare", "curve"))
    options = parser.parse_args()
    bench = Bench(options)
    if options.only != "curve":
        compare(bench, options)
    if options.only != "compare":
        curve(bench, options)


if __name__ == "__main__":
    main()
