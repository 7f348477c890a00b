"""Random learned tensors for tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_drafters import drafter  # noqa: F401  (a fixture)
from tiny_models import make_model  # noqa: F401  (a fixture)
from tiny_vision import make_vision_model  # noqa: F401  (a fixture)

from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.quantized import QuantizedTensor, save_tensors
from tesseraq_gguf.types.tsq.grid import TSQ2


def random_tensor(shape: tuple[int, int], seed: int) -> QuantizedTensor:
    """Return a TSQ2 matrix of random codes whose weights are about as large as a model's."""
    random = torch.Generator().manual_seed(seed)
    rows, groups = shape[0], shape[1] // 64
    q = torch.randint(0, 4, shape, generator=random, dtype=torch.uint8)
    d = e5m3.encode_tensor(torch.rand(rows, groups, generator=random) * 0.02 + 0.005)
    z = torch.randint(90, 140, (rows, groups), generator=random, dtype=torch.uint8)
    return TSQ2.assemble(q, {"d": d, "z": z})


@pytest.fixture(scope="session")
def learn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelSource], list[Path]]:
    """Return the block files of a model: random codes for every matrix whose rows TSQ2 fits."""
    made: dict[str, list[Path]] = {}

    def make(source: ModelSource) -> list[Path]:
        if source.name not in made:
            folder = tmp_path_factory.mktemp("learned")
            shapes = Decoder(source, torch.device("cpu")).matrix_shapes()
            blocks: dict[str, dict[str, QuantizedTensor]] = {}
            for seed, (name, shape) in enumerate(shapes.items()):
                if tensor_type("tsq2").fits(shape[1]):
                    blocks.setdefault(name.split(".")[2], {})[name] = random_tensor(shape, seed)
            made[source.name] = []
            for block, tensors in blocks.items():
                save_tensors(folder / f"{block}.safetensors", tensors)
                made[source.name].append(folder / f"{block}.safetensors")
        return made[source.name]

    return make
