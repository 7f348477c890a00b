# needs: extras=test runtime=cpu
"""Measure dot products and whole models on this machine's runtime, ours and stock types in turns.

Writes docs/results/speed.md, and wants a machine without other work.

    scripts/run bench kernels              kernels, and models in whole (some minutes)
    scripts/run bench kernels --kernels    kernels only
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.markers import write_part
from bench.quality.results import program
from tesseraq_gguf.runtime import Runtime, SourceTree, ensure_source, find_runtime
from tesseraq_gguf.runtime.locate import read_runtime
from tesseraq_gguf.runtime.toolchain import X86_INSTRUCTION_SETS, find_toolchain
from tesseraq_gguf.types.facts import ORDERED_TYPES, names

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TYPES = (*names(lambda t: t.custom), "tq2_0", "q2_K", "q3_K", "q4_0", "q2_0", "iq1_s", "iq1_m")
"""Types of whole models, as ggml writes them."""

WIDTH, INNER, HEADS, VOCABULARY, LAYERS = 4096, 11008, 32, 32000, 4
"""A Llama of 7 billion weights, with four of its layers."""

PROMPT, GENERATE = 512, 64

QUIET = 0.05
"""Share of the processors' time that other programs may take on a machine that counts as quiet."""

IN_CACHE = (
    ("TSQ2 row by row", "tsq2", "tq2_0", "TQ2_0", 1.0),
    ("TSQ2 row by row", "tsq2", "q2_K", "Q2_K", 1.4),
    ("TSQ2 repacked", "tsq2_x1", "tq2_0", "TQ2_0", 1.8),
    ("TSQ3 row by row", "tsq3", "q3_K", "Q3_K", 1.3),
    ("TSQ3 repacked", "tsq3_x1", "q3_K", "Q3_K", 1.3),
    ("TSQ4 row by row", "tsq4", "q4_0", "Q4_0", 1.2),
    ("TSQ4 repacked", "tsq4_x1", "q4_0", "Q4_0", 1.2),
    ("BCQ2 row by row", "bcq2", "q2_K", "Q2_K", 1.0),
    ("BCQ2 repacked", "bcq2_x1", "q2_K", "Q2_K", 1.4),
    ("BCQ4 row by row", "bcq4", "q4_0", "Q4_0", 1.0),
    ("BCQ4 repacked", "bcq4_x1", "q4_0", "Q4_0", 1.0),
    ("PTQ1_61 row by row", "ptq1_61", "iq1_m", "IQ1_M", 1.5),
    ("PTQ1_61 repacked", "ptq1_61_x1", "iq1_m", "IQ1_M", 1.5),
    ("Q2_0", "q2_0", "q2_0_stock", "Q2_0 without SIMD", 10.0),
)
"""What is compared with what, and how many times as fast it should be."""

DECODING = (
    ("tsq2", "tq2_0", 1.25),
    ("tsq2", "q2_K", 3.0),
    ("tsq3", "q3_K", 2.2),
    ("tsq4", "q4_0", 1.5),
    ("bcq4", "q4_0", 0.95),
    ("ptq1_61", "tsq2", 1.15),
    ("ptq1_61", "iq1_m", 1.5),
    ("ptq1_61", "iq1_s", 1.5),
)
PROMPTS = (
    ("tsq2", "q4_0", 2.0),
    ("tsq3", "q4_0", 2.0),
    ("tsq4", "q4_0", 2.0),
    ("bcq4", "q4_0", 0.8),
    ("bcq4_a4", "q4_0", 0.8),
    ("ptq1_61", "q4_0", 1.0),
)


def compile_kernels(runtime: Runtime, source: SourceTree, program: Path) -> None:
    """Compile kernels.cpp with the instructions that the runtime was built with."""
    sets = runtime.manifest["instruction_sets"] or []
    flags = [flag for each in X86_INSTRUCTION_SETS if each.name in sets for flag in each.compiler_flags]
    src = source.llama_cpp / "ggml" / "src"
    libraries = [str(runtime.library(name)) for name in ("ggml", "ggml-cpu", "ggml-base")]
    compiler = (find_toolchain().cxx or "c++").split()
    options = ["-std=c++17", "-O3", *flags, f"-I{src.parent / 'include'}", f"-I{src}"]
    link = [*libraries, f"-Wl,-rpath,{runtime.lib}", "-lpthread", "-o", str(program)]
    subprocess.run([*compiler, *options, str(HERE / "kernels.cpp"), *link], check=True)


def measure_kernels(program: Path, threads: int) -> dict[str, float]:
    """Weights per second by kernel; `read` in bytes per second, `peak` in products per second."""
    output = subprocess.run([str(program), str(threads)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name: float(rate) for name, rate in (line.split() for line in output.splitlines())}


def quantize_rows(ggml: ctypes.CDLL, type_id: int, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """uint8 [rows, bytes]: 64 rows of random weights in a type, over and over; speed does not depend on the weights."""
    x = (np.random.default_rng(columns).standard_normal((64, columns)) * 0.02).astype(np.float32)
    row_bytes = ggml.ggml_row_size(type_id, ctypes.c_int64(columns))
    out = np.empty((64, row_bytes), np.uint8)
    pointers = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    sizes = (ctypes.c_int64(0), ctypes.c_int64(64), ctypes.c_int64(columns))
    importance = np.ones(columns, np.float32)
    ggml.ggml_quantize_chunk(type_id, *pointers, *sizes, ctypes.c_void_p(importance.ctypes.data))
    return np.tile(out, (-(-rows // 64), 1))[:rows]


def write_model(gguf: Any, ggml: ctypes.CDLL, path: Path, type: str, layers: int) -> tuple[int, int]:
    """Write a model in one type. Returns the weights that a token meets, and their bytes."""
    kind = gguf.GGMLQuantizationType[type.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    weights = size = 0
    shapes = {f"attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    tensors = {f"blk.{i}.{n}.weight": shape for i in range(layers) for n, shape in shapes.items()}
    tensors["output.weight"] = (VOCABULARY, WIDTH)
    made: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    for tensor, shape in tensors.items():
        if shape not in made:
            made[shape] = quantize_rows(ggml, kind, *shape)
        writer.add_tensor(tensor, made[shape], raw_dtype=kind)
        weights += shape[0] * shape[1]
        size += made[shape].nbytes
    # the orders that PTQ1_61 needs at run time: the others are folded into the matrices before
    orders = ("attn_q", "ffn_gate") if type in ORDERED_TYPES else ()
    for tensor in (f"blk.{i}.{n}.order" for i in range(layers) for n in orders):
        writer.add_tensor(tensor, np.random.default_rng(0).permutation(WIDTH).astype(np.int32))
        size += 4 * WIDTH
    embedding = quantize_rows(ggml, gguf.GGMLQuantizationType.Q8_0, VOCABULARY, WIDTH)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    norms = [f"blk.{i}.{n}_norm.weight" for i in range(layers) for n in ("attn", "ffn")]
    for tensor in (*norms, "output_norm.weight"):
        writer.add_tensor(tensor, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights, size


def bench_model(runtime: Runtime, model: Path, threads: int, prompt: int, generate: int) -> tuple[float, float]:
    """Tokens per second of a prompt and of decoding, one repetition of llama-bench."""
    command = [str(runtime.tool("llama-bench")), "-m", str(model), "-p", str(prompt), "-n", str(generate)]
    command += ["-t", str(threads), "-r", "1", "-o", "json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    rates = {bool(test["n_prompt"]): float(test["avg_ts"]) for test in json.loads(output)}
    return rates[True], rates[False]


def measure_models(
    runtime: Runtime, source: SourceTree, options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, float]]:
    """Best of all rounds by type; in a round every model has one turn."""
    sys.path.insert(0, str(source.gguf_py))
    import gguf

    ggml = ctypes.CDLL(str(runtime.library("ggml-base")))
    ggml.ggml_row_size.restype = ctypes.c_size_t
    found: dict[str, dict[str, float]] = {}
    for name in options.types:
        weights, size = write_model(gguf, ggml, folder / f"{name}.gguf", name, options.layers)
        found[name] = {"weights": weights, "bytes": size, "prompt": 0.0, "decoding": 0.0}
    for turn in range(options.rounds):
        for name, best in found.items():
            prompt, decoding = bench_model(
                runtime, folder / f"{name}.gguf", options.threads, options.prompt, options.generate
            )
            best["prompt"], best["decoding"] = max(best["prompt"], prompt), max(best["decoding"], decoding)
            print(f"round {turn + 1}: {name:6} prompt {prompt:8.2f} decoding {decoding:8.2f}", flush=True)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def ratios(rows: Sequence[tuple[str, str, float, float]]) -> list[str]:
    """A table of what was compared: name, with what, ratio, and the ratio that it should have."""
    return table(
        ("", "against", "times as fast", "goal", ""),
        [(a, b, f"{x:.2f}", f"{goal:g}", "met" if x >= goal else "missed") for a, b, x, goal in rows],
    )


def restricted(variant: str, folder: Path) -> Runtime:
    """A copy of the portable runtime that has one variant of the CPU backend, so that ggml cannot choose another."""
    copy = folder / "runtime"
    shutil.copytree(find_runtime(portable=True).root, copy, symlinks=True)
    kept = f"libggml-cpu-{variant}.so"
    if not (copy / "lib" / kept).is_file():
        raise SystemExit(f"error: the portable runtime has no variant {variant}")
    for library in (copy / "lib").glob("libggml-cpu-*"):
        if library.name != kept:
            library.unlink()
    runtime = read_runtime(copy)
    assert runtime
    return runtime


def model_table(models: Mapping[str, Mapping[str, float]], read: float, peak: float) -> list[str]:
    """Rates of models, and their shares of what is read and multiplied at most; `peak` 0 leaves the latter out."""
    return table(
        ("type", "prompt, tokens/s", "of the int8 peak", "decoding, tokens/s", "of the bandwidth"),
        [
            (
                name,
                f"{m['prompt']:.1f}",
                f"{m['prompt'] * m['weights'] / peak:.0%}" if peak else "",
                f"{m['decoding']:.1f}",
                f"{m['decoding'] * m['bytes'] / read:.0%}",
            )
            for name, m in models.items()
        ],
    )


def report(
    kernels: Mapping[str, float],
    models: Mapping[str, Mapping[str, float]],
    other: Mapping[str, Mapping[str, float]],
    options: argparse.Namespace,
    machine: Sequence[str],
) -> str:
    """The part of docs/results/speed.md that is measured."""
    command = " ".join(
        [
            "scripts/run bench kernels",
            *(["--kernels"] if not models else []),
            *([f"--variant {options.variant}"] if other else []),
        ]
    )
    lines = [f"Written by `{command}`.", "", *machine, ""]
    lines += ["## Kernels", ""]
    lines += [
        "One thread, rows of 4096 weights, everything in cache. All kernels in turns, the best of 300",
        "turns of each. Repacked kernels take 16 rows at a time (8 without AVX-512) and some columns of",
        "activations, others one each.",
        "",
    ]
    encoders = [name for name in kernels if name.startswith("activations")]
    names = [name for name in kernels if name not in ("read", "peak", "gather", *encoders)]
    shares = {name: f"{kernels[name] / kernels['peak']:.0%}" if kernels["peak"] else "" for name in names}
    lines += table(
        ("kernel", "10⁹ weights × columns / s", "of the int8 peak"),
        [
            (
                name.replace("_x", ", repacked, columns: ").replace("_stock", " without SIMD"),
                f"{kernels[name] / 1e9:.1f}",
                shares[name],
            )
            for name in names
        ],
    )
    compared = [(n, b, kernels[x] / kernels[y], goal) for n, x, y, b, goal in IN_CACHE if x in kernels]
    lines += ratios(compared)
    if encoders:
        lines += [
            "### Rounding activations",
            "",
            "BCQ4 takes activations in 8 bits, BCQ4_A4 in codewords. The share is of the time of a product",
            f"with {WIDTH} rows of BCQ4.",
            "",
        ]
        products = {columns: kernels.get(f"bcq4_x{w}") for columns, w in ((1, 1), (PROMPT, 12))}
        lines += table(
            ("", "10⁹ numbers / s", *(f"share, columns: {columns}" for columns in products)),
            [
                (
                    name.removeprefix("activations_").replace("_", " "),
                    f"{kernels[name] / 1e9:.2f}",
                    *(f"{rate / (WIDTH * kernels[name]):.2%}" if rate else "" for rate in products.values()),
                )
                for name in encoders
            ],
        )
    if "gather" in kernels:
        times = {
            columns: f"{kernels[f'ptq1_61_x{w}'] / (WIDTH * kernels['gather']):.2%}"
            for columns, w in ((1, 1), (PROMPT, 4), (PROMPT, 12))
            if f"ptq1_61_x{w}" in kernels
        }
        found = " and ".join(f"{share} (columns: {columns})" for columns, share in times.items())
        lines += [
            "### Ordering activations",
            "",
            "Activations are brought into the order of a PTQ1_61 matrix's columns once for all matrices that",
            f"share them, at {kernels['gather'] / 1e9:.1f}·10⁹ numbers a second. Of the time of a product with one of "
            f"{WIDTH} rows",
            f"this is {found}.",
            "",
        ]
    if models:
        read, peak = kernels["read"], kernels["peak"] * options.threads
        lines += ["## Models", ""]
        lines += [
            f"A Llama of the shape of 7B with {options.layers} layers, {options.threads} threads, "
            f"pp{options.prompt} and tg{options.generate} of llama-bench.",
            f"All models in turns, the best of {options.rounds} rounds. Plain reads reach {read / 1e9:.1f} GB/s, and "
            f"{options.threads} cores",
            f"{peak / 1e9:.0f}·10⁹ products of int8 a second.",
            "",
        ]
        lines += model_table(models, read, peak)
        for title, what, pairs in (("Decoding", "decoding", DECODING), ("Prompts", "prompt", PROMPTS)):
            known = [(a, b, models[a][what] / models[b][what], goal) for a, b, goal in pairs if {a, b} <= models.keys()]
            lines += [f"### {title}, against others", "", *ratios(known)]
    if other:
        lines += [f"## The same models, with the instructions of `{options.variant}`", ""]
        lines += ["A copy of the portable runtime with this one variant of the CPU backend.", ""]
        lines += model_table(other, kernels["read"], 0.0)
    return "\n".join(lines).rstrip() + "\n"


def describe(runtime: Runtime, busy: float) -> list[str]:
    """The machine, and whether it was quiet."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    sets = ", ".join(runtime.manifest["instruction_sets"] or ["chosen by ggml"])
    lines = [
        f"{datetime.date.today()}, {names[0] if names else 'unknown processor'}, {os.cpu_count()} cores. "
        f"Program: {program(ROOT)}.",
        textwrap.fill(f"Instructions: {sets}.", 100),
    ]
    if busy > QUIET:
        lines += [
            "",
            f"**The machine was not quiet** ({busy:.0%} of its processors' time went elsewhere before the start).",
            "Ratios of kernels hold, since all take turns and the best turn counts. Absolute rates and whole",
            "models are lower bounds at best.",
        ]
    return lines


def busy_share(seconds: float = 3.0) -> float:
    """Share of the processors' time that other programs take; on Linux over some seconds, elsewhere from the load."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))

    def idle_and_all() -> tuple[int, int]:
        ticks = [int(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    idle, total = idle_and_all()
    time.sleep(seconds)
    idle_later, total_later = idle_and_all()
    return 1 - (idle_later - idle) / max(1, total_later - total)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="scripts/run bench kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernels", action="store_true", help="kernels only, no models")
    parser.add_argument(
        "--variant", metavar="NAME", help="also the models with one variant of the portable runtime, such as haswell"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every model")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), metavar="TYPE")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--generate", type=int, default=GENERATE, help="tokens to decode")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/speed.md")
    options = parser.parse_args()

    busy = busy_share()
    # threads that spin at barriers are slow beside other work, and threads that sleep there are slow without
    os.environ["OMP_WAIT_POLICY"] = "passive" if busy > QUIET else "active"
    runtime, source = find_runtime(), ensure_source()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        older = restricted(options.variant, folder) if options.variant else None
        compile_kernels(runtime, source, folder / "kernels")
        kernels = measure_kernels(folder / "kernels", options.threads)
        models = {} if options.kernels else measure_models(runtime, source, options, folder)
        other = {}
        if older:
            (folder / "other").mkdir()
            other = measure_models(older, source, options, folder / "other")
    text = report(kernels, models, other, options, describe(runtime, busy))
    print(text)
    write_part(options.out, text)


if __name__ == "__main__":
    main()
