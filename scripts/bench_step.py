"""Time a step of each learning method against the bare forward and backward pass of the same block.

The block is a Llama block with random weights; processor time of one thread is what is told, so other work on the
machine does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

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
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = make_problem(options)
    bare = timed(lambda steps: [forward_and_backward(problem, options.batch) for _ in range(steps)])
    print(f"{problem_size(problem) / 1e6:.1f} million weights, {options.batch} × {options.tokens} tokens, one thread\n")
    print("| | ms a step | of the bare pass |\n| --- | ---: | ---: |")
    print(f"| bare forward and backward | {1e3 * bare:.0f} | 1 |")
    methods: dict[str, Callable[[int], Method]] = {
        # one stage, in which scales and zero-points move as well
        "TesseraQ": lambda steps: TesseraQ(
            steps, options.batch, soft_shares=(0.5,), settle_scales=1, settle_zeros=1, initialisation=Nearest()
        ),
        "FlexRound": lambda steps: flexround(steps, options.batch),
        "LRQ, rank 1/4": lambda steps: lrq(steps, options.batch, options.width // PAPER_SHARE),
    }
    for name, make in methods.items():
        seconds = timed(lambda steps, make=make: learn(problem, make(steps)))
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / bare:.2f} |", flush=True)


def make_problem(options: argparse.Namespace) -> BlockProblem:
    """Return a Llama block of random weights as a problem; its inputs are random as well."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(0)
    heads = options.heads or options.width // 64
    config = LlamaConfig(
        hidden_size=options.width, intermediate_size=options.inner, num_attention_heads=heads, num_key_value_heads=heads
    )
    config._attn_implementation = "sdpa"
    module = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    block = LoadedBlock(0, "model.layers.0.", module)
    inputs = torch.randn(2 * options.batch, options.tokens, options.width)
    positions = torch.arange(options.tokens)[None]
    arguments = {"position_embeddings": LlamaRotaryEmbedding(config)(inputs, positions)}
    with torch.no_grad():
        targets = block.run(inputs, arguments)
    return BlockProblem(
        block=block,
        grids=dict.fromkeys(block.matrices(), grid_of(options.type)),
        inputs=inputs,
        targets=targets,
        sensitivity=torch.ones(2, options.width),
        arguments=arguments,
        device=torch.device("cpu"),
        autocast=torch.float32,
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


def timed(run: Callable[[int], object]) -> float:
    """Return the seconds of processor time that a step takes, after a first round that may compile."""
    run(FEW)
    spent = []
    for steps in (FEW, MORE):
        began = time.process_time()
        run(steps)
        spent.append(time.process_time() - began)
    return (spent[1] - spent[0]) / (MORE - FEW)


if __name__ == "__main__":
    main()
