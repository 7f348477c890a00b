# needs: extras=demo
"""Measure perplexity in torch over the share of weights of 4 bits, and over orders of columns.

Types with other shares than PTQ1_61's exist nowhere but here. The whole model is quantised block by block; the text
that is measured on walks along through the quantised blocks. Perplexities count the second half of every chunk, as
llama-perplexity does. `--blocks` is quicker: the error of what the matrices of some blocks of the full-precision model
compute, on tokens that nothing was found on. `--mean` measures what a mean of each row, which the paper's code
binarises around and the type has no place for, would take of the squared error of the weights.

    scripts/run bench salient --text valid.txt --calibration calib.txt
    scripts/run bench salient --blocks 0,4,8 --calibration calib.txt --scores error,peak
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.compute.devices import learning_dtype, resolve_device
from tesseraq_gguf.evaluation.simulation import chunks_of, measure
from tesseraq_gguf.learning.calibration import load_calibration, tokens_of
from tesseraq_gguf.learning.column_order import InputStatistics, Score, likeness, order_of, score
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.methods.gptq import GPTQ, compensate
from tesseraq_gguf.methods.problem import BlockProblem, Method
from tesseraq_gguf.methods.ptq161 import Ptq161
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.handed import BlockInputs
from tesseraq_gguf.types.ptq161.grid import BLOCK, Ptq161Grid, with_salient
from tesseraq_gguf.types.quantized import QuantizedTensor

SHARES = (12, 24, 26, 38)
"""Salient weights of a block of 128: 9, 19 (the type's), 20 and 30 %."""


@dataclass
class Alongside:
    """A method that takes a text along through the blocks it learns.

    Attributes:
        method: what learns.
        hidden: of the text, float32 [chunks, length, hidden].
        grid: the grid of all matrices.
    """

    method: Method
    hidden: Tensor
    recorded: BlockInputs
    grid: Ptq161Grid

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Learn the block, then run it on the text."""
        learned = self.method.learn(problem)
        weights = {name: self.grid.dequantize(tensor) for name, tensor in learned.items()}
        arguments = self.recorded.arguments[problem.block.index]
        with torch.no_grad():
            for chunk in range(len(self.hidden)):
                given = self.hidden[chunk : chunk + 1].to(problem.device)
                self.hidden[chunk] = problem.block.run(given, arguments, weights)[0].float().cpu()
        return learned


@dataclass
class OnGrid(Reconstruction):
    """The walk over the blocks with all matrices on one grid."""

    grid: Ptq161Grid = field(default_factory=lambda: with_salient(24))

    def _problem(self, *arguments: object) -> BlockProblem:
        problem = super()._problem(*arguments)  # type: ignore[arg-type]
        problem.grids = dict.fromkeys(problem.grids, self.grid)
        return problem


def main() -> None:
    """Print a table row by row."""
    parser = argparse.ArgumentParser(prog="scripts/run bench salient", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo", help="as `convert` takes it (default: demo)")
    parser.add_argument("--text", type=Path, help="text to measure perplexity on")
    parser.add_argument("--calibration", metavar="TEXT", help="as `convert` takes it")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (default: 64)")
    parser.add_argument("--seqlen", type=int, default=256, help="their tokens (default: 256)")
    parser.add_argument("--ctx", type=int, default=512, help="tokens of a chunk (default: 512)")
    parser.add_argument("--chunks", type=int, default=8, help="chunks to measure (default: 8)")
    parser.add_argument("--method", choices=("rtn", "gptq", "ptq161"), default="gptq")
    parser.add_argument("--steps", type=int, default=120, help="Adam steps of ptq161 (default: 120)")
    parser.add_argument("--salient", default=",".join(map(str, SHARES)), help="salient weights of 128, several")
    parser.add_argument("--scores", default="error", help="what chooses them: error, peak, or both with a comma")
    parser.add_argument("--blocks", metavar="LIST", help="only measure errors, in these blocks: 0,4,8")
    parser.add_argument("--mean", action="store_true", help="only measure what means of rows would buy")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    source = resolve_model(options.model, print)
    decoder = Decoder(source, resolve_device(options.device))
    if options.mean:
        print_means(decoder)
        return
    tokens = load_calibration(source, options.calibration, options.samples, options.seqlen, seed=0).tokens
    if options.blocks:
        print_errors(decoder, tokens, [int(b) for b in options.blocks.split(",")], options)
        return
    if options.text is None:
        parser.error("--text is needed to measure perplexity")
    begin, ids = tokens_of(source, options.text.read_text(encoding="utf-8"), special=False)
    text = chunks_of(ids, begin[0] if begin else None, options.ctx, options.chunks)
    sensitivity = measure_sensitivity(decoder, tokens[:16], seed=0).blocks
    methods: dict[str, Method] = {
        "rtn": AsItStarts(Nearest()),
        "gptq": AsItStarts(GPTQ()),
        "ptq161": Ptq161(options.steps, 4),
    }
    print("| method | salient of 128 | chosen by | bits per weight | perplexity | ± | seconds |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for chosen_by in options.scores.split(","):
        for salient in map(int, options.salient.split(",")):
            began = time.monotonic()
            found, error = perplexity(decoder, methods[options.method], (tokens, text), sensitivity, salient, chosen_by)
            bits = (4 * salient + BLOCK - salient + 16) / BLOCK
            print(
                f"| {options.method} | {salient} ({salient / BLOCK:.0%}) | {chosen_by} | {bits:.2f} | {found:.2f} | "
                f"{error:.2f} | {time.monotonic() - began:.0f} |",
                flush=True,
            )


def perplexity(
    decoder: Decoder,
    method: Method,
    texts: tuple[Tensor, Tensor],
    sensitivity: list[Tensor],
    salient: int,
    chosen_by: Score,
) -> tuple[float, float]:
    """Quantise the model and return its perplexity with the standard error.

    Texts are what it is quantised on, int64 [samples, length], and what it is measured on, int64 [chunks, ctx].
    """
    tokens, text = texts
    grid = with_salient(salient)
    hidden, recorded = decoder.stem(text)
    along = Alongside(method, hidden, recorded, grid)
    types = dict.fromkeys(decoder.matrix_shapes(), grid.type)
    dtype = learning_dtype(decoder.device)
    walk = OnGrid(decoder, along, types, 0, dtype, salient=chosen_by, grid=grid)
    for _ in walk.run(tokens, sensitivity, lambda _: None):
        pass
    return measure(along.hidden, text, decoder.answers())[:2]


@torch.no_grad()
def print_errors(decoder: Decoder, tokens: Tensor, blocks: list[int], options: argparse.Namespace) -> None:
    """Print the error of what matrices compute, relative to what they compute, mean over matrices of some blocks.

    Each is quantised by itself, on the first half of the tokens, and measured on the second.
    """
    hidden, recorded = decoder.stem(tokens)
    errors: dict[tuple[int, str, str], list[float]] = {}
    for index in range(max(blocks) + 1):
        block = decoder.load_block(index)
        fed: dict[str, list[Tensor]] = {}
        for name, module in block.matrices().items() if index in blocks else ():
            module.register_forward_pre_hook(_keeping(fed, name))
        for sample in range(len(hidden)):
            given = hidden[sample : sample + 1].to(decoder.device)
            hidden[sample] = block.run(given, recorded.arguments[index])[0].float().cpu()
        for name, inputs in fed.items():
            weight, x = block.matrices()[name].weight.detach(), torch.cat(inputs)
            half = len(x) // 2
            seen = InputStatistics(x[:half].abs().amax(0), x[:half].square().mean(0))
            first, second = (part.T @ part / len(part) for part in (x[:half], x[half:]))
            for salient in map(int, options.salient.split(",")):
                grid = with_salient(salient)
                for chosen_by in options.scores.split(","):
                    order = order_of(score([weight], seen, chosen_by), likeness([weight]), salient=salient)
                    w, there = weight[:, order], second[order][:, order]
                    rounded = grid.dequantize(grid.quantize(w, seen.energy[order]))
                    compensated = grid.dequantize(compensate(w, first[order][:, order], grid, 0.01).tensor)
                    for method, got in (("rtn", rounded), ("gptq", compensated)):
                        off = got - w
                        error = float(((off @ there) * off).sum() / ((w @ there) * w).sum())
                        errors.setdefault((salient, chosen_by, method), []).append(error)
    print("| method | salient of 128 | chosen by | bits per weight | relative squared error |")
    print("| --- | ---: | --- | ---: | ---: |")
    for (salient, chosen_by, method), found in sorted(errors.items(), key=lambda item: item[0][::-1]):
        bits = (4 * salient + BLOCK - salient + 16) / BLOCK
        mean = sum(found) / len(found)
        print(f"| {method} | {salient} ({salient / BLOCK:.0%}) | {chosen_by} | {bits:.2f} | {mean:.4f} |", flush=True)


def _keeping(fed: dict[str, list[Tensor]], name: str) -> Callable[..., None]:
    return lambda _module, args: fed.setdefault(name, []).append(args[0].flatten(0, -2).float())


def print_means(decoder: Decoder) -> None:
    """Print the squared error of binary weights around 0 and around the mean of their row, blocks of 104, all rows."""
    around = dict.fromkeys(("0", "the row's mean"), 0.0)
    total = 0.0
    for name in decoder.matrix_shapes():
        weight = decoder.matrix(name)
        columns = weight.shape[1] // BLOCK * BLOCK
        weight = weight[:, weight.abs().mean(0).argsort()[: columns * 104 // BLOCK]]
        total += float(weight.square().sum())
        for kind, middle in (("0", 0.0), ("the row's mean", weight.mean(1, keepdim=True))):
            off = (weight - middle).unflatten(1, (-1, 104))
            error = off.abs() - off.abs().mean(-1, keepdim=True)
            around[kind] += float(error.square().sum())
    print("| binary around | squared error, relative to the weights' |\n| --- | ---: |")
    for kind, error in around.items():
        print(f"| {kind} | {error / total:.5f} |")


if __name__ == "__main__":
    main()
