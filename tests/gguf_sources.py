"""A GGUF file as a model, with its config and tokenizer in a folder of the test's and not in the cache."""

from __future__ import annotations

from pathlib import Path

from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.models.gguf_model import GgufCheckpoint, write_header_folder


def gguf_model(file: Path, folder: Path) -> ModelSource:
    """Return the model of a file; the folder must not be there."""
    folder.mkdir()
    write_header_folder(GgufCheckpoint(open_gguf(file), file.stem), folder)
    return ModelSource(file.stem, folder, gguf=file)
