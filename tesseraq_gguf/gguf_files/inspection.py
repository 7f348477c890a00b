"""What is in a GGUF file: tensors, types, sizes, and where it runs. Needs neither the runtime nor its source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tesseraq_gguf import arguments
from tesseraq_gguf.gguf_files.column_orders import SUFFIX, lost_orders
from tesseraq_gguf.gguf_files.factors import factor_tensors
from tesseraq_gguf.gguf_files.gguf_file import PROJECTOR, ArrayValue, GgufFile, TensorInfo, open_gguf
from tesseraq_gguf.printing import printable
from tesseraq_gguf.types.facts import TENSOR_TYPES, names

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Inspection", "TensorSummary", "TypeSummary", "inspect", "open_gguf", "render"]

_GENERAL_KEYS = ("general.name", "general.size_label", "general.license")
_MODEL_KEYS = ("block_count", "context_length", "embedding_length", "feed_forward_length")


@dataclass(frozen=True)
class TensorSummary:
    """One tensor.

    Attributes:
        name: its name.
        type: its type, lower case.
        shape: as llama.cpp prints it, length of a row first.
        bytes: size of its data.
        bpw: bits per weight, block parameters included.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    bpw: float


@dataclass(frozen=True)
class TypeSummary:
    """All tensors of one type.

    Attributes:
        type: the type.
        tensors: how many there are.
        weights: their elements.
        bytes: size of their data.
        bpw: bits per weight, block parameters included.
        custom: True if only our runtime reads it.
    """

    type: str
    tensors: int
    weights: int
    bytes: int
    bpw: float
    custom: bool


@dataclass(frozen=True)
class Inspection:
    """A GGUF file at a glance.

    Attributes:
        path: the file; of a split file the first part.
        parts: how many files it consists of.
        bytes: its size, all parts together.
        bpw: bits of the file per weight of the model, everything counted.
        weights: elements of all tensors, orders of columns and factors of matrices left out.
        block_bpw: bits per weight of the matrices in the blocks, orders of their columns and factors included.
        architecture: llama.cpp's name of the model's kind.
        file_type: name of `general.file_type`, None if the file has none.
        runs_on: in words: any llama.cpp, our runtime only, or nothing, since the file is broken.
        needs_runtime: True if a tensor has a type that only our runtime reads.
        metadata: some of the file's entries, and how many there are in all.
        tesseraq: the entries that begin with `tesseraq.`, by the rest of their key.
        types: totals by type, largest first.
        tensors: every tensor in file order.
    """

    path: str
    parts: int
    bytes: int
    bpw: float
    weights: int
    block_bpw: float
    architecture: str
    file_type: str | None
    runs_on: str
    needs_runtime: bool
    metadata: dict[str, Any]
    tesseraq: dict[str, Any]
    types: tuple[TypeSummary, ...]
    tensors: tuple[TensorSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-ready; `types` is keyed by type."""
        data = asdict(self)
        data["types"] = {t.pop("type"): t for t in data["types"]}
        return data


def inspect(path: Path | str) -> Inspection:
    """Look into a GGUF file.

    Raises:
        FileFormatError: missing, not GGUF, truncated, corrupt, or with tensors of an unknown type.
        UsageError: `path` is no path.
    """
    file = open_gguf(arguments.path("file", path))
    architecture = str(file.get("general.architecture", "unknown"))
    types = _totals(file.tensors)
    beside = _beside_weights(file.tensors)
    weights = sum(t.weights for t in file.tensors if t.name not in beside)
    custom = [t.type for t in types if t.custom]
    wanted = (*_GENERAL_KEYS, *(f"{architecture}.{key}" for key in _MODEL_KEYS))
    metadata = {key: _plain(file.get(key)) for key in wanted if key in file.entries}
    if isinstance(tokens := file.get("tokenizer.ggml.tokens"), ArrayValue):
        metadata["vocabulary"] = tokens.count
    metadata["chat_template"] = "tokenizer.chat_template" in file.entries
    metadata["entries"] = len(file.entries)
    return Inspection(
        path=str(file.path),
        parts=len(file.parts),
        bytes=file.bytes,
        bpw=round(8 * file.bytes / weights, 4) if weights else 0.0,
        weights=weights,
        block_bpw=block_bits_per_weight(file.tensors),
        architecture=architecture,
        file_type=_file_type(file),
        runs_on=_runs_on(custom, {t.type for t in types}, lost_orders(file.tensors)) + _beside(architecture),
        needs_runtime=bool(custom),
        metadata=metadata,
        tesseraq={
            key.removeprefix("tesseraq."): _plain(entry.value)
            for key, entry in file.entries.items()
            if key.startswith("tesseraq.")
        },
        types=types,
        tensors=tuple(
            TensorSummary(t.name, t.type, t.shape, t.bytes, round(t.bits_per_weight, 4)) for t in file.tensors
        ),
    )


def render(inspection: Inspection, *, tensors: bool = True) -> Group:
    """Lay an inspection out for a terminal.

    Args:
        inspection: what to show.
        tensors: whether to list every tensor.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(inspection):
        facts.add_row(Text(printable(name), style="bold"), Text(printable(value)))
    totals = Table("type", title="By type", title_justify="left")
    for heading in ("tensors", "weights", "bytes", "bits per weight"):
        totals.add_column(heading, justify="right")
    for t in inspection.types:
        totals.add_row(t.type, f"{t.tensors:,}", f"{t.weights:,}", f"{t.bytes:,}", f"{t.bpw:.3f}")
    parts: list[Any] = [facts, Text(), totals]
    if tensors:
        listing = Table("tensor", "type", title="Tensors", title_justify="left")
        for heading in ("shape", "bytes", "bits per weight"):
            listing.add_column(heading, justify="right")
        for tensor in inspection.tensors:
            shape = " × ".join(map(str, tensor.shape))
            listing.add_row(Text(printable(tensor.name)), tensor.type, shape, f"{tensor.bytes:,}", f"{tensor.bpw:.3f}")
        parts += [Text(), listing]
    return Group(*parts)


def _facts(inspection: Inspection) -> Iterable[tuple[str, str]]:
    yield "file", inspection.path
    parts = f" in {inspection.parts} parts" if inspection.parts > 1 else ""
    size = f"{inspection.bytes:,} bytes{parts}"
    yield "size", f"{size}, {inspection.bpw:.3f} bits per weight ({inspection.weights:,} weights)"
    if inspection.block_bpw:
        included = "orders of columns and factors included"
        yield "blocks", f"{inspection.block_bpw:.3f} bits per weight of their matrices, {included}"
    yield "architecture", inspection.architecture
    if inspection.file_type:
        yield "file type", inspection.file_type
    yield "runs on", inspection.runs_on
    for key, value in (inspection.metadata | {f"tesseraq.{k}": v for k, v in inspection.tesseraq.items()}).items():
        yield key, str(value)


def _beside_weights(tensors: Iterable[TensorInfo]) -> set[str]:
    """Names of tensors that say how matrices are read: orders of columns, and factors."""
    tensors = list(tensors)
    return {t.name for t in tensors if t.name.endswith(SUFFIX)} | {t.name for t in factor_tensors(tensors).values()}


def block_bits_per_weight(tensors: Iterable[TensorInfo]) -> float:
    """Bits per weight of the matrices in the blocks, with orders of columns and factors; 0 if there are none."""
    blocks = [t for t in tensors if t.name.startswith("blk.")]
    matrices, beside = [t for t in blocks if len(t.shape) > 1], _beside_weights(blocks)
    counted = sum(t.bytes for t in blocks if len(t.shape) > 1 or t.name in beside)
    return round(8 * counted / max(1, sum(t.weights for t in matrices)), 4)


def _totals(tensors: Iterable[TensorInfo]) -> tuple[TypeSummary, ...]:
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, []).append(tensor)
    summaries = []
    for name, group in groups.items():
        weights, size = sum(t.weights for t in group), sum(t.bytes for t in group)
        custom = name in TENSOR_TYPES and TENSOR_TYPES[name].custom
        summaries.append(TypeSummary(name, len(group), weights, size, round(8 * size / weights, 4), custom))
    return tuple(sorted(summaries, key=lambda t: -t.bytes))


def _runs_on(custom: list[str], present: set[str], lost: list[str]) -> str:
    if lost:
        more = ", …" if len(lost) > 1 else ""
        return f"nothing: columns of {lost[0]}{more} have an order that their type does not know; the file is broken"
    if custom:
        return f"tesseraq-gguf runtime only (types: {', '.join(custom)})"
    recent = sorted(present & {*names(lambda t: t.recent)})
    return f"any llama.cpp recent enough to know {', '.join(recent)}" if recent else "any llama.cpp"


def _beside(architecture: str) -> str:
    """What a file needs beside it."""
    return ", beside the file of its model (--mmproj)" if architecture == PROJECTOR else ""


def _file_type(file: GgufFile) -> str | None:
    from gguf import LlamaFileType

    value = file.get("general.file_type")
    if value is None:
        return None
    try:
        return str(LlamaFileType(value).name).lower().replace("mostly_", "mostly ").replace("all_", "all ")
    except ValueError:
        # newer than the published gguf package, or ours
        return next((f"mostly {t.name}" for t in TENSOR_TYPES.values() if t.file_type == value), f"unknown ({value})")


def _plain(value: Any) -> Any:
    return f"{value.count} × {value.element}" if isinstance(value, ArrayValue) else value
