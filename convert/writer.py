"""Write a model as GGUF: learned matrices in their types, other matrices in stock types, all else as llama.cpp has it.

The writing itself is done by a child process, see `worker`. A file appears under its name only when it is whole and
verified.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tesseraq_gguf import errors
from tesseraq_gguf.converter.graph_factors import factors_read
from tesseraq_gguf.converter.nursery import child
from tesseraq_gguf.converter.original import Original
from tesseraq_gguf.converter.plain_types import matrix_of_gguf
from tesseraq_gguf.converter.row_order import Unplaceable
from tesseraq_gguf.converter.verify import verify_types
from tesseraq_gguf.errors import ConversionError, ModelError, TesseraqError, UsageError
from tesseraq_gguf.gguf_files.factors import bytes_of_factor, factor_tensors
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, open_gguf
from tesseraq_gguf.gguf_files.parts import moved, parts_of
from tesseraq_gguf.models.pieces import Piece
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.paths import temporary_home, temporary_sibling
from tesseraq_gguf.runtime.progress import Reporter, SilentReporter
from tesseraq_gguf.runtime.source import SourceTree, ensure_source
from tesseraq_gguf.types.facts import TENSOR_TYPES, tensor_type

Metadata = Mapping[str, "str | int | float | bool"]


@dataclass(frozen=True)
class WrittenFile:
    """A finished file.

    Attributes:
        path: where it is; of a split file the first part.
        bytes: its size, all parts together.
        verified: how many of its tensors were compared with what was learned.
        notes: what the user should know: matrices that were not learned, and why.
        log: what llama.cpp's converter said.
    """

    path: Path
    bytes: int
    verified: int
    notes: tuple[str, ...]
    log: str = field(repr=False)


def check_output(out: Path, source: ModelSource | None = None, *, split: bool = False) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        out: where the file is to be written.
        source: the model, which must not be written over.
        split: whether it may become several files, which are named after it.

    Raises:
        UsageError: a folder, in a folder that is not there or cannot be written to, or a file that is not ours to
            replace.
    """
    if out.is_dir():
        raise UsageError(f"the output {out} is a folder. Name a file in it, such as {out / 'model.gguf'}")
    if not out.parent.is_dir():
        raise UsageError(f"the folder of the output {out} does not exist. Make it first: mkdir -p {out.parent}")
    for file in (out, *(parts_of(out) if split else ())):
        if os.path.lexists(file):
            _check_replaced(file, source)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"the output {out} cannot be written: {error.strerror}") from error


def _check_replaced(out: Path, source: ModelSource | None) -> None:
    if source is not None and out.exists() and any(out.samefile(part) for part in source.gguf_parts()):
        raise UsageError(f"the output {out} is the model itself. Choose another name")
    if out.exists() and not out.is_file():
        raise UsageError(f"the output {out} is not a plain file")
    try:
        with out.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"the output {out} is there and cannot be read: {error.strerror}") from error
    if start not in (b"", b"GGUF"):
        raise UsageError(f"the output {out} is there and is not a GGUF file. Choose another name or remove it")


@dataclass(frozen=True)
class Contents:
    """What a file is to hold beside what llama.cpp's converter gives it.

    Attributes:
        learned: files of `save_tensors`, one or more blocks in each.
        pieces: where learned matrices are in the weight files, by checkpoint name; others are stored as themselves.
        types: types of the file's matrices, by their names there. Those that were not learned must be plain, or be the
            type that they have in the GGUF file which the model came as.
        fallback_type: type of matrices that are neither learned nor named; f16 where it does not fit their rows. A
            model that came as a GGUF file keeps its own type for these where that is smaller.
        metadata: entries to add, such as `tesseraq.method`; ints become uint32. `tesseraq.format_version` and
            `tesseraq.runtime` are there by themselves.
        part_bytes: the most bytes of a file: a model that needs more is written in parts. None writes one file.
    """

    learned: Sequence[Path] = ()
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    fallback_type: str = "q8_0"
    metadata: Metadata = field(default_factory=dict)
    part_bytes: int | None = None


def write_gguf(
    source: ModelSource,
    out: Path,
    contents: Contents,
    progress: Reporter | None = None,
    tree: SourceTree | None = None,
) -> WrittenFile:
    """Write a learned model and verify it: every learned tensor in the file equals the learner's weights, bit for bit.

    Types are verified as well, those of all matrices that `contents.types` names.

    Args:
        source: the model the tensors were learned from.
        out: the file to write; an existing GGUF file is replaced in one step. Parts are named after it.
        contents: what was learned, and what more the file holds.
        progress: told of each thing the user should know, and of bytes written.
        tree: the patched llama.cpp, by default the pinned one.

    Raises:
        UsageError: a type or the output path cannot be meant.
        ModelError: llama.cpp does not know the architecture or the tokenizer.
        ConversionError: nothing learned can be placed, or the file cannot be written.
        VerificationError: the file does not hold what was learned.
    """
    if not contents.learned:
        raise UsageError("nothing was learned: there are no block files to write")
    return _write(source, out, contents, progress or SilentReporter(), tree)


def write_plain(
    source: ModelSource,
    out: Path,
    type: str,
    contents: Contents | None = None,
    progress: Reporter | None = None,
    tree: SourceTree | None = None,
) -> WrittenFile:
    """Write a model with nothing learned, its matrices in stock types, for reference. Otherwise as `write_gguf`.

    Args:
        source: the model.
        out: the file to write.
        type: f32, f16, bf16 or q8_0.
        contents: types of matrices that differ, and metadata.
        progress: told of each thing the user should know, and of bytes written.
        tree: the patched llama.cpp, by default the pinned one.
    """
    contents = replace(contents or Contents(), learned=(), fallback_type=type)
    return _write(source, out, contents, progress or SilentReporter(), tree)


def check_projector(source: ModelSource, type: str = "f16", tree: SourceTree | None = None) -> None:
    """Find out before any work whether a model has a projector that can be written.

    Args:
        source: the model.
        type: one of `options.PROJECTOR_TYPES`.
        tree: the patched llama.cpp, by default the pinned one.

    Raises:
        ModelError: it has none, or llama.cpp writes none for its architecture.
    """
    if source.gguf:
        raise ModelError(
            f"{source.name} is a GGUF file, which has no projector in it: give the Hugging Face folder of the model"
        )
    if not source.senses():
        raise ModelError(
            f"{source.name} is a model of text alone (config.json has no vision_config or audio_config): "
            "it has no projector"
        )
    if not any((source.folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(
            f"{source.name}: there is no preprocessor_config.json in its folder, which says how images are cut: put "
            "the original model's beside config.json"
        )
    _run({"task": "check_projector", "type": type, "out": "none.gguf"}, source, SilentReporter(), tree)


def write_projector(
    source: ModelSource, out: Path, type: str = "f16", progress: Reporter | None = None, tree: SourceTree | None = None
) -> Path:
    """Write what images and sound go through on their way to the model, as llama.cpp's converter does.

    Args:
        source: the model.
        out: the file to write; an existing GGUF file is replaced in one step.
        type: one of `options.PROJECTOR_TYPES`, of its matrices; llama.cpp wants some tensors in others.
        progress: told of bytes written.
        tree: the patched llama.cpp, by default the pinned one.

    Raises:
        UsageError: the output path cannot be meant.
        ModelError: there is none, or llama.cpp writes none for the architecture.
        ConversionError: the file cannot be written.
    """
    check_output(out, source)
    with temporary_sibling(out) as partial:
        _run({"task": "project", "type": type, "out": str(partial)}, source, progress or SilentReporter(), tree)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    return out


@dataclass(frozen=True)
class FileMatrix:
    """A matrix that the file will have.

    Attributes:
        names: checkpoint names of what it is made of: one, or the experts of a stack.
        columns: length of its rows.
        weights: its elements.
        forced: the type that llama.cpp wants it to have, whatever is asked for; None if it can be chosen.
        own: its type in the GGUF file that the model came as.
        own_bytes: its size there.
        layers: of a stack; 1 if it is none.
        factor: whether llama.cpp's graph reads a factor beside it, if its type knows one.
        own_factor: whether it has one in the GGUF file that the model came as.
    """

    names: tuple[str, ...]
    columns: int
    weights: int
    forced: str | None = None
    own: str | None = None
    own_bytes: int = 0
    layers: int = 1
    factor: bool = False
    own_factor: bool = False


@dataclass(frozen=True)
class SourceCheck:
    """What llama.cpp's converter says of a model.

    Attributes:
        dropped: matrices that cannot be written as learned, each with the reason.
        file: the matrices that the file will have, by their names there.
        groups: how many columns stay together, of matrices whose columns have another order there, by checkpoint name.
        columns: for each column there that of the matrix, of the same matrices.
        rest: bytes of header, vocabulary and vectors.
    """

    dropped: dict[str, str]
    file: dict[str, FileMatrix]
    groups: dict[str, int] = field(default_factory=dict)
    columns: dict[str, list[int]] = field(default_factory=dict)
    rest: int = 0


def check_source(
    source: ModelSource,
    matrices: Mapping[str, tuple[int, int]],
    compared: Mapping[str, str] | None = None,
    *,
    pieces: Mapping[str, Piece] | None = None,
    tree: SourceTree | None = None,
    outline: Path | None = None,
) -> SourceCheck:
    """Find out before learning whether a model can be written afterwards, whether it would be the right one, and what
    its file will hold.

    Args:
        source: the model.
        matrices: shapes [out, in] of the matrices to be learned, by checkpoint name.
        compared: tensors that the learner must read as llama.cpp's converter does: stored names by checkpoint name.
        pieces: where matrices are in the weight files, by checkpoint name, unless they are stored as themselves.
        tree: the patched llama.cpp, by default the pinned one.
        outline: where to write the file in f16 with a hole in place of its weights, of a model that came as a folder.

    Raises:
        ModelError: llama.cpp does not know the architecture or the tokenizer, or reads other weights.
        ConversionError: llama.cpp's converter refuses the model.
    """
    if source.gguf is not None:  # the new file has the tensors of this one
        return _check_gguf(source.gguf, matrices, (tree or ensure_source()).llama_cpp)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "task": "check",
            "out": str(Path(folder) / "none.gguf"),
            "metadata": {},
            "matrices": {name: list(shape) for name, shape in matrices.items()},
            "compared": dict(compared or {}),
            "pieces": {name: asdict(piece) for name, piece in (pieces or {}).items()},
            "outline": str(outline) if outline else None,
        }
        answer, _ = _run(job, source, SilentReporter(), tree)
    file = {name: FileMatrix(**facts | {"names": tuple(facts["names"])}) for name, facts in answer["file"].items()}
    return SourceCheck(
        dict(answer["dropped"]), file, dict(answer["groups"]), dict(answer["columns"]), int(answer["rest"])
    )


def files_matrices(file: GgufFile, llama_cpp: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return what `FileMatrix` has to say of the matrices in a GGUF file, names of its checkpoint apart, by their names
    there; and the bytes of the file besides them, factors apart.

    Args:
        file: what its header says.
        llama_cpp: the patched llama.cpp.
    """
    matrices = [tensor for tensor in file.tensors if len(tensor.shape) > 1]
    own = factor_tensors(file.tensors)
    others = {tensor.name for tensor in file.tensors} - {tensor.name for tensor in own.values()}
    read = factors_read(llama_cpp, str(file.get("general.architecture", "")), others)
    found = {t.name: matrix_of_gguf(t, t.name in read, t.name in own) for t in matrices}
    beside = sum(bytes_of_factor(name, found[name]["layers"]) for name in own)
    return found, file.bytes - sum(tensor.bytes for tensor in matrices) - beside


def _check_gguf(path: Path, names: Iterable[str], llama_cpp: Path) -> SourceCheck:
    """Find the matrices of a GGUF file's model in the file itself."""
    original, dropped = Original(path), dict[str, str]()
    layers: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        try:
            place = original.placement(name)
        except Unplaceable as reason:
            dropped[name] = str(reason)
            continue
        layers.setdefault(place.name, []).append((place.layer or 0, name))
    matrices, rest = files_matrices(open_gguf(path), llama_cpp)
    file = {
        target: FileMatrix(tuple(name for _, name in sorted(layers.get(target, ()))) or (target,), **facts)
        for target, facts in matrices.items()
    }
    return SourceCheck(dropped, file, rest=rest)


def stock_type(name: str) -> str:
    """Return the name of a type that tensors can have without being learned.

    Raises:
        UsageError: no such type, or one that can only be learned.
    """
    kind = tensor_type(name)
    if not kind.plain:
        stock = ", ".join(t.name for t in TENSOR_TYPES.values() if t.plain)
        raise UsageError(f"'{name}' can only be learned; for tensors that are not learned choose one of {stock}")
    return kind.name


class _Noting(SilentReporter):
    """Remembers what is noted, and passes all on."""

    def __init__(self, told: Reporter) -> None:
        self.notes: list[str] = []
        self._told = told

    def advance(self, done: int, total: int) -> None:
        self._told.advance(done, total)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._told.note(text)


def _write(
    source: ModelSource, out: Path, contents: Contents, progress: Reporter, tree: SourceTree | None
) -> WrittenFile:
    out, told = Path(out), _Noting(progress)
    job = {
        "task": "write",
        "type": stock_type(contents.fallback_type),
        "types": dict(contents.types),
        "learned": [str(file) for file in contents.learned],
        "pieces": {name: asdict(piece) for name, piece in contents.pieces.items()},
        "metadata": dict(contents.metadata),
        "part_bytes": contents.part_bytes,
    }
    check_output(out, source, split=contents.part_bytes is not None)
    with temporary_home(out) as home:
        answer, log = _run(job | {"out": str(home / out.name)}, source, told, tree)
        parts = [home / name for name in answer["parts"]]
        verify_types(parts[0], contents.types)
        size = sum(part.stat().st_size for part in parts)
        path = moved(parts, out.parent)[0]
    return WrittenFile(path, size, int(answer["verified"]), tuple(told.notes), log)


def _run(
    job: dict[str, Any], source: ModelSource, progress: Reporter, tree: SourceTree | None
) -> tuple[dict[str, Any], str]:
    """Give a job to a child process; return its last answer and its log."""
    tree = tree or ensure_source()
    job |= {
        "name": source.name,
        "folder": str(source.folder),
        "gguf": str(source.gguf) if source.gguf else None,
        "keeps_head": source.keeps_head,
        "llama_cpp": str(tree.llama_cpp),
        "gguf_py": str(tree.gguf_py),
    }
    with tempfile.TemporaryDirectory() as folder:
        job["scratch"] = folder
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        with (Path(folder) / "log").open("w+", encoding="utf-8", errors="replace") as log:
            answer = _talk(file, log, progress)
            log.seek(0)
            said = log.read()
    if answer.get("event") == "done":
        return answer, said
    if answer.get("event") != "error":
        raise ConversionError("the process that writes the file ended without an answer (was it killed?)", said)
    kind = getattr(errors, str(answer["kind"]), TesseraqError)
    if issubclass(kind, ConversionError):
        raise kind(answer["text"], said if answer["log"] else "")
    raise kind(answer["text"])


def _talk(job: Path, log: IO[str], progress: Reporter) -> dict[str, Any]:
    """Run the child process, pass on what it tells, return its last answer. It never outlives this call."""
    # everything it reads is on this machine: nothing to ask a hub for
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer: dict[str, Any] = {}
    with child(job, environment, log) as said:
        for line in said:
            answer = json.loads(line)
            if answer["event"] == "note":
                progress.note(answer["text"])
            elif answer["event"] == "progress":
                progress.advance(answer["done"], answer["total"])
    return answer
