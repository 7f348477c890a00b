# needs: extras=demo,build
"""Learn one block under several settings, and compare losses on learned, held-out and other text.

Blocks before it are quantised by GPTQ, and every setting of TesseraQ starts from the same GPTQ result, those of LRQ
and FlexRound from rounding to nearest, so only learning differs.
The loss is the block's squared error against the full-precision chain, weighted by sensitivity; nothing can be below
what the block's own weights have on the same input.

    scripts/run bench learner --calibration calib.txt
    scripts/run bench learner --calibration calib.txt --block 12 --type q4_0 --settings 'text|steps'
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tesseraq_gguf.compute.devices import learning_dtype, resolve_device
from tesseraq_gguf.learning.calibration import load_calibration
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.lrq import PAPER_SHARE, lrq
from tesseraq_gguf.methods.problem import BlockProblem, Method, Weights
from tesseraq_gguf.methods.scaled_rounding import ScaledRounding
from tesseraq_gguf.methods.start import AsItStarts, Start
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.types.quantized import QuantizedTensor

QUARTERS = tuple(0.7 * (0.002 / 0.7) ** (stage / 19) for stage in range(20))
"""Shares of soft weights of which every stage hardens a quarter."""

TEN_STAGES = (0.8, 0.6, 0.45, 0.33, 0.24, 0.17, 0.11, 0.06, 0.03, 0.01)

BASE: Mapping[str, Any] = {"steps": 10, "batch": 4, "rounding_rate": 5e-2, "scale_rate": 1e-2, "zero_rate": 1e-2}
"""What a setting does not change: 200 steps."""

TESSERAQ: Mapping[str, tuple[int | None, Mapping[str, Any]]] = {
    "base: 20 stages of 10 steps, rate of ν 0.05, of scale and zero 0.01": (None, {}),
    "text: 128 sequences": (128, {}),
    "steps: 20 stages of 25, rate of ν 0.03": (None, {"steps": 25, "rounding_rate": 3e-2}),
    **{
        f"steps: 20 stages of {steps} with {batch} sequences each, rate of ν 0.03, of scale and zero 0.005": (
            None,
            {"steps": steps, "batch": batch, "rounding_rate": 3e-2, "scale_rate": 5e-3, "zero_rate": 5e-3},
        )
        for steps, batch in ((25, 4), (50, 2), (100, 1), (50, 4))
    },
    "rate of ν 0.1": (None, {"rounding_rate": 0.1}),
    "rate of scale and zero 0.05": (None, {"scale_rate": 5e-2, "zero_rate": 5e-2}),
    "rate of scale and zero 0.03": (None, {"scale_rate": 3e-2, "zero_rate": 3e-2}),
    "rate of scale and zero 0.002": (None, {"scale_rate": 2e-3, "zero_rate": 2e-3}),
    "schedule: a quarter of what is soft in every stage": (None, {"soft_shares": QUARTERS}),
    "schedule: 10 stages of 20": (
        None,
        {"steps": 20, "soft_shares": TEN_STAGES, "settle_scales": 7, "settle_zeros": 8},
    ),
    "schedule: scale settles before stage 18 of 20, zero before stage 19": (
        None,
        {"settle_scales": 17, "settle_zeros": 18},
    ),
}
"""Sequences (None: all) and fields of `TesseraQ`, by what a setting is called."""

FACTORS = (0.3, 1.0, 3.0, 10.0)
"""Learning rates of LRQ and FlexRound, for each that `ScaledRounding.rate` takes."""

Setting = tuple["int | None", Method]
"""Sequences to learn on (None: all), and the method."""


def settings(method: str, starts: dict[str, Start], width: int) -> dict[str, Setting]:
    """Return what to compare, by what it is called; `width` is the model's."""
    if method == "tesseraq":
        given = Given(starts)
        return {
            name: (samples, TesseraQ(**{**BASE, **changes}, initialisation=given))
            for name, (samples, changes) in TESSERAQ.items()
        }
    steps, batch = 20 * BASE["steps"], BASE["batch"]
    if method == "flexround":
        return {f"rate × {f:g}": (None, faster(flexround(steps, batch), f)) for f in FACTORS}
    rank = width // PAPER_SHARE
    found: dict[str, Setting] = {f"rate × {f:g}": (None, faster(lrq(steps, batch, rank), f)) for f in FACTORS}
    return found | {f"rank 1/{s}": (None, lrq(steps, batch, width // s)) for s in (16, 8, 2)}


def faster(method: ScaledRounding, factor: float) -> ScaledRounding:
    """Return the method with its learning rates multiplied."""
    return replace(method, rates={bits: factor * rate for bits, rate in method.rates.items()})


@dataclass(frozen=True)
class Given:
    """An initialisation that was computed before."""

    starts: dict[str, Start]

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Return the starts by module name, whatever the problem."""
        return self.starts


class Reached(Exception):  # noqa: N818  (it ends the walk, and is no error)
    """The block to compare on has been reached."""


@dataclass
class UpTo:
    """Quantise blocks by GPTQ until the chosen one, and keep its problem.

    Attributes:
        block: its index.
        problem: set when the walk gets there.
    """

    block: int
    problem: BlockProblem | None = None
    _quick: AsItStarts = field(default_factory=lambda: AsItStarts(GPTQ()))

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Return the block rounded by GPTQ.

        Raises:
            Reached: it is the chosen block.
        """
        if problem.block.index == self.block:
            self.problem = problem
            raise Reached
        print(f"block {problem.block.index} of {self.block}", flush=True)
        return self._quick.learn(problem)


def main() -> None:
    """Walk to the block, learn it under each setting, print the table row by row."""
    parser = argparse.ArgumentParser(prog="scripts/run bench learner", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo", help="as `convert` takes it (default: demo)")
    parser.add_argument("--calibration", required=True, metavar="TEXT", help="a text file, wikitext2 or c4")
    parser.add_argument(
        "--method", choices=("tesseraq", "lrq", "flexround"), default="tesseraq", help="whose settings are compared"
    )
    parser.add_argument("--block", type=int, default=1, help="which block (default: 1, the second)")
    parser.add_argument("--type", default="tsq2", help="tensor type (default: tsq2)")
    parser.add_argument("--samples", type=int, default=360, help="sequences to learn on (default: 360)")
    parser.add_argument("--held-out", type=int, default=24, help="sequences held out (default: 24)")
    parser.add_argument("--other", metavar="TEXT", help="another text, of which as many sequences are measured as well")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--settings", default="", metavar="REGEX", help="only settings whose name matches")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    problem = reach(options)
    learned_on = len(problem.inputs) - options.held_out * (2 if options.other else 1)
    measured = [
        torch.arange(min(48, learned_on)),
        *torch.arange(learned_on, len(problem.inputs)).split(options.held_out),
    ]

    def row(name: str, weights: Weights, seconds: float) -> None:
        found = [f"{mean_loss(problem, weights, samples):.2f}" for samples in measured]
        print(f"| {' | '.join([name, *found])} | {seconds:.0f} |", flush=True)

    columns = ["", "learned on", "held out", *(["other text"] if options.other else []), "seconds"]
    print(f"|{' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    row("the block's own weights", problem.matrices(), 0)
    first = part(problem, learned_on)
    began = time.monotonic()
    starts = GPTQ().start(first)
    nearest = {name: problem.grids[name].quantize(weight) for name, weight in problem.matrices().items()}
    row("rounding to nearest", dequantized(problem, nearest), 0)
    row("GPTQ: the start", dequantized(problem, {n: s.tensor for n, s in starts.items()}), time.monotonic() - began)
    for name, (samples, method) in settings(options.method, starts, problem.inputs.shape[-1]).items():
        if re.search(options.settings, name):
            began = time.monotonic()
            learned = method.learn(part(problem, min(samples or learned_on, learned_on)))
            row(name, dequantized(problem, learned), time.monotonic() - began)


def reach(options: argparse.Namespace) -> BlockProblem:
    """Return the problem of the chosen block with all sequences: to learn on, held out, and of the other text."""
    source = resolve_model(options.model, print)
    decoder = Decoder(source, resolve_device(options.device))
    wanted = options.samples + options.held_out
    tokens = load_calibration(source, options.calibration, wanted, options.seqlen, seed=0).tokens
    if options.other:
        other = load_calibration(source, options.other, options.held_out, options.seqlen, seed=0).tokens
        tokens = torch.cat([tokens, other])
    sensitivity = measure_sensitivity(decoder, tokens[:16], seed=0)
    method = UpTo(options.block)
    walk = Reconstruction(
        decoder, method, dict.fromkeys(decoder.matrix_shapes(), options.type), 0, learning_dtype(decoder.device)
    )
    try:
        for _ in walk.run(tokens, sensitivity.blocks, lambda _: None):
            pass
    except Reached:
        assert method.problem
        return method.problem
    raise SystemExit(f"error: {source.name} has no block {options.block}")


def part(problem: BlockProblem, samples: int) -> BlockProblem:
    """Return the problem with its first sequences alone, and random numbers from the beginning."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = problem.inputs[:samples], problem.targets[:samples]
    return replace(problem, inputs=inputs, targets=targets, samples=None, generator=generator)


@torch.no_grad()
def mean_loss(problem: BlockProblem, weights: Weights, samples: Tensor) -> float:
    """Mean loss on samples, int64 [n]."""
    return sum(float(problem.loss(weights, sample)) for sample in samples.split(1)) / len(samples)


def dequantized(problem: BlockProblem, tensors: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """Weights by module name, float32 [out, in]."""
    return {name: problem.grids[name].dequantize(t) for name, t in tensors.items()}


if __name__ == "__main__":
    main()
