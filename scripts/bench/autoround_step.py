"""Time a step of Intel's AutoRound on one Llama block of random weights. Runs in AutoRound's own environment.

Its quantisation is run with few and with more steps; the difference is told, so what happens once cancels out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCHEME = {"bits": 2, "group_size": 64, "sym": False, "data_type": "int", "act_bits": 16}
VOCABULARY = 256


def main() -> None:
    """Print the seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("width", "inner", "heads", "tokens", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--steps", type=int, nargs=2, required=True, help="of the two runs")
    parser.add_argument("--wall", action="store_true", help="tell wall time, not this process' time on processors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if options.wall else time.process_time
    quantise(options, options.steps[0])
    spent = []
    for steps in options.steps:
        began = clock()
        quantise(options, steps)
        spent.append(clock() - began)
    print(json.dumps({"seconds": (spent[1] - spent[0]) / (options.steps[1] - options.steps[0])}))


def quantise(options: argparse.Namespace, steps: int) -> None:
    """Learn one block in so many steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=1,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(VOCABULARY, (2 * options.batch, options.tokens))
    batches = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens.split(options.batch)]
    quantiser = AutoRound(
        model,
        tokenizer=tokenizer(),  # it must have one, though tokens are given
        scheme=SCHEME,
        dataset=batches,
        nsamples=len(tokens),
        seqlen=options.tokens,
        batch_size=options.batch,
        iters=steps,
        device_map="cpu",
        seed=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        quantiser.output_dir = folder
        quantiser.quantize()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbers."""
    words = models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0")


if __name__ == "__main__":
    main()
