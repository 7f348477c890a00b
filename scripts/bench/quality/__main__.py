# needs: extras=demo,build,plot runtime=cpu
"""Measure files of a small model, ours and the rivals', and write tables and plot into docs/.

Every row is a file: it is made, measured by one run of llama-perplexity against the 16-bit model's logits, and removed.
A result is kept beside the pages at once, in `results/quality.json`: the same command goes on where it was stopped, and
on another machine too. Nothing is calibrated on the text that is measured on; everything is calibrated on the
calibration text.

    scripts/run bench quality --calibration calib.txt --text wikitext2-valid.txt
    scripts/run bench quality … --rows 'llama-|autoround-'    some of the rows
    scripts/run bench quality … --report                      only write the docs
    scripts/run bench quality … --model smollm2               another model, by the size of whole files
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.markers import write_part
from bench.quality import report
from bench.quality.pages import DRAWING, Setting, pages
from bench.quality.places import AUTOROUND_VERSION, Options, Places, remove, run
from bench.quality.plot import plot
from bench.quality.results import Result, Results, figures_of, program, result_key
from bench.quality.rows import AUTOROUND, LLAMA_CPP, OURS, RANKS, ROUNDING, TYPES, Row
from bench.quality.subjects import DEMO, SUBJECTS, Subject
from bench.quality.variables import learned_at_once
from tesseraq_gguf.compute.schemes import scheme_of
from tesseraq_gguf.errors import TesseraqError
from tesseraq_gguf.evaluation.perplexity import TOOL, PerplexityRun, vocabulary_size
from tesseraq_gguf.evaluation.simulation import Simulation
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.paths import cache_folder, temporary_sibling
from tesseraq_gguf.recipe.presets import PRESETS
from tesseraq_gguf.runtime.cuda import find_gpus

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 640
"""Width of the demo model, Gemma-3-270M."""

SHOWN = {
    "cli": "tesseraq-gguf",
    "quantize": "llama-quantize",
    "autoround": "python",
    "autoround_script": "scripts/bench/quality/autoround.py",
    "llama_cpp": "llama.cpp",
    "plain_model": "demo",
    "plain_f16": "f16.gguf",
    "plain_reference": "reference.gguf",
    "plain_imatrix": "imatrix.gguf",
    "plain_folder": "demo-folder",
    "padded_f16": "padded-f16.gguf",
    "padded_reference": "padded-reference.gguf",
    "padded_imatrix": "padded-imatrix.gguf",
    "padded_folder": "padded-folder",
    "tokens": "tokens.json",
    "learned_text": "learned.txt",
    "mixed_text": "mixed.txt",
    "more_mixed_text": "more-mixed.txt",
    "padded_imatrix_mixed": "padded-imatrix-mixed.gguf",
    **{f"width_{n}th": str(WIDTH // n) for n in RANKS},
}
"""Names that commands have in the report."""


def main() -> None:
    """Make and measure what is missing, then write the report."""
    parser = _parser()
    given = parser.parse_args()
    subject = _subject(given, parser)
    options = _options(given, parser, subject)
    every = subject.all_rows()
    rows = [row for row in every if re.search(given.rows, row.name)]
    if given.list:
        print("\n".join(row.name for row in rows))
        return
    if not rows:
        parser.error(f"no row matches --rows {given.rows}; --list shows them")
    options.work.mkdir(parents=True, exist_ok=True)
    (given.docs / "results").mkdir(parents=True, exist_ok=True)
    results = Results(given.docs / "results" / subject.results)
    setting = _setting(subject, options)
    keys = {row.name: result_key(row, _decisive(row, setting, options)) for row in every}
    failed = []
    if not given.report:
        places = Places(options, _say)
        for row in rows:
            if given.again or not results.get(row, keys[row.name]):
                try:
                    results.put(row, measure(row, keys[row.name], places, keep=given.keep))
                except (TesseraqError, RuntimeError) as error:
                    _say(f"error: {row.name}: {error}")
                    failed.append(row.name)
    found = [(row, results.get(row, keys[row.name])) for row in every]
    measured = [(row, result) for row, result in found if result]
    if not measured:
        sys.exit("error: nothing is measured with these options yet")
    write_report(measured, Setting(subject, options, _today(), _shown(options)), given.docs)
    if failed:
        sys.exit(f"error: {len(failed)} rows failed: {', '.join(failed)}")


def measure(row: Row, key: str, places: Places, *, keep: bool = False) -> Result:
    """Make the file of a row and measure it.

    Raises:
        RuntimeError: a command failed, or a matrix of the blocks is not of the row's type.
    """
    options = places.options
    texts = [options.text]
    if row.study == ROUNDING:
        kept = places["kept_text"]
        assert isinstance(kept, Path)
        texts.append(kept)
    logits = [base_logits(places, text) for text in texts if row.scheme is None]
    out = options.work / f"{row.name}.gguf"
    # what rows share is made here, outside their time
    needed = _Filling(places, out)
    commands = [[word.format_map(needed) for word in command] for command in row.commands]
    log = options.work / f"{row.name}.log"
    log.unlink(missing_ok=True)
    _say(f"making {row.name}")
    with _spent(options.work / f"{row.name}.spent") as spent:
        for command in commands:
            spent[2] = max(spent[2], run(command, log))
    facts = inspect(out)
    matrices = [t for t in facts.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    types = Counter(t.type for t in matrices)
    if row.type and set(types) != {row.type}:
        raise RuntimeError(f"the matrices of its blocks should all be {row.type}, and are {dict(types)}")
    bits = facts.block_bpw
    _say(f"measuring {row.name}")
    if row.scheme is None:
        found = [_perplexity(places, out, t).compare(out, base) for t, base in zip(texts, logits, strict=True)]
    else:
        found = [_simulated(places, out, row.scheme)]
    perplexity, error, kld, top1 = found[0]
    if not keep:
        for path in options.work.glob(f"{row.name}.gguf*"):
            remove(path)
    result = Result(
        key=key,
        bits=row.bits or bits,
        types=dict(types),
        embedding=next(t.type for t in facts.tensors if t.name == "token_embd.weight"),
        perplexity=perplexity,
        perplexity_error=error,
        kld=kld,
        top1=top1,
        seconds=spent[0],
        cpu_seconds=spent[1],
        peak_bytes=round(spent[2]) or None,
        variables=learned_at_once(row, [(t.shape[1], t.shape[0]) for t in matrices if t.name.startswith("blk.0.")]),
        kept=found[1] if row.study == ROUNDING else None,
        gpu=next((gpu.name for gpu in find_gpus() if torch.cuda.is_available() and row.family == OURS), None),
        commit=program(ROOT),
        date=time.strftime("%Y-%m-%d"),
        figures=figures_of(row, {"preset": options.preset}),
        bytes=facts.bytes,
    )
    agreement = f"divergence {kld:.5f}, same token {100 * top1:.2f} %"
    _say(f"{row.name}: perplexity {perplexity:.4f}, {agreement}, {spent[0]:.0f} s")
    return result


def base_logits(places: Places, text: Path) -> Path:
    """Return the 16-bit model's log-probabilities on a text; a padded model has the same."""
    options = places.options
    file = options.work / f"base-{options.ctx}x{options.chunks}-{_digest(text)[:8]}.logits"
    if not file.is_file():
        reference = places["plain_reference"]
        assert isinstance(reference, Path)
        _say(f"computing the 16-bit model's logits on {text.name}")
        with temporary_sibling(file) as partial:
            _perplexity(places, reference, text).save_logits(reference, partial)
    return file


def write_report(measured: report.Measured, setting: Setting, docs: Path) -> None:
    """Draw, and put the tables and commands into the pages that have them, between their markers."""
    if types := [m for m in measured if m[0].study == TYPES]:
        plot(types, docs / DRAWING)
    for name, part in pages(measured, setting).items():
        write_part(docs / name, part)
        _say(f"{docs / name} is written")


def _shown(options: Options) -> dict[str, str]:
    """Readable names for what commands name."""
    return SHOWN | {
        "plain_model": options.model if options.model.startswith(DEMO) else Path(options.model).name,
        "calibration": options.calibration.name,
        "preset": options.preset,
        "iters": str(options.iters),
        "threads": str(options.threads),
    }


def _today() -> dict[str, dict[str, Any]]:
    """What presets stand for."""
    return {name: asdict(preset) for name, preset in PRESETS.items()}


def _simulated(places: Places, file: Path, scheme: str) -> tuple[float, float, float, float]:
    """Measure in torch, with activations rounded in a scheme, against the same model as the other rows."""
    options, reference = places.options, places["plain_reference"]
    assert isinstance(reference, Path)
    found = Simulation(scheme_of(scheme, None)).evaluate(file, options.text, options.ctx, options.chunks, reference)
    assert found.kld is not None and found.top1_agreement is not None
    return found.perplexity, found.perplexity_error, found.kld, found.top1_agreement


class _Filling(dict[str, object]):
    """The shared places, and the row's own file."""

    def __init__(self, places: Places, out: Path) -> None:
        super().__init__(out=out)
        self._places = places

    def __missing__(self, name: str) -> object:
        return self._places[name]


def _perplexity(places: Places, file: Path, text: Path) -> PerplexityRun:
    options = places.options
    tool = places.runtime.tool(TOOL)
    return PerplexityRun(tool, text, options.ctx, options.chunks, vocabulary_size(file), lambda *_: None)


@contextmanager
def _spent(file: Path) -> Iterator[list[float]]:
    """Give wall time, processor time, and peak memory, which the body puts there.

    What it took before it was stopped, and went on, counts.
    """
    spent = json.loads(file.read_text()) if file.is_file() else [0.0, 0.0, 0.0]
    started, used = time.monotonic(), _children_seconds()
    try:
        yield spent
    finally:
        spent[:2] = spent[0] + time.monotonic() - started, spent[1] + _children_seconds() - used
        file.write_text(json.dumps(spent))
    file.unlink(missing_ok=True)


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _setting(subject: Subject, options: Options) -> dict[str, Any]:
    return {
        "model": subject.name,
        "text": _digest(options.text),
        "calibration": _digest(options.calibration),
        "ctx": options.ctx,
        "chunks": options.chunks,
    }


def _decisive(row: Row, setting: dict[str, Any], options: Options) -> dict[str, Any]:
    """What decides the result of this row."""
    own: dict[str, dict[str, Any]] = {
        OURS: {"preset": options.preset},
        LLAMA_CPP: {"imatrix_chunks": options.imatrix_chunks},
        AUTOROUND: {name: getattr(options, name) for name in ("samples", "seqlen", "iters")}
        | {"version": AUTOROUND_VERSION},
    }
    return setting | own.get(row.family, {})


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _say(text: str) -> None:
    print(f"== {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/run bench quality", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calibration", type=Path, metavar="TEXT", help="everything is calibrated on this text")
    parser.add_argument("--text", type=Path, metavar="TEXT", help="everything is measured on this text")
    parser.add_argument(
        "--model", default=DEMO, metavar="NAME[=MODEL]",
        help=f"one of {', '.join(SUBJECTS)} (default: {DEMO}), and where it is, as `convert` takes it",
    )  # fmt: skip
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument("--list", action="store_true", help="print the rows' names and leave")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the docs from the results")
    parser.add_argument("--again", action="store_true", help="measure the chosen rows even if their results are there")
    parser.add_argument("--keep", action="store_true", help="keep the files that were made")
    parser.add_argument("--work", type=Path, help="folder for shared files (default: in the cache folder)")
    parser.add_argument(
        "--docs",
        type=Path,
        default=ROOT / "docs",
        help="folder of the pages and of results/quality.json (default: docs)",
    )
    parser.add_argument("--ctx", type=int, default=512, help="tokens of a chunk (default: 512)")
    parser.add_argument("--chunks", type=int, default=24, help="chunks to measure (default: 24)")
    parser.add_argument("--preset", default="fast", help="preset of our own rows (default: fast)")
    parser.add_argument(
        "--imatrix-chunks", type=int, metavar="N",
        help="chunks of 512 tokens for llama-imatrix, 0 for all (default: as many tokens as AutoRound gets)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, help="sequences for AutoRound (default: the preset's)")
    parser.add_argument("--seqlen", type=int, help="tokens of each (default: the preset's)")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps per block (default: 200, its own)")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=threads, help=f"of the rivals' tools (default: {threads})")
    return parser


def _subject(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Subject:
    """Return the model that is asked for; the place that the user gives for it goes before its own."""
    name, _, place = given.model.partition("=")
    if name not in SUBJECTS:
        parser.error(f"--model must be one of {', '.join(SUBJECTS)}, not {name}")
    given.model = place or SUBJECTS[name].model
    given.embedding = SUBJECTS[name].embedding
    if not given.model and not given.list:
        parser.error(f"--model {name}=FILE must say where {SUBJECTS[name].title} is")
    work = given.work or cache_folder("bench-quality")
    given.work = work if name == DEMO else work / name
    return SUBJECTS[name]


def _options(given: argparse.Namespace, parser: argparse.ArgumentParser, subject: Subject) -> Options:
    if not given.list:
        for name in ("calibration", "text"):
            file = getattr(given, name)
            if file is None or not file.is_file():
                parser.error(f"--{name} must be a text file" + (f", and there is none at {file}" if file else ""))
    names = Options.__dataclass_fields__.keys() & vars(given).keys()
    values = {name: getattr(given, name) for name in names}
    if given.preset not in PRESETS:
        parser.error(f"there is no preset {given.preset}")
    values["samples"] = given.samples or subject.samples or PRESETS[given.preset].samples
    values["seqlen"] = given.seqlen or PRESETS[given.preset].length
    if given.imatrix_chunks is None:
        values["imatrix_chunks"] = -(-values["samples"] * values["seqlen"] // 512)
    values["work"] = given.work.resolve()
    return Options(**values, torch=os.environ.get("TORCH", "torch"))


if __name__ == "__main__":
    main()
