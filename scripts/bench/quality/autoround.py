"""Quantise a model with Intel's AutoRound. Runs in AutoRound's own environment, so it knows nothing of this project.

    python autoround.py MODEL OUT TOKENS.json --format fake --iters 200
    python autoround.py MODEL OUT TOKENS.json --format gguf:q2_k_s --iters 200

`fake` makes OUT a Hugging Face folder whose matrices hold the quantised values in 16 bits; a GGUF format makes it a
file. TOKENS.json is a list of token sequences of one length, drawn from the text as our own methods draw theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

SCHEME = {"bits": 2, "group_size": 64, "sym": False, "data_type": "int", "act_bits": 16}
BATCH = 8


def main() -> None:
    """Quantise one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--format", required=True)
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--llama-cpp", type=Path, help="whose converter and gguf package write GGUF files")
    options = parser.parse_args()
    if options.llama_cpp:
        # its own copy of the converter asks for names that no gguf package on PyPI has yet
        os.environ["LLAMA_CPP_ROOT"] = str(options.llama_cpp)
        sys.path.insert(0, str(options.llama_cpp / "gguf-py"))
    from auto_round import AutoRound

    if options.threads:
        torch.set_num_threads(options.threads)
    tokens = torch.tensor(json.loads(options.tokens.read_text()), dtype=torch.int64)
    batches = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens.split(BATCH)]
    quantiser = AutoRound(
        str(options.model),
        scheme=options.format if options.format.startswith("gguf") else SCHEME,
        dataset=batches,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=BATCH,
        iters=options.iters,
        device_map="cpu",
        seed=0,
    )
    # it chooses a name of its own inside the folder that it is given
    with tempfile.TemporaryDirectory(dir=options.out.parent) as name:
        quantiser.quantize_and_save(name, format=options.format)
        pattern = "*.gguf" if options.format.startswith("gguf") else "config.json"
        (made,) = Path(name).rglob(pattern)
        (made if made.suffix == ".gguf" else made.parent).replace(options.out)


if __name__ == "__main__":
    main()
