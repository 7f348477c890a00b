"""How a method is put together from its row, its start and what goes around both."""

from __future__ import annotations

from tesseraq_gguf.methods.awq import AWQ
from tesseraq_gguf.methods.problem import Method
from tesseraq_gguf.methods.rotated import Rotated
from tesseraq_gguf.methods.start import AsItStarts, Initialisation
from tesseraq_gguf.methods.table import METHODS, Settings, start_row


def method_of(name: str, start: str, settings: Settings) -> Method:
    """Put a method together.

    Args:
        name: one of `METHODS`.
        start: what it begins at, the name of a `start_row`, if it learns from a start.
        settings: what it is built from.
    """
    method = _named(name, start, settings)
    return Rotated(method) if settings.rotate else method


def _named(name: str, start: str, settings: Settings) -> Method:
    row = METHODS[name]
    if not (row.begins or row.start):
        built: Method = row.builder()(settings)
        return built
    begun = start_row(row.start or start)
    found: Initialisation = begun.builder()(settings)
    method: Method = AsItStarts(found) if row.start else row.builder()(settings, found)
    return AWQ(method) if begun.scaled else method
