"""Time a step of each learning method against the bare forward and backward pass of the same block.

The block is a Llama block with random weights. On the processor the time of one thread is what is told, so other work
on the machine does not count; on a GPU it is wall time, and the most of its memory that was in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from tesseraq_gguf.devices import learning_dtype, resolve_device
from tesseraq_gguf.grids import grid_of
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.lrq import PAPER_SHARE, lrq
from tesseraq_gguf.methods.start import Nearest
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.reconstruction import BlockProblem, Method

FEW, MORE = 4, 12
"""Steps of the two runs whose difference is told: what happens once a block cancels out."""


def main() -> None:
    """Print one row for each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=640, help="of the residual stream (default: 640)")
    parser.add_argument("--inner", type=int, default=2048, help="of the MLP (default: 2048)")
    parser.add_argument("--heads", type=int, default=0, help="attention heads (default: of 64 channels)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default: 4)")
    parser.add_argument("--type", default="tsq2", help="tensor type (default: tsq2)")
    parser.add_argument("--device", default="cpu", help="where to learn (default: cpu)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve_device(options.device)
    where = "one thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    problem = make_problem(options, device)
    bare, peak = timed(lambda steps: [forward_and_backward(problem, options.batch) for _ in range(steps)], device)
    print(f"{problem_size(problem) / 1e6:.1f} million weights, {options.batch} × {options.tokens} tokens, {where}\n")
    print("| | ms a step | of the bare pass | peak memory |\n| --- | ---: | ---: | ---: |")
    print(f"| bare forward and backward | {1e3 * bare:.1f} | 1 | {_gigabytes(peak)} |", flush=True)
    methods: dict[str, Callable[[int], Method]] = {
        # one stage, in which scales and zero-points move as well
        "TesseraQ": lambda steps: TesseraQ(
            steps, options.batch, soft_shares=(0.5,), settle_scales=1, settle_zeros=1, initialisation=Nearest()
        ),
        "FlexRound": lambda steps: flexround(steps, options.batch),
        "LRQ, rank 1/4": lambda steps: lrq(steps, options.batch, options.width // PAPER_SHARE),
    }
    for name, make in methods.items():
        seconds, peak = timed(lambda steps, make=make: learn(problem, make(steps)), device)
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / bare:.2f} | {_gigabytes(peak)} |", flush=True)


def make_problem(options: argparse.Namespace, device: torch.device) -> BlockProblem:
    """Return a Llama block of random weights as a problem; its inputs are random as well."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(0)
    heads = options.heads or options.width // 64
    config = LlamaConfig(
        hidden_size=options.width, intermediate_size=options.inner, num_attention_heads=heads, num_key_value_heads=heads
    )
    config._attn_implementation = "sdpa"
    module = LlamaDecoderLayer(config, 0).to(device).eval().requires_grad_(False)
    block = LoadedBlock(0, "model.layers.0.", module)
    inputs = torch.randn(2 * options.batch, options.tokens, options.width)
    positions = torch.arange(options.tokens)[None]
    cos, sin = LlamaRotaryEmbedding(config)(inputs, positions)
    arguments = {"position_embeddings": (cos.to(device), sin.to(device))}
    with torch.no_grad():
        targets = block.run(inputs.to(device), arguments).cpu()
    return BlockProblem(
        block=block,
        grids=dict.fromkeys(block.matrices(), grid_of(options.type)),
        inputs=inputs,
        targets=targets,
        sensitivity=torch.ones(2, options.width, device=device),
        arguments=arguments,
        device=device,
        autocast=torch.float32 if device.type == "cpu" else learning_dtype(device),
        generator=torch.Generator().manual_seed(0),
        report=lambda *_: None,
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


def timed(run: Callable[[int], object], device: torch.device) -> tuple[float, int]:
    """Return the seconds that a step takes, after a first round that may compile, and bytes in use on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    run(FEW)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spent = []
    for steps in (FEW, MORE):
        _wait(device)
        began = clock()
        run(steps)
        _wait(device)
        spent.append(clock() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return (spent[1] - spent[0]) / (MORE - FEW), peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gigabytes(peak: int) -> str:
    return f"{peak / 1e9:.1f} GB" if peak else ""


if __name__ == "__main__":
    main()
