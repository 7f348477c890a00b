"""A folder to publish: files under their names with what they say of themselves, and what stands beside them.

Base-Size-Q2_K.gguf …   the files, or their parts      README.md    the card
…-imatrix.gguf, ….types what they were made with       Modelfile    for Ollama
divergence.png          the drawing of the card        SHA256SUMS   of all the others
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import PublishingError, UsageError
from tesseraq_gguf.gguf_files import copying
from tesseraq_gguf.gguf_files.gguf_file import PROJECTOR, GgufFile, open_gguf
from tesseraq_gguf.gguf_files.imatrix import read_imatrix
from tesseraq_gguf.gguf_files.inspection import Inspection, inspect
from tesseraq_gguf.gguf_files.parts import LARGEST_COUNT
from tesseraq_gguf.pages import drawn
from tesseraq_gguf.paths import sha256, temporary_sibling
from tesseraq_gguf.publishing.card import ANYWHERE, PLOT, Card, CardFile, draw, points
from tesseraq_gguf.publishing.measured import Measured, read_comparison
from tesseraq_gguf.publishing.names import base_name, check_names, read_tag, safe, stem_of, tag_of

SUMS, CARD = "SHA256SUMS", "README.md"
HUB = "https://huggingface.co"

Watch = Callable[[str, int, int], None]
"""Told what is counted, how much of it is done, and of how much."""

_CHUNK = 1 << 24
_IMATRIX = ": give it as --imatrix"


@dataclass(frozen=True)
class Request:
    """What to publish.

    Attributes:
        files: GGUF files of one model, anybody's; of split files the first part.
        repo: where they will be on the hub, OWNER/NAME; None if that is not known.
        name: what their names begin with; None takes it from what the first says of itself.
        tags: what programs find a file by, by its name as it is given, where its type is not to say it.
        base: the original model on the hub, OWNER/NAME; None keeps what the files say.
        by: who quantised them; None takes the owner of `repo`, or keeps what they say.
        url: where they are described; None takes the page of `repo`, or keeps what they say.
        license: of the original, as the hub names it; None keeps what they say.
        comparison: JSON that `compare` printed of the files.
        imatrix: the importance matrix that they were rounded with.
        types: lists of types that were chosen for them.
        split: the most bytes of a file; None keeps each whole.
    """

    files: tuple[Path, ...]
    repo: str | None = None
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    by: str | None = None
    url: str | None = None
    license: str | None = None
    comparison: Path | None = None
    imatrix: Path | None = None
    types: tuple[Path, ...] = ()
    split: int | None = None


@dataclass(frozen=True)
class Planned:
    """A file that will be published.

    Attributes:
        source: it, as it is.
        stem: its name, without its ending.
        tag: what programs find it by.
        entries: its metadata, values with their types.
        names: the file, or its parts.
        facts: what is in it.
        row: what was measured of it; None if nothing was.
    """

    source: GgufFile
    stem: str
    tag: str
    entries: Mapping[str, bytes]
    names: Sequence[str]
    facts: Inspection
    row: Mapping[str, Any] | None

    @property
    def changed(self) -> list[str]:
        """Keys that are set anew."""
        return [
            key
            for key, raw in self.entries.items()
            if key not in self.source.entries or self.source.entries[key].raw != raw
        ]


@dataclass(frozen=True)
class Plan:
    """What a folder will hold.

    Attributes:
        request: what was asked for.
        base: what the names begin with.
        files: the models.
        copies: files that are copied as they are, by their names in the folder.
        texts: files that are written, by their names; the card and the sums come besides.
        measured: the comparison; None if there is none.
        model: the original on the hub, OWNER/NAME; None if it is not known.
        license: of it; None if it is not known.
    """

    request: Request
    base: str
    files: Sequence[Planned]
    copies: Mapping[str, Path]
    texts: Mapping[str, str]
    measured: Measured | None
    model: str | None
    license: str | None

    @property
    def names(self) -> list[str]:
        """All files of the folder."""
        plot = [PLOT] if self.measured and self.measured.plotted else []
        models = [name for file in self.files for name in file.names]
        return [*models, *self.copies, *self.texts, *plot, CARD, SUMS]

    @property
    def size(self) -> int:
        """Bytes of models and copies, nearly."""
        return sum(file.source.bytes for file in self.files) + sum(path.stat().st_size for path in self.copies.values())

    def card(self, sizes: Mapping[str, int]) -> str:
        """Return the card; `sizes` are bytes of the files by their names."""
        beside = {name: self._said_of(name) for name in (*self.copies, *self.texts)}
        files = [
            CardFile(f.names, f.tag, sum(sizes[n] for n in f.names), f.facts, _imatrix_of(f.source), f.row)
            for f in self.files
        ]
        repo = self.request.repo
        return Card(self.base, files, self.model, self.license, repo, self.measured, beside).render()

    def plot(self) -> bytes:
        """Return the drawing, of a plan that has one."""
        assert self.measured is not None
        files = [CardFile(f.names, f.tag, 0, f.facts, "", f.row) for f in self.files]
        found = list(points(files, self.measured))
        return drawn(lambda axes: draw(axes, found), "png")

    def _said_of(self, name: str) -> str:
        if name.startswith("Modelfile"):
            tag = next(file.tag for file in self.files if name in (_modelfile_name(file, 1), _modelfile_name(file, 2)))
            return f"for Ollama, of `{tag}`"
        return "types of the matrices, for `--tensor-types`" if name.endswith(".types") else "importance matrix"


def plan(request: Request) -> Plan:
    """Say what a folder will hold, and refuse what cannot be published.

    Raises:
        FileFormatError: a file is missing, no GGUF file, damaged, or with tensors of a type that nobody here knows.
        UsageError: names that clash, files of several models, or an option that cannot be meant.
    """
    every = [path.absolute() for path in request.files]
    if twice := next((path for path in every if every.count(path) > 1), None):
        raise UsageError(f"{twice.name} is given twice")
    sources = {path: open_gguf(path) for path in request.files}
    facts = {path: inspect(path) for path in request.files}
    for path, source in sources.items():
        if (kind := source.get("general.type", "model")) not in ("model", "mmproj"):
            raise UsageError(f"{path} is no model, but of the kind '{kind}'" + _IMATRIX * (kind == "imatrix"))
    if broken := next((path for path in facts if facts[path].runs_on.startswith("nothing")), None):
        raise UsageError(f"{broken} runs on {facts[broken].runs_on}")
    models = [path for path in sources if facts[path].architecture != PROJECTOR]
    kinds = {facts[path].architecture: path for path in models}
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise UsageError(f"{first} is of {one} and {second} of {other}: publish the files of one model at a time")
    base = safe(request.name) if request.name else base_name(sources[(models or list(sources))[0]])
    if not base:
        raise UsageError(f"the name '{request.name}' has no letters or digits")
    tags = _tags(request, sources, facts)
    stems = {path: stem_of(base, tags[path], facts[path]) for path in sources}
    check_names(stems, tags)
    measured = read_comparison(request.comparison) if request.comparison else None
    files = []
    for path, source in sources.items():
        entries = _entries(source, request)
        parts = copying.planned(source, entries, request.split)
        if len(parts) > LARGEST_COUNT:
            raise UsageError(f"{path} would be {len(parts):,} parts, more than can be counted: make them larger")
        names = copying.file_names(stems[path], len(parts))
        row = measured.row_of(source) if measured else None
        files.append(Planned(source, stems[path], tags[path], entries, names, facts[path], row))
    if measured and not any(file.row for file in files):
        raise UsageError(f"{request.comparison} has nothing of {', '.join(path.name for path in request.files)}")
    copies = _copies(request, base, stems)
    main = sources[(models or list(sources))[0]]
    model = request.base or _base_said(main)
    license = request.license or _text(main, "general.license")
    return Plan(request, base, files, copies, _modelfiles(files), measured, model, license)


def write(found: Plan, out: Path, watch: Watch = lambda *_: None) -> list[Path]:
    """Write a folder, which appears when it is whole; return its files.

    Raises:
        UsageError: there is something at `out`.
        PublishingError: the disk has no room, or the folder cannot be written.
        VerificationError: a copy differs from its original.
    """
    check_folder(out, found.size)
    try:
        with temporary_sibling(out) as partial:
            partial.mkdir()
            _fill(found, partial, watch)
    except OSError as error:
        raise PublishingError(f"the folder {out} cannot be written: {error.strerror or error}") from None
    return [out / name for name in found.names]


def check_folder(out: Path, needed: int) -> None:
    """Refuse a folder that cannot be written, before any work is done.

    Raises:
        UsageError: there is something at `out`, or no folder to make it in.
        PublishingError: the disk has no room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is there and is not empty" if out.is_dir() else "is a file"
        raise UsageError(f"the folder {out} {what}: name a new one, or remove it first")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"the folder {parent} does not exist. Make it first: mkdir -p {parent}")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PublishingError(
            f"the folder needs {needed:,} bytes, and {free:,} are free on the disk of {parent}: make room, or write "
            "elsewhere"
        )


def _fill(found: Plan, folder: Path, watch: Watch) -> None:
    done, total = 0, sum(tensor.bytes for file in found.files for tensor in file.source.tensors)

    def told(count: int) -> None:
        nonlocal done
        done += count
        watch("writing MB", done // 1_000_000, total // 1_000_000)

    for file in found.files:
        copying.copy(file.source, folder / f"{file.stem}.gguf", file.entries, found.request.split, told)
    for name, source in found.copies.items():
        shutil.copyfile(source, folder / name)
    for name, text in found.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if PLOT in found.names:
        (folder / PLOT).write_bytes(found.plot())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / CARD).write_text(found.card(sizes), encoding="utf-8")
    sums = [f"{sha256(folder / name)}  {name}\n" for name in sorted(found.names) if name != SUMS]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")


def _tags(request: Request, sources: Mapping[Path, GgufFile], facts: Mapping[Path, Inspection]) -> dict[Path, str]:
    unknown = request.tags.keys() - {path.name for path in sources}
    if unknown:
        raise UsageError(f"--tag {sorted(unknown)[0]}: no file of that name is published")
    given = {name: read_tag(tag) for name, tag in request.tags.items()}
    return {path: given.get(path.name) or tag_of(source, facts[path]) for path, source in sources.items()}


def _entries(source: GgufFile, request: Request) -> dict[str, bytes]:
    """Metadata of a copy: the file's own, with what the request says of it."""
    entries = {key: entry.raw for key, entry in source.entries.items() if not key.startswith("split.")}
    for key in ("quantize.imatrix.file", "quantize.imatrix.dataset"):  # llama-quantize's, with the folders of its user
        if place := _text(source, key):
            entries[key] = copying.text(Path(place.replace("\\", "/")).name)
    owner = request.repo.partition("/")[0] if request.repo else None
    page = f"{HUB}/{request.repo}" if request.repo else None
    said = {"quantized_by": request.by or owner, "url": request.url or page, "license": request.license}
    entries |= {f"general.{key}": copying.text(value) for key, value in said.items() if value}
    if request.base:
        entries = {key: raw for key, raw in entries.items() if not key.startswith("general.base_model.")}
        owner, _, name = request.base.partition("/")
        of = {
            "name": name.replace("-", " "),
            "organization": owner.replace("-", " "),
            "repo_url": f"{HUB}/{request.base}",
        }
        entries["general.base_model.count"] = copying.number(1)
        entries |= {f"general.base_model.0.{key}": copying.text(value) for key, value in of.items()}
    return entries


def _copies(request: Request, base: str, stems: Mapping[Path, str]) -> dict[str, Path]:
    copies = {}
    if request.imatrix:
        read_imatrix(request.imatrix)
        copies[f"{base}-imatrix{'.gguf' if _is_gguf(request.imatrix) else '.dat'}"] = request.imatrix
    for path in request.types:
        of = next((stem for file, stem in stems.items() if path.name == f"{file.name}.types"), None)
        name = f"{of or safe(path.name.removesuffix('.types').removesuffix('.gguf'))}.types"
        if not path.is_file() or name in copies:
            raise UsageError(f"--types {path} is {'given twice' if name in copies else 'no file'}")
        copies[name] = path
    return copies


def _modelfiles(files: Sequence[Planned]) -> dict[str, str]:
    """What Ollama makes a model of: files of stock types that are whole, since it takes no parts."""
    stock = [f for f in files if f.facts.runs_on == ANYWHERE and len(f.names) == 1]
    return {_modelfile_name(file, len(stock)): f"FROM ./{file.names[0]}\n" for file in stock}


def _modelfile_name(file: Planned, count: int) -> str:
    return "Modelfile" if count == 1 else f"Modelfile-{file.tag}"


def _base_said(source: GgufFile) -> str | None:
    """The original model, as a file names it. What nobody quantised yet names what the original was made from."""
    quantised = _text(source, "general.quantized_by") and _text(source, "general.base_model.0.repo_url")
    url = quantised or _text(source, "general.source.repo_url") or ""
    repo = url.removeprefix(f"{HUB}/").strip("/")
    return repo if url.startswith(HUB) and repo.count("/") == 1 else None


def _imatrix_of(source: GgufFile) -> str:
    dataset, chunks = _text(source, "quantize.imatrix.dataset"), source.get("quantize.imatrix.chunks_count")
    if dataset is None and "quantize.imatrix.file" not in source.entries:
        return ""
    named = Path((dataset or "text unknown").replace("\\", "/")).name
    return f"{named}, {chunks} chunks" if isinstance(chunks, int) else named


def _text(source: GgufFile, key: str) -> str | None:
    value = source.get(key)
    return value.strip() if isinstance(value, str) and value.strip() else None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
