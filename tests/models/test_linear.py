"""Which layers are matrices, and which become such."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.methods.building import method_of
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.linear import matrices_of
from tesseraq_gguf.types.grids import grid_of

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (4, 32), generator=torch.Generator().manual_seed(0))


class _Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class _Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


def test_a_layer_that_gives_more_than_a_product_is_no_matrix():
    block = nn.ModuleDict({"plain": nn.Linear(8, 4), "own": _Own(8, 4), "router": _Router(8, 4)})
    assert list(matrices_of(block)) == ["plain", "own"]


def test_layers_that_multiply_from_the_left_are_learned_as_matrices(make_asked):
    source = make_asked("matrices that multiply from the left")
    decoder = Decoder(source, CPU)
    stored = {n: t for file in source.folder.glob("*.safetensors") for n, t in load_file(file).items()}
    name = "transformer.h.0.mlp.c_fc.weight"
    assert decoder.matrix_shapes()[name] == (512, 128)
    assert stored[name].shape == (128, 512)
    assert torch.equal(decoder.matrix(name), stored[name].T)
    assert torch.equal(decoder.as_stored(name, decoder.matrix(name)), stored[name])
    types = dict.fromkeys(decoder.matrix_shapes(), "q8_0")
    settings = Settings(steps=1, batch=1, rounding_rate=1e-3, parameter_rate=1e-3, width=128)
    walk = Reconstruction(decoder, method_of("gptq", "none", settings), types, 0, torch.float32)
    learned = next(walk.run(TOKENS, [torch.ones(2, 128)] * 2, lambda _: None)).tensors[name]
    got = grid_of("q8_0").dequantize(learned)
    assert (got - stored[name].T).norm() < 0.02 * got.norm()
