# needs: extras=test runtime=cuda
"""Test and measure our kernels and the learner on an NVIDIA GPU, for docs/results/speed-gpu.md.

Models for rates are those of `bench/kernels.py`, a Llama of 7 billion random weights; files for perplexity are the demo
model, rounded. What was measured goes into docs/results/speed-gpu.md.

Half an hour and more, most of it nvcc; wants a GPU without other work.

    scripts/run check gpu                 everything
    scripts/run check gpu --no-learner    kernels only
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernels import table, write_model
from bench.markers import write_part
from bench.quality.results import program

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.runtime import Runtime, ensure_source, find_runtime
from tesseraq_gguf.runtime.cuda import Gpu, find_gpus
from tesseraq_gguf.types.facts import names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from tiny_llama import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]

OURS = names(lambda t: t.custom)
_OURS = "|".join(OURS)

FILES: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"type": kind} for kind in OURS},
    "bcq4, own codebooks": {"type": "bcq4", "codebooks": "model"},
}
"""Files whose perplexity is measured, and what `Recipe` has to know of them."""

TYPES = (*OURS, "q2_K", "iq2_xxs", "q4_0", "iq4_nl")
"""Types whose rates are compared."""

LAYERS = 32
BANDWIDTH = {"H100 80GB HBM3": 3352, "H100 PCIe": 2039, "H200": 4800, "A100-SXM4-80GB": 2039, "RTX 4090": 1008}
"""GB/s by a part of a GPU's name, from data sheets."""

OPERATORS = {
    "MUL_MAT": rf"type_a=({_OURS}),type_b=f32",
    "MUL_MAT_ID": rf"type_a=({_OURS}),type_b=f32",
    "GET_COLS": r"ne=",
    "GET_ROWS": rf"type=({_OURS}),",
}
"""What test-backend-ops is asked for, by operator; it compares the GPU with the CPU."""

NOISE = 0.005
"""Relative difference of perplexities that rounding activations differently may make."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second of a prompt of 512 and of 128 tokens decoded, and the bytes of weights that a token reads."""

    prompt: float
    decoding: float
    bytes: int


def main() -> int:
    """Test, measure, write; 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="scripts/run check gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-learner", action="store_true", help="leave the learner out")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model whose rates are measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/speed-gpu.md")
    options = parser.parse_args()
    gpus = find_gpus()
    if not gpus:
        sys.exit("error: no NVIDIA GPU here")
    runtime = find_runtime("cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failures = [line for operator, cases in OPERATORS.items() if (line := check_operator(runtime, operator, cases))]
        perplexities = {name: measure_perplexities(runtime, name, folder) for name in FILES}
        failures += [
            f"perplexity of {name}: {gpu} on the GPU, {cpu} on the CPU"
            for name, (gpu, cpu) in perplexities.items()
            if not abs(gpu - cpu) < NOISE * cpu
        ]
        rates = measure_rates(runtime, folder, options.layers)
        learner = None if options.no_learner else measure_learner(folder)
        if (
            not options.no_learner
            and subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT).returncode
        ):
            failures.append("a method does not learn on the GPU what it learns on the processor")
    text = "\n".join(report(gpus[0], runtime, perplexities, rates, learner))
    print(text)
    write_part(options.out, text)
    print(f"{len(failures)} failures" + "".join(f"\n  {line}" for line in failures))
    return bool(failures)


def check_operator(runtime: Runtime, operator: str, cases: str) -> str | None:
    """Run upstream's tests of an operator on the GPU; what went wrong, if anything did."""
    command = [str(runtime.tool("test-backend-ops")), "test", "-b", "CUDA0", "-o", operator, "-p", cases]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = result.stdout + result.stderr
    passed = re.search(r"(\d+)/(\d+) tests passed", said)
    print(f"{operator}: {passed[0] if passed else said[-300:]}", flush=True)
    whole = passed and passed[1] == passed[2] and int(passed[1]) > 0
    refused = said.count("not supported [CUDA0]")
    if result.returncode or not whole or refused:
        return f"{operator}: exit code {result.returncode}, {passed and passed[0]}, {refused} not supported"
    return None


def measure_perplexities(runtime: Runtime, name: str, folder: Path) -> tuple[float, float]:
    """Perplexity of the demo model, rounded to one of `FILES`, on the GPU and on the CPU alone."""
    model, text = folder / "demo.gguf", folder / "text.txt"
    model.unlink(missing_ok=True)
    convert(Recipe("demo", model, method="rtn", **FILES[name]))
    if not text.exists():
        with text.open("w") as out:
            subprocess.run([sys.executable, str(ROOT / "scripts" / "demo_text.py")], stdout=out, check=True)
    found = []
    for where in (["-ngl", "99"], ["--device", "none"]):
        command = [str(runtime.tool("llama-perplexity")), "-m", str(model), "-f", str(text), "-c", "512", *where]
        result = subprocess.run([*command, "--chunks", "10"], capture_output=True, text=True, errors="replace")
        value = re.search(r"Final estimate: PPL = ([\d.]+)", result.stdout + result.stderr)
        found.append(float(value[1]) if value else float("inf"))
    print(f"perplexity of {name}: GPU {found[0]}, CPU {found[1]}", flush=True)
    return found[0], found[1]


def measure_rates(runtime: Runtime, folder: Path, layers: int) -> dict[str, Rates]:
    """Rates of a model of 7 billion weights by type, all layers on the GPU."""
    sys.path.insert(0, str(ensure_source().gguf_py))
    import gguf

    ggml = ctypes.CDLL(str(runtime.library("ggml-base")))
    ggml.ggml_row_size.restype = ctypes.c_size_t
    found = {}
    for name in TYPES:
        model = folder / f"{name}.gguf"
        _, size = write_model(gguf, ggml, model, name, layers)
        found[name] = Rates(*bench(runtime, model), size)
        model.unlink()
        print(f"{name}: prompt {found[name].prompt:.0f}, decoding {found[name].decoding:.1f} tokens/s", flush=True)
    return found


def bench(runtime: Runtime, model: Path) -> tuple[float, float]:
    """Tokens per second of pp512 and tg128 in llama-bench."""
    command = [str(runtime.tool("llama-bench")), "-m", str(model), "-p", "512", "-n", "128", "-ngl", "99", "-o", "json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    rates = {bool(test["n_prompt"]): float(test["avg_ts"]) for test in json.loads(output)}
    return rates[True], rates[False]


def measure_learner(folder: Path) -> tuple[float, int]:
    """Seconds for one more block of a 7B model with preset `balanced`, and the most bytes of the GPU in use."""
    import torch

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    seconds = []
    for blocks in (1, 2):
        model = make_tiny_model(folder / f"learner-{blocks}", None, **shape, num_hidden_layers=blocks)
        torch.cuda.reset_peak_memory_stats()
        report = convert(Recipe(str(model), folder / f"learned-{blocks}.gguf", preset="balanced", device="cuda"))
        seconds.append(report.seconds)
    return seconds[1] - seconds[0], torch.cuda.max_memory_allocated()


def report(
    gpu: Gpu,
    runtime: Runtime,
    perplexities: Mapping[str, tuple[float, float]],
    rates: Mapping[str, Rates],
    learner: tuple[float, int] | None,
) -> Sequence[str]:
    """The lines of the part of docs/results/speed-gpu.md that is measured."""
    bandwidth = next((value for part, value in BANDWIDTH.items() if part in gpu.name), None)

    def share(one: Rates) -> str:
        return f"{one.decoding * one.bytes / (bandwidth * 1e9):.0%}" if bandwidth else "unknown"

    built: Mapping[str, Any] = runtime.manifest
    lines = [
        f"{datetime.date.today()}, {gpu.name}; CUDA {built['cuda']}, for {', '.join(built['cuda_architectures'])}. "
        f"Program: {program(ROOT)}.",
        "`scripts/run check gpu`: a Llama of 7B weights, all of it on the GPU, as llama-bench measures it.",
        "",
        *table(
            ("type", "pp512, tokens/s", "tg128, tokens/s", "of the memory's bandwidth"),
            [(name, f"{one.prompt:.0f}", f"{one.decoding:.1f}", share(one)) for name, one in rates.items()],
        ),
    ]
    tsq2, q2_k = rates["tsq2"], rates["q2_K"]
    decoding, prompt = tsq2.decoding / q2_k.decoding, tsq2.prompt / q2_k.prompt
    lines += [
        f"TSQ2 against Q2_K: {decoding:.2f} times in decoding (goal 1.1), {prompt:.2f} times in prompts (goal 1).",
        "",
    ]
    lines += table(
        ("perplexity of the demo model, rounded", "GPU", "CPU"),
        [(name, f"{on_gpu:.4f}", f"{on_cpu:.4f}") for name, (on_gpu, on_cpu) in perplexities.items()],
    )
    if learner:
        seconds, peak = learner
        lines.append(
            f"The learner: {seconds:.0f} s for a block of 7B shape (`balanced`), at most {peak / 2**30:.1f} GiB."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
