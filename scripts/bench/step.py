# needs: extras=demo
"""Time a step of each learning method against the bare forward and backward pass of a block.

The block is a Llama block with random weights. On the processor the time of one thread is what is told, so other work
on the machine does not count; on a GPU it is wall time, and the most of its memory that was in use.

Under torchrun the sequences of a step are shared, every process has one thread, and wall time is told: `--wall` gives
that of one process to compare with.

    scripts/run bench step                                a block of the demo model's shape, 4 × 256 tokens
    scripts/run bench step --width 4096 --inner 11008     a block of 7B models
    torchrun --nproc-per-node 2 scripts/bench/step.py     two processes
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tesseraq_gguf.compute.devices import learning_dtype, resolve_device
from tesseraq_gguf.compute.parallel import Team, joined
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.lrq import PAPER_SHARE, lrq
from tesseraq_gguf.methods.problem import BlockProblem, Method
from tesseraq_gguf.methods.start import Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import attention
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.types.grids import grid_of


def main() -> None:
    """Print one row for each method."""
    parser = argparse.ArgumentParser(prog="scripts/run bench step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=640, help="of the residual stream (default: 640)")
    parser.add_argument("--inner", type=int, default=2048, help="of the MLP (default: 2048)")
    parser.add_argument("--heads", type=int, default=0, help="attention heads (default: of 64 channels)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default: 4)")
    parser.add_argument("--type", default="tsq2", help="tensor type (default: tsq2)")
    parser.add_argument("--device", default="cpu", help="where to learn (default: cpu)")
    parser.add_argument("--precision", choices=("float32", "auto"), help="auto is what convert would take; default: "
                        "float32 on the processor, auto on a GPU")  # fmt: skip
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 50), metavar=("FEW", "MORE"),
                        help="of the two runs whose difference is told: what happens once cancels out")  # fmt: skip
    parser.add_argument("--methods", default="", metavar="REGEX", help="only those whose names match")
    parser.add_argument("--wall", action="store_true", help="tell wall time, on the processor too")
    parser.add_argument("--autoround", type=Path, metavar="PYTHON", help="also time AutoRound, which this Python has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with joined() as team:
        measure(options, team)


def measure(options: argparse.Namespace, team: Team) -> None:
    """Print the table of a block's steps; only the first process speaks."""
    device = resolve_device(options.device)
    clock = time.process_time if device.type == "cpu" and team.size == 1 and not options.wall else time.perf_counter
    where = "one thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    where += "" if team.size == 1 else f" in each of {team.size} processes"
    problem = make_problem(options, device, team)
    say = print if team.first else lambda *_, **__: None

    def time_of(run: Callable[[int], object]) -> tuple[float, int]:
        return timed(run, device, clock, options.steps)

    def bare_passes(steps: int) -> None:
        for _ in range(steps):
            forward_and_backward(problem, options.batch)

    bare, peak = time_of(bare_passes)
    size = f"{problem_size(problem) / 1e6:.1f} million weights, {options.batch} × {options.tokens} tokens"
    say(f"{size}, {str(problem.autocast).removeprefix('torch.')}, {where}\n")
    say("| | ms a step | of the bare pass | peak memory |\n| --- | ---: | ---: | ---: |")
    say(f"| bare forward and backward | {1e3 * bare:.1f} | 1 | {_gigabytes(peak)} |", flush=True)
    methods: dict[str, Callable[[int], Method]] = {
        # one stage, in which scales and zero-points move as well
        "TesseraQ": lambda steps: TesseraQ(
            steps, options.batch, soft_shares=(0.5,), settle_scales=1, settle_zeros=1, initialisation=Nearest()
        ),
        "FlexRound": lambda steps: flexround(steps, options.batch),
        "LRQ, rank 1/4": lambda steps: lrq(steps, options.batch, options.width // PAPER_SHARE),
    }
    for name, make in methods.items():
        if not re.search(options.methods, name):
            continue
        seconds, peak = time_of(partial(learn_for, problem, make))
        say(f"| {name} | {1e3 * seconds:.1f} | {seconds / bare:.2f} | {_gigabytes(peak)} |", flush=True)
    if options.autoround:
        seconds = autoround_step(options)
        say(f"| AutoRound | {1e3 * seconds:.1f} | {seconds / bare:.2f} | |")


def autoround_step(options: argparse.Namespace) -> float:
    """Return the seconds of a step of AutoRound on the same block, in its own environment, as its own clock says."""
    shape = ["--width", options.width, "--inner", options.inner, "--heads", options.heads or options.width // 64]
    size = ["--tokens", options.tokens, "--batch", options.batch, "--steps", *options.steps]
    script = Path(__file__).with_name("autoround_step.py")
    command = [str(word) for word in (options.autoround, script, *shape, *size)]
    command += ["--wall"] if options.wall else []
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(json.loads(said.splitlines()[-1])["seconds"])


def make_problem(options: argparse.Namespace, device: torch.device, team: Team) -> BlockProblem:
    """Return a Llama block of random weights as a problem; its inputs are random as well."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(0)
    heads = options.heads or options.width // 64
    config = LlamaConfig(
        hidden_size=options.width, intermediate_size=options.inner, num_attention_heads=heads, num_key_value_heads=heads
    )
    attention.register()
    config._attn_implementation = attention.NAME
    module = LlamaDecoderLayer(config, 0).to(device).eval().requires_grad_(False)
    block = LoadedBlock(0, "model.layers.0.", module)
    samples = 2 * options.batch
    inputs = team.share(torch.randn(samples, options.tokens, options.width))
    positions = torch.arange(options.tokens)[None]
    cos, sin = LlamaRotaryEmbedding(config)(inputs, positions)
    arguments = {"position_embeddings": (cos.to(device), sin.to(device))}
    with torch.no_grad():
        targets = block.run(inputs.to(device), arguments).cpu()
    precision = options.precision or ("float32" if device.type == "cpu" else "auto")
    return BlockProblem(
        block=block,
        grids=dict.fromkeys(block.matrices(), grid_of(options.type)),
        inputs=inputs,
        targets=targets,
        sensitivity=torch.ones(2, options.width, device=device),
        arguments=arguments,
        device=device,
        autocast=learning_dtype(device) if precision == "auto" else torch.float32,
        generator=torch.Generator().manual_seed(0),
        report=lambda *_: None,
        team=team,
        samples=samples,
    )


def problem_size(problem: BlockProblem) -> int:
    """Weights of the block."""
    return sum(weight.numel() for weight in problem.matrices().values())


def forward_and_backward(problem: BlockProblem, batch: int) -> None:
    """Run the block and take the gradient of its loss with respect to every weight."""
    weights = {name: weight.detach().requires_grad_() for name, weight in problem.matrices().items()}
    problem.loss(weights, problem.draw(batch)).backward()


def learn(problem: BlockProblem, method: Method) -> None:
    """Learn the block, from the same random numbers each time."""
    method.learn(replace(problem, generator=torch.Generator().manual_seed(0)))


def learn_for(problem: BlockProblem, make: Callable[[int], Method], steps: int) -> None:
    """Learn the block by the method that takes so many steps."""
    learn(problem, make(steps))


def timed(
    run: Callable[[int], object], device: torch.device, clock: Callable[[], float], steps: Sequence[int]
) -> tuple[float, int]:
    """Return the seconds that a step takes, after a first round that may compile, and bytes in use on a GPU."""
    run(steps[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spent = []
    for count in steps:
        _wait(device)
        began = clock()
        run(count)
        _wait(device)
        spent.append(clock() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return (spent[1] - spent[0]) / (steps[1] - steps[0]), peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gigabytes(peak: int) -> str:
    return f"{peak / 1e9:.1f} GB" if peak else ""


if __name__ == "__main__":
    main()
