"""Which types the matrices of a model have in a mix of llama-quantize's: it is asked, on a file without weights."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.converter.writer import FileMatrix
from tesseraq_gguf.errors import ConversionError, RuntimeMissingError, UsageError
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, write_imatrix
from tesseraq_gguf.runtime.locate import find_runtime
from tesseraq_gguf.types.facts import TENSOR_TYPES
from tesseraq_gguf.types.mixes import Mix

_ANSWER = re.compile(
    r"^\[ *\d+/ *\d+\] +(?P<name>\S+) +- \[.*\], type = +(?P<old>\S+), size = .*?(?:\((?P<new>\w+)\))?$", re.MULTILINE
)
"""What llama-quantize says of a tensor: its type, and the new one if it is another."""

_REFUSED = "failed to quantize: "


def ask(mix: Mix, model: Path, calibrated: bool) -> dict[str, str]:
    """Return the type that llama-quantize would give each tensor of a file, by name.

    Args:
        mix: which mix.
        model: a GGUF file, whose weights are not looked at.
        calibrated: whether it would have an importance matrix.

    Raises:
        RuntimeMissingError: there is no runtime, and so no llama-quantize.
        ConversionError: it refuses the model.
    """
    try:
        tool = find_runtime().tool("llama-quantize")
    except RuntimeMissingError as error:
        raise RuntimeMissingError(f"{spelled('type')} {mix.spelled} asks llama-quantize: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tool), "--dry-run"]
        if calibrated:  # that there is one decides, not what is in it
            imatrix = Path(folder) / "imatrix.gguf"
            write_imatrix(imatrix, Imatrix({"none": Squares(np.ones((1, 1), np.float32), np.ones(1, np.float32))}))
            command += ["--imatrix", str(imatrix)]
        command += [str(model), mix.name]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    found = {m["name"]: (m["new"] or m["old"]).lower() for m in _ANSWER.finditer(done.stdout + "\n" + done.stderr)}
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        reason = next((line.partition(_REFUSED)[2] for line in said if _REFUSED in line), said[-1])
        raise ConversionError(f"llama-quantize has no types for this model: {reason}", done.stderr)
    return found


def by_matrix(mix: Mix, types: Mapping[str, str], file: Mapping[str, FileMatrix]) -> dict[str, str]:
    """Return the type of each matrix that can be chosen, by checkpoint name.

    A matrix that goes into several tensors of the file gets the largest of their types.

    Args:
        mix: for messages.
        types: by name in the file.
        file: its matrices.

    Raises:
        UsageError: nothing here makes one of the types.
    """
    found: dict[str, str] = {}
    for target, matrix in file.items():
        type = types.get(target)
        if type is None or matrix.forced:
            continue
        if type not in TENSOR_TYPES and type != matrix.own:
            raise UsageError(
                f"{spelled('type')} {mix.spelled} has {target} in {type}, which nothing here makes: take another, or "
                "llama-quantize"
            )
        for name in matrix.names if type in TENSOR_TYPES else ():
            found[name] = max(type, found.get(name, type), key=lambda t: TENSOR_TYPES[t].bits_per_weight)
    return found


def torn(types: Mapping[str, str], file: Mapping[str, FileMatrix]) -> dict[str, str]:
    """What is said of matrices, by checkpoint name, that go into tensors for which llama-quantize has several types."""
    wanted: dict[str, list[str]] = {}
    for target, matrix in file.items():
        for name in matrix.names if target in types and not matrix.forced else ():
            wanted.setdefault(name, []).append(types[target])
    return {
        name: f"has one type in all its parts: llama-quantize gives them {', '.join(found)}"
        for name, found in wanted.items()
        if len(set(found)) > 1
    }


def counted(types: Mapping[str, str]) -> str:
    """Say how many matrices have which type, most first."""
    return ", ".join(f"{count} × {type}" for type, count in Counter(types.values()).most_common())
