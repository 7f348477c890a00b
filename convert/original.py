"""The GGUF file that a model came as: where learned matrices go in a file of the same tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tesseraq_gguf.converter.row_order import Placement, Unplaceable
from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models.gguf_config import describe
from tesseraq_gguf.models.gguf_model import Place, Places
from tesseraq_gguf.models.pieces import Stored


class Original:
    """What a conversion class is to a Hugging Face folder: it knows where rows go, and what becomes of values.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._places = Places(describe(open_gguf(path)))
        self._layers: dict[str, dict[int, Tensor]] = {}

    def _place(self, name: str) -> Place:
        try:
            return self._places[name]
        except (ModelError, KeyError) as error:
            raise Unplaceable(f"{self._name} has no tensor for it") from error

    def placement(self, name: str) -> Placement:
        """Find where the rows of a matrix go, by checkpoint name.

        Raises:
            Unplaceable: the file has no tensor for it.
        """
        place = self._place(name)
        rows = None if place.rows is None else np.argsort(place.rows)
        return Placement(place.tensor.name, rows, place.layer)

    def placements(self, tensors: Iterable[Stored]) -> dict[str, list[Placement]]:
        """Find where the rows of matrices go, which the file keeps one by one.

        Raises:
            Unplaceable: the file has no tensor for one.
        """
        return {name: [self.placement(name)] for tensor in tensors for name in tensor.pieces}

    def modified(self, name: str, weights: Tensor) -> list[tuple[str, Tensor]]:
        """Return weights as the file has them; a stack when the last of its layers has come."""
        place = self._place(name)
        moved = torch.from_numpy(place.in_file(weights.numpy()))
        target = place.tensor.name
        if place.layer is None:
            return [(target, moved)]
        layers = self._layers.setdefault(target, {})
        layers[place.layer] = moved
        if len(layers) < place.tensor.shape[-1]:
            return []
        return [(target, torch.stack([layers[i] for i in sorted(self._layers.pop(target))]))]
