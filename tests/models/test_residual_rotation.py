"""Rotation of the residual stream: which architectures allow it, that answers stay, and what it does to outliers."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import KINDS, MIXTURES, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.models.residual_rotation import rotated_model

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (2, 48), generator=torch.Generator().manual_seed(0))
REFUSED = ("gemma2", "gemma3", *MIXTURES)
"""A norm between blocks and stream; routers that are no linear layers."""


def answers(source: ModelSource) -> torch.Tensor:
    decoder = Decoder(source, CPU)
    return decoder.answers()(final_states(decoder, TOKENS).flatten(0, 1))


def in_float32(source: ModelSource, folder) -> ModelSource:
    """The same model with wider tensors: rounding to bfloat16 would hide what rotating does."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in source.folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        elif file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return ModelSource(source.name, folder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in REFUSED])
def test_a_rotated_model_gives_the_same_answers(kind, make_model, tmp_path):  # noqa: F811
    source = in_float32(make_model(kind), tmp_path / "wide")
    rotated = rotated_model(Decoder(source, CPU), tmp_path / "rotated", seed=3)
    assert rotated is not None
    assert torch.allclose(answers(rotated), answers(source), atol=1e-4)
    names = rotated.weight_map().keys()
    assert names == source.weight_map().keys() | {"lm_head.weight"}
    assert rotated.config()["tie_word_embeddings"] is False
    index = json.loads((rotated.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_does_not_allow_it_is_left_alone(kind, make_model, tmp_path):  # noqa: F811
    assert rotated_model(Decoder(make_model(kind), CPU), tmp_path / "rotated", seed=3) is None
    assert [file for file in tmp_path.iterdir() if file.suffix != ".lock"] == []


def test_dtypes_stay_and_a_second_call_writes_nothing(make_model, tmp_path):  # noqa: F811
    decoder = Decoder(make_model("llama"), CPU)
    rotated = rotated_model(decoder, tmp_path / "rotated", seed=3)
    assert rotated is not None
    assert {t.dtype for t in tensors(rotated).values()} == {torch.bfloat16}
    before = {file: file.stat().st_mtime_ns for file in rotated.folder.iterdir()}
    assert rotated_model(decoder, tmp_path / "rotated", seed=3) == rotated
    assert {file: file.stat().st_mtime_ns for file in rotated.folder.iterdir()} == before


def tensors(source: ModelSource) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in set(source.weight_map().values()) for name, tensor in load_file(file).items()}


def test_a_channel_that_stands_out_does_so_no_longer(make_model, tmp_path):  # noqa: F811
    source = in_float32(make_model("llama"), tmp_path / "wide")
    file = source.weight_map()["model.embed_tokens.weight"]
    from safetensors.torch import load_file, save_file

    loud = load_file(file)
    loud["model.embed_tokens.weight"][:, 7] *= 50
    save_file(loud, file, metadata={"format": "pt"})
    rotated = rotated_model(Decoder(source, CPU), tmp_path / "rotated", seed=3)
    assert rotated is not None

    def peak(model: ModelSource) -> float:
        hidden = Decoder(model, CPU).stem(TOKENS)[0].flatten(0, 1)
        return float((hidden.abs().amax(-1) / hidden.square().mean(-1).sqrt()).mean())

    assert peak(source) > 8
    assert peak(rotated) < 3
