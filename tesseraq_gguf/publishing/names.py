"""What a published file is called: `Base-Size-Finetune-Version-TAG.gguf`, as gguf-py names files.

llama.cpp finds `-hf USER/NAME:TAG` by the first file whose name has TAG and a `-` or a `.` behind it, in any case; it
lists what is in its cache by the letters, digits and underscores behind the last `-` or `.` of a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.gguf_file import PROJECTOR, GgufFile
from tesseraq_gguf.gguf_files.inspection import Inspection
from tesseraq_gguf.types.facts import TENSOR_TYPES

_TAG = re.compile(r"[A-Z0-9_]+")
_GUESSED = 1024
"""Added by llama.cpp to a file type that it had to guess."""


def base_name(file: GgufFile) -> str:
    """Return the part of a name that files of one model share, from what a file says of itself, or from its name."""
    import gguf

    own = {key: file.get(f"general.{key}") for key in ("basename", "finetune", "version", "size_label")}
    words = {key: value if isinstance(value, str) and value.strip() else None for key, value in own.items()}
    if words["basename"] is None:
        named = file.get("general.name")
        model = named if isinstance(named, str) and named.strip() else file.path.name.removesuffix(".gguf")
        parts = gguf.Metadata.get_model_id_components(safe(model))
        _, _, base, finetune, version, size = parts
        found = {"basename": base or model, "finetune": finetune, "version": version, "size_label": size}
        words = {key: words[key] or value for key, value in found.items()}
    name = gguf.naming_convention(
        None, words["basename"], words["finetune"], words["version"], words["size_label"], None
    )
    return safe(name) or "model"


def safe(name: str) -> str:
    """Return a name of letters, digits, dots, dashes and underscores."""
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", name)).strip("-.")


def tag_of(file: GgufFile, facts: Inspection) -> str:
    """Return the tag of a file: its type or mix; where types were chosen within a budget, its bits per weight too."""
    value = file.get("general.file_type")
    tag = _named(value) if isinstance(value, int) else None
    if tag is None:
        inside = {t.type: 0 for t in facts.types}
        for tensor in facts.tensors:
            inside[tensor.type] += tensor.bytes if len(tensor.shape) > 1 else 0
        tag = max(inside, key=lambda type: inside[type]).upper()
    if re.search(r" --target-(bpw|size) ", str(facts.tesseraq.get("command", ""))):
        tag += f"_{facts.block_bpw:.2f}BPW".replace(".", "_")
    return tag


def _named(value: int) -> str | None:
    from gguf import LlamaFileType

    ours = next((t.name for t in TENSOR_TYPES.values() if t.custom and t.file_type == value), None)
    if ours:
        return ours.upper()
    try:
        return re.sub("^(MOSTLY|ALL)_", "", LlamaFileType(value & ~_GUESSED).name)
    except ValueError:
        return next((t.name.upper() for t in TENSOR_TYPES.values() if t.file_type == value), None)


def stem_of(base: str, tag: str, facts: Inspection) -> str:
    """Return the name of a file without its ending; what images go through is recognised by `mmproj`."""
    return f"mmproj-{base}-{tag}" if facts.architecture == PROJECTOR else f"{base}-{tag}"


def read_tag(given: str) -> str:
    """Return a tag that a user chose.

    Raises:
        UsageError: llama.cpp would not find it.
    """
    tag = given.strip().upper()
    if not _TAG.fullmatch(tag):
        raise UsageError(f"the tag '{given}' must be of letters, digits and underscores, so that programs find it")
    return tag


def resolved(tag: str, names: list[str]) -> list[str]:
    """Return the names that llama.cpp takes a tag for."""
    pattern = re.compile(f"{re.escape(tag)}[.-]", re.IGNORECASE)
    return [name for name in names if pattern.search(name) and not name.startswith("mmproj")]


def check_names(stems: Mapping[Path, str], tags: Mapping[Path, str]) -> None:
    """Refuse names of which one would be taken for another.

    Args:
        stems: names without their endings, by file.
        tags: their tags, by file.

    Raises:
        UsageError: two files have one name, or the tag of one is found in another's.
    """
    names = {path: f"{stem}.gguf" for path, stem in stems.items()}
    for path, name in names.items():
        if name.startswith("mmproj"):
            others = [other for other in names if other != path and names[other] == name]
        else:
            found = resolved(tags[path], list(names.values()))
            others = [other for other in names if other != path and names[other] in found]
        if others:
            raise UsageError(
                f"{path} and {others[0]} would be {name} and {names[others[0]]}, and {tags[path]} means both: give one "
                f"another tag, such as --tag {path.name}={tags[path]}_OWN"
            )
