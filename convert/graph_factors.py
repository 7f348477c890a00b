"""Which matrices' products llama.cpp's graphs multiply by a factor, asked of its source.

A file of NVFP4 may have a tensor `blk.0.attn_q.scale` beside `blk.0.attn_q.weight`. The loader of every architecture
takes such tensors for the matrices that it names for all of them, and calls them as the matrices, with `_s` behind. A
graph reads a factor where it hands it on with its matrix, in the arguments of one call:

    build_lora_mm(layer.wq, cur, layer.wq_s)

A graph that hands the matrix on alone would answer wrongly. One such call is enough to leave a factor out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

from tesseraq_gguf.gguf_files.factors import place_of

_CLASS = r"(?:llama_model|llm_build)_\w+"

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

_LOADED = re.compile(
    r"layer\.(\w+)_s\s*=\s*create_tensor\(tn\(LLM_TENSOR_(\w+),\s*\"scale\",\s*i\),\s*\{(1|n_expert)\}"
)

_TESTED = re.compile(r"\s*(?:->|\?|&&|\|\||==|!=|=(?!=))")
"""What follows a matrix that is asked about, or set, and not multiplied."""

_WHOLE_LAYERS = re.compile(r"\bbuild_qkv\(")
"""Calls of what all graphs share and gives the matrices out of a layer by itself."""

_ASKS = ("if", "while", "assert", "GGML_ASSERT")


def factors_of(llama_cpp: Path, architecture: str) -> frozenset[str]:
    """Return the matrices whose factors a graph reads, as names in a file without block and ending: `attn_q`.

    Args:
        llama_cpp: the source.
        architecture: llama.cpp's name.
    """
    source = llama_cpp / "src"
    names = re.findall(r"\{\s*LLM_TENSOR_(\w+),\s*\"(?:blk\.%d\.)?(\w+)\"", _text(source / "llama-arch.cpp"))
    in_file = dict(names)
    model = _of_model(source, architecture)
    common = _text(source / "llama-graph.cpp") if _WHOLE_LAYERS.search(model) else ""
    loaded = _LOADED.findall(_text(source / "llama-model.cpp"))
    found = {
        in_file[tensor]
        for member, tensor, _ in loaded
        if _members(model, tensor) <= {member} and (_handed(model, member) or _handed(common, member)) == {True}
    }
    return frozenset(found | ({"output"} if _handed(model, "output", r"\bmodel\.") == {True} else set()))


def factors_read(llama_cpp: Path, architecture: str, tensors: Collection[str]) -> set[str]:
    """Return the matrices of a file that can have a factor, by their names there.

    Graphs refuse factors of a feed-forward network with biases. Where a factor belongs to the model itself, its place
    is taken.

    Args:
        llama_cpp: the source.
        architecture: llama.cpp's name.
        tensors: names of all tensors of the file.
    """
    read = factors_of(llama_cpp, architecture)
    found = set[str]()
    for name in tensors:
        module = name.removesuffix(".weight")
        matrix = re.sub(r"^blk\.\d+\.", "", module)
        biased = matrix.startswith("ffn_") and f"{module}.bias" in tensors
        if name != module and matrix in read and not biased and place_of(name) not in tensors:
            found.add(name)
    return found


def _members(model: str, tensor: str) -> set[str]:
    """What a model's own loader calls a matrix."""
    return set(re.findall(rf"(\w+)\s*=\s*create_tensor\(tn\(LLM_TENSOR_{tensor},\s*\"weight\"", model))


def _handed(text: str, member: str, before: str = r"(?:\.|->)\s*") -> set[bool]:
    """Whether calls get a matrix with its factor, True, or alone, False; what holds for some calls."""
    factor = re.compile(rf"(?:\.|->)\s*{member}_s\b")
    return {
        bool(arguments and factor.search(arguments))
        for match in re.finditer(rf"{before}{member}\b", text)
        if not _TESTED.match(text, match.end())
        for callee, arguments in [_call_around(text, match.start())]
        if callee not in _ASKS and not _negated(text, match.start())
    }


def _negated(text: str, position: int) -> bool:
    """Whether `!layer.wq` is asked, where `position` is that of the dot."""
    return re.search(r"!\s*[\w.\[\]>-]*$", text[max(0, position - 80) : position]) is not None


def _call_around(text: str, position: int) -> tuple[str, str]:
    """Return what is called with a position among its arguments, and these; both empty where nothing is."""
    depth = 0
    for start in range(position - 1, -1, -1):
        depth += (text[start] in ")]") - (text[start] in "([")
        if depth < 0 and text[start] == "(":
            break
        if text[start] in ";{}" and depth <= 0:
            return "", ""
    else:
        return "", ""
    callee = re.search(r"(\w+)\s*(?:<\w+>)?\s*$", text[max(0, start - 80) : start])
    return (callee[1] if callee else ""), text[start : _end(text, start)]


def _end(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([") - (text[position] in ")]")
        if depth == 0:
            return position + 1
    return len(text)


def _of_model(source: Path, architecture: str) -> str:
    """The code of an architecture's model, with all classes that it names; empty if nothing is known of it."""
    constant = re.search(rf"\{{\s*(LLM_ARCH_\w+),\s*\"{re.escape(architecture)}\"", _text(source / "llama-arch.cpp"))
    made = constant and re.search(
        rf"case {constant[1]}:(?:\s*case \w+:)*\s*(?:\{{\s*)?return new (\w+)", _text(source / "llama-model.cpp")
    )
    if not made:
        return ""
    files = sorted((source / "models").glob("*.cpp"))
    declared = _declarations(_text(source / "models" / "models.h"))
    classes, parts, open_classes = set[str](), dict[Path, str](), [made[1]]
    while open_classes:
        name = open_classes.pop()
        classes.add(name)
        defining = {file: _text(file) for file in files if f"{name}::" in _text(file) and file not in parts}
        parts |= defining
        seen = {found for text in (*defining.values(), declared.get(name, "")) for found in re.findall(_CLASS, text)}
        open_classes += sorted(seen & declared.keys() - classes)
    return "\n".join(parts.values())


def _declarations(header: str) -> dict[str, str]:
    """Declarations of classes by their names."""
    return {m[1]: m[0] for m in re.finditer(rf"^struct ({_CLASS})\b.*?^\}};", header, re.DOTALL | re.MULTILINE)}


@cache
def _text(file: Path) -> str:
    """A source file without comments; empty if there is none."""
    return _COMMENT.sub("", file.read_text(encoding="utf-8")) if file.is_file() else ""
