"""The child process that writes: llama.cpp's conversion library lives here, and its `gguf` which knows our types.

The parent may have imported another `gguf` (transformers does), and the library keeps state in its modules; so it gets
a process of its own. `python -m tesseraq_gguf.converter.worker JOB.json` reads a job, answers in JSON lines on its
standard output, and leaves the library's chatter on its standard error. It ends when its standard input closes: a
parent that is gone leaves no writer behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tesseraq_gguf.converter.answers import Emit, explain, own_output, refusal
from tesseraq_gguf.converter.from_folder import from_folder
from tesseraq_gguf.converter.from_gguf import from_gguf
from tesseraq_gguf.converter.grids import teach_rounding
from tesseraq_gguf.converter.learned import LearnedTensors
from tesseraq_gguf.converter.original import Original
from tesseraq_gguf.converter.plan import Plan
from tesseraq_gguf.converter.ranges import keep_within_range
from tesseraq_gguf.converter.split import split
from tesseraq_gguf.converter.survey import Survey, compare, write_outline
from tesseraq_gguf.converter.upstream import Converter, feed
from tesseraq_gguf.converter.verify import Expected, verify
from tesseraq_gguf.errors import ConversionError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models.pieces import Piece
from tesseraq_gguf.types.facts import FORMAT_VERSION, register_with_gguf, tensor_type

_RUNTIME_HINT = "needs the tesseraq-gguf runtime: pip install tesseraq-gguf; tesseraq-gguf runtime build"
_STOCK_HINT = "any llama.cpp"


def check(job: dict[str, Any], emit: Emit) -> None:
    """Answer which matrices cannot be placed, and fail where writing would fail: unknown architecture or tokenizer."""
    converter = Converter(job, "f16")
    shapes = {name: (rows, columns) for name, (rows, columns) in job["matrices"].items()}
    plan = Plan(converter, shapes, _pieces(job))
    if job["compared"]:
        compare(job, Converter(job, "f16"))
    if job["outline"]:
        write_outline(job, Path(job["outline"]))
    survey = Survey(job, bool(job["compared"]))
    emit({
        "event": "done",
        "dropped": plan.dropped,
        "file": survey.matrices(job, converter, plan),
        "groups": plan.groups(),
        "columns": plan.columns(),
        "rest": survey.rest(Path(job["out"])),
    })  # fmt: skip


def write(job: dict[str, Any], emit: Emit) -> None:
    """Write the file of a job and verify it."""
    learned = LearnedTensors([Path(f) for f in job["learned"]])
    plan = probe = None
    if learned.types:
        probe = Converter(job, "f32") if job["gguf"] is None else Original(Path(job["gguf"]))
        plan = Plan(probe, learned.shapes(), _pieces(job))
        for name, reason in plan.dropped.items():
            emit({"event": "note", "text": f"{name}: what was learned is not used, because {reason}"})
        if not plan.by_matrix:
            raise ConversionError(
                f"{job['name']}: none of the learned matrices can be written, the first because {reason}"
            )
    if job["gguf"] is None:
        writer = from_folder(job, learned, plan, emit)
    else:
        writer = from_gguf(job, learned, plan, probe, emit)
    _add_metadata(writer, job, learned)
    if job["part_bytes"] is not None:
        split(writer, job["part_bytes"], emit)
    parts = _write_file(writer, Path(job["out"]), emit)
    emit({"event": "stage", "text": "verifying"})
    compared = 0
    if plan is not None and probe is not None:
        compared = verify(parts[0], _expected(probe, plan, learned))
    else:
        open_gguf(parts[0])
    emit({"event": "done", "verified": compared, "parts": [part.name for part in parts]})


def check_projector(job: dict[str, Any], emit: Emit) -> None:
    """Fail where writing the projector would fail: llama.cpp has no class for it, or something of it is missing."""
    converter = Converter(job, job["type"], projector=True)
    converter.model.prepare_metadata(vocab_only=False)
    emit({"event": "done"})


def project(job: dict[str, Any], emit: Emit) -> None:
    """Write what images and sound go through on their way to the model, all of it as llama.cpp's converter does."""
    converter = Converter(job, job["type"], projector=True)
    feed(job, converter, learned=False)
    keep_within_range(converter.model.gguf_writer)
    converter.model.prepare_tensors()
    converter.model.prepare_metadata(vocab_only=False)
    _write_file(converter.model.gguf_writer, Path(job["out"]), emit)
    open_gguf(Path(job["out"]))
    emit({"event": "done", "verified": 0})


def _pieces(job: dict[str, Any]) -> dict[str, Piece]:
    return {name: Piece(**piece | {"shape": tuple(piece["shape"])}) for name, piece in job["pieces"].items()}


def _expected(probe: Converter | Original, plan: Plan, learned: LearnedTensors) -> Iterator[Expected]:
    """The learner's weights, dequantised by its grid and moved by the converter itself, not by our row maps.

    Of a model that came as a GGUF file they are moved back to where its rows were read from.
    """
    from tesseraq_gguf.types.grids import grid_of

    def weights(name: str) -> Any:
        return grid_of(learned.types[name]).dequantize(learned[name])

    for tensor in plan.tensors():
        # stacks come with the last of a block's experts, all at once
        for target, moved in probe.modified(tensor.name, tensor.filled(weights)):
            first = plan.by_target[target][0][0]
            yield Expected(target, learned.types[first], moved.numpy(), learned.orders.get(first))
    for name, order in plan.orders(learned).items():
        yield Expected(name, "i32", order)
    for name in learned.vectors:
        for target, moved in probe.modified(name, learned.vector(name)):
            yield Expected(target, "f32", moved.float().numpy())


def _add_metadata(writer: Any, job: dict[str, Any], learned: LearnedTensors) -> None:
    import gguf

    values: dict[str, Any] = {}
    if learned.types:
        custom = any(tensor_type(t).custom for t in learned.types.values())
        values["tesseraq.format_version"] = FORMAT_VERSION
        values["tesseraq.runtime"] = _RUNTIME_HINT if custom else _STOCK_HINT
    for key, codewords in learned.codebooks().items():
        writer.add_key_value(key, codewords, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT8)
    for key, value in (values | job["metadata"]).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


class _Counted:
    """A tensor of the writer that tells how far writing is."""

    def __init__(self, tensor: Any, told: Callable[[int], None]) -> None:
        self._tensor, self._told = tensor, told
        self.nbytes = tensor.nbytes

    def tofile(self, file: IO[bytes]) -> None:
        self._tensor.tofile(file)
        self._told(self.nbytes)


def _write_file(writer: Any, out: Path, emit: Emit) -> list[Path]:
    """Write the file, or its parts beside it; return what was written."""
    infos = [info for part in writer.tensors for info in part.values()]
    total = sum(info.nbytes for info in infos)
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise ConversionError(
            f"the file needs {total:,} bytes, and {free:,} are free on the disk that it is written to: make room, or "
            "write elsewhere"
        )
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        emit({"event": "progress", "done": done, "total": total})

    for info in infos:
        info.tensor = _Counted(info.tensor, told)
    parts: list[Path] = writer.format_shard_names(out)
    try:
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
    finally:
        with contextlib.suppress(OSError):  # a full disk fails again here; the first failure is the one to tell
            writer.close()
    return parts


def _end_with_parent() -> None:
    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: the interpreter cannot end while a thread has its lock
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Do one job; see the module's docstring."""
    emit = own_output()
    _end_with_parent()
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    sys.path[:0] = [job["gguf_py"], job["llama_cpp"]]
    try:
        import gguf
        import torch

        register_with_gguf(gguf)
        teach_rounding(gguf)
        with torch.inference_mode():
            {"write": write, "check": check, "project": project, "check_projector": check_projector}[job["task"]](
                job, emit
            )
    except Exception as error:
        explained = explain(error, job)
        if explained is None:
            traceback.print_exc()
        kind, text = explained or refusal(error, job)
        # users see the log where it says more than the line does
        emit({"event": "error", "kind": kind, "text": text, "log": explained is None})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
