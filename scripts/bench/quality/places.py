"""What several rows share, each made when a row first asks for it and kept in the work folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.quality.pad_gemma import pad
from bench.quality.rows import RANKS
from tesseraq_gguf.learning.calibration import load_calibration
from tesseraq_gguf.models import resolve_model
from tesseraq_gguf.models.whole import whole_model
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.runtime.source import ensure_source

AUTOROUND_VERSION = "0.16.1"

_STRETCH = 2000
_PARTS = 5


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes:
        work: the folder for results and shared files.
        model: the model, as `tesseraq-gguf convert` takes it.
        embedding: type of the embedding in the file that divergence is measured from.
        calibration: the text that everything is calibrated on.
        text: the text that everything is measured on.
        ctx: tokens of a chunk.
        chunks: how many chunks are measured.
        imatrix_chunks: how many chunks of 512 tokens of the calibration text llama-imatrix reads; 0 is all.
        preset: of our own rows.
        samples: sequences that AutoRound learns on.
        seqlen: tokens of each.
        iters: AutoRound's steps per block.
        threads: of llama.cpp's tools and AutoRound.
        torch: the torch that AutoRound's environment gets.
    """

    work: Path
    model: str
    embedding: str
    calibration: Path
    text: Path
    ctx: int
    chunks: int
    imatrix_chunks: int
    preset: str
    samples: int
    seqlen: int
    iters: int
    threads: int
    torch: str


class Places(Mapping[str, object]):
    """The names that commands have in braces. Asking for one makes what it stands for."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options = options
        self.say = say
        self._makers: dict[str, Callable[[], object]] = {
            "cli": lambda: Path(sys.executable).with_name("tesseraq-gguf"),
            "quantize": lambda: self._tool("llama-quantize"),
            "autoround": self._autoround,
            "autoround_script": lambda: Path(__file__).with_name("autoround.py"),
            "calibration": lambda: options.calibration,
            "learned_text": lambda: self._part(kept=False),
            "kept_text": lambda: self._part(kept=True),
            "mixed_text": self._mixed,
            "more_mixed_text": lambda: self._mixed(seeds=3),
            **{f"width_{n}th": partial(self._width, n) for n in RANKS},
            "preset": lambda: options.preset,
            "iters": lambda: options.iters,
            "threads": lambda: options.threads,
            "tokens": self._tokens,
            "llama_cpp": lambda: ensure_source().llama_cpp,
            "plain_model": lambda: options.model,
            "plain_f16": lambda: self._made("plain-f16.gguf", lambda out: self._convert(out, "f16")),
            "plain_reference": lambda: self._made(
                "plain-reference.gguf", lambda out: self._convert(out, options.embedding)
            ),
            "plain_imatrix": lambda: self._imatrix("plain"),
            "plain_folder": lambda: self._folder("plain", options.model),
            "padded_f16": lambda: self._padded("f16"),
            "padded_reference": lambda: self._padded("reference"),
            "padded_imatrix": lambda: self._imatrix("padded"),
            "padded_imatrix_mixed": lambda: self._imatrix("padded", mixed=True),
            "padded_folder": lambda: self._folder("padded", str(self["padded_f16"])),
        }
        self._known: dict[str, object] = {}
        # one build for all rows, whatever becomes of the sources meanwhile
        self.runtime = find_runtime()

    def __getitem__(self, name: str) -> object:
        if name not in self._known:
            self._known[name] = self._makers[name]()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def _tool(self, name: str) -> Path:
        return self.runtime.tool(name)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        file = self.options.work / name
        if not file.exists():
            self.say(f"making {name}")
            with temporary_sibling(file) as partial:
                make(partial)
        return file

    def _convert(self, out: Path, embedding: str) -> None:
        options = ["--type", "f16", "--embedding-type", embedding]
        run([str(self["cli"]), "convert", self.options.model, str(out), *options])

    def _padded(self, kind: str) -> Path:
        source = self[f"plain_{kind}"]
        assert isinstance(source, Path)

        def make(out: Path) -> None:
            pad(source, out)

        return self._made(f"padded-{kind}.gguf", make)

    def _imatrix(self, kind: str, mixed: bool = False) -> Path:
        options = self.options
        chunks = 0 if mixed else options.imatrix_chunks
        command = [str(self._tool("llama-imatrix")), "-m", str(self[f"{kind}_reference"])]
        command += ["-f", str(self["mixed_text"] if mixed else options.calibration)]
        command += ["-c", "512", "-b", "512", "-t", str(options.threads), "--no-ppl"]
        command += ["--chunks", str(chunks)] if chunks else []
        name = f"{kind}-imatrix-{'mixed' if mixed else chunks or 'all'}.gguf"
        return self._made(name, lambda out: run([*command, "-o", str(out)]))

    def _mixed(self, seeds: int = 1) -> Path:
        """The calibration text, and more that the model wrote itself: 131,072 tokens for each seed."""

        def own(seed: int) -> Path:
            command = [str(self["cli"]), "write-text", self.options.model, "--seed", str(seed)]
            return self._made(f"own-{seed}.txt" if seed else "own.txt", lambda out: run([*command, str(out)]))

        files = [self.options.calibration, *(own(seed) for seed in range(seeds))]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:8]
        return self._made(f"mixed-{digest}.txt", lambda out: out.write_text("\n".join(texts), encoding="utf-8"))

    def _part(self, kept: bool) -> Path:
        text = self.options.calibration.read_text(encoding="utf-8", errors="replace")

        def make(out: Path) -> None:
            out.write_text(parted(text)[kept], encoding="utf-8")

        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return self._made(f"{'kept' if kept else 'learned'}-{digest}.txt", make)

    def _folder(self, name: str, model: str) -> Path:
        """A Hugging Face folder of a model with its weights, for programs that take nothing else."""
        source = resolve_model(model, self.say)
        if not source.gguf:
            return source.folder

        def make(out: Path) -> None:
            whole_model(source, torch.float16).save_pretrained(out)
            for file in source.folder.iterdir():
                if not (out / file.name).exists():
                    shutil.copyfile(file, out / file.name)

        return self._made(f"{name}-folder", make)

    def _width(self, share: int) -> int:
        """A share 1/n of the model's width."""
        config = resolve_model(self.options.model, self.say).config()
        return int(config.get("text_config", config)["hidden_size"]) // share

    def _tokens(self) -> Path:
        options = self.options

        def make(out: Path) -> None:
            source = resolve_model(options.model, self.say)
            drawn = load_calibration(source, str(options.calibration), options.samples, options.seqlen, seed=0)
            out.write_text(json.dumps(drawn.tokens.tolist()))

        return self._made(f"tokens-{options.samples}x{options.seqlen}.json", make)

    def _autoround(self) -> Path:
        """Python of AutoRound's own environment: it asks for other versions of things than we do."""
        folder = self.options.work / "autoround"
        python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        stamp = folder / "installed"
        if not stamp.is_file():
            self.say("installing AutoRound")
            run([sys.executable, "-m", "venv", "--clear", str(folder)])
            # torch first: which build of it fits is for the user to say
            for package in (self.options.torch, f"auto-round=={AUTOROUND_VERSION}"):
                run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package])
            stamp.touch()
        return python


def parted(text: str) -> tuple[str, str]:
    """Cut a text into four fifths to learn on and a fifth to keep: every fifth stretch of some 2000 characters.

    Stretches end at line ends, so both parts are of the same kinds of text.
    """
    stretches = [""]
    for line in text.splitlines(keepends=True):
        if len(stretches[-1]) >= _STRETCH:
            stretches.append("")
        stretches[-1] += line
    kept = stretches[_PARTS - 1 :: _PARTS]
    learned = [s for index, s in enumerate(stretches) if index % _PARTS != _PARTS - 1]
    return "".join(learned), "".join(kept)


def run(command: list[str], log: Path | None = None) -> int:
    """Run a program to its end; what it says goes to a log, where one can watch it.

    Returns:
        The most memory that it, or a program that it ran, had in use, in bytes; 0 where the system does not tell.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    with log.open("a+b") if log else tempfile.TemporaryFile() as said:
        said.write(f"$ {' '.join(command)}\n".encode())
        said.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        try:
            code, peak = _end_of(process)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code:
            said.seek(0)
            tail = "\n".join(said.read().decode("utf-8", "replace").splitlines()[-12:])
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{tail}")
        return peak


def _end_of(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a program; return its exit code and the most memory it had in use, in bytes."""
    if not hasattr(os, "wait4"):
        return process.wait(), 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def remove(path: Path) -> None:
    """Remove a file or a folder, whichever is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
