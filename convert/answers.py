"""What the child process that writes tells its parent."""

from __future__ import annotations

import errno
import json
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import TesseraqError
from tesseraq_gguf.models.source import NO_TOKENIZER, ModelSource

Emit = Callable[[dict[str, Any]], None]


def own_output() -> Emit:
    """Keep standard output for the answers; what the library prints there goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    return emit


def note_fallbacks(written: list[tuple[str, str, int]], emit: Emit) -> None:
    """Say which matrices of the blocks were not learned: one line for each kind of matrix."""
    groups: Counter[tuple[str, str, int]] = Counter()
    for name, kind, columns in written:
        if name.startswith("blk."):
            groups[name.split(".", 2)[2].removesuffix(".weight"), kind, columns] += 1
    for (matrix, kind, columns), count in groups.items():
        blocks = "1 block" if count == 1 else f"{count} blocks"
        emit({"event": "note", "text": f"{matrix} of {blocks}, in rows of {columns} weights, is {kind}: not learned"})


_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it grows too large"}


def explain(error: BaseException, job: dict[str, Any]) -> tuple[str, str] | None:
    """Return error class and one line for what a job raised, None if it is not understood."""
    if isinstance(error, TesseraqError):
        return type(error).__name__, str(error)
    if isinstance(error, FileNotFoundError) and error.errno is None:  # llama.cpp's own
        missing = str(error).strip().splitlines()[0].removeprefix("File not found: ")
        return "ModelError", f"{job['name']}: llama.cpp's converter needs a file that is not there: {missing}"
    if isinstance(error, OSError):
        # numpy drops the number of the error of a short write
        full = _FULL.get(error.errno or 0) or (_FULL[errno.ENOSPC] if "requested and" in str(error) else None)
        return "ConversionError", f"the file cannot be written: {full or error.strerror or error}"
    if isinstance(error, MemoryError):
        return "ConversionError", "not enough memory to write the file"
    read_folder = None if job["gguf"] else ModelSource(job["name"], Path(job["folder"]))
    if "tokenizer" in str(error) and read_folder and not read_folder.has_tokenizer():
        return "ModelError", f"{job['name']}: {NO_TOKENIZER}"
    if isinstance(error, AssertionError) and not str(error):
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        if "vocab_size" in line:
            return "ModelError", (
                f"{job['name']}: its tokenizer has more tokens than its embedding has rows: resize the embedding "
                "(resize_token_embeddings of transformers) and save the model again, or take the original tokenizer"
            )
    if isinstance(error, ValueError) and (unknown := re.search("Can not map tensor '(.+)'", str(error))):
        return "ModelError", (
            f"{job['name']}: llama.cpp has no place for {unknown[1]} in a model of this architecture: save the model "
            "without that tensor, or get the original again"
        )
    if "BPE pre-tokenizer was not recognized" in str(error):
        return (
            "ModelError",
            f"{job['name']}: llama.cpp does not know this model's tokenizer (get_vocab_base_pre refuses it)",
        )
    return None


def refusal(error: BaseException, job: dict[str, Any]) -> tuple[str, str]:
    """Return error class and one line for what the library raised and nobody understands."""
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, AssertionError) and not reason:
        reason = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return (
        "ConversionError",
        f"{job['name']}: llama.cpp's converter refuses the model: {type(error).__name__}: {reason}",
    )
