# needs: extras=demo,build runtime=cpu
"""Compare perplexities of stock types in the pinned llama.cpp with and without our patches.

Both programs are built with the same options, so every digit they print is compared.

The unpatched llama-perplexity is built once, into the cache.

    scripts/run check stock --text FILE                    the demo model rounded to each type, padded where need be
    scripts/run check stock --text FILE a.gguf b.gguf      files of your own
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.quality.pad_gemma import pad

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.runtime import cache, find_runtime, pin, toolchain
from tesseraq_gguf.runtime.source import fetch_sdist
from tesseraq_gguf.types.facts import names, tensor_type

TYPES = names(lambda t: t.family and not t.custom)
TOOL = "llama-perplexity"
_ATTEMPTS = 3
"""Runs until one says its last line: now and then it ends well and keeps that to itself."""

DEMO_WIDTH = 640
"""Weights in most rows of the demo model, of which the longer ones have multiples."""


def main() -> int:
    """Print one line per file; 1 if any differs."""
    parser = argparse.ArgumentParser(prog="scripts/run check stock", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        help=f"GGUF files; none rounds the demo model to {', '.join(TYPES)}",
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--types", default="", help="of those that are rounded to, these alone: q4_k,iq2_s")
    options = parser.parse_args()
    ours, theirs = find_runtime().tool(TOOL), unpatched()
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for file in options.files or rounded(Path(folder), options.types.split(",") if options.types else TYPES):
            patched, stock = (measured(tool, file, options.text, options.chunks) for tool in (ours, theirs))
            same &= patched == stock
            verdict = "same" if patched == stock else "DIFFERENT"
            print(f"{file.name:<24} patched {patched:>12}   unpatched {stock:>12}   {verdict}")
    return not same


def rounded(folder: Path, types: Sequence[str]) -> Iterator[Path]:
    """Make one file after the other, and remove it when it has been used."""
    plain, padded = folder / "f16.gguf", folder / "padded.gguf"
    convert(Recipe("demo", plain, type="f16"))
    pad(plain, padded)
    for name in types:
        out = folder / f"{name}.gguf"
        model = plain if tensor_type(name).fits(DEMO_WIDTH) else padded
        convert(Recipe(str(model), out, type=name, method="rtn"))
        yield out
        out.unlink()


def measured(tool: Path, file: Path, text: Path, chunks: int) -> str:
    """Return the perplexity as the tool prints it."""
    command = [str(tool), "-m", str(file), "-f", str(text), "-c", "512", "-b", "512", "--chunks", str(chunks)]
    for _ in range(_ATTEMPTS):
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        found = re.search(r"Final estimate: PPL = ([\d.]+)", result.stdout + result.stderr)
        if found or result.returncode:
            break
    if not found:
        sys.exit(f"{tool} failed on {file} with exit code {result.returncode}:\n{result.stderr[-2000:]}")
    return found[1]


def unpatched() -> Path:
    """Build the pinned llama.cpp as its authors published it, with the options of our runtime, once."""
    home = cache.cache_dir() / f"{pin.VERSION}-unpatched"
    tool = home / "build" / "bin" / TOOL
    if tool.is_file():
        return tool
    home.mkdir(parents=True, exist_ok=True)
    whole = home / "unpacked"
    if not whole.is_file():
        with tarfile.open(fetch_sdist()) as archive:
            archive.extractall(home, filter="data")
        whole.touch()
    source = next(home.glob("*/vendor/llama.cpp"))
    programs = toolchain.find_toolchain()
    options = find_runtime().manifest["cmake_options"]
    configure = [programs.cmake, "-S", str(source), "-B", str(home / "build"), "-G", "Ninja", *options]
    # it runs where it was built: its libraries are found there
    configure += [f"-DCMAKE_MAKE_PROGRAM={programs.ninja}", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=OFF"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([programs.ninja, "-C", str(home / "build"), TOOL], check=True)
    return tool


if __name__ == "__main__":
    sys.exit(main())
